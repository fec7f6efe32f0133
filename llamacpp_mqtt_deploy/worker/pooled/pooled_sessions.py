"""What a client asks of its session, where any worker of the pool may run the session's requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from llamacpp_mqtt_deploy.core.errors import Busy
from llamacpp_mqtt_deploy.pool_ports import Cancelled, LeaseLost, SharedJournal
from llamacpp_mqtt_deploy.ports import EntryKey, StoreError
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.pooled.claiming import Claims

# An engine that is told to stop does so within 5 s, or its request is ended without it.
_ENDED_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.05
# Longer than it takes by far: only a worker that dies meanwhile leaves a session held.
_HOLD_S = 30.0
# A restart of the database, or the time until a lost lease is a new one, is waited for. Where it takes longer all that is asked is
# refused at once, for a minute: no one waits for those before him.
_PATIENCE_S = 20.0
_PATIENT_AGAIN_S = 60.0
_TRY_EVERY_S = 0.2

_Result = TypeVar("_Result")


class PooledSessions:
    """Each method waits for the database: not for the thread that reads messages. Raises StoreError. `beat` is called while one waits
    for a database that is away."""

    def __init__(
        self,
        *,
        journal: SharedJournal,
        registry: JobRegistry,
        claims: Claims,
        stop: Callable[[Job], object],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._journal = journal
        self._registry = registry
        self._claims = claims
        self._stop = stop
        self._sleep = sleep
        self._away_since: float | None = None
        self.beat: Callable[[], object] = lambda: None

    def patiently(self, step: Callable[[], _Result]) -> _Result:
        """Do it, and where the database is away for a moment, when it is back."""
        while True:
            try:
                found = step()
            except StoreError as problem:
                if not (isinstance(problem, LeaseLost) or self._journal.trouble()):
                    raise
                now = time.monotonic()
                if self._away_since is None or now > self._away_since + _PATIENT_AGAIN_S:
                    self._away_since = now
                if now > self._away_since + _PATIENCE_S:
                    raise
                self.beat()
                self._sleep(_TRY_EVERY_S)
            else:
                self._away_since = None
                return found

    def cancel(self, session: tuple[str, str], request_id: str | None) -> Mapping[str, Any]:
        """Cancel one request, or all of the session; returns what the ack says of it."""
        found = self.patiently(lambda: self._journal.cancel(session, request_id))
        stopped = self._end(found, forget=False)
        if request_id is None:
            return {"cancelled": stopped}
        if found.ended:
            return {"state": "ended"}
        if not stopped:
            return {"state": "unknown"}
        return {"state": "queued" if found.claimed else "running", "cancelled": 1}

    def forget(self, session: tuple[str, str], change: Callable[[tuple[str, str]], None]) -> Mapping[str, Any]:
        """Cancel all of the session, wherever it runs, then let the store forget; prompts that come meanwhile wait."""
        self.patiently(lambda: self._journal.hold_session(session, hold_s=_HOLD_S))
        try:
            found = self._journal.cancel(session, None, forget=True)
            stopped = self._end(found, forget=True)
            self._wait_until_ended(session)
            change(session)
        finally:
            self._journal.free_session(session)
        return {"cancelled": stopped}

    def begun(self, route: str, *, age_s: float) -> Sequence[str]:
        """Sessions of the route with requests under way, at any worker."""
        return self.patiently(lambda: self._journal.begun_sessions(route, age_s=age_s))

    def _end(self, found: Cancelled, *, forget: bool) -> int:
        for key in found.running_here:
            self._stop_here(key, forget=forget)
        self._claims.take(found.claimed)
        return len(found.claimed) + len(found.running_here) + found.running_elsewhere

    def _stop_here(self, key: EntryKey, *, forget: bool) -> None:
        job = self._registry.find(key)
        if job is not None:
            job.forgotten = job.forgotten or forget
            self._stop(job)

    def _wait_until_ended(self, session: tuple[str, str]) -> None:
        """Their ends write no history, but those of an earlier cancel may: the change comes after all of them."""
        until = time.monotonic() + _ENDED_WITHIN_S
        while self._journal.running_in(session):
            if time.monotonic() >= until:
                raise Busy("a request of this session has not ended yet; ask again", retry_after_s=1.0)
            self._sleep(_LOOK_EVERY_S)
