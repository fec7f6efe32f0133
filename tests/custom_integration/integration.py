"""The integration's files, and those of its modules that need no Home Assistant, loaded without the rest of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "custom_components" / "llamacpp_mqtt"
PURE = ("answer_reader", "asking", "resend_rules", "worker_status")

_NAME = "llamacpp_mqtt_alone"


def module(name: str) -> Any:
    """One of PURE, as part of a package of its own: the integration's `__init__` imports Home Assistant."""
    assert name in PURE
    if _NAME not in sys.modules:
        package = ModuleType(_NAME)
        package.__path__ = [str(FOLDER)]
        sys.modules[_NAME] = package
    return importlib.import_module(f"{_NAME}.{name}")


def data(name: str) -> Any:
    """A JSON file of the integration."""
    return json.loads((FOLDER / name).read_text("utf-8"))
