"""`lmd status`: the workers on the bus, on a terminal, on a pipe and as JSON."""

from __future__ import annotations

import json
import string
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.commands.status import describe
from llamacpp_mqtt_deploy.commands.terminal import one_line
from tests.client.terminal import Terminal, lmd
from tests.client.worker import PlayedWorker
from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port

ENGINE = {"state": "ready", "kind": "server", "backend": "cuda"}


@pytest.mark.broker
def test_on_a_pipe_each_worker_is_a_line(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port, name="kitchen") as kitchen, PlayedWorker(broker.port, name="attic") as attic:
        kitchen.status(ts=time.time(), every_s=10, slots=4, models=["qwen", "phi"], engine=ENGINE)
        kitchen.health(slots={"busy": 1, "total": 4}, queue=3)
        attic.status(state="offline", reason="lost")
        result = lmd("status", "--port", str(broker.port), environment=environment)
        assert result.returncode == 0
        lines = [line.split(None, 6) for line in result.stdout.decode().splitlines()]
        named = lmd("status", "--port", str(broker.port), "--worker", "attic", environment=environment)
    assert lines[0] == ["worker", "state", "engine", "slots", "queue", "models", "problem"]
    assert lines[1] == ["attic", "offline", "-", "-", "-", "-", "its connection was lost"]
    assert lines[2] == ["kitchen", "online", "ready/cuda", "1/4", "3", "qwen,phi", "-"]
    assert named.returncode == 4
    assert b"attic" in named.stdout
    assert b"kitchen" not in named.stdout


@pytest.mark.broker
def test_on_a_terminal_it_is_a_table_that_no_worker_can_steer(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port) as worker:
        broken = {"state": "failed", "detail": "out of\x1b[2J mem\u202eory\nsecond line"}
        worker.status(models=["[red]q\x1b]0;t\x07wen"], engine=broken, slots="many")
        with Terminal(["status", "--port", str(broker.port)], environment=environment) as terminal:
            assert terminal.wait() == 0
    assert "\x1b[32monline\x1b[0m" in terminal.text
    assert "[red]q]0;twen" in terminal.text
    assert "\x1b[2J" not in terminal.text
    assert "\u202e" not in terminal.text


@pytest.mark.broker
@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["top", "--once"],
        ["admin", "drain"],
        ["usage"],
        ["check", "--no-generate"],
        ["ask", "hi"],
        ["config"],
    ],
    ids=lambda command: str(command[0]),
)
def test_json_on_a_terminal_cannot_steer_it_and_says_the_same(
    command: list[str], broker: Mosquitto, environment: dict[str, str]
) -> None:
    evil = "\x9b31m\x9d0;title\x9c\x1b[2J\u202egnp.exe\u2028x\x7f\u200e\u2066"

    def answer(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="chunk", seq=0, content=evil)
        worker.done(session, request, evil, seq=1)

    words = [*command, "--json", "--set", f"mqtt.port={broker.port}", "--set", "engine.url=http://127.0.0.1:9"]
    words += ["--set", f"generation.system_prompt={evil}"]
    with PlayedWorker(broker.port, play=answer) as worker:
        worker.status(models=[evil], engine={"state": evil, "detail": evil})
        worker.admin_ack = {"message": evil, "usage": [{"day": evil, "first_level": evil}], "today": evil}
        with Terminal(words, environment=environment) as terminal:
            terminal.wait()
        piped = lmd(*words, environment=environment).stdout.decode()
    for text in (terminal.text, piped):
        assert not set(text) & set(evil) - set(string.printable), text
        for line in [text] if command[0] in ("check", "config") else text.splitlines():
            assert json.loads(line)
    if command[0] not in ("check", "top"):  # which quote it as the table does
        assert r"\u009b31m\u009d0;title\u009c\u001b[2J\u202egnp.exe\u2028x\u007f\u200e\u2066" in piped


@pytest.mark.broker
def test_with_json_programs_get_all_that_workers_tell(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port) as worker:
        worker.status(ts=time.time() - 500, every_s=10, engine=ENGINE)
        worker.health(queue=3)
        result = lmd("status", "--port", str(broker.port), "--json", environment=environment)
    (found,) = json.loads(result.stdout)["workers"]
    assert (found["worker"], found["state"]) == ("played", "stale")
    assert found["problem"] == "its status was last renewed 8 min ago"
    assert found["status"]["engine"] == ENGINE
    assert found["health"] == {"queue": 3}
    assert result.returncode == 4  # what was not renewed is not online


@pytest.mark.broker
def test_no_broker_no_worker_and_no_permission_have_codes(
    broker: Mosquitto, guarded: Mosquitto, environment: dict[str, str]
) -> None:
    nobody = lmd("status", "--port", str(broker.port), "--timeout", "0.2", environment=environment)
    assert (nobody.returncode, nobody.stdout) == (4, b"")
    assert b"there is no worker under llm/status/#" in nobody.stderr
    assert lmd("status", "--port", str(free_port()), environment=environment).returncode == 3
    anonymous = lmd("status", "--port", str(guarded.port), environment=environment)
    assert anonymous.returncode == 3


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
FIELDS = ["state", "ts", "every_s", "reason", "engine", "slots", "queue", "models"]


@given(st.text(), st.dictionaries(st.sampled_from(FIELDS), JSON), st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_whatever_a_worker_says_of_itself_makes_one_harmless_line(
    worker: str, status: dict[str, Any], health: dict[str, Any]
) -> None:
    for cell in describe(worker, status, health, now=1.7e9).cells():
        assert one_line(cell) == cell
