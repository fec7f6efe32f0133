"""A delivered message becomes a job, a refusal or an answer to a control: in order of receipt, in one thread."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import structlog

from llamacpp_mqtt_deploy.core.addresses import Address, TopicMap
from llamacpp_mqtt_deploy.core.errors import Busy, Internal, RequestError
from llamacpp_mqtt_deploy.core.guessing import guess_ids
from llamacpp_mqtt_deploy.core.requests import Generate, RawRequest, check_request, read_request
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Store, StoreError
from llamacpp_mqtt_deploy.worker.acknowledging import Acknowledger, Receipt
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.control import Controls
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.inbox import Inbox
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.journal_clock import wall
from llamacpp_mqtt_deploy.worker.message_log import MessageLog
from llamacpp_mqtt_deploy.worker.own_errors import defect, out_of_memory
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from llamacpp_mqtt_deploy.worker.refusals import Received, Refusals, first_level_of

log = structlog.get_logger(__name__)

# Protocol, section 1: longer Correlation Data is not mirrored (it would be stored and sent with every event).
_MAX_CORRELATION_BYTES = 64
# One commit for a burst: as many messages as are there, at most this many, so that the first need not wait for the last.
_BURST = 64
# When a request that lost its place in the queue may try again; a full queue takes some time to shrink.
_RETRY_EVICTED_S = 10.0
# Whose message it is is asked for each one in the link's thread; a topic can be 64 KiB long.
_REMEMBERED_TOPICS, _REMEMBERED_TOPIC_CHARS = 256, 256


@dataclass(slots=True)
class _Accepted:
    """A request of the current burst: in the queue, held until the journal has it."""

    job: Job
    evicted: list[Job]
    """Those that lost their place in the queue to it."""


_Burst = list[tuple[Delivery, _Accepted | None]]
"""What was read and is not yet acknowledged, in order of receipt."""


class Intake:
    """Reads the inbox. Address first, then the payload, then admission; journal, acknowledgement, first event, in that order."""

    def __init__(
        self,
        *,
        topics: TopicMap,
        acknowledger: Acknowledger,
        answers: Answers,
        refusals: Refusals,
        store: Store,
        registry: JobRegistry,
        maker: JobMaker,
        controls: Controls,
        admin: Callable[[Delivery, bytes | None], None],
        completion: Completion,
        counters: Counters,
        policies: Callable[[], Policies],
        redelivery: Redelivery,
        background: Background,
        message_log: MessageLog,
        inbox_messages: int,
        now: Callable[[], float] = wall,
    ) -> None:
        self._now = now
        self._topics = topics
        self._answers = answers
        self._refusals = refusals
        self._store = store
        self._registry = registry
        self._maker = maker
        self._controls = controls
        self._admin = admin
        self._completion = completion
        self._counters = counters
        self._policies = policies
        self._redelivery = redelivery
        self._background = background
        self._log = message_log
        self._acknowledger = acknowledger
        self._known_level = lru_cache(_REMEMBERED_TOPICS)(partial(first_level_of, topics))
        self._inbox = Inbox(max_messages=inbox_messages, level_of=self._level_of)
        self.offer = self._inbox.offer
        self._thread = threading.Thread(target=self._loop, name="intake", daemon=True)
        self._may_read = threading.Event()
        self._shut = False
        self.beat_at = time.monotonic()

    def _level_of(self, topic: str) -> str:
        short = len(topic) <= _REMEMBERED_TOPIC_CHARS
        return self._known_level(topic) if short else first_level_of(self._topics, topic)

    # --- the thread ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; nothing is read before `begin_reading`."""
        self._thread.start()

    def begin_reading(self) -> None:
        """Begin to read: the worker has its place on the bus, and what an earlier start left was taken up.

        A broker that kept our session delivers before we have subscribed. Read at once, these requests would be taken for
        what an earlier start left and would end twice; and another worker may be serving this root.
        """
        self._may_read.set()

    @property
    def waiting(self) -> int:
        """Messages that came in and were not read yet."""
        return len(self._inbox)

    def close(self, timeout_s: float) -> None:
        """Read what is in the inbox, then end; what was never read stays with the broker."""
        if not self._may_read.is_set():
            self._shut = True
            self._may_read.set()
        self._inbox.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _loop(self) -> None:
        while True:
            self.beat_at = time.monotonic()
            if not self._may_read.wait(1.0):
                continue
            if self._shut:
                return
            room = self._answers.room(timeout_s=1.0)
            if not room:
                if self._inbox.closed:
                    return  # What is not read is not acknowledged: it stays with the broker for the next start.
                continue
            burst = self._inbox.take(min(_BURST, room), timeout_s=1.0)
            if burst is None:
                return
            if burst:
                self._take_in(burst)

    # --- a burst -------------------------------------------------------------------------------------------------------

    def _take_in(self, burst: list[Delivery]) -> None:
        """Requests that come in a burst share one commit. A control message sees all requests before it accepted."""
        pending: _Burst = []
        for delivery in burst:
            accepted = None
            try:
                message = self._received(delivery)
                if message.address is not None and message.address.kind == "request" and not delivery.retain:
                    accepted = self._receive(message, message.address, pending)
                else:
                    self._accept(pending)
                    pending = []
                    self._other(message)
            except Exception:
                # A defect: the message is acknowledged all the same, or the broker would deliver it for ever.
                log.exception("intake.failed", topic=delivery.topic[:200])
            pending.append((delivery, accepted))
        self._accept(pending)

    def _received(self, delivery: Delivery) -> Received:
        data = delivery.correlation
        mirrored = data if data is not None and len(data) <= _MAX_CORRELATION_BYTES else None
        return Received(delivery, self._topics.address(delivery.topic), mirrored)

    def _accept(self, pending: _Burst) -> None:
        """Take in a burst, or part of one: journal, then acknowledge in order of receipt, then send each its first event.

        The requests may run while the journal writes them; until it has them, nobody hears of them. A defect on the way costs
        these requests, never the thread that reads all others.
        """
        receipt = self._acknowledger.take([delivery for delivery, _ in pending])
        accepted = [item for _, item in pending if item is not None]
        if not accepted:
            self._acknowledger.ready(receipt)
            return
        jobs = [item.job for item in accepted]
        try:
            for job in jobs:
                job.responder.hold()
            written = self._store.accept_soon([job.entry for job in jobs])
            for job in jobs:
                job.accepting = written
            # Callbacks come in the order of the writes, so that nothing overtakes this on its way to the clients.
            written.on_done(lambda problem: self._journaled(jobs, receipt, problem))
            self._end_evicted(accepted)
            self._let_go(accepted)
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

    def _let_go(self, accepted: list[_Accepted]) -> None:
        """Let these requests run."""
        jobs = [item.job for item in accepted]
        for job in jobs:
            if self._registry.was_cancelled(job):
                self._controls.cancel(job)  # while it is still held: a quick engine would be done first
        waiting = [job for job in jobs if self._registry.must_wait(job)]
        positions = self._registry.positions() if waiting else {}
        self._registry.commit(jobs)
        for job in waiting:
            if job.key in positions:
                job.position = positions[job.key]
                job.responder.queued(position=job.position, reason=job.wait_reason)

    # --- one message ---------------------------------------------------------------------------------------------------

    def _other(self, message: Received) -> None:
        """Everything but requests: control, admin, and what is not for us."""
        address = message.address
        if message.delivery.retain:
            self._log.warning(
                "message.ignored",
                message.first_level,
                topic=message.shown_topic(),
                reason="retained: requests are not kept",
            )
        elif address is None:
            self._log.warning(
                "message.ignored",
                message.first_level,
                topic=message.shown_topic(),
                reason="no session path of the protocol",
            )
        elif address.kind == "admin":
            self._admin(message.delivery, message.correlation)
        else:
            self._controls.handle(address, message.delivery.payload, message.correlation)

    def _receive(self, message: Received, address: Address, pending: _Burst) -> _Accepted | None:
        """One request up to its place in the queue; refusals are answered here."""
        payload = message.delivery.payload
        policy = self._policies().routes[address.route].parse
        raw: RawRequest | None = None
        try:
            raw = read_request(payload, policy=policy)
            if raw is None:
                return None
            if address.session is None:
                name = policy.names.of("session_id")
                address = self._topics.with_session(address.route, raw.session_id, field_name=name)
            asked_for = message.delivery.response_topic
            if asked_for is not None and asked_for != address.reply_topic:
                request_id = raw.request_id or uuid.uuid4().hex
                self._refusals.reject(message, address, request_id, "reply_topic_forbidden")
                return None
            return self._enter(message, address, raw, check_request(raw, policy=policy), pending)
        except (RequestError, MemoryError) as problem:
            error = problem if isinstance(problem, RequestError) else self._starved(message)
            ids = raw or guess_ids(payload, policy.names)
            if address.session is None and ids.session_id is not None:
                address = self._topics.find_session(address.route, ids.session_id) or address
            self._refusals.refuse(message, address, ids.request_id, error)
            return None

    def _starved(self, message: Received) -> RequestError:
        self._counters.starved()
        # Without its stack: that would take memory too.
        log.error("request.out_of_memory", topic=message.shown_topic(), bytes=len(message.delivery.payload))
        return out_of_memory()

    def _enter(
        self, message: Received, address: Address, raw: RawRequest, request: Generate, pending: _Burst
    ) -> _Accepted | None:
        assert address.session is not None
        delivery = message.delivery
        key = EntryKey(address.route, address.session, request.request_id or uuid.uuid4().hex)
        if request.request_id is not None and self._sent_again(message, address, key, raw.digest, pending):
            return None
        if delivery.correlation is not None and message.correlation is None:
            note = f"Correlation Data over {_MAX_CORRELATION_BYTES} bytes is not mirrored"
            request = replace(request, warnings=(*request.warnings, note))
        limits_s = [limit for limit in (request.timeout_s, delivery.expiry_s) if limit is not None]
        timeout_s = min(limits_s)
        waited_s = max(0.0, time.monotonic() - delivery.received_at)
        now = self._now()
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
        job = self._maker.make(
            entry=entry,
            address=address,
            request=request,
            received_at=delivery.received_at,
            deadline=delivery.received_at + timeout_s,
        )
        return _Accepted(job, self._registry.enter(job))

    def _sent_again(self, message: Received, address: Address, key: EntryKey, digest: str, pending: _Burst) -> bool:
        """Whether this id is known: then its state is told once more (protocol, section 5), and nothing runs twice."""
        job = self._registry.find(key)
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
            # Twice in one burst: the first one's events answer both.
            if not any(item is not None and item.job is job for _, item in pending) and not job.responder.snapshot():
                job.responder.queued(position=job.position, reason=job.wait_reason, share="answer")
        else:
            terminal = entry.terminal or self._redelivery.unstored(key)
            if terminal is not None:
                self._redelivery.send(key, entry.reply_topic, terminal, message.correlation, share="answer", again=True)
            # Else its end is being written at this moment, and will be published.
        return True
