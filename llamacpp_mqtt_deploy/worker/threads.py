"""The generation threads: as many as the engine has slots, each taking one job after the other."""

from __future__ import annotations

import threading
import time

import structlog

from llamacpp_mqtt_deploy.worker.generation import Generation
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry

log = structlog.get_logger(__name__)

# A stopped job whose engine call does not return: after this long its thread counts as stuck.
_STUCK_AFTER_S = 30.0


class GenerationThreads:
    """A pool of named threads that only grows: a thread without a slot waits and costs nothing."""

    def __init__(self, *, registry: JobRegistry, generation: Generation) -> None:
        self._registry = registry
        self._generation = generation
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def ensure(self, slots: int) -> None:
        """Have at least this many threads."""
        with self._lock:
            # One more: while a thread waits for the disk with an end, its slot is another one's already.
            while len(self._threads) < slots + 1 and not self._closed.is_set():
                thread = threading.Thread(target=self._loop, name=f"generation-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _loop(self) -> None:
        while not self._closed.is_set():
            self._run_next()

    def _run_next(self) -> None:
        """In a call of its own: a thread that waits keeps no job, with its prompt and answer, in a variable."""
        job = self._registry.take(timeout_s=60.0)
        if job is None:
            return
        try:
            self._generation.run(job)
        except Exception:
            # The outermost loop: nothing may end this thread, and no slot may be lost.
            log.exception("generation.failed", request_id=job.key.request_id)
            self._registry.leave(job)

    def stuck(self) -> list[Job]:
        """Running jobs whose engine call does not come back although it was told to stop."""
        now = time.monotonic()
        return [
            job
            for job in self._registry.all_held_slots()
            if job.stop.at is not None and now - job.stop.at > _STUCK_AFTER_S
        ]

    def close(self, timeout_s: float) -> None:
        self._closed.set()
        self._registry.close()
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
