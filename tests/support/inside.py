"""The in-process engine for tests: made, opened, and held still where native code would hang."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.engines.inprocess import native
from llamacpp_mqtt_deploy.engines.inprocess.inprocess_engine import InprocessEngine
from llamacpp_mqtt_deploy.stopping import StopSignal


def need_llama_cpp() -> None:
    """Skip where llama-cpp-python is not installed; fail in CI, where it must be."""
    if importlib.util.find_spec("llama_cpp") is None:
        reason = 'llama-cpp-python is not installed: pip install ".[inprocess]"'
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def make_engine(model: Path, **settings: Any) -> InprocessEngine:
    """An open engine that is ready; one thread, because tests share the processor."""
    need_llama_cpp()
    wishes = {"context_tokens": 8192, "batch_tokens": 64, "threads": 1, **settings}
    engine = InprocessEngine(EngineSettings(kind="inprocess", model_path=model, **wishes))
    engine.open()
    assert engine.wait_ready(StopSignal(), 30), engine.info()
    return engine


@contextlib.contextmanager
def frozen_computation(reached: threading.Event | None = None) -> Iterator[None]:
    """While inside, no computation comes back, as when a GPU hangs."""
    thaw = threading.Event()
    decode = native.Context.decode

    def stuck(context: native.Context, tokens: list[int]) -> None:
        if reached is not None:
            reached.set()
        thaw.wait(60)
        decode(context, tokens)

    patch = pytest.MonkeyPatch()
    patch.setattr(native.Context, "decode", stuck)
    try:
        yield
    finally:
        patch.undo()
        thaw.set()
