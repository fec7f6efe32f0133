"""The server engine against servers that do nasty things."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished, Opened, PromptProgress, Text
from llamacpp_mqtt_deploy.core.errors import (
    BadRequest,
    ContextOverflow,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    IdleTimeout,
    ModelNotFound,
    RequestError,
    Unsupported,
)
from llamacpp_mqtt_deploy.engines.server.failures import NoAnswer
from llamacpp_mqtt_deploy.engines.server.http import READ_BYTES, HttpExchange
from llamacpp_mqtt_deploy.engines.server.line import ServerAddress
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.engines.server.streaming import StreamingExchange
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal
from tests.engines.members import io_loop
from tests.support.llama_server import LlamaServer
from tests.support.sham_server import DONE, END, STREAM, Answer, ShamServer, chunk, delta, event, reply, reset, stream
from tests.support.waiting import eventually

CHAT = "/v1/chat/completions"
CALL = EngineCall(messages=[{"role": "user", "content": "hi"}], chunk_timeout_s=5)
LOADING = reply(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
GOOD = stream(delta(role="assistant", content=None), delta(content="good"), delta("stop"), DONE)


@pytest.fixture
def sham() -> Iterator[ShamServer]:
    with ShamServer() as server:
        yield server


class Reader:
    """Who reads the answers of a test's engine: the thread that asks, or the I/O loop."""

    loop: IoLoop | None = None


@pytest.fixture(autouse=True, params=["thread", "loop"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "loop", io_loop() if request.param == "loop" else None)


def engine_for(sham: ShamServer, **settings: Any) -> ServerEngine:
    engine = ServerEngine(EngineSettings(**{"url": sham.url, "unavailable_after_s": 5, **settings}), loop=Reader.loop)
    engine.open()
    return engine


def play(
    engine: ServerEngine, call: EngineCall = CALL, *, stop: StopSignal | None = None, waits: list[str] | None = None
) -> list[Delta]:
    stop, on_wait = stop or StopSignal(), ([] if waits is None else waits).append
    if Reader.loop is None:
        return list(engine.stream(call, stop=stop, on_wait=on_wait))
    deltas: list[Delta] = []

    def feed(new: Sequence[Delta]) -> float:
        deltas.extend(new)
        return 0.0

    deltas.append(engine.pump(call, stop=stop, on_wait=on_wait, feed=feed))
    return deltas


def said(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, Text))


def error_of(sham: ShamServer, *answers: Answer | tuple[Answer, ...], **settings: Any) -> RequestError:
    sham.on(CHAT, *answers)
    with pytest.raises(RequestError) as caught:
        play(engine_for(sham, **settings))
    return caught.value


def test_an_answer_in_one_piece_shows_as_well_that_a_server_is_there_again(sham: ShamServer) -> None:
    whole = {"choices": [{"message": {"content": "all of it"}, "finish_reason": "stop"}]}
    sham.on(CHAT, GOOD, reply(200, whole))
    engine = engine_for(sham, dialect="openai", model="m")
    play(engine)
    engine._saw(replace(engine.info(), state="unreachable"))  # as a connection that failed meanwhile leaves it
    assert said(play(engine)) == "all of it"
    assert engine.info().state == "ready"


# --- what arrives ----------------------------------------------------------------------------------------------------


def test_pings_crlf_and_cuts_inside_a_character_do_no_harm(sham: ShamServer) -> None:
    whole = b":\n\n" + delta(content="gr\u2028ün 😀") + b":\r\n\r\n" + delta("stop").replace(b"\n", b"\r\n") + DONE
    pieces = [whole[place : place + 1] for place in range(len(whole))]
    sham.on(CHAT, (STREAM, *map(chunk, pieces), END))
    deltas = play(engine_for(sham))
    assert said(deltas) == "gr\u2028ün 😀"
    assert isinstance(deltas[-1], Finished)


def test_a_stream_that_is_not_chunked_ends_with_its_connection(sham: ShamServer) -> None:
    sham.on(
        CHAT,
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"
        + delta("stop", content="a")
        + DONE,
    )
    assert said(play(engine_for(sham))) == "a"


def test_many_events_in_one_read_keep_their_order(sham: ShamServer) -> None:
    words = [f"{number} " for number in range(3000)]
    content = b"".join(delta(content=word) for word in words) + delta("stop") + DONE
    assert len(content) > READ_BYTES
    sham.on(CHAT, stream(content))
    assert said(play(engine_for(sham))) == "".join(words)


def test_a_stream_that_ends_without_done_is_lost(sham: ShamServer) -> None:
    error = error_of(sham, stream(delta(content="half")))
    assert isinstance(error, EngineLost)
    assert error.retryable


@pytest.mark.parametrize("ending", [b"", b"5\r\nab", b"zz\r\n"])
def test_a_connection_that_breaks_in_the_middle_is_lost(sham: ShamServer, ending: bytes) -> None:
    assert isinstance(error_of(sham, (STREAM, chunk(delta(content="half")), ending)), EngineLost)


def test_a_reset_in_the_middle_is_lost(sham: ShamServer) -> None:
    assert isinstance(error_of(sham, (STREAM, chunk(delta(content="half")), reset)), EngineLost)


@pytest.mark.parametrize("form", [b"data: ", b"error: "])
def test_an_error_in_the_middle_keeps_its_text(sham: ShamServer, form: bytes) -> None:
    inner = b'{"code":500,"message":"Failed to decode","type":"server_error"}'
    line = form + (b'{"error":' + inner + b"}" if form == b"data: " else inner) + b"\n\n"
    error = error_of(sham, stream(delta(content="half"), line))
    assert isinstance(error, EngineFailed)
    assert "Failed to decode" in error.message


def test_a_context_that_overflows_in_the_middle_says_so(sham: ShamServer) -> None:
    line = event({"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}})
    assert isinstance(error_of(sham, stream(delta(content="half"), line)), ContextOverflow)


@pytest.mark.parametrize(
    "garbage", [b"data: {not json\n\n", b"data: 17\n\n", b'data: {"choices":[7]}\n\n', b'data: {"choices":{"a":1}}\n\n']
)
def test_garbage_in_a_stream_is_an_error_of_the_engine(sham: ShamServer, garbage: bytes) -> None:
    assert isinstance(error_of(sham, stream(garbage)), EngineFailed)


def test_an_endless_line_is_given_up(sham: ShamServer) -> None:
    def flood(connection: socket.socket) -> None:
        piece = chunk(b"x" * 60_000)
        while True:
            connection.sendall(piece)

    error = error_of(sham, (STREAM, chunk(b"data: "), flood))
    assert isinstance(error, EngineFailed)
    assert sham.hung_up.wait(5)


def test_an_answer_that_is_no_stream_comes_in_one_piece(sham: ShamServer) -> None:
    message = {"role": "assistant", "content": "whole", "reasoning_content": "thought"}
    sham.on(
        CHAT, reply(200, {"choices": [{"message": message, "finish_reason": "length"}], "usage": {"prompt_tokens": 3}})
    )
    deltas = play(engine_for(sham))
    assert deltas[0] == Opened("sham", streams=False)
    assert said(deltas) == "whole"
    assert isinstance(deltas[-1], Finished)
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].usage.prompt_tokens == 3


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream"])
def test_a_page_is_no_completion(sham: ShamServer, kind: str) -> None:
    error = error_of(sham, reply(200, b"<html>login</html>", kind=kind))
    assert isinstance(error, EngineFailed)
    assert "engine.url" in error.message


def test_json_that_is_no_completion_is_an_error(sham: ShamServer) -> None:
    assert isinstance(error_of(sham, reply(200, {"status": "ok"})), EngineFailed)


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x16\x03\x01\x00\x00", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500]
)
def test_another_protocol_is_no_answer(sham: ShamServer, greeting: bytes) -> None:
    assert isinstance(error_of(sham, greeting), EngineLost)


def test_a_refusal_that_drips_is_cut_off(sham: ShamServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(connection: socket.socket) -> None:
        pause = threading.Event()
        while not pause.wait(0.02):
            connection.sendall(b"x")

    monkeypatch.setattr("llamacpp_mqtt_deploy.engines.server.server_engine.COUNT_WITHIN_S", 0.2)
    started = time.monotonic()
    head = b"HTTP/1.1 500 X\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
    assert isinstance(error_of(sham, (head, drip)), EngineFailed)
    assert time.monotonic() - started < 3


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status, error, leaf, text",
    [
        (400, {"code": 400, "message": "bad\x00\n grammar", "type": "invalid_request_error"}, EngineFailed, "bad grammar"),
        (400, {"code": 400, "message": "Field 'top_k': Value", "type": "invalid_request_error"}, BadRequest, "top_k"),
        (400, {"message": "maximum context length is 9", "code": "context_length_exceeded"}, ContextOverflow, "9"),
        (401, {"message": "Invalid API Key", "type": "authentication_error"}, EngineUnavailable, "api_key"),
        (404, {"message": 'model "x" not found, try pulling it', "type": "api_error"}, ModelNotFound, "pulling"),
        (404, {"message": "File Not Found", "type": "not_found_error"}, EngineUnavailable, "engine.url"),
        (500, {"code": 500, "message": "template at /srv/models/a.jinja broke", "type": "server_error"}, EngineFailed, "[path]"),
        (500, "plain text", EngineFailed, "plain text"),
        (302, {}, EngineUnavailable, "302"),
    ],
)  # fmt: skip
def test_a_refusal_becomes_the_right_error(
    sham: ShamServer, status: int, error: object, leaf: type[RequestError], text: str
) -> None:
    refused = error_of(sham, reply(status, {"error": error}, headers="Location: http://127.0.0.1:1/\r\n"))
    assert type(refused) is leaf
    assert text in refused.message
    assert len(sham.bodies()) == 1


def test_an_overflow_keeps_its_numbers(sham: ShamServer) -> None:
    message = "request (6020 tokens) exceeds the available context size (512 tokens), try increasing it"
    error = {
        "code": 400,
        "message": message,
        "type": "exceed_context_size_error",
        "n_prompt_tokens": 6020,
        "n_ctx": 512,
    }
    refused = error_of(sham, reply(400, {"error": error}))
    assert isinstance(refused, ContextOverflow)
    assert refused.details == {"n_prompt_tokens": 6020, "n_ctx": 512}


def test_an_error_never_shows_the_key_a_path_or_an_address(sham: ShamServer) -> None:
    text = (
        "key sesame-1 refused by http://10.0.0.7:80/x for ~/models/secret.gguf, C:\\models\\secret.gguf " + "x" * 9000
    )
    error = error_of(sham, reply(500, {"error": {"message": text}}), api_key="sesame-1")
    for secret in ("sesame-1", "10.0.0.7", "secret.gguf"):
        assert secret not in error.message
    assert len(error.message) < 700
    assert sham.asked[-1][1]["authorization"] == "Bearer sesame-1"


@pytest.mark.parametrize("char", ["\r", "\n", "\u2013"])
def test_a_key_that_no_header_can_carry_is_not_quoted(char: str, sham: ShamServer) -> None:
    address, key = ServerAddress(sham.url), f"sesame{char}opens"
    with pytest.raises(ValueError, match="the API key holds") as asking:
        HttpExchange(address, api_key=key, connect_timeout_s=5.0)
    with (
        StreamingExchange(address, api_key=key, connect_timeout_s=5.0) as exchange,
        pytest.raises(NoAnswer, match="the API key holds") as answering,
    ):
        exchange.send(CHAT, b"{}", timeout_s=5.0)
    assert "sesame" not in f"{asking.value}{answering.value}"


def test_a_key_comes_from_its_file(sham: ShamServer, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\nnot this\n")
    sham.on(CHAT, GOOD)
    play(engine_for(sham, api_key_file=tmp_path / "key"))
    assert sham.asked[-1][1]["authorization"] == "Bearer from-file"


def test_a_key_file_that_is_missing_is_found_at_the_start(sham: ShamServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="api_key_file"):
        engine_for(sham, api_key_file=tmp_path / "none")


def test_a_key_that_is_renewed_on_disk_is_used_at_the_next_request(sham: ShamServer, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("first-key\n")
    engine = engine_for(sham, api_key_file=file)
    sham.on(CHAT, GOOD)
    play(engine)
    file.write_text("second-key\n")
    assert engine.probe().state == "ready"
    assert sham.asked[-1][1]["authorization"] == "Bearer second-key"
    play(engine)
    assert sham.asked[-1][1]["authorization"] == "Bearer second-key"


@pytest.mark.parametrize("gone", [Path.unlink, Path.touch], ids=["missing", "empty"])
def test_a_key_file_that_is_just_being_replaced_leaves_the_last_key(
    gone: Callable[[Path], None], sham: ShamServer, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text("first-key\n")
    engine = engine_for(sham, api_key_file=file)
    file.write_text("")
    gone(file)
    sham.on(CHAT, GOOD)
    play(engine)
    assert sham.asked[-1][1]["authorization"] == "Bearer first-key"


def test_neither_the_renewed_key_nor_the_one_before_is_shown_in_an_error(sham: ShamServer, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("first-key\n")
    engine = engine_for(sham, api_key_file=file)
    file.write_text("second-key\n")
    sham.on(CHAT, reply(500, {"error": {"message": "neither first-key nor second-key is good"}}))
    with pytest.raises(RequestError) as caught:
        play(engine)
    assert "first-key" not in caught.value.message
    assert "second-key" not in caught.value.message


def test_a_server_that_refuses_the_key_is_reported_as_failed(sham: ShamServer) -> None:
    sham.on("/props", reply(401, {"error": {"message": "Invalid API Key"}}))
    info = engine_for(sham).probe()
    assert info.state == "failed"
    assert "api_key" in info.detail


@pytest.mark.parametrize("url", ["ftp://host", "unix://", "localhost:8080", "http://"])
def test_an_address_that_cannot_work_is_found_at_the_start(url: str) -> None:
    with pytest.raises(ValueError, match=r"engine\.url"):
        ServerEngine(EngineSettings(url=url))


def test_the_environments_proxies_and_passwords_are_ignored(
    sham: ShamServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sham.on(CHAT, GOOD)
    assert said(play(engine_for(sham))) == "good"
    assert "authorization" not in sham.asked[-1][1]


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_a_loading_server_is_waited_for_however_long_it_takes(sham: ShamServer) -> None:
    sham.on(CHAT, LOADING, LOADING, LOADING, GOOD)
    waits: list[str] = []
    assert said(play(engine_for(sham, unavailable_after_s=0), waits=waits)) == "good"
    assert waits == ["loading"]


def test_a_server_that_loads_at_first_contact_is_waited_for(sham: ShamServer) -> None:
    sham.on("/props", LOADING, LOADING, reply(200, {"total_slots": 3}))
    sham.on(CHAT, GOOD)
    engine = engine_for(sham)
    waits: list[str] = []
    assert said(play(engine, waits=waits)) == "good"
    assert waits == ["loading"]
    assert engine.info().slots == 3


@pytest.mark.parametrize("status, reason", [(429, "waiting"), (502, "engine_restarting"), (503, "engine_restarting")])
def test_a_gateways_refusal_is_waited_for(sham: ShamServer, status: int, reason: str) -> None:
    sham.on(CHAT, reply(status, b"upstream"))
    waits: list[str] = []
    with pytest.raises(EngineUnavailable):
        play(engine_for(sham, unavailable_after_s=0.2), waits=waits)
    assert waits == [reason]
    assert len(sham.bodies()) > 1


def test_a_connection_that_dies_before_the_answer_is_tried_once_more(sham: ShamServer) -> None:
    sham.on(CHAT, (reset,), GOOD)
    assert said(play(engine_for(sham))) == "good"
    assert len(sham.bodies()) == 2


def test_a_request_that_ends_its_server_twice_is_not_sent_a_third_time(sham: ShamServer) -> None:
    assert isinstance(error_of(sham, (reset,)), EngineLost)
    assert len(sham.bodies()) == 2


def test_nothing_is_sent_again_once_the_answer_began(sham: ShamServer) -> None:
    assert isinstance(error_of(sham, stream(delta(role="assistant", content=None)), GOOD), EngineLost)
    assert len(sham.bodies()) == 1


def test_a_server_that_restarts_is_found_again(sham: ShamServer) -> None:
    sham.on(CHAT, GOOD)
    engine = engine_for(sham, unavailable_after_s=30)
    play(engine)
    port = int(sham.url.rpartition(":")[2])
    sham.__exit__()
    waits: list[str] = []
    heard = threading.Event()
    results: list[list[Delta]] = []

    def on_wait(reason: str) -> None:
        waits.append(reason)
        heard.set()

    thread = threading.Thread(
        target=lambda: results.append(list(engine.stream(CALL, stop=StopSignal(), on_wait=on_wait))), daemon=True
    )
    thread.start()
    assert heard.wait(5)
    assert engine.info().state == "unreachable"
    listener = socket.create_server(("127.0.0.1", port))
    again = ShamServer(listener=listener)
    again.on(CHAT, GOOD)
    with again:
        thread.join(10)
        assert said(results[0]) == "good"
        assert waits == ["engine_restarting"]
        assert engine.info().state == "ready"


# --- deadlines and cancels -------------------------------------------------------------------------------------------


def test_pings_do_not_count_as_output(sham: ShamServer) -> None:
    def ping(connection: socket.socket) -> None:
        pause = threading.Event()
        while not pause.wait(0.05):
            connection.sendall(chunk(b":\n\n"))

    sham.on(CHAT, (STREAM, chunk(delta(content="one")), ping))
    started = time.monotonic()
    with pytest.raises(IdleTimeout):
        play(engine_for(sham), replace(CALL, chunk_timeout_s=0.3))
    assert 0.25 < time.monotonic() - started < 3


def test_progress_counts_as_output(sham: ShamServer) -> None:
    def progress(connection: socket.socket) -> None:
        pause = threading.Event()
        for done in range(12):
            shown = {"total": 12, "processed": done, "cache": 0}
            connection.sendall(chunk(event({"choices": [{"delta": {}}], "prompt_progress": shown})))
            pause.wait(0.06)

    sham.on(CHAT, (STREAM, progress, chunk(delta("stop", content="x") + DONE), END))
    deltas = play(engine_for(sham), replace(CALL, chunk_timeout_s=0.4))
    assert sum(isinstance(delta, PromptProgress) for delta in deltas) == 12


def test_a_slow_reader_is_not_taken_for_a_silent_engine(sham: ShamServer) -> None:
    more = threading.Event()
    sham.on(CHAT, (STREAM, chunk(delta(content="a")), more, chunk(delta("stop", content="b") + DONE), END))
    stream_ = engine_for(sham).stream(
        replace(CALL, chunk_timeout_s=0.3), stop=StopSignal(), on_wait=lambda reason: None
    )
    deltas = [next(stream_), next(stream_)]
    assert not more.wait(0.5)  # our reader is busy for longer than the limit
    more.set()
    deltas += stream_
    assert said(deltas) == "ab"


def cancel_while(sham: ShamServer, **settings: Any) -> float:
    """Cancel a call whose request has been received; the seconds until it raised `Stopped`."""
    engine, stop, errors = engine_for(sham, **settings), StopSignal(), list[BaseException]()
    asked_before = len(sham.bodies())

    def run() -> None:
        try:
            play(engine, stop=stop)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    eventually(lambda: len(sham.bodies()) > asked_before)
    started = time.monotonic()
    stop.set("cancelled")
    thread.join(10)
    took = time.monotonic() - started
    assert [type(error) for error in errors] == [Stopped]
    return took


def test_a_cancel_ends_the_wait_for_headers(sham: ShamServer) -> None:
    sham.on(CHAT, (threading.Event(),))
    assert cancel_while(sham) < 0.5
    assert sham.hung_up.wait(5)


def test_a_cancel_ends_the_wait_for_text(sham: ShamServer) -> None:
    sham.on(CHAT, (STREAM, chunk(delta(content="a")), threading.Event()))
    assert cancel_while(sham) < 0.5
    assert sham.hung_up.wait(5)


def test_a_cancel_ends_the_wait_for_the_rest_of_a_whole_answer(sham: ShamServer) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    sham.on(CHAT, (head, threading.Event()))
    assert cancel_while(sham) < 0.5
    assert sham.hung_up.wait(5)


def test_a_cancel_ends_the_wait_for_a_connection() -> None:
    # A listener whose queue is full answers no further SYN: the next connect hangs until its timeout.
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        engine = ServerEngine(EngineSettings(url=url, dialect="llamacpp", connect_timeout_s=30))
        stop = StopSignal()
        timer = threading.Timer(0.3, stop.set, ("cancelled",))
        timer.start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            play(engine, stop=stop)
        assert 0.25 < time.monotonic() - started < 2


def test_a_silent_header_is_given_up_after_the_chunk_timeout(sham: ShamServer) -> None:
    sham.on(CHAT, (threading.Event(),))
    with pytest.raises(IdleTimeout):
        play(engine_for(sham), replace(CALL, chunk_timeout_s=0.2))
    assert sham.hung_up.wait(5)


def test_closing_the_engine_is_idempotent_and_final(sham: ShamServer) -> None:
    engine = engine_for(sham)
    assert engine.wait_ready(StopSignal(), 5)
    engine.close(Deadline(1))
    engine.close(Deadline(1))
    assert engine.probe().state == "closed"


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_the_body_asks_for_a_stream_with_progress_and_usage(sham: ShamServer) -> None:
    sham.on(CHAT, GOOD)
    sampling = {"temperature": 0.5, "seed": -1, "top_k": 5, "id_slot": 3, "n_predict": 9, "max_tokens": None}
    play(engine_for(sham), replace(CALL, sampling=sampling, thinking=False, thinking_budget=9, model="m"))
    body = sham.bodies()[0]
    assert body == {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "reasoning_format": "auto",
        "temperature": 0.5,
        "seed": -1,
        "top_k": 5,
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_budget_tokens": 9,
    }
    assert sham.asked[-1][1]["accept-encoding"] == "identity"


def test_a_named_tool_is_the_only_one_left(sham: ShamServer) -> None:
    sham.on(CHAT, GOOD)
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    named = {"type": "function", "function": {"name": "b"}}
    play(engine_for(sham), replace(CALL, tools=tools, tool_choice=named))
    assert sham.bodies()[0]["tools"] == tools[1:]
    assert sham.bodies()[0]["tool_choice"] == "required"
    with pytest.raises(BadRequest):
        play(engine_for(sham), replace(CALL, tools=tools[:1], tool_choice=named))


def test_tokens_are_counted_once_for_the_same_conversation(sham: ShamServer) -> None:
    sham.on(f"{CHAT}/input_tokens", reply(200, {"input_tokens": 28, "object": "response.input_tokens"}))
    engine = engine_for(sham)
    assert engine.count_tokens(CALL, stop=StopSignal()) is None  # nothing is known of the server yet
    engine.probe()
    assert [engine.count_tokens(CALL, stop=StopSignal()) for _ in range(3)] == [28, 28, 28]
    assert len(sham.bodies(f"{CHAT}/input_tokens")) == 1


def test_tokens_are_counted_through_the_template_where_the_server_is_older(sham: ShamServer) -> None:
    sham.on("/apply-template", reply(200, {"prompt": "<s>hi"}))
    sham.on("/tokenize", reply(200, {"tokens": [1, 2, 3]}))
    engine = engine_for(sham)
    engine.probe()
    assert engine.count_tokens(CALL, stop=StopSignal()) == 3
    assert sham.bodies("/tokenize") == [{"content": "<s>hi", "add_special": True, "parse_special": True}]


def test_a_server_that_cannot_count_is_asked_once(sham: ShamServer) -> None:
    engine = engine_for(sham)
    engine.probe()
    asked_before = len(sham.asked)
    assert [engine.count_tokens(CALL, stop=StopSignal()) for _ in range(3)] == [None, None, None]
    assert len(sham.asked) == asked_before + 2


def test_slots_progress_tells_work_from_rest(sham: ShamServer) -> None:
    slot = {
        "id": 1,
        "is_processing": True,
        "id_task": 14,
        "n_prompt_tokens_processed": 7,
        "next_token": [{"n_decoded": 3}],
    }
    sham.on("/slots", reply(200, [{"id": 0, "is_processing": False}, slot]))
    progress = engine_for(sham).slots_progress()
    assert progress is not None
    assert [(each.working, each.task, each.prompt_tokens_processed, each.tokens_decoded) for each in progress] == [
        (False, None, 0, 0),
        (True, 14, 7, 3),
    ]
    sham.on("/slots", reply(501, {"error": {"message": "off"}}))
    assert engine_for(sham).slots_progress() is None


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A file with a self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sham")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8
    file = tmp_path / "sham.pem"
    file.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, plain, serialization.NoEncryption()))
    return file


@pytest.fixture
def tls_sham(certificate: Path) -> Iterator[ShamServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ShamServer(tls=context) as server:
        yield server


def test_a_server_behind_tls_is_read_and_cancelled_like_any_other(tls_sham: ShamServer, certificate: Path) -> None:
    tls_sham.on(CHAT, GOOD, (STREAM, chunk(delta(content="a")), threading.Event()))
    assert said(play(engine_for(tls_sham, ca_file=certificate))) == "good"
    assert cancel_while(tls_sham, ca_file=certificate) < 0.5
    assert tls_sham.hung_up.wait(5)


def test_a_server_that_nobody_vouches_for_gets_no_prompt(tls_sham: ShamServer) -> None:
    with pytest.raises(EngineUnavailable):
        play(engine_for(tls_sham, unavailable_after_s=0))
    assert not tls_sham.bodies()
    info = engine_for(tls_sham).probe()
    assert info.state == "unreachable"
    assert "certificate" in info.detail


def test_a_cancel_ends_a_tls_handshake_that_hangs() -> None:
    with ShamServer() as sham, socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        engine = engine_for(sham, url=url, dialect="llamacpp", connect_timeout_s=30)
        stop = StopSignal()
        timer = threading.Timer(0.2, stop.set, ("cancelled",))
        timer.start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            play(engine, stop=stop)
        assert time.monotonic() - started < 2


# --- llama.cpp's own server --------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("unix", [False, True])
def test_a_killed_server_loses_its_answers_and_is_found_again(
    start_llama_server: Callable[..., LlamaServer], unix: bool
) -> None:
    server = start_llama_server(slots=1, unix=unix, api_key="sesame")
    engine = ServerEngine(EngineSettings(url=server.url, api_key=SecretStr("sesame"), unavailable_after_s=30))
    engine.open()
    call = replace(CALL, sampling={"max_tokens": 4000})
    running = engine.stream(call, stop=StopSignal(), on_wait=lambda reason: None)
    next(delta for delta in running if isinstance(delta, Text))
    server.kill()
    with pytest.raises(EngineLost):
        list(running)
    assert engine.probe().state == "unreachable"
    server.start(wait=False)
    waits: list[str] = []
    deltas = play(engine, replace(CALL, sampling={"max_tokens": 4}), waits=waits)
    assert isinstance(deltas[-1], Finished)
    assert waits[0] == "engine_restarting"
    assert engine.info().state == "ready"


@pytest.mark.engine
def test_a_wrong_key_is_refused_by_the_server_itself(start_llama_server: Callable[..., LlamaServer]) -> None:
    server = start_llama_server(slots=1, api_key="sesame")
    engine = ServerEngine(EngineSettings(url=server.url, api_key=SecretStr("wrong"), unavailable_after_s=1))
    with pytest.raises(EngineUnavailable):
        play(engine)
    assert engine.info().state == "failed"


@pytest.mark.engine
def test_the_servers_refusals_are_passed_on_in_its_words(llama_server: LlamaServer) -> None:
    engine = ServerEngine(EngineSettings(url=llama_server.url))
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    with pytest.raises(RequestError) as caught:
        play(engine, replace(CALL, response_format=schema))
    assert not caught.value.retryable
    assert "nonsense" in caught.value.message
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with pytest.raises(Unsupported):
        play(engine, replace(CALL, messages=[{"role": "user", "content": [image]}]))


@pytest.mark.engine
def test_what_a_slot_does_can_be_watched(slow_llama_server: LlamaServer) -> None:
    engine = ServerEngine(EngineSettings(url=slow_llama_server.url))
    call = replace(CALL, sampling={"max_tokens": 4000})
    running = engine.stream(call, stop=StopSignal(), on_wait=lambda reason: None)
    next(delta for delta in running if isinstance(delta, Text))
    progress = engine.slots_progress()
    assert progress is not None
    (working,) = [slot for slot in progress if slot.working]
    assert working.tokens_decoded > 0
    assert isinstance(running, Generator)
    running.close()
    slow_llama_server.idle_within(2)
