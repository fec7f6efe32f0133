"""Looks at all jobs four times a second: time limits, first events, heartbeats, positions in the queue."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import structlog

from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry

log = structlog.get_logger(__name__)

CHECK_EVERY_S = 0.25
# Protocol, section 3: the first event comes within 1 s of the arrival, also when the engine takes its time.
_FIRST_EVENT_S = 0.5
# Protocol, section 3: a change of position is told at most once a second.
_POSITIONS_EVERY_S = 1.0
# Of a long queue so many hear at one look that their place has changed, and so many where it is: the tokens of others wait meanwhile.
_CHANGES_TOLD = 100
_NEWCOMERS_TOLD = 250
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
        self._moved: deque[tuple[Job, int]] = deque()
        """Those whose place is another than they were told, at the last look at the places; who was told longest ago is first."""
        self._answering_at = 0.0
        self._away_since: float | None = None

    def check(self) -> None:
        jobs = self._registry.all()
        if not jobs:
            self._moved.clear()
            return
        now = time.monotonic()
        away_since = self._away_since = self._engine_away_since(jobs, now)
        newcomers: list[Job] = []
        for job in jobs:
            if now < job.quiet_until and job.phase == "queued" and away_since is None and job.stop.at is None:
                continue  # nearly all of a long queue
            try:
                self._look_after(job, now)
            except Exception:
                # A defect with one job must not cost the others their limits and heartbeats, look after look.
                log.exception("deadlines.failed", request_id=job.key.request_id)
            if job.phase == "queued" and _is_owed_an_event(job, now):
                newcomers.append(job)
        self._tell_places(jobs, newcomers, now)

    def _look_after(self, job: Job, now: float) -> None:
        job.hurry()
        self._limit(job, now)
        self._speak(job, now)
        last_at = job.responder.last_event_at
        if job.responder.silent:
            job.quiet_until = job.deadline
        elif last_at is not None:
            job.quiet_until = min(job.deadline, last_at + self._heartbeat_s())

    def _tell_places(self, jobs: Sequence[Job], newcomers: Sequence[Job], now: float) -> None:
        """Tell newcomers of a long queue their place, and once a second the others that theirs has changed."""
        is_time = now - self._positions_at >= _POSITIONS_EVERY_S
        positions = self._registry.positions() if is_time or newcomers else {}
        if is_time:
            self._positions_at = now
            self._moved = deque(self._now_elsewhere(jobs, positions))
        for job in newcomers[:_NEWCOMERS_TOLD]:
            self._tell_place(job, positions.get(job.key, job.position))
        for _ in range(min(_CHANGES_TOLD, len(self._moved))):
            job, position = self._moved.popleft()
            if job.phase == "queued":
                self._tell_place(job, position)

    def _now_elsewhere(self, jobs: Sequence[Job], positions: Mapping[EntryKey, int]) -> list[tuple[Job, int]]:
        """Those whose place, or what they wait for, is not what they were told, with their place."""
        reason = self._registry.wait_reason
        moved = [
            (job, position)
            for job in jobs
            if (position := positions.get(job.key)) is not None
            and (position, reason) != (job.position, job.wait_reason)
            and job.responder.last_event_at is not None
        ]
        if len(moved) > _CHANGES_TOLD:
            moved.sort(key=lambda each: each[0].responder.last_event_at or 0.0)
        return moved

    def _tell_place(self, job: Job, position: int) -> None:
        job.position, job.wait_reason = position, self._registry.wait_reason
        try:
            job.responder.queued(position=position, reason=job.wait_reason)
        except Exception:
            log.exception("deadlines.failed", request_id=job.key.request_id)

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
            if job.phase != "queued" and _is_owed_an_event(job, now):
                job.responder.queued(position=job.position, reason=job.wait_reason)
        elif now - last_at >= self._heartbeat_s():
            state = "queued" if job.phase == "queued" else "generating" if job.prompt_done else "prompt"
            job.responder.ping(state=state)


def _is_owed_an_event(job: Job, now: float) -> bool:
    """Whether its client has heard nothing for as long as it may."""
    responder = job.responder
    return responder.last_event_at is None and now - job.received_at >= _FIRST_EVENT_S and not responder.silent
