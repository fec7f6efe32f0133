"""What the benchmarks start: a broker, a llama.cpp server, an engine with a pace, and daemons; all end with the block."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from benchmarks.bus import Bus
from benchmarks.samples import Load
from tests.gateway.process import GatewayProcess
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.services import require_program
from tests.support.tiny_gguf import write_tiny_gguf

ROOT = Path(__file__).resolve().parents[1]

# As config/mosquitto.conf advises. Saved now and then and at the end, not at every message; without `set_tcp_nodelay` a first
# token comes some 40 ms later (Nagle's algorithm in the broker against the delayed acknowledgements of its clients). A queue
# without a bound, so that a client of the benchmark that falls behind shows in the figures and loses nothing.
BROKER = (
    "log_type error",
    "persistence true",
    "autosave_interval 300",
    "set_tcp_nodelay true",
    "max_queued_messages 0",
)
LAYERS, WIDTH = 5, 128
"""About a million parameters: thousands of tokens a second, so that what the bridge costs can be seen."""


class Daemon:
    """A running daemon with a client of its broker."""

    def __init__(self, process: DaemonProcess, bus: Bus) -> None:
        self.process = process
        self.bus = bus

    def run(self, **load: Any) -> Load:
        """A load over the bus, with the processor time that the daemon took for it."""
        before = self.cpu_s()
        result = self.bus.run(**load)
        result.daemon_cpu_s = self.cpu_s() - before
        return result

    def cpu_s(self) -> float:
        """The processor time of the daemon so far, of all its threads: user and system."""
        return processor_time_s(self.process.process.pid)

    def rss_mib(self) -> float:
        return self.process.rss_bytes() / 2**20

    def memory_mib(self, kind: Literal["Rss", "Pss"]) -> float:
        """Resident memory, or its share where pages are shared with other processes."""
        text = Path(f"/proc/{self.process.process.pid}/smaps_rollup").read_text("ascii")
        line = next(line for line in text.splitlines() if line.startswith(f"{kind}:"))
        return int(line.split()[1]) / 1024

    def online_at(self) -> float | None:
        """When this life of the worker was first heard to be online; None before."""
        for at, topic, payload in self.bus.received:
            if at > self.process.started_at and b"/status/" in topic and json.loads(payload)["state"] == "online":
                return at
        return None


class RelayProcess:
    """A running bare relay (`benchmarks/relay.py`) with a client of its broker."""

    def __init__(self, process: subprocess.Popen[bytes], bus: Bus) -> None:
        self._process = process
        self._bus = bus

    def run(self, **load: Any) -> Load:
        """A load over the relay, with the processor time that it took."""
        before = processor_time_s(self._process.pid)
        result = self._bus.run(**load)
        result.daemon_cpu_s = processor_time_s(self._process.pid) - before
        return result


class GatewayInFront:
    """A running gateway, a process of its own, whose worker answers."""

    def __init__(self, process: GatewayProcess) -> None:
        self._process = process
        self.port = process.port

    def cpu_s(self) -> float:
        """The processor time of the gateway so far, of all its threads: user and system."""
        return processor_time_s(self._process.pid)


class World:
    """Everything is started when it is first asked for, in a folder that goes with it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._roots: dict[Path, str] = {}
        self.folder = Path()

    def __enter__(self) -> Self:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lmd-bench-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @cached_property
    def broker(self) -> Mosquitto:
        folder = self.folder / "broker"
        settings = (*BROKER, f"persistence_location {folder}/")
        broker = Mosquitto(folder, settings=settings, verbose=False)
        self._stack.callback(broker.close)
        return broker.start()

    @cached_property
    def model(self) -> Path:
        return write_tiny_gguf(self.folder / "model.gguf", layers=LAYERS, width=WIDTH)

    @cached_property
    def llama(self) -> LlamaServer:
        """A llama.cpp server with 8 slots."""
        return self._stack.enter_context(self.llama_with(slots=8, n_ctx=2048))

    def model_with(self, **wishes: Any) -> Path:
        """Another model file; wishes as in `write_tiny_gguf`."""
        shape = {"layers": LAYERS, "width": WIDTH, **wishes}
        return write_tiny_gguf(self.folder / "other.gguf", **shape)

    @contextlib.contextmanager
    def llama_with(self, *, slots: int, n_ctx: int, model: Path | None = None) -> Iterator[LlamaServer]:
        server = LlamaServer(model or self.model, slots=slots, n_ctx=n_ctx, batch=256)
        try:
            yield server.start()
        finally:
            server.close()

    @contextlib.contextmanager
    def pace(self, tokens_per_s: float, *, slots: int = 256) -> Iterator[int]:
        """The port of an engine that says so many tokens a second in each stream; 0 is as fast as it can."""
        command = [sys.executable, "-m", "benchmarks.pace", str(tokens_per_s), str(slots)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            try:
                yield int(process.stdout.readline())
            finally:
                process.kill()

    @contextlib.contextmanager
    def relay(
        self, engine_port: int, *, pause_s: float, doing: Literal["least", "checks", "journal"] = "least"
    ) -> Iterator[RelayProcess]:
        """A relay in front of this engine; `pause_s` is its shortest pause between two chunks. `checks` adds the worker's checks, and
        `journal` its journal to them."""
        folder = Path(tempfile.mkdtemp(prefix="relay", dir=self.folder))
        numbers = [str(self.broker.port), str(engine_port), folder.name, str(folder), str(pause_s)]
        module = "benchmarks.journaled_relay" if doing == "journal" else "benchmarks.relay"
        command = [sys.executable, "-m", module, *numbers, *(["checked"] if doing == "checks" else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                with Bus(self.broker.port, root=folder.name) as bus:
                    yield RelayProcess(process, bus)
            finally:
                process.kill()

    @contextlib.contextmanager
    def daemon(
        self,
        engine: str | None,
        *,
        protocol: str = "5",
        qos: int = 1,
        folder: Path | None = None,
        **settings: Any,
    ) -> Iterator[Daemon]:
        """A daemon in front of this engine; the same `folder` again is the same worker."""
        process = self.daemon_process(engine, protocol=protocol, folder=folder, **settings)
        root = str(process.settings["mqtt.root"])
        with Bus(self.broker.port, root=root, protocol=protocol, qos=qos) as bus:
            try:
                process.start()
                process.wait_ready(60.0)
                yield Daemon(process, bus)
                process.stop()
            finally:
                process.close()

    @contextlib.contextmanager
    def gateway(self, engine: str) -> Iterator[GatewayInFront]:
        """A gateway in front of a worker that nobody else speaks to, in front of this engine."""
        worker = self.daemon_process(engine)
        folder = Path(tempfile.mkdtemp(prefix="gateway", dir=self.folder))
        gateway = GatewayProcess(folder, self.broker.port, mqtt__root=worker.settings["mqtt.root"])
        try:
            worker.start()
            worker.wait_ready(60.0)
            gateway.start()
            gateway.wait_ready(60.0)
            yield GatewayInFront(gateway)
        finally:
            gateway.close()
            worker.close()

    def daemon_process(
        self, engine: str | None, *, protocol: str = "5", folder: Path | None = None, **settings: Any
    ) -> DaemonProcess:
        """A daemon that is not started yet."""
        folder = folder or self.folder / f"daemon{len(self._roots)}"
        # A root for each worker: the broker keeps the session of one that has ended, and would store its requests twice.
        root = self._roots.setdefault(folder, f"llm{len(self._roots)}")
        wanted: dict[str, Any] = {
            "mqtt.root": root,
            "mqtt.port": self.broker.port,
            "mqtt.protocol": protocol,
            "limits.queue_size": 1024,
            **({"engine.url": engine} if engine is not None else {}),
        }
        wanted |= {name.replace("__", "."): value for name, value in settings.items()}
        return DaemonProcess(folder, wanted)

    def described(self) -> dict[str, dict[str, str]]:
        """The machine and the versions of all that takes part."""
        return {
            "machine": {
                "cpu": _cpu_name(),
                "cores": str(len(os.sched_getaffinity(0))),
                "kernel": platform.release(),
                "temporary files on": file_system(self.folder),
            },
            "versions": {
                "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
                "python": platform.python_version(),
                "mosquitto": _output(require_program("mosquitto"), "-h").partition("\n")[0].rpartition(" ")[2],
                "xllamacpp": _package("xllamacpp"),
                "llama-cpp-python": _package("llama-cpp-python"),
                "paho-mqtt": _package("paho-mqtt"),
            },
        }


def processor_time_s(pid: int) -> float:
    """What a process has used so far, in all its threads: user and system."""
    # The kernel's clock of another process (see clock_getcpuclockid(3)); /proc counts in steps of 10 ms.
    return time.clock_gettime((~pid << 3) | 2)


def file_system(path: Path) -> str:
    """The type of the file system that holds this path (ext4, tmpfs, ...)."""
    return _output("stat", "--file-system", "--format=%T", str(path))


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    # `mosquitto -h` prints its version and ends with 3.
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
