"""A worker whose engine falls asleep while nobody asks: what is told of it, who wakes it, and what an operator can do."""

from __future__ import annotations

import pytest

from llamacpp_mqtt_deploy.checking.engine import check_engine
from llamacpp_mqtt_deploy.commands.status import describe
from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus


def told_asleep(bus: Bus) -> dict[str, object]:
    """The first status that says that the engine sleeps."""
    found: list[dict[str, object]] = []

    def came() -> bool:
        bus.listener.pull(0.05)
        found[:] = [
            event for event in bus.listener.events if (event.get("engine") or {}) and _state_of(event) == "asleep"
        ]
        return bool(found)

    eventually(came)
    return found[0]


def _state_of(event: dict[str, object]) -> object:
    engine = event.get("engine")
    return engine.get("state") if isinstance(engine, dict) else None


def test_a_request_wakes_the_engine_and_is_told_that_it_loads(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine)
    bus.admin("unload", transaction="t1")
    assert bus.listener.until(action="unload")["status"] == "ok"
    assert told_asleep(bus)["state"] == "online"
    bus.ask("one", request_id="r1")
    assert bus.listener.until(type="queued", request_id="r1")["reason"] == "loading"
    assert bus.listener.terminal("r1")["type"] == "done"
    assert engine.wakes == 1


def test_a_status_of_one_that_sleeps_tells_the_same_models_and_limits(bus: Bus) -> None:
    engine = ScriptedEngine(model="m1", further_models=("m2",))
    bus.worker(engine)
    awake = bus.listener.until(_topic="llm/status/w1", state="online", models=["m1", "m2"], slots=2)
    engine.become("asleep")
    asleep = told_asleep(bus)
    for field in ("models", "model", "n_ctx", "slots", "capabilities", "limits", "routes"):
        assert asleep[field] == awake[field]
    assert "problem" not in asleep
    row = describe("w1", asleep, {}, now=float(str(asleep["ts"])))
    assert (row.state, row.engine, row.problem) == ("online", "asleep/script", "")


def test_a_reload_while_it_sleeps_keeps_the_models_that_requests_may_name(bus: Bus) -> None:
    engine = ScriptedEngine(model="m1", further_models=("m2",))
    worker = bus.worker(engine)
    bus.listener.until(_topic="llm/status/w1", models=["m1", "m2"])
    engine.become("asleep")
    told_asleep(bus)
    worker.daemon._loaded.overrides.update({"limits.queue_size": "7"})  # type: ignore[attr-defined]
    bus.admin("reload")
    bus.listener.until(action="reload", changed=["limits.queue_size"])
    bus.ask("one", request_id="r1", model="m2")
    assert bus.listener.terminal("r1")["type"] == "done"
    assert engine.calls[-1].model == "m2"


def test_a_worker_whose_engine_sleeps_before_the_broker_comes_is_ready_all_the_same(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.become("asleep")
    worker = bus.worker(engine, wait=False)
    eventually(lambda: worker.daemon.ready)
    assert engine.wakes == 0


def test_what_waits_for_a_slot_while_it_wakes_is_told_that_it_loads(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    engine.become("asleep")
    eventually(lambda: worker.daemon.parts.registry.wait_reason == "loading")


def test_nothing_is_unloaded_under_a_request(bus: Bus) -> None:
    engine, gate = ScriptedEngine(slots=1), Gate()
    engine.play("one", gate)
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    eventually(gate.reached.is_set)
    bus.admin("unload")
    refused = bus.listener.until(action="unload")
    assert (refused["status"], refused["code"]) == ("error", "busy")
    gate.open()
    assert bus.listener.terminal("r1")["type"] == "done"
    assert engine.info().state == "ready"


def test_an_operator_keeps_it_awake_and_takes_that_back(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(engine)
    engine.become("asleep")
    bus.admin("keep_awake", seconds=60)
    ack = bus.listener.until(action="keep_awake")
    assert (ack["keep_awake"], ack["seconds"], engine.wakes) == (True, 60, 1)
    bus.admin("keep_awake", seconds=0)
    assert bus.listener.until(action="keep_awake", keep_awake=False)["status"] == "ok"
    bus.sender.publish("llm/admin/w1", b"keep_awake forever")
    assert "seconds" in bus.listener.until(_topic="llm/admin-reply/w1", status="error")["fields"]
    assert not engine.info().kept_awake


@pytest.mark.parametrize("action", ["unload", "keep_awake"])
def test_an_engine_that_never_sleeps_says_so(bus: Bus, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    monkeypatch.setattr(engine, "unload", lambda: "unsupported")
    monkeypatch.setattr(engine, "keep_awake", lambda seconds: False)
    bus.worker(engine)
    bus.admin(action)
    assert bus.listener.until(action=action)["code"] == "unsupported"


def test_an_operator_chooses_the_model_of_requests_that_name_none(bus: Bus) -> None:
    engine = ScriptedEngine(model="m1", further_models=("m2",))
    worker = bus.worker(engine, engine__model="m1", engine__aliases={"small": "m2"})
    bus.listener.until(_topic="llm/status/w1", model="m1", models=["m1", "m2", "small"])
    bus.admin("model", model="small")
    assert bus.listener.until(action="model")["model"] == "m2"
    bus.listener.until(_topic="llm/status/w1", model="m2")
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    assert engine.calls[-1].model == "m2"
    bus.ask("two", request_id="r2", model="m1")
    bus.listener.terminal("r2")
    assert engine.calls[-1].model == "m1"
    bus.admin("model", model="m3")
    refused = bus.listener.until(action="model", status="error")
    assert (refused["code"], "m1" in refused["fields"]["model"]) == ("model_not_found", True)
    bus.admin("reload")  # the file says m1
    assert "engine.model" in bus.listener.until(action="reload")["changed"]
    assert worker.daemon.parts.in_force.settings.engine.model == "m1"


def test_a_route_that_names_its_model_goes_before_the_operators_choice(bus: Bus) -> None:
    bus.worker(ScriptedEngine(model="m1", further_models=("m2",)), routes__default__model="m1")
    bus.listener.until(_topic="llm/status/w1", models=["m1", "m2"])
    bus.admin("model", model="m2")
    assert bus.listener.until(action="model")["code"] == "unsupported"


def test_the_check_takes_an_engine_that_sleeps_for_a_sound_one() -> None:
    running = {"state": "online", "engine": {"state": "asleep", "kind": "managed"}}
    findings = {
        each.name: each for each in check_engine(EngineSettings(kind="managed"), generate=True, running=running)
    }
    found = findings["engine.reachable"]
    assert (found.verdict, "the next request wakes it" in found.text) == ("ok", True)
