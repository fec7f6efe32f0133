"""How the gateway behaves: when clients leave, workers are missing, bodies are too large, keys are wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamacpp_mqtt_deploy.client import AsyncBusClient
from llamacpp_mqtt_deploy.client.async_connection import AsyncConnection
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, PromptProgress, Reasoning
from llamacpp_mqtt_deploy.core.errors import ContextOverflow
from llamacpp_mqtt_deploy.gateway import running_answers
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Silence, Step
from tests.gateway.world import RunningGateway, World
from tests.support.ports import free_port
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

CHAT = "/v1/chat/completions"


def chat(text: str = "hello there", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def pieces(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


# --- text for curl ---------------------------------------------------------------------------------------------------


def test_a_text_is_answered_by_the_text_as_it_comes(world: World) -> None:
    gate = Gate()
    engine = ScriptedEngine()
    world.worker(engine)
    gateway = world.gateway()
    engine.play("one", " two", gate, " three")
    with httpx.stream("POST", f"{gateway.url}/ask", content="count to three", timeout=20) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain")
        assert response.headers["x-accel-buffering"] == "no"
        text = response.iter_text()
        first = ""
        while first != "one two":
            first += next(text)
        gate.open()
        assert first + "".join(text) == "one two three"


def test_events_come_as_they_are_to_who_accepts_them(http: httpx.Client) -> None:
    with http.stream("POST", "/ask", json={"prompt": "a b c"}, headers={"accept": "text/event-stream"}) as response:
        events = list(pieces(response))
    assert [event["type"] for event in events] == ["start", "chunk", "chunk", "chunk", "done"] or events[-1][
        "type"
    ] == "done"
    assert "".join(event.get("content", "") for event in events) == "a b c"
    assert [event["seq"] for event in events if event["type"] == "chunk"] == list(range(len(events) - 2))


def test_a_prompt_without_a_session_leaves_nothing_behind(world: World) -> None:
    worker = world.worker()
    gateway = world.gateway()
    for text in ("my name is Ada", "what is my name"):
        assert httpx.post(f"{gateway.url}/ask", content=text, timeout=20).text == text
    assert [len(call.messages) for call in worker.engine.calls] == [1, 1]


def test_a_session_remembers_and_a_control_resets_it(world: World) -> None:
    worker = world.worker()
    gateway = world.gateway()
    with httpx.Client(base_url=gateway.url, timeout=20) as http:
        for text in ("one", "two"):
            assert http.post("/ask", json={"prompt": text, "session": "kitchen"}).text == text
        history = http.post("/control", json={"action": "history", "session": "kitchen"}).json()
        assert [message["content"] for message in history["messages"]] == ["one", "one", "two", "two"]
        assert http.post("/control", json={"action": "reset", "session": "kitchen"}).json()["status"] == "ok"
        assert http.post("/ask", json={"prompt": "three", "session": "kitchen"}).text == "three"
    assert [len(call.messages) for call in worker.engine.calls] == [1, 3, 1]


def test_no_piece_of_a_stream_waits_for_the_acknowledgement_of_the_one_before(gateway: RunningGateway) -> None:
    # Nagle's algorithm on a connection of the gateway's cost 43 ms before the first piece.
    with httpx.Client(base_url=gateway.url, timeout=20) as http:
        assert http.get("/healthz").status_code == 200
        server = gateway.gateway._server
        assert server is not None
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


# --- clients that leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot_within_half_a_second(world: World, stream: bool) -> None:
    engine = ScriptedEngine(slots=1)
    world.worker(engine)
    gateway = world.gateway()
    engine.play("begun", Silence())
    body = json.dumps(chat(stream=stream)).encode()
    with socket.create_connection(("127.0.0.1", gateway.port)) as wire:
        wire.sendall(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body)
        )
        eventually(lambda: engine.busy == 1)
        if stream:
            assert b"200 OK" in wire.recv(4096)
    left_at = time.monotonic()
    eventually(lambda: engine.busy == 0, 5)
    assert time.monotonic() - left_at < 0.5


def test_a_cancel_that_names_neither_session_nor_request_ends_nobodys_answer(world: World) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=4)
    engine.play("one", gate, " two")
    world.worker(engine)
    gateway = world.gateway()
    with httpx.Client(base_url=gateway.url, timeout=20) as http, http.stream("POST", "/ask", content="count") as answer:
        pieces = answer.iter_text()
        assert next(pieces) == "one"
        refused = httpx.post(f"{gateway.url}/control", json={"action": "cancel"}, timeout=20)
        gate.open()
        assert "".join(pieces) == " two"
    assert refused.status_code == 400
    assert "request_id" in refused.text


def test_a_request_with_an_idempotency_key_runs_once_and_gets_its_answer_again(world: World) -> None:
    worker = world.worker()
    gateway = world.gateway()
    headers = {"Idempotency-Key": "order-1"}
    first = httpx.post(f"{gateway.url}{CHAT}", json=chat("say it"), headers=headers, timeout=20).json()
    again = httpx.post(f"{gateway.url}{CHAT}", json=chat("say it"), headers=headers, timeout=20).json()
    assert first["choices"] == again["choices"]
    assert first["id"] == again["id"] == "chatcmpl-order-1"
    assert len(worker.engine.calls) == 1
    other = httpx.post(f"{gateway.url}{CHAT}", json=chat("something else"), headers=headers, timeout=20)
    assert other.status_code == 409


def test_who_lost_the_connection_asks_again_and_gets_the_whole_answer(world: World) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    world.worker(engine)
    gateway = world.gateway()
    engine.play("one", " two", gate, " three")
    asked: Any = {"json": chat(stream=True), "headers": {"Idempotency-Key": "lost"}, "timeout": 20}
    with httpx.stream("POST", f"{gateway.url}{CHAT}", **asked) as response:
        text = ""
        for piece in pieces(response):
            text += piece["choices"][0]["delta"].get("content", "")
            if text == "one two":
                break
    answered = threading.Event()
    whole: list[str] = []

    def ask_again() -> None:
        with httpx.stream("POST", f"{gateway.url}{CHAT}", **asked) as response:
            whole.extend(piece["choices"][0]["delta"].get("content", "") for piece in pieces(response))
        answered.set()

    thread = threading.Thread(target=ask_again)
    thread.start()
    eventually(lambda: "".join(whole) == "one two")
    gate.open()
    assert answered.wait(10)
    thread.join()
    assert "".join(whole) == "one two three"
    assert len(engine.calls) == 1


def test_who_asks_again_takes_the_answer_over_and_the_older_reader_is_told(world: World) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    world.worker(engine)
    gateway = world.gateway()
    engine.play("one", gate, " two")
    asked: Any = {"json": chat(stream=True), "headers": {"Idempotency-Key": "twice"}, "timeout": 20}
    with httpx.stream("POST", f"{gateway.url}{CHAT}", **asked) as older:
        lines = pieces(older)
        assert next(lines)["choices"]
        with httpx.stream("POST", f"{gateway.url}{CHAT}", **asked) as newer:
            assert list(lines)[-1]["error"]["code"] == "duplicate_request"
            gate.open()
            assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces(newer)) == "one two"
    assert len(engine.calls) == 1


def test_who_asks_twice_at_once_on_a_level_that_is_new_hears_one_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both wait for the broker to grant the subscription, and go on in the same turn of the loop."""
    worker = world.worker()
    gateway = world.gateway(keys={"alice": {}})
    gateway.write_keys({"alice": {}, "bob": {}})
    subscribe = AsyncConnection.subscribe
    both, asked = asyncio.Barrier(2), itertools.count()

    async def subscribe_together(connection: AsyncConnection, *args: Any) -> None:
        await subscribe(connection, *args)
        if next(asked) < both.parties:
            await both.wait()

    headers = {"Idempotency-Key": "at-once", "x-api-key": gateway.keys["bob"]}
    eventually(lambda: httpx.get(f"{gateway.url}/v1/models", headers=headers, timeout=5).status_code == 200, 5)
    monkeypatch.setattr(AsyncConnection, "subscribe", subscribe_together)

    def ask(_: int) -> tuple[int, str | None]:
        response = httpx.post(f"{gateway.url}{CHAT}", json=chat(), headers=headers, timeout=20)
        return response.status_code, response.json().get("error", {}).get("code")

    with ThreadPoolExecutor(2) as pool:
        heard = list(pool.map(ask, range(2)))
    assert sorted(heard) == [(200, None), (409, "duplicate_request")]
    assert len(worker.engine.calls) == 1


def test_another_request_under_the_id_of_one_under_way_is_refused_and_changes_nothing_for_the_first(
    world: World,
) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    world.worker(engine)
    gateway = world.gateway(gateway__retry_grace_s=0.5)
    headers = {"Idempotency-Key": "one"}

    def ask_another() -> tuple[int, str]:
        response = httpx.post(f"{gateway.url}{CHAT}", json=chat("something else"), headers=headers, timeout=20)
        return response.status_code, response.json()["error"]["code"]

    engine.play("one", gate, " two")
    asked: Any = {"json": chat(stream=True), "headers": headers, "timeout": 20}
    with httpx.stream("POST", f"{gateway.url}{CHAT}", **asked) as response:
        lines = pieces(response)
        assert next(lines)["choices"]
        assert ask_another() == (409, "duplicate_request")
        gate.open()
        assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in lines) == "one two"
    engine.play("begun", Silence())
    headers["Idempotency-Key"] = "two"
    with httpx.stream("POST", f"{gateway.url}{CHAT}", **asked) as response:
        next(pieces(response))
    assert ask_another() == (409, "duplicate_request")
    eventually(lambda: engine.busy == 0, 5)  # it was given up, as without the other one


def test_who_leaves_while_the_broker_is_away_is_cancelled_when_it_is_back(world: World) -> None:
    engine = ScriptedEngine(slots=1)
    world.worker(engine)
    gateway = world.gateway()
    engine.play("begun", Silence())
    with httpx.stream("POST", f"{gateway.url}{CHAT}", json=chat(stream=True), timeout=20) as response:
        lines = pieces(response)
        next(lines)
        world.broker.stop()
        eventually(lambda: not httpx.get(f"{gateway.url}/readyz", timeout=5).json()["broker"])
    assert engine.busy == 1
    world.broker.start()
    eventually(lambda: engine.busy == 0, 20)


@pytest.mark.parametrize("behind", [b"\r\n", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"x" * 4000])
def test_who_sends_something_behind_his_request_and_leaves_is_cancelled(world: World, behind: bytes) -> None:
    engine = ScriptedEngine(slots=1)
    world.worker(engine)
    gateway = world.gateway()
    engine.play("begun", Silence())
    body = json.dumps(chat()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), 5) as client:
        client.sendall(head.encode() + body)
        eventually(lambda: engine.busy == 1)
        client.sendall(behind)
        time.sleep(0.2)  # it may be read with the end of the connection or before it
    eventually(lambda: engine.busy == 0, 5)


def test_whoever_does_not_come_back_in_time_is_cancelled(world: World) -> None:
    engine = ScriptedEngine(slots=1)
    world.worker(engine)
    gateway = world.gateway(gateway__retry_grace_s=0.3)
    engine.play("begun", Silence())
    with httpx.stream(
        "POST", f"{gateway.url}{CHAT}", json=chat(stream=True), headers={"Idempotency-Key": "gone"}, timeout=20
    ) as response:
        next(pieces(response))
    assert engine.busy == 1
    eventually(lambda: engine.busy == 0, 5)


def test_a_key_whose_clients_leave_all_the_time_costs_others_no_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_answers, "MOST_AWAITED", 2)
    gate = Gate()
    engine = ScriptedEngine(slots=4)
    world.worker(engine)
    gateway = world.gateway(keys={"alice": {}, "bob": {}}, gateway__retry_grace_s=60)

    def asking(name: str, request_id: str) -> Any:
        headers = {"Authorization": f"Bearer {gateway.keys[name]}", "Idempotency-Key": request_id}
        asked: Any = {"json": chat(stream=True), "headers": headers, "timeout": 20}
        return httpx.stream("POST", f"{gateway.url}{CHAT}", **asked)

    def leave(name: str, request_id: str, *steps: Step) -> None:
        engine.play("begun", *steps)
        with asking(name, request_id) as response:
            next(pieces(response))

    for request_id in ("a1", "a2", "a3"):
        leave("alice", request_id, Silence())
    eventually(lambda: engine.busy == 2, 5)
    leave("bob", "b1", gate, " and ended")
    eventually(lambda: engine.busy == 2, 5)
    gate.open()
    with asking("bob", "b1") as response:
        assert (
            "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces(response)) == "begun and ended"
        )
    assert len(engine.calls) == 4


# --- errors have their status ----------------------------------------------------------------------------------------


def test_without_a_worker_the_answer_is_503_at_once(world: World) -> None:
    gateway = world.gateway(ready=False)
    eventually(lambda: httpx.get(f"{gateway.url}/readyz", timeout=5).json()["broker"])
    began_at = time.monotonic()
    response = httpx.post(f"{gateway.url}{CHAT}", json=chat(stream=True), timeout=20)
    assert time.monotonic() - began_at < 1
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "no_worker"
    assert httpx.get(f"{gateway.url}/healthz", timeout=5).status_code == 200
    assert httpx.get(f"{gateway.url}/readyz", timeout=5).status_code == 503


def test_a_full_queue_is_429_with_the_time_to_wait(world: World) -> None:
    engine = ScriptedEngine(slots=1)
    world.worker(engine, limits__queue_size=1)
    gateway = world.gateway()
    for _ in range(2):
        engine.play(Silence())

    def hold() -> None:
        with httpx.stream("POST", f"{gateway.url}{CHAT}", json=chat(stream=True), timeout=20):
            pass

    def waiting() -> int:
        ack = httpx.post(f"{gateway.url}/control", json={"action": "ping", "session": "x"}, timeout=20).json()
        return int(ack["queue"])

    for queued in (0, 1):
        threading.Thread(target=hold, daemon=True).start()
        eventually(lambda queued=queued: engine.busy == 1 and waiting() == queued)  # type: ignore[misc]
    refused = httpx.post(f"{gateway.url}{CHAT}", json=chat(stream=True), timeout=20)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_a_prompt_that_does_not_fit_is_400_with_the_apis_own_code(world: World) -> None:
    engine = ScriptedEngine()
    world.worker(engine)
    gateway = world.gateway()
    engine.play(ContextOverflow("Too long.", n_prompt_tokens=9000, n_ctx=4096))
    response = httpx.post(f"{gateway.url}{CHAT}", json=chat(stream=True), timeout=20)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_timeout_is_504(world: World) -> None:
    engine = ScriptedEngine()
    world.worker(engine)
    gateway = world.gateway()
    engine.play(Silence())
    response = httpx.post(f"{gateway.url}{CHAT}", json=chat(stream=True, timeout_s=0.3), timeout=20)
    assert response.status_code == 504


def test_a_model_that_nobody_serves_is_404_and_default_is_the_workers_own(http: httpx.Client) -> None:
    refused = http.post(CHAT, json=chat(model="gpt-9"))
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"
    assert http.post(CHAT, json=chat(model="default")).json()["choices"][0]["message"]["content"] == "hello there"
    listed = http.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["scripted"]
    assert http.post(CHAT, json=chat(model=listed[0]["id"])).status_code == 200


def test_a_stream_that_fails_after_its_first_piece_tells_it_in_its_own_form_and_never_looks_whole(world: World) -> None:
    engine = ScriptedEngine()
    world.worker(engine)
    gateway = world.gateway()
    engine.play("half", Silence())
    with httpx.stream("POST", f"{gateway.url}{CHAT}", json=chat(stream=True, timeout_s=0.5), timeout=20) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-1][6:])["error"]["code"] == "timeout"
    assert "data: [DONE]" not in lines


def test_plain_text_that_fails_after_its_first_piece_is_cut(world: World) -> None:
    engine = ScriptedEngine()
    world.worker(engine)
    gateway = world.gateway()
    engine.play("half", Silence())
    received: list[str] = []
    asked: Any = {"json": {"prompt": "x", "timeout_s": 0.5}, "timeout": 20}
    with httpx.stream("POST", f"{gateway.url}/ask", **asked) as response, pytest.raises(httpx.RemoteProtocolError):
        received.extend(response.iter_text())
    assert received[0].startswith("half")
    assert "timeout" in "".join(received)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_bodies_over_the_limit_are_refused_whether_they_tell_their_size_or_not(world: World) -> None:
    world.worker()
    gateway = world.gateway(gateway__max_body_bytes=2000)
    told = httpx.post(f"{gateway.url}{CHAT}", json=chat("x" * 3000), timeout=20)
    assert told.status_code == 413

    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 100

    untold = httpx.post(f"{gateway.url}{CHAT}", content=parts(), timeout=20)
    assert untold.status_code == 413
    assert httpx.post(f"{gateway.url}{CHAT}", json=chat(), timeout=20).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"messages": 1}', b"\xff\xfe", b"[" * 5000, b'{"messages": NaN}', b'{"a":1,"a":2}']
)
def test_what_is_no_request_is_400_in_the_apis_own_form(http: httpx.Client, body: bytes) -> None:
    response = http.post(CHAT, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_sends_its_head_or_its_body_too_slowly_is_cut_off(world: World) -> None:
    world.worker()
    gateway = world.gateway(gateway__header_timeout_s=0.4, gateway__body_timeout_s=0.4)
    for begin in (b"POST /ask HTTP/1.1\r\nHost: loc", b""):
        with socket.create_connection(("127.0.0.1", gateway.port)) as wire:
            wire.settimeout(10)
            wire.sendall(begin)
            assert wire.recv(100) == b""
    with socket.create_connection(("127.0.0.1", gateway.port)) as wire:
        wire.settimeout(10)
        wire.sendall(b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        assert b" 504 " in wire.recv(100)


def test_a_connection_that_is_in_use_is_not_closed(world: World) -> None:
    gateway = world.gateway(ready=False, gateway__header_timeout_s=0.5)
    with socket.create_connection(("127.0.0.1", gateway.port)) as wire:
        wire.settimeout(10)
        pause, ends_at = threading.Event(), time.monotonic() + 2
        while time.monotonic() < ends_at:
            pause.wait(0.05)
            wire.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                part = wire.recv(4096)
                assert part, "closed between two requests"
                answer += part


def test_a_head_without_end_is_refused(gateway: RunningGateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port)) as wire:
        wire.settimeout(10)
        wire.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        answer = b""
        try:
            for number in range(2000):
                wire.sendall(b"X-%d: %s\r\n" % (number, b"x" * 100))
            answer = wire.recv(100)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert not answer or b" 400 " in answer
    assert httpx.get(f"{gateway.url}/healthz", timeout=5).status_code == 200


def test_a_reader_that_takes_nothing_is_cut_and_others_go_on(world: World) -> None:
    engine = ScriptedEngine(slots=2)
    world.worker(engine)
    gateway = world.gateway(gateway__slow_reader_s=0.5)
    engine.play(*["x" * 4000 for _ in range(900)])
    body = json.dumps(chat(stream=True, max_tokens=1000)).encode()
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with wire:
        wire.connect(("127.0.0.1", gateway.port))
        wire.sendall(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body)
        )
        eventually(lambda: len(engine.calls) == 1)
        for _ in range(5):
            assert httpx.post(f"{gateway.url}{CHAT}", json=chat(), timeout=20).status_code == 200
        eventually(lambda: gateway.gateway._capacity.taken == 0)
        wire.settimeout(30)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := wire.recv(65536):
                received += part
        assert b"[DONE]" not in received
        assert not received.endswith(b"0\r\n\r\n")


def test_one_key_leaves_places_to_the_others(world: World) -> None:
    engine = ScriptedEngine(slots=4)
    world.worker(engine)
    gateway = world.gateway(keys={"alice": {}, "bob": {}}, gateway__max_streams_per_level=1)
    engine.play(Silence())

    def post(name: str, **fields: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {gateway.keys[name]}"}
        return httpx.post(f"{gateway.url}{CHAT}", json=chat(**fields), headers=headers, timeout=20)

    holder = threading.Thread(target=lambda: post("alice", stream=True, timeout_s=3), daemon=True)
    holder.start()
    eventually(lambda: engine.busy == 1)
    refused = post("alice")
    assert refused.status_code == 429
    assert refused.headers["retry-after"]
    assert post("bob").status_code == 200
    holder.join(20)


# --- the stop --------------------------------------------------------------------------------------------------------


def test_at_a_stop_answers_may_finish_and_what_takes_too_long_ends_with_an_error(world: World) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=2)
    world.worker(engine)
    gateway = world.gateway(gateway__drain_timeout_s=1)
    engine.play("quick", gate, " end")
    results: dict[str, list[str]] = {"quick": [], "slow": []}

    def read(name: str) -> None:
        with httpx.stream("POST", f"{gateway.url}{CHAT}", json=chat(stream=True), timeout=20) as response:
            results[name] = [line for line in response.iter_lines() if line.startswith("data: ")]

    quick = threading.Thread(target=read, args=("quick",))
    quick.start()
    assert gate.reached.wait(10)
    engine.play("slow", Silence())
    slow = threading.Thread(target=read, args=("slow",))
    slow.start()
    eventually(lambda: engine.busy == 2)
    gateway.stop_soon()
    eventually(lambda: "stopping" in gateway.manager.words)
    gate.open()
    for thread in (quick, slow):
        thread.join(20)
    gateway.join()
    assert results["quick"][-1] == "data: [DONE]"
    assert json.loads(results["slow"][-1][6:])["error"]["code"] == "shutting_down"
    eventually(lambda: engine.busy == 0)


def test_a_request_whose_body_is_whole_only_after_the_drain_is_told_so(world: World) -> None:
    world.worker()
    gateway = world.gateway(gateway__drain_timeout_s=1)
    body = json.dumps(chat()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), 5) as client:
        client.sendall(head.encode() + body[:-1])
        eventually(lambda: gateway.gateway._capacity.taken == 1)
        gateway.stop_soon()
        gateway.stop_soon()  # cuts the drain short
        client.sendall(body[-1:])
        client.settimeout(10)
        answer = b""
        while more := client.recv(4096):
            answer += more
    assert b"503" in answer.split(b"\r\n")[0]
    assert b"shutting_down" in answer


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_open_the_gateway_by_bearer_and_by_header_and_nothing_else_does(world: World) -> None:
    world.worker()
    gateway = world.gateway(keys={"alice": {}})
    url, key = f"{gateway.url}{CHAT}", gateway.keys["alice"]
    for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
        assert httpx.post(url, json=chat(), headers=headers, timeout=20).status_code == 200
    for headers in ({}, {"authorization": "Bearer lmd-wrong"}, {"authorization": key}, {"x-api-key": key[:-1]}):
        refused = httpx.post(url, json=chat(), headers=headers, timeout=20)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{gateway.url}/healthz", timeout=5).status_code == 200


def test_the_same_id_of_two_keys_is_two_requests(world: World) -> None:
    worker = world.worker()
    gateway = world.gateway(keys={"alice": {"level": "team"}, "bob": {"level": "team"}, "eve": {}})
    texts = {}
    for name in gateway.keys:
        headers = {"x-api-key": gateway.keys[name], "Idempotency-Key": "same"}
        answer = httpx.post(f"{gateway.url}{CHAT}", json=chat(f"I am {name}"), headers=headers, timeout=20)
        texts[name] = answer.json()["choices"][0]["message"]["content"]
    assert texts == {name: f"I am {name}" for name in gateway.keys}
    assert len(worker.engine.calls) == 3


def test_a_session_cannot_be_named_like_the_place_of_anothers_requests(world: World) -> None:
    worker = world.worker()
    gateway = world.gateway(keys={"alice": {"level": "team"}, "bob": {"level": "team"}})
    asked = {"messages": [{"role": "user", "content": "secret"}]}
    headers = {"x-api-key": gateway.keys["alice"], "Idempotency-Key": "same"}
    assert httpx.post(f"{gateway.url}{CHAT}", json=asked, headers=headers, timeout=20).status_code == 200
    stolen = {**asked, "session": "key.alice", "request_id": "same", "stream": False}
    httpx.post(f"{gateway.url}/ask", json=stolen, headers={"x-api-key": gateway.keys["bob"]}, timeout=20)
    assert len(worker.engine.calls) == 2


def test_a_key_is_held_to_its_models_its_lane_and_its_rate(world: World) -> None:
    engine = ScriptedEngine()
    worker = world.worker(engine, engine__models='["other"]')
    gateway = world.gateway(keys={"alice": {"models": ["default"], "max_priority": "batch", "requests_per_minute": 3}})
    headers = {"x-api-key": gateway.keys["alice"]}
    with httpx.Client(base_url=gateway.url, headers=headers, timeout=20) as http:
        assert http.post(CHAT, json=chat(model="other")).status_code == 403
        assert http.post(CHAT, json=chat(priority="interactive")).status_code == 200
        assert http.post(CHAT, json=chat()).status_code == 200
        limited = http.post(CHAT, json=chat())
        assert limited.status_code == 429
        assert int(limited.headers["retry-after"]) >= 1
    assert len(worker.engine.calls) == 2


def test_a_key_that_is_removed_is_refused_without_a_restart(world: World) -> None:
    world.worker()
    gateway = world.gateway(keys={"alice": {}, "bob": {}})

    def status(name: str) -> int:
        return httpx.post(
            f"{gateway.url}{CHAT}", json=chat(), headers={"x-api-key": gateway.keys[name]}, timeout=20
        ).status_code

    assert status("alice") == status("bob") == 200
    gateway.write_keys({"bob": {}})
    eventually(lambda: status("alice") == 401, 5)
    gateway.keys_file.write_text("no toml [")
    assert status("bob") == 200


# --- web pages -------------------------------------------------------------------------------------------------------


def test_without_keys_foreign_pages_and_foreign_names_are_refused(gateway: RunningGateway) -> None:
    def status(**headers: str) -> int:
        return httpx.post(f"{gateway.url}/ask", content="hi", headers=headers, timeout=20).status_code

    assert status(origin=gateway.url) == 200
    assert status(host=f"localhost:{gateway.port}") == 200
    assert status(origin="https://evil.example") == 403
    assert status(origin="null") == 403
    assert status(host=f"evil.example:{gateway.port}") == 403


def test_only_named_origins_may_read_answers_from_elsewhere(world: World) -> None:
    world.worker()
    gateway = world.gateway(gateway__cors_origins='["https://chat.example"]')
    named = httpx.post(f"{gateway.url}/ask", content="hi", headers={"origin": "https://chat.example"}, timeout=20)
    assert named.status_code == 200
    assert named.headers["access-control-allow-origin"] == "https://chat.example"
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{gateway.url}/ask", headers=asked, timeout=20).headers


def test_silence_is_filled_with_signs_of_life(world: World) -> None:
    gate = Gate()
    engine = ScriptedEngine()
    world.worker(engine)
    gateway = world.gateway(gateway__heartbeat_s=0.2)
    engine.play("one", gate)
    with httpx.stream("POST", f"{gateway.url}{CHAT}", json=chat(stream=True), timeout=20) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": ping"
        gate.open()
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize(
    "path,step",
    [
        (CHAT, PromptProgress(1, 2, 0)),
        ("/v1/messages", PromptProgress(1, 2, 0)),
        ("/v1/messages", Reasoning("hm")),
        ("/chat/stream", Reasoning("hm")),
    ],
)
def test_what_an_api_has_no_words_for_does_not_keep_signs_of_life_away(world: World, path: str, step: Delta) -> None:
    heard = threading.Event()

    def busy(_call: EngineCall) -> Iterator[Step]:
        for _ in range(400):
            if heard.wait(0.05):
                break
            yield step
        yield "done"

    world.worker(ScriptedEngine(busy))
    gateway = world.gateway(gateway__heartbeat_s=0.3)
    body = chat(stream=True, max_tokens=9) if path.startswith("/v1") else {"message": "hi", "session_id": "s"}
    with httpx.stream("POST", f"{gateway.url}{path}", json=body, timeout=20) as response:
        lines = response.iter_lines()
        assert any("ping" in line for line in itertools.islice(lines, 50))
        heard.set()
        assert any("done" in line for line in lines)


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/api/nothing", "/ask/"])
def test_what_is_not_there_is_told_in_the_form_of_its_api(http: httpx.Client, path: str) -> None:
    response = http.post(path, json={})
    assert response.status_code in (404, 405)
    assert "error" in response.json()
    wrong_method = http.get(CHAT)
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    assert wrong_method.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/openapi.json").json()["openapi"].startswith("3.")
    assert "/v1/chat/completions" in http.get("/docs").text


def test_the_address_of_the_websocket_tells_a_proxy_that_passes_no_upgrade_what_is_missing(http: httpx.Client) -> None:
    response = http.get("/ws")
    assert (response.status_code, response.headers["upgrade"]) == (426, "websocket")
    assert "Upgrade and Connection" in response.json()["error"]["message"]


# --- the start -------------------------------------------------------------------------------------------------------


def test_who_asks_while_the_gateway_starts_is_answered_and_not_told_that_nobody_is_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.worker(ScriptedEngine())
    opened = AsyncBusClient.open

    async def slow(self: AsyncBusClient) -> AsyncBusClient:
        await asyncio.sleep(0.3)
        return await opened(self)

    monkeypatch.setattr(AsyncBusClient, "open", slow)
    gateway = RunningGateway(world.broker.port, world.folder / "starting")
    try:
        response = httpx.post(f"{gateway.url}/ask", content="hello", timeout=20)
        assert (response.status_code, response.text.strip()) == (200, "hello")
    finally:
        gateway.close()


def test_a_gateway_without_a_broker_says_so_at_once(tmp_path: Path) -> None:
    gateway = RunningGateway(free_port(), tmp_path)
    try:
        began_at = time.monotonic()
        assert httpx.post(f"{gateway.url}/ask", content="hello", timeout=20).status_code == 503
        assert time.monotonic() - began_at < 5
    finally:
        gateway.close()
