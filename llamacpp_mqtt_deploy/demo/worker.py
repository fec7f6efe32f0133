"""The demo's worker: `lmd run` as a process of its own, with a configuration that comes from flags alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamacpp_mqtt_deploy import demo_model
from llamacpp_mqtt_deploy.demo.brokers import HOST, INSTALL, Broker
from llamacpp_mqtt_deploy.demo.processes import DemoFailed, DemoProcess, DemoProcesses

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import BusClient

WORKER_ID = "demo"
SESSION = "demo"

# The demo itself connects to these.
OURS = (
    "mqtt.host",
    "mqtt.port",
    "mqtt.transport",
    "mqtt.protocol",
    "mqtt.worker_id",
    "mqtt.tls.enabled",
    "sessions.path",
)

_ONLINE_S = 90.0  # a first start from the card of a small board; a daemon that ends is noticed at once
_DEMO_MODEL_S = 60.0
_WORTH_TELLING_S = 2.0
_OWN_MODEL_S = 900.0  # a large file from a slow disk

# What would let the user's own installation, or systemd, reach into the demo.
_FOREIGN = (
    "LMD_", "LLAMA_ARG_", "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_",
    "INVOCATION_ID", "JOURNAL_STREAM",
)  # fmt: skip

# The demo model makes a short answer in milliseconds. At this pace a person can read along.
PACE: Mapping[str, str] = {
    "streaming.mode": "simulated",
    "streaming.chunk_chars": "4",
    "streaming.chunk_interval_s": "0.04",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the worker's status says of itself once it is ready."""

    model: str
    slots: int
    n_ctx: int | None
    backend: str
    mode: str
    server: str
    """Whose server it is, for people."""


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without what would configure a worker."""
    return {name: value for name, value in environ.items() if not name.startswith(_FOREIGN)}


def worker_settings(
    *, broker: Broker, directory: Path, model: Path | None, overrides: Mapping[str, str]
) -> dict[str, str]:
    """The worker's configuration, dotted key -> text; `model` None is the demo model."""
    settings = {
        "mqtt.host": HOST,
        "mqtt.port": str(broker.port),
        "mqtt.protocol": broker.protocol,
        "mqtt.worker_id": WORKER_ID,
        "engine.kind": "managed",
        "engine.model_path": str(model or demo_model.path()),
        "engine.slots": "2",
        "engine.managed.cache_ram_mib": "64",
        "generation.max_tokens": "300",
        "sessions.path": str(directory / "state.db"),
        "limits.drain_timeout_s": "1",
        "logging.format": "console",
    }
    if model is None:
        greedy = {"generation.temperature": "0", "engine.context_tokens": "1024"}  # as its card says
        # A GPU takes longer to wake than this model to answer, and threads longer to wait for each other: on a busy
        # machine with two cores two threads once took 7 s for a first token.
        small = {"engine.model": "demo", "engine.gpu_layers": "0", "engine.threads": "1"}
        settings |= {**greedy, **small, **PACE}
    else:
        settings["engine.context_tokens"] = "4096"
    return settings | dict(overrides)


def check_model(path: Path) -> None:
    """Raises DemoFailed for what no engine can load."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except IsADirectoryError:
        raise DemoFailed(f"{path} is a directory; --model takes a GGUF file in it.") from None
    except OSError as error:
        raise DemoFailed(f"The model {path} cannot be read: {error.strerror}. --model takes a GGUF file.") from None
    if magic != b"GGUF":
        raise DemoFailed(f"{path} is no GGUF file, the format of models for llama.cpp. --model takes one.")


def check_engine(overrides: Mapping[str, str]) -> None:
    """Raises DemoFailed when nothing here can serve a model."""
    if overrides.get("engine.kind", "managed") != "managed" or "engine.managed.binary" in overrides:
        return
    if shutil.which("llama-server") is None and importlib.util.find_spec("xllamacpp") is None:
        raise DemoFailed(
            "There is no llama.cpp server on this machine. The extra `demo` brings one, ready built: "
            f"{INSTALL}\nOr put llama-server on PATH."
        )


def start_worker(processes: DemoProcesses, settings: Mapping[str, str], *, environ: Mapping[str, str]) -> DemoProcess:
    flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    # -P: the folder in which the demo is called may hold a module with the name of one of ours.
    command = [sys.executable, "-P", "-m", "llamacpp_mqtt_deploy", "run", "--config", os.devnull, *flags]
    # With TMPDIR whatever its engine leaves behind goes with our directory.
    return processes.start("daemon", command, environ={**environ, "TMPDIR": str(processes.directory)})


def wait_online(processes: DemoProcesses, child: DemoProcess, bus: BusClient) -> None:
    """Wait for the worker's retained status. Raises DemoFailed."""
    processes.wait(child, "online", lambda: WORKER_ID in bus.workers_online(), _ONLINE_S)


def wait_ready(
    processes: DemoProcesses, child: DemoProcess, bus: BusClient, *, own_model: bool, on_detail: Callable[[str], None]
) -> Facts:
    """Wait until its engine answers; `on_detail` hears what the status says meanwhile. Raises DemoFailed."""
    timeout_s = _OWN_MODEL_S if own_model else _DEMO_MODEL_S
    began_at = time.monotonic()
    heard: list[str] = []

    def ready() -> bool:
        engine = _engine(bus)
        detail = str(engine.get("detail") or "")
        if detail and [detail] != heard[-1:] and time.monotonic() - began_at > _WORTH_TELLING_S:
            heard.append(detail)
            on_detail(detail)
        if engine.get("state") == "failed":
            raise DemoFailed(f"The engine does not start: {detail}", child.last_lines())
        return engine.get("state") == "ready"

    try:
        processes.wait(child, "ready", ready, timeout_s)
    except DemoFailed as failure:
        if child.ended is None and heard and time.monotonic() - began_at >= timeout_s:
            raise DemoFailed(f"The engine is not ready after {timeout_s:g} s: {heard[-1]}", failure.lines) from None
        raise
    return _facts(bus)


def _engine(bus: BusClient) -> Mapping[str, Any]:
    engine = bus.status(wait_s=0).get(WORKER_ID, {}).get("engine")
    return engine if isinstance(engine, Mapping) else {}


def _facts(bus: BusClient) -> Facts:
    status = bus.status(wait_s=0).get(WORKER_ID, {})
    models = status.get("models") or ["a model without a name"]
    routes = status.get("routes") or {}
    return Facts(
        model=str(models[0]),
        slots=int(status.get("slots") or 1),
        n_ctx=status.get("n_ctx"),
        backend=str(_engine(bus).get("backend") or "unknown"),
        mode=str(routes.get("default", {}).get("mode") or "native"),
        server=_server(str(_engine(bus).get("kind"))),
    )


def _server(kind: str) -> str:
    if kind != "managed":
        return f"engine.kind = {kind}"
    return "llama-server" if shutil.which("llama-server") else "xllamacpp"
