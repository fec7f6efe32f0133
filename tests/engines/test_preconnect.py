"""A connection to the server that is begun when a request comes in."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Text
from llamacpp_mqtt_deploy.core.errors import EngineUnavailable
from llamacpp_mqtt_deploy.engines.server import preconnect
from llamacpp_mqtt_deploy.engines.server.line import ServerAddress
from llamacpp_mqtt_deploy.engines.server.preconnect import Preconnection
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal
from tests.support.sham_server import DONE, STREAM, ShamServer, chunk, delta, reply, stream
from tests.support.waiting import eventually

CALL = EngineCall(messages=[{"role": "user", "content": "hi"}], chunk_timeout_s=10)
COMPLETIONS = "/v1/chat/completions"
ANSWER = stream(delta(content="yes"), delta("stop"), DONE)
LONG_S = 60.0


class CountingSham(ShamServer):
    """Knows how many connections it was asked for."""

    @property
    def connections(self) -> int:
        return len(self._connections)


@pytest.fixture
def sham() -> Iterator[CountingSham]:
    with CountingSham() as server:
        server.on(COMPLETIONS, ANSWER)
        yield server


@pytest.fixture
def keep_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconnect, "KEPT_S", LONG_S)


class Engine:
    """An engine in front of the server, described already, with what it says to a call."""

    def __init__(self, loop: IoLoop, url: str, **settings: Any) -> None:
        self.loop = loop
        self.engine = ServerEngine(EngineSettings(url=url, **settings), loop=loop)
        self.engine.open()
        assert self.engine.wait_ready(StopSignal(), 10)

    def expect(self) -> None:
        """As the link does, in the loop's thread; comes back when it is done."""
        self.in_loop(self.engine.expect)

    def in_loop(self, call: Callable[[], None]) -> None:
        done = threading.Event()
        self.loop.call_soon(call)
        self.loop.call_soon(lambda: self.loop.call_soon(done.set))
        assert done.wait(5)

    def ask(self, call: EngineCall = CALL, stop: StopSignal | None = None) -> str:
        said: list[Delta] = []

        def feed(deltas: Sequence[Delta]) -> float:
            said.extend(deltas)
            return 0.0

        self.engine.pump(call, stop=stop or StopSignal(), on_wait=lambda _: None, feed=feed)
        return "".join(each.text for each in said if isinstance(each, Text))


@pytest.fixture
def engine(loop: IoLoop, sham: CountingSham) -> Iterator[Engine]:
    made = Engine(loop, sham.url)
    yield made
    made.engine.close(Deadline(5))


@pytest.mark.usefixtures("keep_long")
def test_a_request_goes_over_the_connection_that_was_begun_for_it(engine: Engine, sham: CountingSham) -> None:
    before = sham.connections
    for turn in range(1, 4):
        engine.expect()
        eventually(lambda turn=turn: sham.connections == before + turn)  # type: ignore[misc]
        assert len(sham.bodies()) == turn - 1, "nothing was sent on it yet"
        assert engine.ask() == "yes"
        assert sham.connections == before + turn, "no other one was made"


@pytest.mark.usefixtures("keep_long")
def test_many_messages_begin_one_connection(engine: Engine, sham: CountingSham) -> None:
    before = sham.connections
    for _ in range(100):
        engine.expect()
    eventually(lambda: sham.connections == before + 1)
    assert engine.ask() == "yes"
    assert sham.connections == before + 1


def test_one_that_nobody_wanted_ends_soon_and_no_other_follows_for_a_while(
    engine: Engine, sham: CountingSham, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sham.connections
    engine.expect()
    eventually(lambda: sham.connections == before + 1)
    kept = sham._connections[-1]
    eventually(lambda: kept.fileno() < 0)  # the server sees its end
    for _ in range(20):
        engine.expect()
    assert sham.connections == before + 1
    assert engine.ask() == "yes", "a request that comes connects by itself"
    assert sham.connections == before + 2

    monkeypatch.setattr(preconnect, "RESTS_S", 0.0)
    engine.engine._preconnection._not_before = 0.0  # type: ignore[union-attr]
    engine.expect()
    eventually(lambda: sham.connections == before + 3)


@pytest.mark.usefixtures("keep_long")
def test_one_that_the_server_has_ended_is_not_used(engine: Engine, sham: CountingSham) -> None:
    before = sham.connections
    engine.expect()
    eventually(lambda: sham.connections == before + 1)
    sham._connections[-1].shutdown(socket.SHUT_RDWR)
    kept = engine.engine._preconnection._made  # type: ignore[union-attr]
    assert kept is not None
    eventually(lambda: not preconnect._lives(kept))
    call = EngineCall(messages=CALL.messages, chunk_timeout_s=10, once=True)  # which has one attempt only
    assert engine.ask(call) == "yes"
    assert sham.connections == before + 2


@pytest.mark.usefixtures("keep_long")
def test_one_that_was_refused_costs_no_attempt(loop: IoLoop) -> None:
    with CountingSham() as first:
        port = first._listener.getsockname()[1]
        engine = Engine(loop, first.url, unavailable_after_s=0.2)
    engine.expect()
    with pytest.raises(EngineUnavailable):
        engine.ask()
    engine.engine._saw(engine.engine._info.__class__(state="ready", kind="server"))
    engine.expect()
    with CountingSham(listener=socket.create_server(("127.0.0.1", port))) as second:
        second.on(COMPLETIONS, ANSWER)
        assert engine.ask() == "yes"
    engine.engine.close(Deadline(5))


@pytest.mark.usefixtures("keep_long")
def test_beside_a_request_that_runs_nothing_is_begun(engine: Engine, sham: CountingSham) -> None:
    go_on = threading.Event()
    sham.on(COMPLETIONS, (STREAM + chunk(delta(content="y")), go_on))
    stop = StopSignal()
    before = sham.connections

    def run() -> None:
        with pytest.raises(Stopped):
            engine.ask(stop=stop)

    runs = threading.Thread(target=run, daemon=True)
    runs.start()
    eventually(lambda: sham.connections == before + 1)
    for _ in range(5):
        engine.expect()
    assert sham.connections == before + 1
    stop.set("cancelled")
    runs.join(5)
    assert not runs.is_alive()


@pytest.mark.usefixtures("keep_long")
def test_a_cancel_cuts_it(engine: Engine, sham: CountingSham) -> None:
    sham.on(COMPLETIONS, (STREAM + chunk(delta(content="y")), threading.Event()))
    engine.expect()
    stop = StopSignal()
    threading.Timer(0.2, stop.set, ("cancelled",)).start()
    with pytest.raises(Stopped):
        engine.ask(stop=stop)
    assert sham.hung_up.wait(5)


@pytest.mark.usefixtures("keep_long")
def test_a_server_with_one_thread_is_not_kept_from_answering_other_questions(loop: IoLoop) -> None:
    class OneThread(CountingSham):
        def _start(self, run: Callable[..., None], *args: object) -> None:
            if run == self._accept:
                super()._start(run)
            else:
                run(*args)

    with OneThread() as server:
        server.on(COMPLETIONS, ANSWER)
        server.on("/tokenize", reply(200, {"tokens": []}))
        engine = Engine(loop, server.url)
        engine.expect()
        eventually(lambda: len(server._connections) > 1)
        began = time.monotonic()
        assert engine.ask(EngineCall(messages=[{"role": "user", "content": "<|odd|>"}], chunk_timeout_s=10)) == "yes"
        assert time.monotonic() - began < 3.0, "the question would be given up after 5 s"
        assert server.bodies("/tokenize")
        engine.engine.close(Deadline(5))


@pytest.mark.usefixtures("keep_long")
def test_closing_the_engine_ends_it(engine: Engine, sham: CountingSham) -> None:
    before = sham.connections + 1
    engine.expect()
    eventually(lambda: sham.connections == before)
    engine.engine.close(Deadline(5))
    kept = sham._connections[-1]
    eventually(lambda: kept.fileno() < 0)
    engine.expect()
    engine.engine._preconnection.prepare()  # type: ignore[union-attr]
    assert sham.connections == before
    assert engine.engine._preconnection._spare is None  # type: ignore[union-attr]


@pytest.mark.parametrize("url", ["http://localhost:1", "https://127.0.0.1:1"])
def test_none_is_begun_where_a_name_is_looked_up_or_tls_spoken(loop: IoLoop, url: str) -> None:
    made = Preconnection(ServerAddress(url), loop)
    made.prepare()
    made.begin()
    assert (made._spare, made._made, made.take()) == (None, None, None)
    assert not loop._ends


@pytest.mark.parametrize("family", ["ipv6", "unix"])
def test_it_is_begun_on_every_kind_of_socket_that_needs_no_name(loop: IoLoop, tmp_path: Path, family: str) -> None:
    if family == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        url = f"unix://{tmp_path}/s"
    else:
        try:
            listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        except OSError:
            pytest.skip("this machine has no IPv6")
        url = f"http://[::1]:{listener.getsockname()[1]}"
    with listener:
        listener.settimeout(5)
        made = Preconnection(ServerAddress(url), loop)
        made.prepare()
        made.begin()
        loop.call_soon(lambda: None)
        accepted, _ = listener.accept()
        with accepted:
            taken = made.take()
            assert taken is not None
            with taken:
                taken.sendall(b"hello")
                assert accepted.recv(5) == b"hello"
        assert made.take() is None
        made.close()
