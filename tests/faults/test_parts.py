"""The parts of the rig: the same seed makes the same run, fewer faults are found again, the proxy bends what it should."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.checker import Checker
from tests.faults.clock_hook import SetClock
from tests.faults.history import Entry, Reader, Writer
from tests.faults.proxy import Bend, Network, connect_client_id, packet_bytes
from tests.faults.schedule import KINDS, OFTEN, POOL_KINDS, WORKERS, Fault, make, shrink
from tests.faults.wishes import Wish, wishes


def test_a_seed_makes_the_same_faults_and_the_same_requests_each_time() -> None:
    assert make(seed=5, requests=100, faults=60) == make(seed=5, requests=100, faults=60)
    assert make(seed=5, requests=100, faults=60) != make(seed=6, requests=100, faults=60)
    assert wishes(client="c0", seed=5, count=50) == wishes(client="c0", seed=5, count=50)
    assert wishes(client="c0", seed=5, count=50) != wishes(client="c1", seed=5, count=50)


def test_every_kind_of_fault_comes_before_any_comes_again() -> None:
    made = make(seed=1, requests=1000, faults=2 * len(KINDS))
    assert {fault.kind for fault in made[: len(KINDS)]} == set(KINDS)
    assert [fault.after for fault in made] == sorted(fault.after for fault in made)


def test_shrinking_finds_the_two_faults_that_matter() -> None:
    faults = make(seed=3, requests=1000, faults=40)
    tries = 0

    def fails(some: Sequence[Fault]) -> bool:
        nonlocal tries
        tries += 1
        return {7, 31} <= {fault.number for fault in some}

    assert [fault.number for fault in shrink(faults, fails)] == [7, 31]
    assert tries < 80


def test_each_worker_of_a_pool_is_a_target_of_its_own() -> None:
    made = make(seed=1, requests=1000, faults=9 * len(POOL_KINDS), pool=True)
    assert {fault.kind for fault in made[: len(POOL_KINDS) + len(OFTEN)]} == set(POOL_KINDS)
    killed = {fault.target for fault in made if fault.kind in ("worker.kill", "worker.stop", "worker.term")}
    assert killed == {f"worker {number}" for number in range(WORKERS)}


def test_a_history_is_read_on_where_it_stopped_and_half_a_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "c0.jsonl"
    writer, reader = Writer(path), Reader(path)
    writer.write("up")
    writer.write("begun", request_id="a", number=3)
    assert [(entry.what, entry.number) for entry in reader.news()] == [("up", -1), ("begun", 3)]
    with path.open("ab") as file:
        file.write(b'{"at": 1, "wh')
    assert list(reader.news()) == []
    writer.close()


def test_the_checker_counts_wishes_that_nobody_fulfilled_as_lost() -> None:
    planned = wishes(client="c0", seed=1, count=3)
    checker = Checker({"c0": planned}, {})
    checker.take("c0", Entry(1.0, "begun", "a", number=0))
    assert [broken.promise for broken in checker.close()] == ["lost", "lost"]


@pytest.mark.parametrize(
    "what, text, promises",
    [("answer", "right", []), ("answer", "rig", ["torn"]), ("failed", "interrupted", []), ("failed", "busy", ["code"])],
)
def test_what_the_package_gives_to_its_program_is_the_right_answer_or_an_explained_error(
    what: str, text: str, promises: list[str]
) -> None:
    planned = [Wish(0, "short", "c4/s0", "Hello")]
    checker = Checker({"c4": planned}, {"Hello": "right"}, by_package=frozenset({"c4"}))
    for entry in ("begun", what, "ended"):
        checker.take("c4", Entry(1.0, entry, "a", number=0, text=text))
    assert [broken.promise for broken in checker.close()] == promises


def test_a_history_that_lacks_a_turn_is_told() -> None:
    planned = [Wish(0, "chat", "c0/c0", "Hello"), Wish(0, "history", "c0/c0")]
    checker = Checker({"c0": planned}, {})
    done = {"type": "done", "request_id": "a", "session_id": "c0/c0", "seq": 0, "final": True}
    done |= {"finish_reason": "stop", "full_content": "Hi"}
    ack = {"type": "ack", "action": "history", "status": "ok", "messages": []}
    checker.take("c0", Entry(1.0, "begun", "a", number=0))
    checker.take("c0", Entry(1.0, "event", "a", text=json.dumps(done), topic="llm/reply/c0/c0"))
    checker.take("c0", Entry(1.0, "ended", "a", number=0))
    checker.take("c0", Entry(1.0, "begun", "b", number=1))
    checker.take("c0", Entry(1.0, "event", "b", text=json.dumps(ack), topic="llm/reply/c0/c0"))
    checker.take("c0", Entry(1.0, "ended", "b", number=1))
    assert [broken.promise for broken in checker.close()] == ["history"]


def test_a_doubled_question_for_a_history_may_be_refused_once() -> None:
    checker = Checker({"c0": [Wish(0, "history", "c0/c0")]}, {})
    busy = {"type": "ack", "action": "history", "status": "error", "code": "busy"}
    ack = {"type": "ack", "action": "history", "status": "ok", "messages": []}
    checker.take("c0", Entry(1.0, "begun", "b", number=0))
    for told in (busy, ack):
        checker.take("c0", Entry(1.0, "event", "b", text=json.dumps(told), topic="llm/reply/c0/c0"))
    checker.take("c0", Entry(1.0, "ended", "b", number=0))
    assert checker.histories == 1
    assert checker.close() == []


def test_the_clock_of_another_process_jumps_while_it_runs(tmp_path: Path) -> None:
    clock = SetClock(tmp_path)
    code = "import time\nfor line in iter(input, 'end'): print(int(time.time()), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=clock.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        read = []
        for offset_s in (0.0, 86400.0, -86400.0):
            clock.jump(offset_s)
            process.stdin.write("now\n")
            process.stdin.flush()
            read.append(int(process.stdout.readline()))
        process.communicate("end\n", timeout=10)
    assert 86390 < read[1] - read[0] < 86410
    assert 86390 < read[0] - read[2] < 86410


# --- the proxy -------------------------------------------------------------------------------------------------------

PUBACK = b"\x40\x02\x00\x01"
PUBLISH = b"\x32\x07\x00\x01t\x00\x01hi"


class Line:
    """The near and the far end of a connection through a proxy."""

    def __init__(self, *, mqtt: bool) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.network = Network()
        self.proxy = self.network.lay(self._server.getsockname()[1], mqtt=mqtt)
        self.near = socket.create_connection(("127.0.0.1", self.proxy.port), 5)
        self.far, _ = self._server.accept()
        self.far.settimeout(5)

    def close(self) -> None:
        for end in (self.near, self.far, self._server):
            end.close()
        self.network.close()


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line(mqtt=True)
    yield made
    made.close()


@pytest.fixture
def plain_line() -> Iterator[Line]:
    made = Line(mqtt=False)
    yield made
    made.close()


def receive(end: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        more = end.recv(size - len(got))
        assert more, f"closed after {got!r}"
        got += more
    return got


def test_packets_pass_whole_however_they_are_cut(line: Line) -> None:
    for byte in PUBLISH + PUBACK:
        line.far.sendall(bytes([byte]))
    assert receive(line.near, 13) == PUBLISH + PUBACK


def test_pubacks_are_eaten_and_publishes_doubled_on_the_way_down_only(line: Line) -> None:
    line.proxy.change(Bend(eat_pubacks=1, double=True))
    line.far.sendall(PUBACK + PUBLISH + PUBACK)
    assert receive(line.near, 22) == PUBLISH + b"\x3a" + PUBLISH[1:] + PUBACK
    line.near.sendall(PUBACK + PUBLISH)
    assert receive(line.far, 13) == PUBACK + PUBLISH


def test_a_silent_proxy_holds_back_until_it_may_speak(line: Line) -> None:
    line.proxy.change(Bend(silent=True))
    line.far.sendall(PUBLISH)
    line.near.settimeout(0.2)
    with pytest.raises(TimeoutError):
        line.near.recv(1)
    line.near.settimeout(5)
    line.proxy.change(Bend())
    assert receive(line.near, 9) == PUBLISH


@pytest.mark.parametrize("bend", [Bend(bytewise=True), Bend(delay_s=0.01), Bend(down_bytes_per_s=10_000)])
def test_a_slow_proxy_changes_nothing_but_the_time(line: Line, bend: Bend) -> None:
    line.proxy.change(bend)
    line.far.sendall(PUBLISH * 20)
    assert receive(line.near, 180) == PUBLISH * 20


def test_a_cut_ends_both_sides(line: Line) -> None:
    line.near.sendall(PUBLISH)
    assert receive(line.far, 9) == PUBLISH  # now the proxy knows both
    line.proxy.change(Bend(), cut=True)
    for end in (line.near, line.far):
        try:
            assert end.recv(1) == b""
        except ConnectionResetError:
            continue


TOLD = b'data: {"choices":[{"delta":{"content":"x"}}],"usage":{"completion_tokens":11,"prompt_tokens":14,"total_tokens":25,"prompt_tokens_details":{}}}\n\n'


@pytest.mark.parametrize("lie", ["garbage", "usage"])
def test_a_lie_is_as_long_as_the_truth(plain_line: Line, lie: str) -> None:
    plain_line.proxy.change(Bend(lie=lie))
    plain_line.far.sendall(TOLD)
    told = receive(plain_line.near, len(TOLD))
    assert told != TOLD
    assert (b"1e30" in told) == (lie == "usage")


def test_the_other_lie_stops_in_the_middle_of_a_line(plain_line: Line) -> None:
    plain_line.proxy.change(Bend(lie="mid_line"))
    plain_line.far.sendall(TOLD)
    assert receive(plain_line.near, len(TOLD) // 2) == TOLD[: len(TOLD) // 2]
    assert plain_line.near.recv(10) == b""


def test_mqtt_headers_are_read_in_both_versions() -> None:
    for level, properties in ((4, b""), (5, b"\x05\x11\x00\x00\x00\x10")):
        body = b"\x00\x04MQTT" + bytes([level, 2]) + struct.pack(">H", 60) + properties + b"\x00\x03abc"
        packet = bytes([0x10, len(body)]) + body
        assert connect_client_id(packet) == "abc"
        assert packet_bytes(packet) == len(packet)
    assert packet_bytes(b"\x30\x80") == 0
    assert packet_bytes(b"\x30\x80\x01") == 131
