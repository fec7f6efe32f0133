"""What becomes of a checked request on a worker of its own: a place in the queue, the journal, the acknowledgement, its first event."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import structlog

from llamacpp_mqtt_deploy.core.addresses import Address
from llamacpp_mqtt_deploy.core.errors import Busy, Internal
from llamacpp_mqtt_deploy.core.requests import Generate, RawRequest
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Store, StoreError
from llamacpp_mqtt_deploy.worker.acknowledging import Acknowledger, Receipt
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.journal_clock import wall
from llamacpp_mqtt_deploy.worker.own_errors import defect
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from llamacpp_mqtt_deploy.worker.refusals import Received, Refusals

log = structlog.get_logger(__name__)

# When a request that lost its place in the queue may try again; a full queue takes some time to shrink.
_RETRY_EVICTED_S = 10.0
# Protocol, section 1: longer Correlation Data is not mirrored (it would be stored and sent with every event).
MAX_CORRELATION_BYTES = 64


class Admission(Protocol):
    """Takes in the requests of a burst of messages. Called by the intake's thread only."""

    def enter(self, message: Received, address: Address, raw: RawRequest, request: Generate) -> None:
        """Take up a checked request, as a part of the burst; its session is known. Raises a RequestError when it has no place."""

    def read(self, delivery: Delivery) -> None:
        """This message is read, whatever came of it: it is acknowledged with the burst."""

    def commit(self) -> None:
        """The burst is over, or a message comes that has to see its requests accepted."""


@dataclass(slots=True)
class _Accepted:
    """A request of the current burst: in the queue, held until the journal has it."""

    job: Job
    evicted: list[Job]
    """Those that lost their place in the queue to it."""


class LocalAdmission:
    """Takes requests into this worker's own queue; those of a burst share one commit."""

    def __init__(
        self,
        *,
        acknowledger: Acknowledger,
        refusals: Refusals,
        store: Store,
        registry: JobRegistry,
        maker: JobMaker,
        cancel: Callable[[Job], object],
        completion: Completion,
        counters: Counters,
        redelivery: Redelivery,
        background: Background,
        now: Callable[[], float] = wall,
    ) -> None:
        self._acknowledger = acknowledger
        self._refusals = refusals
        self._store = store
        self._registry = registry
        self._maker = maker
        self._cancel = cancel
        self._completion = completion
        self._counters = counters
        self._redelivery = redelivery
        self._background = background
        self._now = now
        self._deliveries: list[Delivery] = []
        self._accepted: list[_Accepted] = []

    def read(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)

    def enter(self, message: Received, address: Address, raw: RawRequest, request: Generate) -> None:
        assert address.session is not None
        key = EntryKey(address.route, address.session, request.request_id or uuid.uuid4().hex)
        if request.request_id is not None and self._sent_again(message, address, key, raw.digest):
            return
        request = noted(message, request)
        entry, timeout_s = journal_entry(message, address, key, raw, request, now=self._now())
        received_at = message.delivery.received_at
        job = self._maker.make(
            entry=entry, address=address, request=request, received_at=received_at, deadline=received_at + timeout_s
        )
        self._accepted.append(_Accepted(job, self._registry.enter(job)))

    def _sent_again(self, message: Received, address: Address, key: EntryKey, digest: str) -> bool:
        """Whether this id is known: then its state is told once more (protocol, section 5), and nothing runs twice."""
        job = self._registry.untold(key)
        try:
            entry = job.entry if job is not None else self._store.find(key)
        except StoreError as problem:
            log.error("journal.failed", step="find", problem=str(problem), request_id=key.request_id)
            raise Internal("the worker cannot read its journal; nothing was run") from problem
        if entry is None:
            return False
        if entry.digest != digest:
            self._refusals.reject(message, address, key.request_id, "duplicate_request")
        elif job is not None:
            # Twice in one burst, or while its place is not known yet: the first one's events answer both.
            is_new = any(item.job is job for item in self._accepted) or (job.phase == "queued" and not job.position)
            if not is_new and not job.responder.snapshot():
                job.responder.queued(position=job.position, reason=job.wait_reason, share="answer")
        else:
            terminal = entry.terminal or self._redelivery.unstored(key)
            if terminal is not None:
                self._redelivery.send(key, entry.reply_topic, terminal, message.correlation, share="answer", again=True)
            # Else its end is being written at this moment, and will be published.
        return True

    # --- the end of a burst ---------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Take in a burst, or part of one: journal, then acknowledge in order of receipt, then send each its first event.

        The requests may run while the journal writes them; until it has them, nobody hears of them. A defect on the way costs
        these requests, never the thread that reads all others.
        """
        deliveries, self._deliveries = self._deliveries, []
        accepted, self._accepted = self._accepted, []
        receipt = self._acknowledger.take(deliveries)
        if not accepted:
            self._acknowledger.ready(receipt)
            return
        jobs = [item.job for item in accepted]
        try:
            for job in jobs:
                job.responder.hold()
            waiting = self._registry.waiting(jobs)
            # Of those that begin at once nobody hears before the engine has taken them up. Beside others what is written then
            # shares one commit with this; a worker at rest writes this while it prepares the prompt, or it would take a
            # processor from the engine while that reads it (the first token comes 0.5 ms sooner).
            unhurried = not waiting and self._registry.running() > 0
            written = self._store.accept_soon([job.entry for job in jobs], unhurried=unhurried)
            for job in jobs:
                job.accepting = written
            # Callbacks come in the order of the writes, so that nothing overtakes this on its way to the clients.
            written.on_done(lambda problem: self._journaled(jobs, receipt, problem))
            self._end_evicted(accepted)
            self._let_go(jobs, waiting)
        except StoreError as problem:
            self._not_journaled(jobs, receipt, problem)
            self._end_evicted(accepted)
        except Exception as cause:
            if not isinstance(cause, MemoryError):
                log.exception("intake.failed", requests=len(accepted))
            for job in jobs:
                self._completion.failed(job, defect(cause))
            self._end_evicted(accepted)
            self._acknowledger.ready(receipt)

    def _journaled(self, jobs: Sequence[Job], receipt: Receipt, problem: StoreError | None) -> None:
        """The store's thread: the requests are accepted, or are not."""
        if problem is not None:
            self._background.run(receipt, lambda: self._not_journaled(jobs, receipt, problem))
            return
        self._counters.accepted(len(jobs))
        self._acknowledger.ready(receipt)
        for job in jobs:
            job.responder.release()

    def _not_journaled(self, jobs: Sequence[Job], receipt: Receipt, problem: StoreError) -> None:
        """Refuse them: nobody has heard of them, and a restart would not know them."""
        log.error("journal.failed", step="accept", problem=str(problem), requests=len(jobs))
        self._acknowledger.ready(receipt)
        for job in jobs:
            job.responder.withdraw()
            job.unjournaled = True
            job.stop.set("unjournaled")
            if job.phase in ("queued", "pacing"):
                self._completion.stopped(job)

    def _end_evicted(self, accepted: list[_Accepted]) -> None:
        """Tell those that lost their places. In another thread: an end waits for the disk, and this thread is everybody's.

        After the write of the requests was begun: one of them may have lost its place to another, and ends after it began.
        """
        for item in accepted:
            for job in item.evicted:
                own = job.address.first_level == item.job.address.first_level
                whose = "a more urgent request of yours" if own else "a client that holds fewer places"
                error = Busy(f"the queue is full and {whose} took this place", retry_after_s=_RETRY_EVICTED_S)
                self._background.run(("evicted", job.key), partial(self._completion.failed, job, error))

    def _let_go(self, jobs: Sequence[Job], waiting: Sequence[Job]) -> None:
        """Let these requests run; those that are `waiting` have to be told."""
        for job in jobs:
            if self._registry.was_cancelled(job):
                self._cancel(job)  # while it is still held: a quick engine would be done first
        # None: the next look at all jobs tells them.
        positions = (self._registry.positions_at_once(len(jobs)) or {}) if waiting else {}
        self._registry.commit(jobs)
        for job in waiting:
            if job.key in positions:
                job.position = positions[job.key]
                job.responder.queued(position=job.position, reason=job.wait_reason)


def noted(message: Received, request: Generate) -> Generate:
    """The request, with a warning where something of the message is left out."""
    if message.delivery.correlation is None or message.correlation is not None:
        return request
    note = f"Correlation Data over {MAX_CORRELATION_BYTES} bytes is not mirrored"
    return replace(request, warnings=(*request.warnings, note))


def journal_entry(
    message: Received, address: Address, key: EntryKey, raw: RawRequest, request: Generate, *, now: float
) -> tuple[Entry, float]:
    """What the journal keeps of a request that is accepted `now` (seconds since the epoch), and its time limit in seconds from its
    receipt."""
    delivery = message.delivery
    timeout_s = min(limit for limit in (request.timeout_s, delivery.expiry_s) if limit is not None)
    waited_s = max(0.0, time.monotonic() - delivery.received_at)
    entry = Entry(
        key=key,
        topic=delivery.topic,
        payload=delivery.payload,
        digest=raw.digest,
        correlation=message.correlation,
        accepted_at=now,
        expires_at=now + timeout_s - waited_s,
        reply_topic=address.reply_topic or "",
    )
    return entry, timeout_s
