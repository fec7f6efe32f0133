"""What a client knows of the workers: their retained status messages."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import orjson

KNOWN_WORKERS = 100
DEFAULT_HEARTBEAT_S = 15.0


class StatusBoard:
    """The latest status of each worker; written by the network thread, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: dict[str, Mapping[str, Any]] = {}
        self._something = threading.Event()

    def note(self, worker: str, payload: bytes) -> None:
        """Take a status message; an empty one clears the worker's place."""
        try:
            status = orjson.loads(payload) if payload else None
        except orjson.JSONDecodeError:
            return
        with self._lock:
            if not payload:
                self._workers.pop(worker, None)
            elif isinstance(status, dict) and (worker in self._workers or len(self._workers) < KNOWN_WORKERS):
                self._workers[worker] = status
        self._something.set()

    def wait(self, timeout_s: float) -> None:
        """Wait until something has arrived, and a moment longer for what the broker sends right behind it."""
        if self._something.wait(timeout_s):
            threading.Event().wait(min(0.05, timeout_s))

    def all(self) -> dict[str, Mapping[str, Any]]:
        with self._lock:
            return dict(self._workers)

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
