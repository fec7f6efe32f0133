"""`lmd usage`: an operator sees who has spent what."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.client.terminal import lmd
from tests.client.worker import PlayedWorker
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.broker


def _row(level: str, day: str = "2026-11-21", **fields: Any) -> dict[str, Any]:
    told = {"day": day, "first_level": level, "requests": 2, "tokens_in": 30, "tokens_out": 20, "engine_s": 7.25}
    return told | fields


def test_each_level_is_a_line_with_its_share_of_the_quota(broker: Mosquitto, environment: dict[str, str]) -> None:
    rows = [_row("alice", tokens_per_day=200), _row("bob", engine_s=4000.0), _row("*", tokens_in=0)]
    with PlayedWorker(broker.port) as worker:
        worker.admin_ack = {"today": "2026-11-21", "usage": rows}
        told = lmd("usage", "--days", "7", "--level", "alice", "--port", str(broker.port), environment=environment)
        (order,) = worker.orders
    assert (told.returncode, told.stderr) == (0, b"")
    lines = [line.split() for line in told.stdout.decode().splitlines()]
    assert lines[0] == ["day", "first_level", "requests", "tokens_in", "tokens_out", "engine", "of_a_day's_tokens"]
    assert lines[1] == ["2026-11-21", "alice", "2", "30", "20", "7.2", "s", "25", "%", "of", "200"]
    assert lines[2] == ["2026-11-21", "bob", "2", "30", "20", "1", "h", "7", "min", "-"]
    assert (order["action"], order["days"], order["first_level"], order["limit"]) == ("usage", 7, "alice", 100)


def test_programs_get_every_row(broker: Mosquitto, environment: dict[str, str]) -> None:
    account = [_row(f"user{number}") for number in range(650)]

    def ack(order: dict[str, Any]) -> dict[str, Any]:
        offset, limit = order.get("offset", 0), order["limit"]
        following = {"next_offset": offset + limit} if offset + limit < len(account) else {}
        return {"today": "2026-11-21", "usage": account[offset : offset + limit]} | following

    with PlayedWorker(broker.port) as worker:
        worker.admin_ack = ack
        told = lmd("usage", "--json", "--port", str(broker.port), environment=environment)
    assert json.loads(told.stdout)["usage"] == account


def test_an_account_in_several_parts_is_read_to_its_end_and_no_row_shown_twice(
    broker: Mosquitto, environment: dict[str, str]
) -> None:
    account = [_row(f"user{number}") for number in range(7)]

    def ack(order: dict[str, Any]) -> dict[str, Any]:
        offset = order.get("offset", 0)
        page = account[max(0, offset - 1) : offset + 3]  # a request ended meanwhile and moved the rows
        return {"today": "2026-11-21", "usage": page} | ({"next_offset": offset + 3} if offset + 3 < 7 else {})

    with PlayedWorker(broker.port) as worker:
        worker.admin_ack = ack
        told = json.loads(lmd("usage", "--json", "--port", str(broker.port), environment=environment).stdout)
        assert told == {"worker": "played", "today": "2026-11-21", "usage": account, "more": False}
        few = lmd("usage", "--top", "2", "--port", str(broker.port), environment=environment)
    assert len(few.stdout.splitlines()) == 3
    assert b"--top 20 shows more" in few.stderr


@pytest.mark.parametrize(
    "ack",
    [
        {"usage": "none"},
        {"usage": [7, None, {"day": "\x1b[2J", "first_level": ["x"], "requests": "many", "tokens_in": True}]},
        {"usage": [_row("a")], "next_offset": 0},
        {"usage": [], "next_offset": "soon", "today": 5},
    ],
)
def test_a_strange_answer_breaks_neither_terminal_nor_loop(
    broker: Mosquitto, environment: dict[str, str], ack: dict[str, Any]
) -> None:
    with PlayedWorker(broker.port) as worker:
        worker.admin_ack = ack
        told = lmd("usage", "--port", str(broker.port), environment=environment)
    assert told.returncode == 0
    assert b"\x1b" not in told.stdout + told.stderr
    assert b"Traceback" not in told.stderr


def test_a_worker_that_cannot_read_its_account_says_so(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port) as worker:
        worker.admin_ack = {"status": "error", "code": "internal", "message": "the worker's state cannot be read"}
        told = lmd("usage", "--port", str(broker.port), environment=environment)
    assert (told.returncode, told.stdout) == (1, b"")
    assert told.stderr == b"lmd usage: internal: the worker's state cannot be read\n"
