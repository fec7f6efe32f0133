"""The engine that starts its own server: real crashes, hangs and wrong files, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from llamacpp_mqtt_deploy.config.settings import EngineSettings, ManagedSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished, Text
from llamacpp_mqtt_deploy.core.errors import EngineLost, EngineUnavailable, ShuttingDown
from llamacpp_mqtt_deploy.engines.managed import verdicts
from llamacpp_mqtt_deploy.engines.managed.managed_engine import ManagedEngine
from llamacpp_mqtt_deploy.engines.managed.stalling import Vigilance
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal
from tests.support.fake_llama_server import FakeLlamaServer, write_fake_llama_server
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

ALERT = Vigilance(busy_every_s=0.1, idle_every_s=0.1, answer_within_s=0.5, deaf_after_s=0.5, stuck_after_s=1.0)
"""A watch whose limits fit a test."""

Make = Callable[..., ManagedEngine]


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What systemd gives, with a path short enough for a socket; and no llama-server of this machine in sight."""
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        monkeypatch.setenv("RUNTIME_DIRECTORY", folder)
        monkeypatch.setenv("PATH", "/nonexistent")
        yield Path(folder)


@pytest.fixture
def make(tiny_gguf: Path) -> Iterator[Make]:
    """Open an engine over the tiny model; `binary` and `extra_args` are those of `engine.managed`."""
    engines: list[ManagedEngine] = []

    def build(
        *,
        vigilance: Vigilance | None = None,
        binary: Path | None = None,
        extra_args: tuple[str, ...] = ("--no-warmup", "--reasoning", "off"),
        ready: bool = True,
        **settings: Any,
    ) -> ManagedEngine:
        wishes: dict[str, Any] = {
            "model_path": tiny_gguf,
            "slots": 2,
            "context_tokens": 16384,
            "batch_tokens": 64,
            "threads": 1,
            "unavailable_after_s": 20.0,
        }
        server = ManagedSettings(binary=binary, extra_args=extra_args, cache_ram_mib=16)
        engine = ManagedEngine(
            EngineSettings(kind="managed", managed=server, **(wishes | settings)), vigilance=vigilance
        )
        engines.append(engine)
        engine.open()
        if ready:
            assert engine.wait_ready(StopSignal(), 30), engine.info()
        return engine

    yield build
    for engine in engines:
        engine.close(Deadline(1))


def say(text: str = "the water", **sampling: object) -> EngineCall:
    return EngineCall(messages=[{"role": "user", "content": text}], sampling={"seed": 7, **sampling})


SHORT = say(max_tokens=4)
ENDLESS = say(max_tokens=16000)


def play(engine: ManagedEngine, call: EngineCall = SHORT, waits: list[str] | None = None) -> list[Delta]:
    return list(engine.stream(call, stop=StopSignal(), on_wait=(waits if waits is not None else []).append))


class Run(threading.Thread):
    """A generation in a thread of its own, with what came of it."""

    def __init__(self, engine: ManagedEngine, call: EngineCall = ENDLESS) -> None:
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

    def ended(self, timeout_s: float = 10) -> BaseException | None:
        self.join(timeout_s)
        assert not self.is_alive()
        return self.error


def pid_of(engine: ManagedEngine) -> int:
    life = engine._life
    assert life is not None
    return life.child.pid


def runs(pid: int) -> bool:
    """The process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def state_of(engine: ManagedEngine) -> str:
    return engine.info().state


# --- life ------------------------------------------------------------------------------------------------------------


def test_it_starts_a_server_and_answers(make: Make) -> None:
    engine = make()
    assert isinstance(play(engine)[-1], Finished)
    info = engine.probe()
    assert (info.state, info.kind, info.slots, info.n_ctx, info.backend) == ("ready", "managed", 2, 16384, "cpu")
    assert info.models == ("tiny.gguf",)


def test_a_request_that_comes_while_it_loads_waits_and_is_answered(make: Make) -> None:
    engine = make(ready=False)
    waits: list[str] = []
    assert isinstance(play(engine, waits=waits)[-1], Finished)
    assert waits[:1] == ["loading"]


def test_the_key_is_on_no_command_line_and_our_secrets_are_not_in_its_environment(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMD_MQTT__PASSWORD", "hunter2")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    engine = make()
    process = Path(f"/proc/{pid_of(engine)}")
    environment = process.joinpath("environ").read_bytes()
    assert engine._key.encode() not in process.joinpath("cmdline").read_bytes()
    assert f"LLAMA_API_KEY={engine._key}".encode() in environment
    assert b"hunter2" not in environment
    assert b"NOTIFY_SOCKET" not in environment


def test_nobody_else_gets_at_the_server(make: Make, runtime_directory: Path) -> None:
    engine = make()
    [folder] = runtime_directory.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    endpoint = engine._endpoint
    assert endpoint is not None
    stranger = ServerEngine(EngineSettings(url=endpoint.url))
    assert "API key" in stranger.probe().detail


def test_the_terminals_interrupt_does_not_reach_the_server(make: Make) -> None:
    pid = pid_of(make())
    assert os.getsid(pid) != os.getsid(0)
    assert os.getpgid(pid) == pid


def test_the_server_dies_before_the_worker_when_memory_is_short(make: Make) -> None:
    assert Path(f"/proc/{pid_of(make())}/oom_score_adj").read_text().strip() == "500"


def test_further_arguments_come_last(make: Make) -> None:
    engine = make(extra_args=("--no-warmup", "--threads-http", "3"))
    arguments = Path(f"/proc/{pid_of(engine)}/cmdline").read_bytes().decode().split("\0")
    assert arguments[-4:-1] == ["--no-warmup", "--threads-http", "3"]


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_crash_in_the_middle_of_eight_streams_ends_them_and_the_next_request_is_answered(make: Make) -> None:
    engine = make(slots=8)
    streams = [Run(engine) for _ in range(8)]
    eventually(lambda: all(stream.speaks() for stream in streams), 20)
    pid = pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    assert [type(stream.ended()) for stream in streams] == [EngineLost] * 8
    waits: list[str] = []
    assert isinstance(play(engine, waits=waits)[-1], Finished)
    assert time.monotonic() - started < 5
    assert "engine_restarting" in waits
    assert not Path(f"/proc/{pid}").exists()


def test_a_crash_while_idle_is_noticed_and_told(make: Make) -> None:
    engine = make()
    pid = pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: state_of(engine) == "restarting")
    assert "SIGKILL from outside" in engine.info().detail
    assert "lack of memory" in engine.info().detail
    assert engine.wait_ready(StopSignal(), 10)
    assert pid_of(engine) != pid
    assert "once for lack of memory" in engine.info().problem


def test_crashes_in_a_row_are_answered_with_longer_pauses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "FIRST_PAUSE_S", 0.05)
    engine = make()
    pauses = []
    for _ in range(3):
        os.kill(pid_of(engine), signal.SIGSEGV)
        eventually(lambda: state_of(engine) == "restarting")
        pauses.append(engine.info().detail.partition("again in ")[2].partition(" s.")[0])
        assert engine.wait_ready(StopSignal(), 10)
    assert pauses == ["0.05", "0.1", "0.2"]


def test_a_file_that_is_no_model_is_told_and_a_restart_tries_the_new_one(
    make: Make, tmp_path: Path, tiny_gguf: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"this is no model" * 100)
    engine = make(model_path=path, ready=False)
    eventually(lambda: state_of(engine) == "failed", 20)
    assert "exit code 1" in engine.info().detail
    assert "engine.model_path" in engine.info().detail
    assert "invalid magic" in engine.info().detail or "failed to load model" in engine.info().detail
    with pytest.raises(EngineUnavailable):
        play(engine)
    path.write_bytes(tiny_gguf.read_bytes())
    assert engine.restart()
    assert engine.wait_ready(StopSignal(), 10)


def test_an_argument_that_the_server_does_not_know_is_told(make: Make) -> None:
    engine = make(extra_args=("--frobnicate",), ready=False)
    eventually(lambda: state_of(engine) == "failed", 20)
    assert "unrecognized arguments: --frobnicate" in engine.info().detail


def test_a_server_that_dies_whenever_it_starts_is_a_failure(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "FIRST_PAUSE_S", 0.01)
    fake = write_fake_llama_server(tmp_path, dies=signal.SIGABRT, says="GGML_ASSERT(n_tokens > 0) failed")
    engine = make(binary=fake.path, ready=False)
    eventually(lambda: state_of(engine) == "failed", 20)
    assert "SIGABRT" in engine.info().detail
    assert "GGML_ASSERT(n_tokens > 0) failed" in engine.info().detail
    assert len(fake.runs) == verdicts.FAILED_AFTER_CRASHES


def test_a_cancel_ends_the_wait_for_a_restart(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "FIRST_PAUSE_S", 30.0)
    engine = make()
    os.kill(pid_of(engine), signal.SIGKILL)
    eventually(lambda: state_of(engine) == "restarting")
    run = Run(engine)
    eventually(lambda: run.waits == ["engine_restarting"])
    run.stop.set("cancelled")
    assert isinstance(run.ended(0.5), Stopped)


def test_a_request_gives_up_on_a_restart_that_takes_too_long(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "FIRST_PAUSE_S", 30.0)
    engine = make(unavailable_after_s=0.2)
    os.kill(pid_of(engine), signal.SIGKILL)
    eventually(lambda: state_of(engine) == "restarting")
    with pytest.raises(EngineUnavailable):
        play(engine)


# --- hangs -----------------------------------------------------------------------------------------------------------


def test_a_server_that_answers_nothing_is_killed_and_started_again(make: Make) -> None:
    engine = make(vigilance=ALERT)
    stream = Run(engine)
    eventually(stream.speaks)
    pid = pid_of(engine)
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), 10)
    assert isinstance(stream.ended(), EngineLost)
    assert engine.wait_ready(StopSignal(), 10)
    assert isinstance(play(engine)[-1], Finished)


@pytest.mark.parametrize(
    "wish, why",
    [({"slots_move": False}, "does not move"), ({"slots_silent": True}, "decoding thread answers nothing")],
    ids=["unmoved", "silent"],
)
def test_a_server_whose_decoding_hangs_is_killed_and_started_again(
    make: Make, tmp_path: Path, wish: dict[str, Any], why: str
) -> None:
    fake = write_fake_llama_server(tmp_path, ignores_sigterm=True, **wish)
    with structlog.testing.capture_logs() as lines:
        engine = make(vigilance=ALERT, binary=fake.path, slots=1)
        stream = Run(engine)
        assert isinstance(stream.ended(20), EngineLost)
        eventually(lambda: len(fake.runs) == 2)
    [hung] = [line for line in lines if line["event"] == "llama_server.hung"][:1]
    assert why in hung["problem"]


def test_a_server_that_works_long_is_left_alone(make: Make, tmp_path: Path) -> None:
    fake = write_fake_llama_server(tmp_path)
    engine = make(vigilance=ALERT, binary=fake.path, slots=1)
    stream = Run(engine)
    eventually(stream.speaks)
    stream.join(2 * ALERT.stuck_after_s)
    assert stream.is_alive()
    assert len(fake.runs) == 1
    stream.stop.set("cancelled")
    stream.ended()


# --- endings ---------------------------------------------------------------------------------------------------------


def test_a_restart_ends_running_streams_and_brings_a_new_server(make: Make) -> None:
    engine = make()
    stream = Run(engine)
    eventually(stream.speaks)
    pid = pid_of(engine)
    assert engine.restart()
    assert isinstance(stream.ended(), EngineLost)
    assert engine.wait_ready(StopSignal(), 10)
    assert pid_of(engine) != pid
    assert isinstance(play(engine)[-1], Finished)


def test_a_server_that_ignores_sigterm_is_killed_at_a_restart(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = write_fake_llama_server(tmp_path, ignores_sigterm=True)
    engine = make(binary=fake.path, slots=1)
    monkeypatch.setattr(engine, "_kill_after_s", 0.2)
    assert engine.restart()
    eventually(lambda: len(fake.runs) == 2)
    assert engine.wait_ready(StopSignal(), 10)


@pytest.mark.parametrize("stubborn", [False, True], ids=["wheel", "ignores-sigterm"])
def test_it_closes_in_time_with_an_open_stream_and_leaves_nothing_behind(
    make: Make, runtime_directory: Path, tmp_path: Path, stubborn: bool
) -> None:
    engine = make(binary=write_fake_llama_server(tmp_path, ignores_sigterm=True).path, slots=1) if stubborn else make()
    stream = Run(engine)
    eventually(stream.speaks)
    pid = pid_of(engine)
    started = time.monotonic()
    engine.close(Deadline(2))
    assert time.monotonic() - started < 2
    assert isinstance(stream.ended(), ShuttingDown)
    assert not Path(f"/proc/{pid}").exists()
    assert list(runtime_directory.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name in ("engine-supervisor", "engine-watcher")]
    assert state_of(engine) == "closed"
    assert not engine.restart()
    with pytest.raises(ShuttingDown):
        play(engine)
    engine.close(Deadline(2))


def test_it_closes_at_once_while_it_waits_for_the_next_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "FIRST_PAUSE_S", 30.0)
    engine = make()
    os.kill(pid_of(engine), signal.SIGKILL)
    eventually(lambda: state_of(engine) == "restarting")
    started = time.monotonic()
    engine.close(Deadline(5))
    assert time.monotonic() - started < 1


def test_an_engine_that_was_never_opened_can_be_closed(tiny_gguf: Path) -> None:
    ManagedEngine(EngineSettings(kind="managed", model_path=tiny_gguf)).close(Deadline(1))


WORKER = """
import sys, threading
from pathlib import Path
import structlog
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
from llamacpp_mqtt_deploy.engines.managed.managed_engine import ManagedEngine
from llamacpp_mqtt_deploy.config.settings import EngineSettings, ManagedSettings
from llamacpp_mqtt_deploy.stopping import StopSignal

binary = Path(sys.argv[2]) if len(sys.argv) > 2 else None
engine = ManagedEngine(EngineSettings(kind="managed", model_path=Path(sys.argv[1]), slots=1, threads=1, context_tokens=512,
                                      managed=ManagedSettings(binary=binary)))
threading.Thread(target=engine.open).start()  # a thread that ends: the server must not end with it
assert engine.wait_ready(StopSignal(), 30)
print(engine._life.child.pid, flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("program", ["wheel", "binary"])
def test_no_server_is_left_when_the_worker_is_killed(program: str, tiny_gguf: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_gguf)]
    if program == "binary":
        arguments.append(str(write_fake_llama_server(tmp_path).path))
    with subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        assert runs(pid)
        worker.kill()
    eventually(lambda: not runs(pid), 5)


# --- programs --------------------------------------------------------------------------------------------------------


def arguments_of(fake: FakeLlamaServer) -> list[str]:
    return list(fake.runs[-1]["argv"])


def test_flags_that_an_old_server_does_not_know_are_left_out(make: Make, tmp_path: Path) -> None:
    fake = write_fake_llama_server(tmp_path)
    with structlog.testing.capture_logs() as lines:
        engine = make(binary=fake.path, slots=1, flash_attention="on")
    arguments = arguments_of(fake)
    assert "--cache-ram" not in arguments
    assert "--no-kv-unified" not in arguments
    assert arguments[arguments.index("--n-gpu-layers") + 1] == "999"
    assert arguments[arguments.index("--flash-attn") + 1].startswith("-"), "this one takes no value"
    [told] = [line for line in lines if line["event"] == "llama_server.flags_left_out"]
    assert "--cache-ram" in told["flags"]
    assert engine.info().state == "ready"


def test_an_old_server_gets_its_key_by_a_private_file_and_listens_on_loopback(make: Make, tmp_path: Path) -> None:
    fake = write_fake_llama_server(tmp_path)
    engine = make(binary=fake.path, slots=1)
    arguments = arguments_of(fake)
    path = Path(arguments[arguments.index("--api-key-file") + 1])
    assert path.read_text() == engine._key
    assert path.stat().st_mode & 0o777 == 0o600
    assert engine._key not in " ".join(arguments)
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assert "LLAMA_API_KEY" not in fake.runs[-1]["environ"]


def test_a_program_that_is_no_llama_server_is_told(make: Make, tmp_path: Path) -> None:
    fake = write_fake_llama_server(tmp_path, help="usage: something else")
    engine = make(binary=fake.path, ready=False)
    eventually(lambda: state_of(engine) == "failed")
    assert "says no flags: usage: something else" in engine.info().detail
    assert fake.runs == []


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"model_path": None}, "engine.model_path is needed"),
        ({"model_path": Path("/nonexistent/x.gguf")}, "ProtectHome"),
        ({"managed": ManagedSettings(binary=Path("/nonexistent/llama-server"))}, "there is no file"),
        ({"managed": ManagedSettings(binary=Path("/etc/passwd"))}, "cannot be executed"),
        ({"managed": ManagedSettings(extra_args=("--api-key=x",))}, "the worker's own"),
        ({"managed": ManagedSettings(extra_args=("-c", "4096"))}, "engine.context_tokens"),
    ],
    ids=["no-model", "missing-model", "missing-binary", "not-executable", "key", "context"],
)
def test_what_can_never_work_is_said_at_once(tiny_gguf: Path, settings: dict[str, Any], text: str) -> None:
    engine = ManagedEngine(EngineSettings(**({"kind": "managed", "model_path": tiny_gguf} | settings)))
    with pytest.raises(ValueError, match=text):
        engine.open()
    engine.close(Deadline(1))


def test_where_there_is_no_server_the_operator_learns_what_to_install(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llamacpp-mqtt-deploy\[managed\]'"):
        ManagedEngine(EngineSettings(kind="managed", model_path=tiny_gguf)).open()


# --- what the server says --------------------------------------------------------------------------------------------


def test_no_prompt_reaches_the_log(make: Make) -> None:
    with structlog.testing.capture_logs() as lines:
        engine = make(extra_args=("--no-warmup", "--verbosity", "3"))
        play(engine, say("unutterable words", max_tokens=4))
        bad = EngineCall(messages=[{"role": "assistant", "tool_calls": [{"function": {"arguments": "unutterable"}}]}])
        with pytest.raises(Exception):  # noqa: B017 - only what it writes is looked at
            play(engine, bad)
        os.kill(pid_of(engine), signal.SIGKILL)
        eventually(lambda: state_of(engine) == "restarting")
    ours = [line for line in lines if line["event"].startswith("llama_server.")]
    assert {"llama_server.said", "llama_server.ended"} <= {line["event"] for line in ours}
    assert not [line for line in ours if "unutterable" in str(line)]
    assert "unutterable" not in engine.info().detail
