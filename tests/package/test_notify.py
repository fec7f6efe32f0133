"""What systemd hears, over real datagram sockets."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.service.systemd import Notifier, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@lmd-test-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1))
        listener.settimeout(5)
        yield listener, name


def test_each_word_arrives_as_one_datagram(manager: tuple[socket.socket, str]) -> None:
    listener, name = manager
    notifier = Notifier(environ={"NOTIFY_SOCKET": name})
    heard = []
    for say in (notifier.ready, notifier.stopping, notifier.watchdog, lambda: notifier.extend_timeout(5_000_000)):
        say()
        heard.append(listener.recv(4096))
    assert heard == [b"READY=1", b"STOPPING=1", b"WATCHDOG=1", b"EXTEND_TIMEOUT_USEC=5000000"]
    notifier.close()


def test_reloading_carries_the_monotonic_time(manager: tuple[socket.socket, str]) -> None:
    listener, name = manager
    notifier = Notifier(environ={"NOTIFY_SOCKET": name})
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    word, when = listener.recv(4096).decode().split("\n")
    assert word == "RELOADING=1"
    assert before <= int(when.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    notifier.close()


def test_a_status_can_say_nothing_but_a_status(manager: tuple[socket.socket, str]) -> None:
    listener, name = manager
    notifier = Notifier(environ={"NOTIFY_SOCKET": name})
    notifier.status("waiting for broker\nREADY=1\r\0 \ud800" + "x" * 10_000)
    heard = listener.recv(65536)
    assert heard.startswith(b"STATUS=waiting for broker READY=1")
    assert b"\n" not in heard
    assert len(heard) < 4096
    notifier.close()


def test_a_manager_that_does_not_read_holds_nobody_up(manager: tuple[socket.socket, str]) -> None:
    _, name = manager
    notifier = Notifier(environ={"NOTIFY_SOCKET": name})
    for _ in range(5000):  # far more than the queue of a datagram socket holds
        notifier.watchdog()
    notifier.close()


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "relative", "vsock:2:1", "/" + "x" * 500, "@" + "x" * 500])
def test_without_a_manager_nothing_happens_and_nothing_is_raised(address: str) -> None:
    notifier = Notifier(environ={"NOTIFY_SOCKET": address})
    notifier.ready()
    notifier.status("x")
    notifier.close()
    notifier.close()
    notifier.ready()


@pytest.mark.parametrize(
    "environ,expected",
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_bites(environ: dict[str, str], expected: float | None) -> None:
    assert watchdog_interval_s(environ=environ) == expected
