"""What a worker says of itself in its retained status. Knows no Home Assistant."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROTOCOL = 1
MAX_STATUS_CHARS = 64 * 1024
MAX_MODELS = 200
LEVEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""One level of a topic, as the worker accepts it from clients."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A status that keeps to the protocol; what it leaves out has the protocol's default."""

    state: str
    every_s: float = 10.0
    heartbeat_s: float = 15.0
    models: tuple[str, ...] = ()
    vision: bool = False
    tools: bool = True
    version: str | None = None
    max_request_bytes: int = 1024 * 1024
    reason: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    """All of it, for the diagnostics."""

    @property
    def online(self) -> bool:
        """It works on requests; while it drains, on those that it has."""
        return self.state in ("online", "draining")


def parse_status(payload: str | bytes | bytearray) -> WorkerStatus | None:
    """None for what is no status of this protocol, an empty payload (a worker that was removed) among it."""
    if not payload or len(payload) > MAX_STATUS_CHARS:
        return None
    try:
        told = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or told.get("protocol") != PROTOCOL or not isinstance(told.get("state"), str):
        return None
    can, limits, models = told.get("capabilities"), told.get("limits"), told.get("models")
    can = can if isinstance(can, dict) else {}
    limits = limits if isinstance(limits, dict) else {}
    return WorkerStatus(
        state=told["state"],
        every_s=_number(told.get("every_s"), 10.0),
        heartbeat_s=_number(told.get("heartbeat_s"), 15.0),
        models=tuple(str(model) for model in models[:MAX_MODELS]) if isinstance(models, list) else (),
        vision=can.get("vision") is True,
        tools=can.get("tools") is not False,
        version=_string(told.get("version")),
        max_request_bytes=int(_number(limits.get("max_request_bytes"), 1024 * 1024)),
        reason=_string(told.get("problem")) or _string(told.get("reason")),
        told=told,
    )


def _number(value: object, default: float) -> float:
    """A number above zero, else the default."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        return default
    return float(value)


def _string(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
