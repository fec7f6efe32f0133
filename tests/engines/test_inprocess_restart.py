"""A restart of the in-process engine while a call is being planned; model and library are stand-ins."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typing_extensions import override

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import EngineCall, Finished, TokenUsage
from llamacpp_mqtt_deploy.core.errors import EngineLost
from llamacpp_mqtt_deploy.engines.inprocess import generating, inprocess_engine, opening, planning
from llamacpp_mqtt_deploy.engines.inprocess.inprocess_engine import InprocessEngine
from llamacpp_mqtt_deploy.engines.slots import Slots
from llamacpp_mqtt_deploy.stopping import Deadline, StopSignal

CALL = EngineCall(messages=[{"role": "user", "content": "hi"}])


class World:
    """An engine whose first planner restarts it in the middle of a plan; the plan is handed over when the next model is loaded."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.planners: list[Any] = []
        self.served: list[int] = []
        library = SimpleNamespace(can_offload=lambda: False, gpu_layers=0)
        model = SimpleNamespace(library=library, close=lambda: None)
        context = SimpleNamespace(n_ctx=64, close=lambda: None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
        monkeypatch.setattr(opening, "load", lambda *_: (model, "m"))
        monkeypatch.setattr(opening, "make_context", lambda *_: context)
        monkeypatch.setattr(planning, "Planner", self._planner)
        monkeypatch.setattr(generating, "GenerationLoop", self._loop)
        monkeypatch.setattr(inprocess_engine, "Slots", self._slots)
        self.engine = InprocessEngine(EngineSettings(kind="inprocess", model_path=path))

    def _planner(self, _model: object, **_: object) -> Any:
        number = len(self.planners)

        def plan(_call: EngineCall) -> Any:
            if number == 0:
                assert self.engine.restart()
            return SimpleNamespace(number=number, chunk_timeout_s=30)

        template = SimpleNamespace(tool_style=None, thinking_tags=None)
        self.planners.append(SimpleNamespace(name="m", n_ctx=64, template=template, plan=plan))
        return self.planners[-1]

    def _loop(self, run: Any, *_: object) -> Any:
        def perform() -> None:
            self.served.append(run.plan.number)
            run.give([Finished("stop", TokenUsage())])

        return SimpleNamespace(perform=perform)

    def _slots(self, number: int) -> Slots:
        world = self

        class Late(Slots):
            @override
            def acquire(self, stop: StopSignal, timeout_s: float | None = None) -> bool:
                world.until_loaded_again()
                return super().acquire(stop, timeout_s)

        return Late(number)

    def until_loaded_again(self) -> None:
        """The second model is there and its planner in use."""
        stop = StopSignal()
        while len(self.planners) < 2 or not self.engine.wait_ready(stop, 30):
            stop.wait(0.001)


def test_a_call_that_was_planned_for_a_model_that_is_gone_is_not_given_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "m.gguf", monkeypatch)
    world.engine.open()
    try:
        with pytest.raises(EngineLost):
            list(world.engine.stream(CALL, stop=StopSignal(), on_wait=lambda _: None))
        assert world.served == []
        assert isinstance(list(world.engine.stream(CALL, stop=StopSignal(), on_wait=lambda _: None))[-1], Finished)
        assert world.served == [1]
    finally:
        world.engine.close(Deadline(5))
