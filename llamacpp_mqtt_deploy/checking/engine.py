"""The engine: reachable, which model, how much context; and one token, to be sure."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.checking.findings import Finding, fail, ok, skip, warn
from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import EngineCall, Finished
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.shared_libraries import lacking_library
from llamacpp_mqtt_deploy.ports import EngineInfo
from llamacpp_mqtt_deploy.service.idle_gpu import NVIDIA_SIGNS, idle_gpu
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal

LOAD_WITHIN_S = 60.0  # from a slow card
GENERATE_WITHIN_S = 60.0  # one token, behind whatever the engine is doing
# ProtectHome=yes of the service hides these (systemd.exec(5)).
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))


def check_engine(engine: EngineSettings, *, generate: bool, running: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Ask the engine. `running` is the status of the worker that runs with this configuration, None when none does."""
    logs.use_host_logging()
    if engine.kind == "server":
        yield from _server(engine, generate=generate)
        return
    yield from _model_file(engine)
    if engine.kind == "managed":
        yield _binary(engine)
    if running is None:
        yield skip(
            "engine.reachable",
            f"a {engine.kind} engine starts with the worker",
            "start it with `lmd run` and check again",
        )
        return
    told = running.get("engine")
    state = told.get("state") if isinstance(told, Mapping) else told
    if state == "ready":
        yield ok("engine.reachable", "the running worker says that its engine is ready")
        if isinstance(told, Mapping) and isinstance(told.get("backend"), str):
            shown = told.get("gpu_layers")
            layers = shown if isinstance(shown, str) else None
            info = EngineInfo(state="ready", kind=engine.kind, backend=told["backend"], gpu_layers=layers)
            yield from _backend(engine, info)
    elif state == "asleep":
        yield ok("engine.reachable", "the running worker says that its engine is asleep; the next request wakes it")
    else:
        yield fail(
            "engine.reachable", f"the running worker says that its engine is {state}", "look into the worker's log"
        )


def _server(engine: EngineSettings, *, generate: bool) -> Iterator[Finding]:
    from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine  # noqa: PLC0415 - needs requests; the rest does not

    server = ServerEngine(engine)
    try:
        try:
            server.open()
        except ValueError as error:
            yield fail("engine.reachable", str(error), "mend [engine]")
            return
        info = server.probe()
        if info.state != "ready":
            advice = "wait until the model is loaded" if info.state == "loading" else ""
            if not info.detail and not advice:
                advice = "start the server, or check engine.url"  # a detail says by itself what to do
            yield fail("engine.reachable", info.detail or f"the server at {engine.url} is {info.state}", advice)
            return
        yield ok("engine.reachable", f"{engine.url} answers")
        yield from _description(engine, info)
        if generate:
            yield _one_token(server, engine, info)
        else:
            yield skip("engine.generate", "not tried (--no-generate)")
    finally:
        server.close(Deadline(2.0))


def _backend(engine: EngineSettings, info: EngineInfo, signs: Sequence[Path] = NVIDIA_SIGNS) -> Iterator[Finding]:
    """What the engine computes on; nothing where it does not tell."""
    problem = idle_gpu(engine, info, signs)
    if problem:
        yield warn("engine.backend", *_advised(problem))
    elif info.backend != "unknown":
        layers = f", {info.gpu_layers} of the model on the GPU" if info.gpu_layers else ""
        yield ok("engine.backend", info.backend + layers)


def _advised(problem: str) -> tuple[str, str]:
    what, _, advice = problem.partition("; ")
    return what, advice.removesuffix(".")


def _description(engine: EngineSettings, info: EngineInfo) -> Iterator[Finding]:
    yield from _backend(engine, info)
    if engine.model is not None and info.models and engine.model not in info.models:
        yield warn(
            "engine.model",
            f"the server does not name {engine.model!r} among its models ({', '.join(info.models[:5])})",
            "check engine.model",
        )
    else:
        yield ok("engine.model", engine.model or ", ".join(info.models[:5]) or "the server does not tell")
    if info.n_ctx is None:
        yield warn(
            "engine.context",
            "the server does not tell its context",
            "set engine.context_tokens, so that histories are cut in time",
        )
    else:
        yield ok("engine.context", f"{info.n_ctx} tokens for each of {info.slots} slots")


def _one_token(server: Any, engine: EngineSettings, info: EngineInfo) -> Finding:
    call = EngineCall(
        messages=[{"role": "user", "content": "Hi"}],
        model=engine.model or (info.models[0] if info.models else None),
        sampling={"max_tokens": 1},
        chunk_timeout_s=GENERATE_WITHIN_S,
    )
    stop = StopSignal()
    limit = threading.Timer(GENERATE_WITHIN_S, stop.set, ["timeout"])
    limit.name, limit.daemon = "lmd-check-limit", True
    limit.start()
    began_at = time.monotonic()
    try:
        with closing(cast("Any", server.stream(call, stop=stop, on_wait=lambda _reason: None))) as stream:
            ended = any(isinstance(delta, Finished) for delta in stream)
    except Stopped:
        return fail("engine.generate", f"no token within {GENERATE_WITHIN_S:g} s", "is the engine overloaded or stuck?")
    except RequestError as error:
        return fail("engine.generate", f"{error.code}: {error.message}", "try the server by hand; look into its log")
    finally:
        limit.cancel()
    took_ms = (time.monotonic() - began_at) * 1000
    if not ended:
        return fail("engine.generate", "the answer did not end properly", "look into the server's log")
    return ok("engine.generate", f"one token in {took_ms:.0f} ms")


def _binary(engine: EngineSettings) -> Finding:
    if engine.managed.binary is not None:
        path = shutil.which(engine.managed.binary)
        if path is None:
            return fail("engine.binary", f"{engine.managed.binary} cannot be run", "check engine.managed.binary")
        return ok("engine.binary", path)
    path = shutil.which("llama-server")
    if path is not None:
        return ok("engine.binary", path)
    if importlib.util.find_spec("xllamacpp") is None:
        return fail(
            "engine.binary",
            "there is no llama-server on PATH and no xllamacpp package",
            "install one of them, or set engine.managed.binary",
        )
    return _loaded_wheel()


def _loaded_wheel() -> Finding:
    """Whether the xllamacpp package can be loaded, in a process of its own: it is large, and a crash of it is not ours."""
    command = [sys.executable, "-P", "-c", "import xllamacpp"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_WITHIN_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return warn("engine.binary", f"the xllamacpp package cannot be tried: {error}")
    if ended.returncode == 0:
        return ok("engine.binary", "the xllamacpp package")
    said = " ".join(ended.stderr.split())[-300:]
    lacks = lacking_library(ended.stderr)
    how = lacks or said or f"exit code {ended.returncode}"
    return fail("engine.binary", f"the xllamacpp package cannot be loaded: {how}", "" if lacks else "install it again")


def _model_file(engine: EngineSettings) -> Iterator[Finding]:
    path = engine.model_path
    if path is None:
        yield skip("engine.file", f"{engine.filename} comes from {engine.repo_id}")
        return
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        size = path.stat().st_size
    except OSError as error:
        yield fail("engine.file", f"{path}: {error.strerror or error}", "check engine.model_path and its permissions")
        return
    if magic != b"GGUF":
        yield fail("engine.file", f"{path} is no GGUF file", "llama.cpp reads GGUF only")
        return
    yield ok("engine.file", f"{path} ({size / 1e9:.2f} GB)")
    if any(path.resolve().is_relative_to(home) for home in HOMES):
        yield warn(
            "engine.file.home",
            f"{path} is in a home directory, which the systemd service cannot see (ProtectHome)",
            "put models into /var/lib or /srv",
        )
