"""What is held of bodies and frames: bounded for one key and for all, and given back."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from llamacpp_mqtt_deploy.core.errors import Busy
from llamacpp_mqtt_deploy.gateway import bodies
from llamacpp_mqtt_deploy.gateway.incoming_bytes import IncomingBytes
from tests.gateway.raw_frames import CONT, PING, TEXT, UPGRADE, close_code, frame, plain, rest, until
from tests.gateway.world import RunningGateway, World
from tests.support.waiting import eventually

PART = b'{"prompt":"' + b"a" * 30_000


def test_one_owner_holds_a_part_and_all_together_no_more_than_all() -> None:
    held = IncomingBytes(total=10, each=6)
    first, second, other = held.holding("alice"), held.holding("alice"), held.holding("bob")
    first.set(4)
    second.set(2)
    with pytest.raises(Busy):
        second.set(3)
    assert (second.count, held.held) == (2, 6)
    with pytest.raises(Busy):
        other.set(5)
    first.set(1)
    with other:
        other.set(6)
        assert held.held == 9
    assert held.held == 3


@pytest.fixture
def gateway(world: World, monkeypatch: pytest.MonkeyPatch) -> RunningGateway:
    """For one key 50 000 bytes, which one body and a half have."""
    monkeypatch.setattr(bodies, "INCOMING_OF_ONE", 50_000)
    world.worker()
    return world.gateway(keys={"alice": {}, "bob": {}}, gateway__max_body_bytes=40_000)


def post(gateway: RunningGateway, path: str, part: bytes = PART) -> socket.socket:
    """Of a request of alice a part."""
    wire = plain(gateway.port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {gateway.keys['alice']}\r\nContent-Length: 39000\r\n\r\n"
    wire.sendall(head.encode() + part)
    return wire


def upgraded(gateway: RunningGateway) -> socket.socket:
    wire = plain(gateway.port)
    wire.sendall(UPGRADE + b"x-api-key: " + gateway.keys["alice"].encode() + b"\r\n\r\n")
    assert until(wire, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
    return wire


def framed(gateway: RunningGateway) -> socket.socket:
    wire = upgraded(gateway)
    wire.sendall(frame(TEXT, PART + b"a" * 8000)[: len(PART)])
    return wire


def fragmented(gateway: RunningGateway) -> socket.socket:
    wire = upgraded(gateway)
    wire.sendall(frame(TEXT, PART[:15_000], fin=False) + frame(CONT, PART[15_000:], fin=False))
    return wire


def ask(gateway: RunningGateway, name: str) -> httpx.Response:
    return httpx.post(
        f"{gateway.url}/ask", content="hello " * 1000, headers={"x-api-key": gateway.keys[name]}, timeout=20
    )


def held_by_all(gateway: RunningGateway) -> int:
    count: int = gateway.gateway._server.config.ws_protocol_class.incoming.held  # type: ignore[union-attr]
    return count


@pytest.mark.broker
@pytest.mark.parametrize(
    "begin",
    [
        lambda gateway: post(gateway, "/v1/chat/completions"),
        lambda gateway: post(gateway, "/control"),
        lambda gateway: post(gateway, "/api/show"),
        framed,
        fragmented,
    ],
    ids=["body", "control", "show", "frame", "fragments"],
)
def test_a_key_that_has_much_read_at_once_is_told_to_wait_and_no_other_key(
    gateway: RunningGateway, begin: Callable[[RunningGateway], socket.socket]
) -> None:
    with ExitStack() as stack:
        stack.enter_context(begin(gateway))
        eventually(lambda: held_by_all(gateway) >= len(PART) - 16)
        second = stack.enter_context(post(gateway, "/ask"))
        assert until(second, b"\r\n\r\n").startswith(b"HTTP/1.1 429 ")
        third = stack.enter_context(framed(gateway))
        assert close_code(rest(third)) == 1013
        assert ask(gateway, "bob").status_code == 200
    eventually(lambda: held_by_all(gateway) == 0)
    assert ask(gateway, "alice").status_code == 200


@pytest.mark.broker
@pytest.mark.parametrize("begin", [framed, fragmented])
def test_a_message_that_does_not_become_whole_in_time_ends_its_socket_and_an_idle_one_lives(
    world: World, begin: Callable[[RunningGateway], socket.socket]
) -> None:
    world.worker()
    gateway = world.gateway(keys={"alice": {}}, gateway__body_timeout_s=0.3)
    with upgraded(gateway) as idle, begin(gateway) as wire:
        idle.sendall(frame(PING, b"one"))
        until(idle, b"one")
        assert close_code(rest(wire)) == 1008
        time.sleep(0.5)
        idle.sendall(frame(PING, b"two"))
        until(idle, b"two")
        request: Any = frame(TEXT, b'{"session":"s","request_id":"r","prompt":"still here"}')
        idle.sendall(request)
        until(idle, b'"full_content":"still here"')
    eventually(lambda: held_by_all(gateway) == 0)
