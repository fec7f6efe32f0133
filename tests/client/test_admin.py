"""`lmd admin`: an operator acts on a worker without any other program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.client.terminal import lmd
from tests.client.worker import PlayedWorker
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.broker


@pytest.mark.parametrize(
    "words,sent,ack,said",
    [
        (["drain"], {"action": "drain"}, {"state": "draining"}, "played takes no new requests"),
        (["resume"], {"action": "resume"}, {"state": "online"}, "played takes requests again."),
        (["cancel-all"], {"action": "cancel_all"}, {"cancelled": 3}, "played told 3 requests to stop."),
        (
            ["reload"],
            {"action": "reload"},
            {"changed": ["limits.queue_size"], "needs_restart": ["mqtt.host"]},
            "in force now: limits.queue_size. A restart is needed for mqtt.host.",
        ),
        (["restart-engine"], {"action": "restart_engine"}, {}, "played restarts its engine."),
        (["unload"], {"action": "unload"}, {}, "played lets its model go; the next request loads it."),
        (["keep-awake"], {"action": "keep_awake"}, {"keep_awake": True}, "awake until `lmd admin keep-awake 0`."),
        (
            ["keep-awake", "60"],
            {"action": "keep_awake", "seconds": 60.0},
            {"keep_awake": True, "seconds": 60.0},
            "awake for 60 s.",
        ),
        (["keep-awake", "0"], {"action": "keep_awake", "seconds": 0.0}, {"keep_awake": False}, "fall asleep again."),
        (["model", "qwen"], {"action": "model", "model": "qwen"}, {"model": "qwen"}, "name no model with qwen."),
        (["log-level", "debug"], {"action": "log_level", "level": "debug"}, {"level": "debug"}, "at the level debug."),
    ],
)
def test_each_order_is_sent_and_its_answer_told(
    broker: Mosquitto, environment: dict[str, str], words: list[str], sent: dict[str, object], ack: dict[str, object],
    said: str,
) -> None:  # fmt: skip
    with PlayedWorker(broker.port) as worker:
        worker.admin_ack = ack
        result = lmd("admin", *words, "--port", str(broker.port), environment=environment)
        assert (result.returncode, result.stderr) == (0, b"")
        assert said in result.stdout.decode()
        (order,) = worker.orders
        assert order.pop("transaction")
        assert order == sent
        spoken = lmd("admin", *words, "--json", "--port", str(broker.port), environment=environment)
        assert json.loads(spoken.stdout).items() >= ack.items()


@pytest.mark.parametrize("code,exit_code", [("unsupported", 1), ("shutting_down", 5)])
def test_a_refusal_is_told_with_its_reason(
    broker: Mosquitto, environment: dict[str, str], code: str, exit_code: int
) -> None:
    with PlayedWorker(broker.port) as worker:
        worker.admin_ack = {"status": "error", "code": code, "message": "Not\x1b[2J ours."}
        result = lmd("admin", "restart-engine", "--port", str(broker.port), environment=environment)
    assert (result.returncode, result.stdout) == (exit_code, b"")
    assert result.stderr == f"lmd admin restart-engine: {code}: Not[2J ours.\n".encode()


def test_with_several_workers_the_one_that_is_named_obeys(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port, name="kitchen") as kitchen, PlayedWorker(broker.port, name="attic") as attic:
        port = str(broker.port)
        result = lmd("admin", "drain", "--port", port, environment=environment)
        assert (result.returncode, kitchen.orders, attic.orders) == (2, [], [])
        assert b"Several workers are online: attic, kitchen. Name one: --worker attic" in result.stderr
        assert lmd("admin", "drain", "--worker", "kitchen", "--port", port, environment=environment).returncode == 0
        assert (len(kitchen.orders), attic.orders) == (1, [])
        attic.status(state="offline")
        assert lmd("admin", "drain", "--port", port, environment=environment).returncode == 0
        assert len(kitchen.orders) == 2
        gone = lmd("admin", "drain", "--worker", "attic", "--port", port, environment=environment)
        assert gone.returncode == 4
        assert b"The worker attic is not online" in gone.stderr
        assert attic.orders == []  # nor later: the broker was given nothing to keep for it
        assert lmd("admin", "drain", "--worker", "+", "--port", port, environment=environment).returncode == 4


def test_without_a_worker_or_an_answer_the_code_says_so(broker: Mosquitto, environment: dict[str, str]) -> None:
    port = str(broker.port)
    assert lmd("admin", "drain", "--timeout", "0.2", "--port", port, environment=environment).returncode == 4
    with PlayedWorker(broker.port) as worker:
        worker.admin_ack = None
        result = lmd("admin", "drain", "--timeout", "0.5", "--port", port, environment=environment)
        assert len(worker.orders) == 1
    assert result.returncode == 4
    assert b"On llm/admin/played drain was not answered within 0.5 s, though online: played." in result.stderr


def test_the_access_list_decides_who_is_an_operator(
    guarded: Mosquitto, environment: dict[str, str], tmp_path: Path
) -> None:
    codes = {}
    with PlayedWorker(guarded.port, username="worker") as worker:
        for user in ("alice", "operator"):
            file = tmp_path / user
            file.write_text(f"{user}-secret\n")
            flags = ["--port", str(guarded.port), "-u", user, "--password-file", str(file), "--timeout", "2"]
            result = lmd("admin", "drain", *flags, environment=environment)
            codes[user] = result.returncode
            assert user == "operator" or b"'alice' may not" in result.stderr
        assert len(worker.orders) == 1
    assert codes == {"alice": 3, "operator": 0}
