"""`/ws`: the protocol's events over a WebSocket, with a real client library."""

from __future__ import annotations

import json
import socket as plain_socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Silence
from tests.gateway.world import RunningGateway, World
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(slots=2)


@pytest.fixture
def gateway(world: World, engine: ScriptedEngine) -> RunningGateway:
    world.worker(engine)
    return world.gateway()


@pytest.fixture
def socket(gateway: RunningGateway) -> Iterator[Connection]:
    with connect(address(gateway), close_timeout=2) as socket:
        yield socket


def address(gateway: RunningGateway) -> str:
    return f"ws://127.0.0.1:{gateway.port}/ws"


def say(socket: Connection, **frame: Any) -> None:
    socket.send(json.dumps(frame))


def events_of(socket: Connection, request_id: str) -> Iterator[dict[str, Any]]:
    while True:
        event = json.loads(socket.recv(timeout=10))
        if event.get("request_id") == request_id:
            yield event
            if event.get("final") or event["type"] in ("done", "error", "rejected"):
                return


def test_many_requests_share_one_socket_and_each_gets_its_own_events(socket: Connection) -> None:
    for number in range(10):
        say(socket, type="request", session=f"s{number}", request_id=f"r{number}", prompt=f"text number {number}")
    texts = {f"r{number}": "" for number in range(10)}
    ended: set[str] = set()
    while len(ended) < 10:
        event = json.loads(socket.recv(timeout=10))
        texts[event["request_id"]] += event.get("content", "")
        if event["type"] == "done":
            ended.add(event["request_id"])
    assert texts == {f"r{number}": f"text number {number}" for number in range(10)}


@pytest.mark.parametrize("session", ["s", 7])
def test_a_control_cancels_and_is_acknowledged(socket: Connection, engine: ScriptedEngine, session: str | int) -> None:
    engine.play("begun", Silence())
    say(socket, type="request", session=session, request_id="r", prompt="long")
    events = events_of(socket, "r")
    while next(events)["type"] != "chunk":
        pass
    say(socket, type="control", session=session, action="cancel", request_id="r", transaction="t1")
    seen = [json.loads(socket.recv(timeout=10)) for _ in range(2)]
    assert {event["type"] for event in seen} == {"ack", "done"}
    ack = next(event for event in seen if event["type"] == "ack")
    assert (ack["status"], ack["transaction"]) == ("ok", "t1")
    assert next(event for event in seen if event["type"] == "done")["finish_reason"] == "cancelled"
    eventually(lambda: engine.busy == 0)


def test_the_same_request_again_brings_a_snapshot(socket: Connection, engine: ScriptedEngine) -> None:
    gate = Gate()
    engine.play("one", " two", gate, " three")
    frame = {"type": "request", "session": "s", "request_id": "r", "prompt": "count"}
    say(socket, **frame)
    text = ""
    for event in events_of(socket, "r"):
        text += event.get("content", "") if event["type"] == "chunk" else ""
        if text == "one two":
            break
    say(socket, **frame)
    again = events_of(socket, "r")
    snapshot = next(event for event in again if event["type"] == "snapshot")
    assert snapshot["content"] == "one two"
    gate.open()
    assert list(again)[-1]["full_content"] == "one two three"
    assert len(engine.calls) == 1


def test_a_socket_that_is_lost_is_asked_again_over_another_one(gateway: RunningGateway, engine: ScriptedEngine) -> None:
    gate = Gate()
    engine.play("one", gate, " two")
    frame = {"type": "request", "session": "s", "request_id": "r", "prompt": "count"}
    lost = connect(address(gateway))
    say(lost, **frame)
    next(event for event in events_of(lost, "r") if event["type"] == "chunk")
    lost.socket.close()
    with connect(address(gateway), close_timeout=2) as socket:
        say(socket, **frame)
        events = events_of(socket, "r")
        assert next(event for event in events if event["type"] == "snapshot")["content"] == "one"
        gate.open()
        assert list(events)[-1]["full_content"] == "one two"
    assert len(engine.calls) == 1


def test_a_socket_that_is_closed_cancels_its_requests(gateway: RunningGateway, engine: ScriptedEngine) -> None:
    engine.play("begun", Silence())
    with connect(address(gateway), close_timeout=2) as socket:
        say(socket, type="request", session="s", request_id="r", prompt="long")
        next(event for event in events_of(socket, "r") if event["type"] == "chunk")
        assert engine.busy == 1
    eventually(lambda: engine.busy == 0, 2)


def test_a_socket_that_takes_nothing_is_ended_with_its_requests(world: World, engine: ScriptedEngine) -> None:
    world.worker(engine)
    gateway = world.gateway(gateway__slow_reader_s=0.5)
    engine.play(*["x" * 8000 for _ in range(450)], Silence())
    wire = plain_socket.socket()
    wire.setsockopt(plain_socket.SOL_SOCKET, plain_socket.SO_RCVBUF, 4096)
    wire.connect(("127.0.0.1", gateway.port))
    with connect(address(gateway), sock=wire, close_timeout=1, max_queue=1) as socket:
        say(socket, type="request", session="s", request_id="r", prompt="long")
        eventually(lambda: engine.busy == 1)
        eventually(lambda: engine.busy == 0, 20)


@pytest.mark.parametrize(
    "frame,code",
    [
        ("{", "bad_request"),
        ("[]", "bad_request"),
        ('{"type": "novelty"}', "bad_request"),
        ('{"type": "request", "request_id": "r", "temperature": "hot", "prompt": "x"}', "bad_request"),
        ('{"type": "request", "request_id": "../x", "prompt": "x"}', "bad_request"),
        ('{"type": "request", "request_id": "r", "prompt": "x", "model": "gpt-9"}', "model_not_found"),
        ('{"type": "control", "action": "explode"}', "bad_request"),
        ("[" * 10_000, "bad_request"),
    ],
)
def test_a_frame_that_cannot_be_read_is_told_and_the_socket_lives_on(socket: Connection, frame: str, code: str) -> None:
    socket.send(frame)
    told = json.loads(socket.recv(timeout=10))
    assert told["code"] == code
    say(socket, type="request", session="s", request_id="fine", prompt="hello")
    assert list(events_of(socket, "fine"))[-1]["full_content"] == "hello"


def test_a_defect_of_the_gateway_is_told_and_nobody_waits_for_ever(
    gateway: RunningGateway, socket: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    assert gateway.gateway._running is not None
    monkeypatch.setattr(gateway.gateway._running, "begin", broken)
    say(socket, session="s", request_id="r", prompt="hello")
    assert [event["code"] for event in events_of(socket, "r")] == ["internal"]


def test_a_frame_over_the_limit_closes_the_socket(world: World) -> None:
    world.worker()
    gateway = world.gateway(gateway__max_body_bytes=2000)
    with connect(address(gateway), close_timeout=2) as socket:
        socket.send("x" * 5000)
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=10)
    with connect(address(gateway), close_timeout=2) as socket:
        say(socket, session="s", request_id="r", prompt="hello")
        assert list(events_of(socket, "r"))[-1]["full_content"] == "hello"


def test_a_key_comes_as_a_subprotocol_because_a_browser_can_set_no_header(world: World) -> None:
    world.worker()
    gateway = world.gateway(keys={"alice": {}})
    with pytest.raises(InvalidStatus, match="403"):
        connect(address(gateway))
    with connect(address(gateway), subprotocols=["lmd", f"lmd.key.{gateway.keys['alice']}"], close_timeout=2) as socket:  # type: ignore[list-item]
        assert socket.subprotocol == "lmd"
        say(socket, session="s", request_id="r", prompt="hello")
        done = list(events_of(socket, "r"))[-1]
        assert done["session_id"] == "alice/s"


def with_key(gateway: RunningGateway, name: str) -> Connection:
    return connect(address(gateway), additional_headers={"x-api-key": gateway.keys[name]}, close_timeout=2)


def test_a_key_that_is_removed_ends_its_open_socket(world: World) -> None:
    worker = world.worker()
    gateway = world.gateway(keys={"alice": {}, "bob": {}})
    with with_key(gateway, "alice") as socket:
        say(socket, type="request", session="s", request_id="r1", prompt="hi")
        assert [*events_of(socket, "r1")][-1]["type"] == "done"
        gateway.write_keys({"bob": {}})
        headers = {"x-api-key": gateway.keys["alice"]}
        eventually(lambda: httpx.get(f"{gateway.url}/v1/models", headers=headers).status_code == 401, 5)
        say(socket, type="request", session="s", request_id="r2", prompt="hi")
        assert [event["code"] for event in events_of(socket, "r2")] == ["unauthorized"]
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=5)
        assert socket.close_code == 1008
    assert len(worker.engine.calls) == 1


def test_a_key_that_changes_counts_for_the_next_request_of_an_open_socket(world: World) -> None:
    world.worker()
    gateway = world.gateway(keys={"alice": {}})
    with with_key(gateway, "alice") as socket:
        say(socket, type="request", session="s", request_id="r1", prompt="hi")
        assert [*events_of(socket, "r1")][-1]["type"] == "done"
        gateway.write_keys({"alice": {"models": ("another",)}})
        headers = {"x-api-key": gateway.keys["alice"]}
        eventually(lambda: not httpx.get(f"{gateway.url}/v1/models", headers=headers).json()["data"], 5)
        say(socket, type="request", session="s", request_id="r2", prompt="hi")
        assert [event["code"] for event in events_of(socket, "r2")] == [
            "model_not_found"
        ]  # the one it may name is not served


def test_a_request_that_is_sent_again_counts_for_the_rate(world: World) -> None:
    engine = ScriptedEngine(slots=2)
    world.worker(engine)
    gateway = world.gateway(keys={"alice": {"requests_per_minute": 2}})
    gate = Gate()
    engine.play("one", gate, " two")
    with with_key(gateway, "alice") as socket:
        for _ in range(3):
            say(socket, type="request", session="s", request_id="r", prompt="hi")
        assert [event["code"] for event in events_of(socket, "r") if event["type"] == "rejected"] == ["rate_limited"]
        gate.open()
        assert [*events_of(socket, "r")][-1]["full_content"] == "one two"


def test_a_control_that_is_refused_ends_no_request(world: World) -> None:
    engine = ScriptedEngine(slots=2)
    world.worker(engine)
    gateway = world.gateway(keys={"alice": {"requests_per_minute": 1}})
    gate = Gate()
    engine.play("one", gate, " two")
    with with_key(gateway, "alice") as socket:
        say(socket, type="request", session="s", request_id="r", prompt="hi")
        say(socket, type="control", session="s", action="cancel", request_id="r", transaction="t")
        say(socket, type="control", session="s", action="explode", request_id="r", transaction="u")
        acks: dict[str, dict[str, Any]] = {}
        while len(acks) < 2:
            event = json.loads(socket.recv(timeout=10))
            assert event["type"] not in ("error", "done")
            if event["type"] == "ack":
                acks[event["transaction"]] = event
        assert (acks["t"]["status"], acks["t"]["code"]) == ("error", "rate_limited")
        assert acks["u"]["status"] == "error"
        gate.open()
        assert [*events_of(socket, "r")][-1]["full_content"] == "one two"


def test_another_request_under_the_id_of_one_under_way_changes_nothing_for_it(
    socket: Connection, engine: ScriptedEngine
) -> None:
    gate = Gate()
    engine.play("one", gate, " two")
    say(socket, type="request", session="s", request_id="r", prompt="count")
    next(event for event in events_of(socket, "r") if event["type"] == "chunk")
    say(socket, type="request", session="s", request_id="r", prompt="something else")
    rejected = [*events_of(socket, "r")][-1]
    assert (rejected["type"], rejected["code"]) == ("rejected", "duplicate_request")
    say(socket, type="request", session="s", request_id="r", prompt="count", temperature="hot")
    assert [*events_of(socket, "r")][-1]["type"] == "rejected"
    gate.open()
    assert [*events_of(socket, "r")][-1]["full_content"] == "one two"
    assert len(engine.calls) == 1


def test_a_page_of_another_origin_gets_no_socket(gateway: RunningGateway) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        connect(address(gateway), origin="https://evil.example")  # type: ignore[arg-type]
    with connect(address(gateway), origin=gateway.url, close_timeout=2) as socket:  # type: ignore[arg-type]
        say(socket, session="s", request_id="r", prompt="hello")
        assert list(events_of(socket, "r"))[-1]["type"] == "done"
