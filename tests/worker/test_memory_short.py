"""The worker's own memory is not enough for one request: that one ends with a sentence that says so, the status tells it, others go on."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.service import shortages
from llamacpp_mqtt_deploy.worker import intake
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.control import Controls
from llamacpp_mqtt_deploy.worker.prompting import PromptBuilder
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus


def _starve(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    patch.setattr(owner, name, no_memory)


def _problem(bus: Bus) -> str:
    while bus.listener.pull(0.0) is not None:
        pass
    told = [event for event in bus.listener.events if event["_topic"] == "llm/status/w1"]
    return str(told[-1].get("problem", ""))


@pytest.mark.parametrize(
    "owner, name",
    [(intake, "read_request"), (PromptBuilder, "build"), (Completion, "_done_fields")],
    ids=["reading", "running", "ending"],
)
def test_a_request_that_needs_too_much_memory_ends_with_a_sentence_and_the_status_tells_it(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    monkeypatch.setattr(shortages, "STARVED_FOR_S", 2.0)
    worker = bus.worker()
    with capture_logs() as lines, monkeypatch.context() as patch:
        _starve(patch, owner, name)
        bus.ask("much", request_id="r1")
        end = bus.listener.terminal("r1")
    assert (end["code"], end["retryable"]) == ("internal", False)
    assert "ran out of memory" in end["message"]
    assert [line["event"] for line in lines if line["log_level"] == "error"].count("request.out_of_memory") == 1
    eventually(lambda: "ran out of memory on 1 request since" in _problem(bus))
    assert worker.daemon.parts.registry.load().busy == 0
    bus.ask("little", request_id="r2")
    assert bus.listener.terminal("r2")["full_content"] == "little"
    eventually(lambda: not _problem(bus))


def test_a_control_that_needs_too_much_memory_is_answered_with_an_error(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus.worker()
    with monkeypatch.context() as patch:
        _starve(patch, Controls, "_begin")
        bus.control("history", transaction="t1")
        ack = bus.listener.until(type="ack", status="error")
    assert ack["code"] == "internal"
    assert "ran out of memory" in ack["message"]
    bus.control("ping", transaction="t2")
    assert bus.listener.until(type="ack", transaction="t2")["status"] == "ok"
