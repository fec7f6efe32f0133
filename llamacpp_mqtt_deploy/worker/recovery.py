"""After a restart: run again what had published no chunk, end what had, publish ends that no broker has acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from llamacpp_mqtt_deploy.core.errors import Internal, Interrupted, RequestError, TimedOut
from llamacpp_mqtt_deploy.ports import Entry, Store
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.journal_clock import wall
from llamacpp_mqtt_deploy.worker.journaled import JournaledRequests, terminal_of
from llamacpp_mqtt_deploy.worker.own_errors import lost_too_often

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Recovered:
    """What `Recovery.run` did, for the log."""

    run_again: int = 0
    ended: int = 0
    delivered_again: int = 0


class Recovery:
    """Runs once, after the first connection and before new requests are subscribed."""

    def __init__(
        self,
        *,
        store: Store,
        registry: JobRegistry,
        requests: JournaledRequests,
        max_starts: Callable[[], int],
        now: Callable[[], float] = wall,
    ) -> None:
        self._now = now
        self._store = store
        self._registry = registry
        self._requests = requests
        self._max_starts = max_starts

    def run(self) -> Recovered:
        found = Recovered()
        for entry in self._store.undelivered():
            found.delivered_again += self._guarded(self._deliver, entry)
        for entry in self._store.unfinished():
            if self._guarded(self._take_up, entry):
                found.run_again += 1
            else:
                found.ended += 1
        if found.run_again or found.ended or found.delivered_again:
            log.info(
                "journal.recovered",
                run_again=found.run_again,
                ended=found.ended,
                delivered_again=found.delivered_again,
            )
        return found

    def _guarded(self, step: Callable[[Entry], bool], entry: Entry) -> bool:
        """One entry that cannot be read or ended costs nobody but itself: else the worker would never start again."""
        try:
            return step(entry)
        except Exception:
            log.exception("recovery.entry_failed", request_id=entry.key.request_id, session=entry.key.session)
            self._put_aside(entry)
            return False

    def _put_aside(self, entry: Entry) -> None:
        """End the entry, at the least in the journal, so that it does not come again at each start."""
        error = Internal("the worker failed on this request after a restart; its log says why")
        try:
            if entry.terminal is None:
                self._requests.finish(entry, terminal_of(entry, error, metadata=None))
                return
        except Exception:
            log.exception("recovery.end_failed", request_id=entry.key.request_id, session=entry.key.session)
        try:
            self._store.mark_delivered([entry.key])
        except Exception:
            log.exception("recovery.end_failed", request_id=entry.key.request_id, session=entry.key.session)
        else:
            log.error(
                "recovery.entry_put_aside",
                request_id=entry.key.request_id,
                session=entry.key.session,
                message="no end could be sent for this request; it is not tried again",
            )

    def _deliver(self, entry: Entry) -> bool:
        """Publish an end that no broker has acknowledged."""
        if entry.terminal is not None:
            self._requests.publish(entry, entry.terminal, again=True)
        return True

    def _take_up(self, entry: Entry) -> bool:
        """Put an accepted request back into the queue; False when it ended instead."""
        wall_now = self._now()
        try:
            if entry.state == "streaming":
                raise Interrupted("the worker died in the middle of this answer; send a new request for it")
            if entry.starts >= self._max_starts():
                raise lost_too_often(entry.starts)
            left_s = entry.left_s(wall_now)
            if left_s is not None and left_s <= 0:
                raise TimedOut("the time limit of this request passed while the worker was down")
            job = self._requests.job(entry, waited_s=entry.waited_s(wall_now), left_s=left_s)
        except RequestError as error:
            self._requests.end(entry, error)
            return False
        try:
            self._registry.enter(job, recovered=True)
            positions = self._registry.positions_at_once(1)
            if positions is not None:  # else the next look at all jobs tells it
                job.position = positions.get(entry.key, 1)
                job.responder.queued(position=job.position, reason=job.wait_reason)
            self._registry.commit([job])
        except Exception:
            self._registry.claim_end(job)
            self._registry.leave(job)
            raise
        return True
