"""Looks at all jobs four times a second: time limits, first events, heartbeats, positions in the queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog

from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry

log = structlog.get_logger(__name__)

CHECK_EVERY_S = 0.25
# Protocol, section 3: the first event comes within 1 s of the arrival, also when the engine takes its time.
_FIRST_EVENT_S = 0.5
# Protocol, section 3: a change of position is told at most once a second.
_POSITIONS_EVERY_S = 1.0
# A running job that was stopped ends in its own thread; when the engine does not return, it is ended from here.
_RETURN_S = 5.0


class Deadlines:
    """`check` is called every `CHECK_EVERY_S` seconds, in the I/O loop.

    `end` has to end a job whose stop signal is set, in another thread (it writes to the store); it is asked each time again.
    """

    def __init__(
        self,
        *,
        registry: JobRegistry,
        end: Callable[[Job], object],
        heartbeat_s: Callable[[], float],
        unavailable_after_s: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._end = end
        self._heartbeat_s = heartbeat_s
        self._unavailable_after_s = unavailable_after_s
        self._positions_at = 0.0
        self._answering_at = 0.0
        self._away_since: float | None = None

    def check(self) -> None:
        jobs = self._registry.all()
        if not jobs:
            return
        now = time.monotonic()
        tell_positions = now - self._positions_at >= _POSITIONS_EVERY_S
        if tell_positions:
            self._positions_at = now
        positions = self._registry.positions() if tell_positions else {}
        self._away_since = self._engine_away_since(jobs, now)
        for job in jobs:
            try:
                self._look_after(job, now, positions.get(job.key))
            except Exception:
                # A defect with one job must not cost the others their limits and heartbeats, look after look.
                log.exception("deadlines.failed", request_id=job.key.request_id)

    def _look_after(self, job: Job, now: float, position: int | None) -> None:
        job.hurry()
        self._limit(job, now)
        self._speak(job, now)
        if job.phase == "queued" and position is not None:
            reason = self._registry.wait_reason
            if (position, reason) != (job.position, job.wait_reason):
                job.position, job.wait_reason = position, reason
                job.responder.queued(position=position, reason=reason)

    def _limit(self, job: Job, now: float) -> None:
        if now >= job.deadline:
            job.stop.set("timeout")
        elif self._waited_in_vain(job, now):
            job.stop.set("engine_away")
        if not job.stop.is_set() or job.phase in ("ending", "ended"):
            return
        if job.phase == "queued":
            self._end(job)
        elif job.phase == "running" and job.stop.at is not None and now - job.stop.at > _RETURN_S:
            log.error("engine.stuck", request_id=job.key.request_id, reason=job.stop.reason)
            self._end(job)

    def _engine_away_since(self, jobs: Sequence[Job], now: float) -> float | None:
        """Since when the engine cannot be reached; None when it can.

        A server too busy to say how it is may well be generating: one that answers a request is not away, and a stream that
        falls silent has a time limit of its own.
        """
        if any(job.opened and job.phase == "running" for job in jobs):
            self._answering_at = now
        away_since = self._registry.engine_away_since
        return None if away_since is None else max(away_since, self._answering_at)

    def _waited_in_vain(self, job: Job, now: float) -> bool:
        """Whether it has waited long enough for an engine that cannot be reached, in the queue or with a slot. All wait at the
        same time: else each would wait anew when the one before it has given up."""
        if self._away_since is None or job.opened:
            return False
        waits = job.phase == "queued" or (job.phase == "running" and job.wait_reason == "engine_restarting")
        return waits and now - max(job.received_at, self._away_since) >= self._unavailable_after_s()

    def _speak(self, job: Job, now: float) -> None:
        last_at = job.responder.last_event_at
        if last_at is None:
            if now - job.received_at >= _FIRST_EVENT_S:
                job.responder.queued(position=job.position, reason=job.wait_reason)
        elif now - last_at >= self._heartbeat_s():
            state = "queued" if job.phase == "queued" else "generating" if job.prompt_done else "prompt"
            job.responder.ping(state=state)
