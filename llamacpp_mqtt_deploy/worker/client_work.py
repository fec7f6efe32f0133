"""What clients ask for and what may wait for the disk, in a thread of its own: whoever floods it waits for himself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from llamacpp_mqtt_deploy.core.fair_queue import FairQueue

log = structlog.get_logger(__name__)

# A person asks for one thing and then for another; a program that needs more gets `busy` and asks again.
_PER_LEVEL = 16
_IN_ALL = 1024


class ClientWork:
    """Runs calls one after the other: in order within a first topic level, in turn between levels."""

    def __init__(self, name: str = "client-work") -> None:
        self._changed = threading.Condition()
        self._waiting: FairQueue[Callable[[], object]] = FairQueue(per_level=_PER_LEVEL, in_all=_IN_ALL)
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self.beat_at = time.monotonic()
        """When the thread last came round, for the watchdog (monotonic seconds)."""

    def start(self) -> None:
        self._thread.start()

    def beat(self) -> None:
        """In the thread: a call waits, and is no defect."""
        self.beat_at = time.monotonic()

    def has_place(self, first_level: str) -> bool:
        """Whether `run` takes a call for this level now; stays so for a caller that is the only one to call `run`."""
        with self._changed:
            return not self._closed and self._waiting.has_place(first_level)

    def run(self, first_level: str, call: Callable[[], object]) -> bool:
        """Run `call` soon; False when there is no place for it. Never waits."""
        with self._changed:
            if self._closed or not self._waiting.put(first_level, call):
                return False
            self._changed.notify()
        return True

    def close(self, timeout_s: float) -> None:
        """Do what waits, as far as the time allows, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self.beat_at = time.monotonic()
                call = self._waiting.take()
                if call is None:
                    if self._closed:
                        return
                    # At least one look a second: the watchdog wants to see this thread alive.
                    self._changed.wait(1.0)
                    continue
            try:
                call()
            except Exception:
                log.exception("client_work.failed")
