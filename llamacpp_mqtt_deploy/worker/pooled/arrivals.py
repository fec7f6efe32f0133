"""What becomes of a checked request on a worker of a pool: a place in the common queue, the acknowledgement, its first event."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from llamacpp_mqtt_deploy.core.addresses import Address
from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.errors import Internal
from llamacpp_mqtt_deploy.core.requests import Generate, RawRequest
from llamacpp_mqtt_deploy.core.turns import LANES
from llamacpp_mqtt_deploy.pool_ports import Claimed, Enqueued, LeaseLost, PoolRequest, SharedJournal
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, StoreError
from llamacpp_mqtt_deploy.worker.acknowledging import Acknowledger
from llamacpp_mqtt_deploy.worker.admitting import journal_entry, noted
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.journal_clock import wall
from llamacpp_mqtt_deploy.worker.pooled.claiming import Claims
from llamacpp_mqtt_deploy.worker.pooled.queue_watch import WaitingRequests
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from llamacpp_mqtt_deploy.worker.refusals import Received, Refusals

log = structlog.get_logger(__name__)

# While the database is away nothing is acknowledged: what comes in meanwhile stays at the broker.
_AGAIN_S = 0.5
# The queue is the pool's; how long its requests run is known here only of those that ran here.
_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class _Arrival:
    message: Received
    address: Address
    silent: bool
    request: PoolRequest

    @property
    def key(self) -> EntryKey:
        return self.request.entry.key


class PooledAdmission:
    """Takes requests into the queue that all workers of the pool share; those of a burst share one transaction.

    `beat` is called while it waits for a database that is away, `silent` tells whether a route tells ends alone.
    """

    def __init__(
        self,
        *,
        journal: SharedJournal,
        acknowledger: Acknowledger,
        refusals: Refusals,
        registry: JobRegistry,
        counters: Counters,
        redelivery: Redelivery,
        background: Background,
        claims: Claims,
        waiting: WaitingRequests,
        limits: Callable[[], QueueLimits],
        aging_s: Callable[[], float],
        silent: Callable[[str], bool],
        now: Callable[[], float] = wall,
    ) -> None:
        self._journal = journal
        self._acknowledger = acknowledger
        self._refusals = refusals
        self._registry = registry
        self._counters = counters
        self._redelivery = redelivery
        self._background = background
        self._claims = claims
        self._waiting = waiting
        self._limits = limits
        self._aging_s = aging_s
        self._silent = silent
        self._now = now
        self._closing = threading.Event()
        self._deliveries: list[Delivery] = []
        self._arrivals: list[_Arrival] = []
        self.beat: Callable[[], object] = lambda: None

    def close(self) -> None:
        """Wait for the database no longer: what was not taken in stays with the broker."""
        self._closing.set()

    def enter(self, message: Received, address: Address, raw: RawRequest, request: Generate) -> None:
        assert address.session is not None
        key = EntryKey(address.route, address.session, request.request_id or uuid.uuid4().hex)
        if self._runs_here(message, address, key, raw.digest):
            return
        self._registry.check_rate(address.first_level, message.delivery.received_at)
        self._registry.check_quota(address.first_level, self._now())
        entry, _ = journal_entry(message, address, key, raw, noted(message, request), now=self._now())
        self._arrivals.append(
            _Arrival(
                message,
                address,
                request.stream is False or self._silent(address.route),
                PoolRequest(
                    entry=entry,
                    first_level=address.first_level,
                    lane=LANES.index(request.priority),
                    in_turn=request.mode != "messages",
                    model=request.model,
                ),
            )
        )

    def _runs_here(self, message: Received, address: Address, key: EntryKey, digest: str) -> bool:
        job = self._registry.untold(key)
        if job is None:
            return False
        if job.entry.digest != digest:
            self._refusals.reject(message, address, key.request_id, "duplicate_request")
        elif not job.responder.snapshot():
            job.responder.queued(position=job.position, reason=job.wait_reason, share="answer")
        return True

    def read(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)

    # --- the end of a burst --------------------------------------------------------------------------------------------

    def commit(self) -> None:
        deliveries, self._deliveries = self._deliveries, []
        arrivals, self._arrivals = self._arrivals, []
        receipt = self._acknowledger.take(deliveries)
        outcomes = self._enqueue(arrivals) if arrivals else []
        if outcomes is None:
            return  # never acknowledged: the broker delivers it to the next life, or to another worker
        self._acknowledger.ready(receipt)
        for arrival, outcome in zip(arrivals, outcomes, strict=True):
            self._tell(arrival, outcome)

    def _enqueue(self, arrivals: Sequence[_Arrival]) -> list[Enqueued] | None:
        """All in one transaction; None when the worker closes while the database is away."""
        told = False
        while True:
            try:
                return self._transaction(arrivals)
            except LeaseLost:
                pass  # the membership's thread joins again
            except StoreError as problem:
                if not self._journal.trouble():
                    return self._one_by_one(arrivals, problem)
                if not told:
                    log.error("pool.enqueue_waits", problem=str(problem), requests=len(arrivals))
                    told = True
            self.beat()
            if self._closing.wait(_AGAIN_S):
                return None

    def _transaction(self, arrivals: Sequence[_Arrival]) -> list[Enqueued]:
        outcomes, evicted = self._journal.enqueue(
            [arrival.request for arrival in arrivals],
            limits=self._limits(),
            retry_after_s=_RETRY_AFTER_S,
            aging_s=self._aging_s(),
        )
        if evicted:
            # In another thread: an end waits for the database, and this thread is everybody's.
            self._background.run(("evicted", evicted[0].entry.key), lambda: self._claims.take(_distinct(evicted)))
        return outcomes

    def _one_by_one(self, arrivals: Sequence[_Arrival], problem: StoreError) -> list[Enqueued]:
        """The database is there and refuses something: whichever request it is, the others are taken in."""
        if len(arrivals) == 1:
            log.error("journal.failed", step="enqueue", problem=str(problem), request_id=arrivals[0].key.request_id)
            return [Enqueued(refused=Internal("the worker cannot write this request to its journal; nothing was run"))]
        outcomes: list[Enqueued] = []
        for arrival in arrivals:
            outcomes += self._enqueue([arrival]) or []
        return outcomes

    # --- first events --------------------------------------------------------------------------------------------------

    def _tell(self, arrival: _Arrival, outcome: Enqueued) -> None:
        if outcome.refused is not None:
            self._refusals.refuse(arrival.message, arrival.address, arrival.key.request_id, outcome.refused)
        elif outcome.known is not None:
            self._tell_known(arrival, outcome.known, outcome.owner)
        else:
            self._counters.accepted(1)
            self._registry.take_rate(arrival.address.first_level, arrival.message.delivery.received_at)
            if not arrival.silent:
                self._waiting.add(
                    arrival.request.entry,
                    received_at=arrival.message.delivery.received_at,
                    position=outcome.position,
                )
            self._claims.wake()

    def _tell_known(self, arrival: _Arrival, entry: Entry, owner: int | None) -> None:
        """Tell its state once more (protocol, section 5); nothing runs twice."""
        key, message = arrival.key, arrival.message
        if entry.digest != arrival.request.entry.digest:
            self._refusals.reject(message, arrival.address, key.request_id, "duplicate_request")
        elif entry.terminal is not None:
            topic, terminal = entry.reply_topic, entry.terminal
            self._redelivery.send(key, topic, terminal, message.correlation, share="answer", again=True)
        elif owner is None and not arrival.silent:
            self._waiting.again(entry)
        elif owner is not None:
            self._background.run(("snapshot", key), lambda: self._ask_snapshot(key))

    def _ask_snapshot(self, key: EntryKey) -> None:
        try:
            self._journal.ask_snapshot(key)
        except StoreError as problem:
            # Its client asks again.
            log.warning("pool.snapshot_failed", problem=str(problem), request_id=key.request_id)


def _distinct(claimed: Sequence[Claimed]) -> list[Claimed]:
    return list({each.entry.key: each for each in claimed}.values())
