"""Work that may wait for the disk, in a thread of its own: the I/O loop must not wait for anything."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

import structlog

log = structlog.get_logger(__name__)

# Endings are as many as there are jobs, and jobs are bounded; this is for what nobody has thought of.
_MAX_WAITING = 10_000


class Background:
    """Runs calls one after the other in the order in which they came; each has a name, and waits at most once under it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[Hashable, Callable[[], object]] = OrderedDict()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="background", daemon=True)
        self.beat_at = time.monotonic()
        """When the thread last came round, for the watchdog (monotonic seconds)."""

    def start(self) -> None:
        self._thread.start()

    def run(self, name: Hashable, call: Callable[[], object]) -> bool:
        """Run `call` soon, unless one of this name waits already; False when there is no place for it. Never waits."""
        with self._changed:
            if self._closed or (len(self._waiting) >= _MAX_WAITING and name not in self._waiting):
                return False
            self._waiting.setdefault(name, call)
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
                if not self._waiting:
                    if self._closed:
                        return
                    # At least one look a second: the watchdog wants to see this thread alive.
                    self._changed.wait(1.0)
                    continue
                name, call = self._waiting.popitem(last=False)
            try:
                call()
            except Exception:
                log.exception("background.failed", name=str(name))
