"""The log as it was before a test set it up."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
import structlog

from llamacpp_mqtt_deploy import logs


@pytest.fixture
def log_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that `logs.setup` changes in this process is put back after the test."""
    root = logging.getLogger()
    handlers, level, show = list(root.handlers), root.level, warnings.showwarning
    hooks = sys.excepthook, threading.excepthook
    monkeypatch.setattr(logs._State, "threshold", logs._State.threshold)
    monkeypatch.setattr(logs._State, "hidden", ())
    monkeypatch.setattr(logs._State, "with_content", False)
    logs.forget_problems()
    yield
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    warnings.showwarning = show
    root.handlers[:], root.level = handlers, level
    sys.excepthook, threading.excepthook = hooks
