"""What a client knows of the workers: their retained status and health messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson

KNOWN_WORKERS = 1000
MAX_STATUS_BYTES = 65536
"""A status has some kilobytes; what is larger is no worker's."""
DEFAULT_HEARTBEAT_S = 15.0
QUIET_S = 0.05
"""Retained messages come in one go; this long after the last of them there are no more."""


class StatusBoard:
    """The latest status (or health) of each worker; written by the network thread, read by any. `on_change` is called in the
    former after each message."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._workers: dict[str, Mapping[str, Any]] = {}
        self._heard_at: dict[str, float] = {}
        self._messages = 0

    def note(self, worker: str, payload: bytes, *, retain: bool) -> None:
        """Take a status message, which the broker had kept (`retain`) or passes on as it comes; an empty one clears the worker's place."""
        if len(payload) > MAX_STATUS_BYTES:
            return
        try:
            status = orjson.loads(payload) if payload else None
        except orjson.JSONDecodeError:
            return
        with self._changed:
            if not payload:
                self._workers.pop(worker, None)
                self._heard_at.pop(worker, None)
            elif isinstance(status, dict) and (worker in self._workers or len(self._workers) < KNOWN_WORKERS):
                self._workers[worker] = status
                self._heard_at.pop(worker, None)
                if not retain:
                    self._heard_at[worker] = time.monotonic()
            self._messages += 1
            self._changed.notify_all()
        self.on_change()

    def wait(self, timeout_s: float) -> None:
        """Wait until something has arrived, and until nothing more comes right behind it; at most this long."""
        ends_at = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._messages, timeout_s)
            while (remaining_s := ends_at - time.monotonic()) > 0:
                known = self._messages
                if not self._changed.wait_for(lambda: self._messages != known, min(QUIET_S, remaining_s)):  # noqa: B023
                    return

    def all(self) -> dict[str, Mapping[str, Any]]:
        with self._changed:
            return dict(self._workers)

    def heard_at(self) -> dict[str, float]:
        """When (monotonic seconds) the latest status of a worker came from itself; none of those whose status the broker had kept."""
        with self._changed:
            return dict(self._heard_at)

    def online(self) -> list[str]:
        """The workers that take or finish requests, by their own word."""
        return [worker for worker, status in self.all().items() if status.get("state") in ("online", "draining")]

    def heartbeat_s(self) -> float:
        """The longest heartbeat of a worker that is online; the protocol's default where none is known."""
        told = [status.get("heartbeat_s") for status in self.all().values() if status.get("state") == "online"]
        beats = [float(beat) for beat in told if isinstance(beat, int | float) and 0.1 <= beat <= 3600]
        return max(beats, default=DEFAULT_HEARTBEAT_S)

    def summary(self) -> str:
        """`kitchen is offline, attic is draining`, at most five of them; empty when nothing is known."""
        states = sorted(f"{worker} is {status.get('state')}" for worker, status in self.all().items())
        return ", ".join(states[:5])
