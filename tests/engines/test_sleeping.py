"""The engine that ends its server while nobody asks, and starts it again for the next request; with real servers."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings, ManagedSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished, Text
from llamacpp_mqtt_deploy.core.errors import EngineUnavailable, ShuttingDown
from llamacpp_mqtt_deploy.engines.managed import verdicts
from llamacpp_mqtt_deploy.engines.managed.idleness import Idleness
from llamacpp_mqtt_deploy.engines.managed.managed_engine import ManagedEngine
from llamacpp_mqtt_deploy.engines.managed.stalling import Vigilance
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal
from tests.support.waiting import eventually

ALERT = Vigilance(busy_every_s=0.1, idle_every_s=0.1, answer_within_s=0.5, deaf_after_s=0.5, stuck_after_s=1.0)

Make = Callable[..., ManagedEngine]


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        monkeypatch.setenv("RUNTIME_DIRECTORY", folder)
        monkeypatch.setenv("PATH", "/nonexistent")
        yield Path(folder)


@pytest.fixture
def make(tiny_gguf: Path) -> Iterator[Make]:
    """Open an engine over a copy-less tiny model that sleeps after so many seconds."""
    engines: list[ManagedEngine] = []

    def build(sleep_after_s: float, *, vigilance: Vigilance | None = None, **settings: Any) -> ManagedEngine:
        wishes: dict[str, Any] = {
            "model_path": tiny_gguf,
            "slots": 2,
            "context_tokens": 16384,
            "threads": 1,
            "unavailable_after_s": 20.0,
        }
        managed = ManagedSettings(
            extra_args=("--no-warmup", "--reasoning", "off"), cache_ram_mib=16, sleep_after_s=sleep_after_s
        )
        engine = ManagedEngine(
            EngineSettings(kind="managed", managed=managed, **(wishes | settings)), vigilance=vigilance
        )
        engines.append(engine)
        engine.open()
        assert engine.wait_ready(StopSignal(), 30), engine.info()
        return engine

    yield build
    for engine in engines:
        engine.close(Deadline(1))


def say(**sampling: object) -> EngineCall:
    return EngineCall(messages=[{"role": "user", "content": "the water"}], sampling={"seed": 7, **sampling})


SHORT = say(max_tokens=4)
ENDLESS = say(max_tokens=16000)


class Run(threading.Thread):
    """A generation in a thread of its own, with what came of it."""

    def __init__(self, engine: ManagedEngine, call: EngineCall = SHORT) -> None:
        super().__init__(name="generation", daemon=True)
        self.stop = StopSignal()
        self.deltas: list[Delta] = []
        self.waits: list[str] = []
        self.error: BaseException | None = None
        self._engine = engine
        self._call = call
        self.start()

    def run(self) -> None:
        try:
            for delta in self._engine.stream(self._call, stop=self.stop, on_wait=self.waits.append):
                self.deltas.append(delta)
        except BaseException as error:  # noqa: BLE001 - whatever came is what the test looks at
            self.error = error

    def speaks(self) -> bool:
        return any(isinstance(delta, Text) for delta in self.deltas)

    def ended(self, timeout_s: float = 20) -> BaseException | None:
        self.join(timeout_s)
        assert not self.is_alive()
        return self.error

    def answered(self) -> bool:
        assert self.ended() is None, self.error
        return isinstance(self.deltas[-1], Finished)


def pid_of(engine: ManagedEngine) -> int:
    life = engine._life
    assert life is not None
    return life.child.pid


def state_of(engine: ManagedEngine) -> str:
    return engine.info().state


def put_to_sleep(engine: ManagedEngine) -> int:
    """Unload; the id of the process that is gone then."""
    pid = pid_of(engine)
    assert engine.unload() == "done"
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    return pid


# --- when ----------------------------------------------------------------------------------------------------------------


def test_the_time_until_sleep_counts_from_the_last_call_and_stands_still_during_one() -> None:
    idleness = Idleness(60.0)
    idleness.ready(100.0)
    assert idleness.left_s(130.0) == 30.0
    idleness.begin()
    idleness.begin()
    assert idleness.left_s(1000.0) == math.inf
    idleness.end(1000.0)
    assert idleness.left_s(1000.0) == math.inf
    idleness.end(1010.0)
    assert idleness.left_s(1010.0) == 60.0
    assert idleness.left_s(2000.0) == 0.0
    never = Idleness(0)
    never.ready(0.0)
    assert never.left_s(1e9) == math.inf


def test_what_is_kept_awake_sleeps_when_that_time_is_over() -> None:
    idleness = Idleness(60.0)
    idleness.ready(0.0)
    idleness.keep_awake(600, 10.0)
    assert (idleness.kept_awake(609.9), idleness.kept_awake(610.0)) == (True, False)
    assert idleness.left_s(100.0) == 510.0
    idleness.keep_awake(None, 100.0)
    assert idleness.left_s(1e9) == math.inf
    idleness.keep_awake(0, 200.0)
    assert idleness.left_s(200.0) == 0.0


# --- the process -----------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_an_idle_server_ends_and_the_next_request_starts_it_again(make: Make) -> None:
    engine = make(0.3)
    known = engine.probe()
    pid = pid_of(engine)
    eventually(lambda: state_of(engine) == "asleep", 5)
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    asleep = engine.probe()
    assert (asleep.state, asleep.detail, asleep.problem) == ("asleep", "", "")
    assert (asleep.models, asleep.n_ctx, asleep.slots) == (known.models, known.n_ctx, known.slots)
    assert (asleep.tools, asleep.thinking, asleep.backend) == (known.tools, known.thinking, known.backend)
    run = Run(engine)
    assert run.answered()
    assert run.waits == ["loading"]
    eventually(lambda: state_of(engine) == "asleep", 5)  # and so on


@pytest.mark.engine
def test_neither_probes_nor_the_watch_wake_it_or_keep_it_awake(make: Make) -> None:
    engine = make(1.0, vigilance=ALERT)
    started = time.monotonic()
    while state_of(engine) == "ready":
        engine.probe()
        assert time.monotonic() - started < 10
    assert state_of(engine) == "asleep"
    calm = threading.Event()
    for _ in range(20):  # several rounds of the watch and of its limits
        assert engine.probe().state == "asleep"
        assert engine.count_tokens(SHORT, stop=StopSignal()) is None
        calm.wait(0.05)
    assert (state_of(engine), engine._life) == ("asleep", None)


@pytest.mark.engine
def test_it_does_not_fall_asleep_under_a_long_answer(make: Make) -> None:
    engine = make(0.3)
    run = Run(engine, ENDLESS)
    eventually(run.speaks)
    pid = pid_of(engine)
    calm = threading.Event()
    for _ in range(15):
        calm.wait(0.1)
        assert (state_of(engine), pid_of(engine)) == ("ready", pid)
    assert engine.unload() == "busy"
    run.stop.set("cancelled")
    assert isinstance(run.ended(), Stopped)
    eventually(lambda: state_of(engine) == "asleep", 5)


@pytest.mark.engine
def test_a_request_that_comes_while_it_falls_asleep_is_answered(make: Make) -> None:
    engine = make(0)
    with_the_lock = [pid_of(engine)]
    for _ in range(3):
        assert engine.unload() == "done"
        run = Run(engine)  # its process has just been told to end, and runs yet
        assert run.answered()
        assert set(run.waits) == {"loading"}
        assert pid_of(engine) not in with_the_lock
        with_the_lock.append(pid_of(engine))


@pytest.mark.engine
def test_two_requests_wake_it_once(make: Make) -> None:
    engine = make(0)
    put_to_sleep(engine)
    runs = [Run(engine) for _ in range(4)]
    assert all(run.answered() for run in runs)
    assert [run.waits for run in runs] == [["loading"]] * 4
    pid = pid_of(engine)
    put_to_sleep(engine)
    assert not Path(f"/proc/{pid}").exists()
    calm = threading.Event()
    calm.wait(0.3)
    assert (state_of(engine), engine._life) == ("asleep", None)  # nothing was left that starts it once more


@pytest.mark.engine
def test_a_cancel_while_it_wakes_ends_the_request_and_it_sleeps_again(make: Make) -> None:
    engine = make(0.3)
    eventually(lambda: state_of(engine) == "asleep", 5)
    run = Run(engine)
    eventually(lambda: run.waits == ["loading"])
    run.stop.set("cancelled")
    assert isinstance(run.ended(), Stopped)
    eventually(lambda: state_of(engine) == "ready", 10)
    eventually(lambda: state_of(engine) == "asleep", 5)


@pytest.mark.engine
def test_it_closes_while_it_sleeps_and_while_it_wakes(make: Make) -> None:
    sleeping = make(0)
    put_to_sleep(sleeping)
    started = time.monotonic()
    sleeping.close(Deadline(5))
    assert time.monotonic() - started < 1
    waking = make(0)
    put_to_sleep(waking)
    run = Run(waking)
    eventually(lambda: run.waits == ["loading"])
    waking.close(Deadline(5))
    assert isinstance(run.ended(), ShuttingDown)
    assert waking._life is None


@pytest.mark.engine
def test_one_that_cannot_wake_says_so_and_is_tried_again_with_pauses(
    make: Make, tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(verdicts, "FIRST_FAILED_PAUSE_S", 0.1)
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_gguf.read_bytes())
    engine = make(0, model_path=model)
    put_to_sleep(engine)
    model.write_bytes(b"this is no model" * 100)
    run = Run(engine)
    error = run.ended(30)
    assert isinstance(error, EngineUnavailable)
    assert (run.waits[0], engine.info().state) == ("loading", "failed")
    assert "cannot load the model" in engine.info().detail
    model.write_bytes(tiny_gguf.read_bytes())
    eventually(lambda: state_of(engine) == "ready", 20)
    assert Run(engine).answered()


@pytest.mark.engine
def test_a_crash_while_it_is_awake_is_no_sleep(make: Make) -> None:
    engine = make(30)
    os.kill(pid_of(engine), signal.SIGKILL)
    eventually(lambda: state_of(engine) == "restarting")
    assert engine.unload() == "away"
    assert engine.wait_ready(StopSignal(), 10)


@pytest.mark.engine
def test_keep_awake_wakes_it_and_holds_it_until_the_time_is_over(make: Make) -> None:
    engine = make(0.2)
    eventually(lambda: state_of(engine) == "asleep", 5)
    assert engine.keep_awake(None)
    eventually(lambda: state_of(engine) == "ready", 10)
    calm = threading.Event()
    for _ in range(15):
        calm.wait(0.1)
        assert (state_of(engine), engine.info().kept_awake) == ("ready", True)
    assert engine.keep_awake(0.3)
    eventually(lambda: state_of(engine) == "asleep", 5)
    assert not engine.info().kept_awake
    assert engine.keep_awake(0)  # takes it back, which is no reason to wake
    assert state_of(engine) == "asleep"


@pytest.mark.engine
def test_the_last_word_counts_between_unload_and_keep_awake(make: Make) -> None:
    engine = make(0)
    assert engine.keep_awake(None)
    assert engine.unload() == "done"
    assert (state_of(engine), engine.info().kept_awake) == ("asleep", False)
    assert engine.keep_awake(None)
    eventually(lambda: state_of(engine) == "ready", 10)


@pytest.mark.engine
def test_a_restart_of_one_that_sleeps_starts_it(make: Make) -> None:
    engine = make(0)
    pid = put_to_sleep(engine)
    assert engine.restart()
    eventually(lambda: state_of(engine) == "ready", 10)
    assert pid_of(engine) != pid
    put_to_sleep(engine)
    assert state_of(engine) == "asleep"
