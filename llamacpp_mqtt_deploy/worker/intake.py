"""A delivered message becomes a job, a refusal or an answer to a control: in order of receipt, in one thread."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from llamacpp_mqtt_deploy.core import events
from llamacpp_mqtt_deploy.core.addresses import Address, TopicMap
from llamacpp_mqtt_deploy.core.errors import Busy, Internal, RequestError
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.guessing import guess_ids
from llamacpp_mqtt_deploy.core.requests import Generate, RawRequest, check_request, read_request
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Outbox, Store, StoreError
from llamacpp_mqtt_deploy.worker.acknowledging import Acknowledger, Receipt
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.control import Controls
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.inbox import Inbox
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery

log = structlog.get_logger(__name__)

# Protocol, section 1: longer Correlation Data is not mirrored (it would be stored and sent with every event).
_MAX_CORRELATION_BYTES = 64
# One commit for a burst: as many messages as are there, at most this many, so that the first need not wait for the last.
_BURST = 64


@dataclass(slots=True)
class _Accepted:
    """A request of the current burst: in the line, held until the journal has it."""

    job: Job
    evicted: Job | None


class Intake:
    """Reads the inbox. Address first, then the payload, then admission; journal, acknowledgement, first event, in that order."""

    def __init__(
        self,
        *,
        topics: TopicMap,
        outbox: Outbox,
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
        inbox_messages: int,
    ) -> None:
        self._topics = topics
        self._outbox = outbox
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
        self._acknowledger = Acknowledger(outbox)
        self._inbox = Inbox(max_messages=inbox_messages)
        self.offer = self._inbox.offer
        self._thread = threading.Thread(target=self._loop, name="intake", daemon=True)
        self._let_in = threading.Event()
        self._shut = False
        self.beat_at = time.monotonic()

    # --- the thread ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; nothing is read before `let_in`."""
        self._thread.start()

    def let_in(self) -> None:
        """Begin to read: the worker has its place on the bus, and what an earlier life left was taken up.

        A broker that kept our session delivers before we have subscribed. Read at once, these requests would be taken for
        what an earlier life left and would end twice; and another worker may be serving this root.
        """
        self._let_in.set()

    def close(self, timeout_s: float) -> None:
        """Read what is in the inbox, then end; what was never let in stays with the broker."""
        if not self._let_in.is_set():
            self._shut = True
            self._let_in.set()
        self._inbox.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _loop(self) -> None:
        while True:
            self.beat_at = time.monotonic()
            if not self._let_in.wait(1.0):
                continue
            if self._shut:
                return
            burst = self._inbox.take(_BURST, timeout_s=1.0)
            if burst is None:
                return
            if burst:
                self._take_in(burst)

    # --- a burst -------------------------------------------------------------------------------------------------------

    def _take_in(self, burst: list[Delivery]) -> None:
        """Requests that come in a burst share one commit. A control message sees all requests before it accepted."""
        pending: list[tuple[Delivery, _Accepted | None]] = []
        for delivery in burst:
            accepted = None
            try:
                if self._is_request(delivery):
                    accepted = self._receive(delivery, pending)
                else:
                    self._accept(pending)
                    pending = []
                    self._other(delivery)
            except Exception:
                # A defect: the message is acknowledged all the same, or the broker would deliver it for ever.
                log.exception("intake.failed", topic=_shown(delivery.topic))
            pending.append((delivery, accepted))
        self._accept(pending)

    def _is_request(self, delivery: Delivery) -> bool:
        address = self._topics.address(delivery.topic)
        return address is not None and address.kind == "request" and not delivery.retain

    def _accept(self, pending: list[tuple[Delivery, _Accepted | None]]) -> None:
        """Take in a burst, or part of one: journal, then acknowledge in order of receipt, then say the first word to each.

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
            # Callbacks come in the order of the writes, so that nothing overtakes this on its way to the clients.
            written.on_done(lambda problem: self._journaled(jobs, receipt, problem))
            self._let_go(accepted)
        except StoreError as problem:
            self._not_journaled(jobs, receipt, problem)
        except Exception:
            log.exception("intake.failed", requests=len(accepted))
            for job in jobs:
                self._completion.failed(job, Internal("the worker failed on this request; its log says why"))
            self._acknowledger.ready(receipt)

    def _journaled(self, jobs: Sequence[Job], receipt: Receipt, problem: StoreError | None) -> None:
        """The store's thread: the requests are accepted, or are not."""
        if problem is not None:
            self._background.run(receipt, lambda: self._not_journaled(jobs, receipt, problem))
            return
        self._counters.add("accepted", len(jobs))
        self._acknowledger.ready(receipt)
        for job in jobs:
            job.responder.release()

    def _not_journaled(self, jobs: Sequence[Job], receipt: Receipt, problem: StoreError) -> None:
        """Refuse them: nobody has heard of them, and a restart would not know them."""
        log.error("journal.failed", step="accept", problem=str(problem), requests=len(jobs))
        self._acknowledger.ready(receipt)
        for job in jobs:
            job.responder.withdraw()
            job.forgotten = True
            job.stop.set("unjournaled")
            if job.phase in ("queued", "pacing"):
                self._completion.stopped(job)

    def _let_go(self, accepted: list[_Accepted]) -> None:
        """Let these requests run."""
        for item in accepted:
            if item.evicted is not None:
                self._completion.failed(
                    item.evicted, Busy("the queue is full and a more urgent request took this place", retry_after_s=10)
                )
        waiting = [item.job for item in accepted if self._registry.must_wait(item.job)]
        positions = self._registry.positions() if waiting else {}
        self._registry.commit([item.job for item in accepted])
        for item in accepted:
            job = item.job
            if self._registry.was_cancelled(job.key):
                self._controls.cancel(job)
            elif job in waiting and job.key in positions:
                job.position = positions[job.key]
                job.responder.queued(position=job.position, reason=job.wait_reason)

    # --- one message ---------------------------------------------------------------------------------------------------

    def _other(self, delivery: Delivery) -> None:
        """Everything but requests: control, admin, and what is none of our business."""
        address = self._topics.address(delivery.topic)
        if delivery.retain:
            self._counters.add("ignored")
            log.warning("message.ignored", topic=_shown(delivery.topic), reason="retained: requests are not kept")
        elif address is None:
            self._counters.add("ignored")
            log.warning("message.ignored", topic=_shown(delivery.topic), reason="no session path of the protocol")
        elif address.kind == "admin":
            self._admin(delivery, _correlation(delivery))
        else:
            self._controls.handle(address, delivery.payload, _correlation(delivery))

    def _receive(self, delivery: Delivery, pending: list[tuple[Delivery, _Accepted | None]]) -> _Accepted | None:
        """One request up to its place in the line; refusals are answered here."""
        address = self._topics.address(delivery.topic)
        assert address is not None
        policy = self._policies().routes[address.route].parse
        raw: RawRequest | None = None
        try:
            raw = read_request(delivery.payload, policy=policy)
            if raw is None:
                return None
            if address.session is None:
                name = policy.names.of("session_id")
                address = self._topics.with_session(address.route, raw.session_id, field_name=name)
            if delivery.response_topic is not None and delivery.response_topic != address.reply_topic:
                self._reject(address, raw.request_id or uuid.uuid4().hex, delivery, "reply_topic_forbidden")
                return None
            return self._enter(delivery, address, raw, check_request(raw, policy=policy), pending)
        except RequestError as error:
            ids = raw or guess_ids(delivery.payload, policy.names)
            if address.session is None and ids.session_id is not None:
                address = self._topics.find_session(address.route, ids.session_id) or address
            self._refuse(address, ids.request_id, delivery, error)
            return None

    def _enter(
        self,
        delivery: Delivery,
        address: Address,
        raw: RawRequest,
        request: Generate,
        pending: list[tuple[Delivery, _Accepted | None]],
    ) -> _Accepted | None:
        assert address.session is not None
        key = EntryKey(address.route, address.session, request.request_id or uuid.uuid4().hex)
        if request.request_id is not None and self._sent_again(delivery, address, key, raw.digest, pending):
            return None
        if delivery.correlation is not None and _correlation(delivery) is None:
            note = f"Correlation Data over {_MAX_CORRELATION_BYTES} bytes is not mirrored"
            request = replace(request, warnings=(*request.warnings, note))
        limits_s = [limit for limit in (request.timeout_s, delivery.expiry_s) if limit is not None]
        timeout_s = min(limits_s)
        waited_s = max(0.0, time.monotonic() - delivery.received_at)
        now = time.time()
        entry = Entry(
            key=key,
            topic=delivery.topic,
            payload=delivery.payload,
            digest=raw.digest,
            correlation=_correlation(delivery),
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

    def _sent_again(
        self,
        delivery: Delivery,
        address: Address,
        key: EntryKey,
        digest: str,
        pending: list[tuple[Delivery, _Accepted | None]],
    ) -> bool:
        """Whether this id is known: then its state is told once more (protocol, section 5), and nothing runs twice."""
        job = self._registry.find(key)
        if job is not None and any(item is not None and item.job is job for _, item in pending):
            # Twice in one burst: the first one's events answer both.
            return job.entry.digest == digest or self._reject(address, key.request_id, delivery, "duplicate_request")
        try:
            entry = job.entry if job is not None else self._store.find(key)
        except StoreError as problem:
            log.error("journal.failed", step="find", problem=str(problem), request_id=key.request_id)
            raise Internal("the worker cannot read its journal; nothing was run") from problem
        if entry is None:
            return False
        if entry.digest != digest:
            return self._reject(address, key.request_id, delivery, "duplicate_request")
        if job is not None:
            if not job.responder.snapshot():
                job.responder.queued(position=job.position, reason=job.wait_reason)
            return True
        terminal = entry.terminal or self._redelivery.unstored(key)
        if terminal is not None:
            self._redelivery.send(key, entry.reply_topic, terminal, _correlation(delivery))
            return True
        # In the journal, not ended and not inside: its end is being written at this moment, and will be published.
        return True

    # --- refusals ------------------------------------------------------------------------------------------------------

    def _refuse(self, address: Address, request_id: str | None, delivery: Delivery, error: RequestError) -> None:
        """Answer with one `error` event; nothing was accepted, nothing is remembered."""
        self._counters.refused(error.code)
        log.info(
            "request.refused",
            code=error.code,
            topic=_shown(delivery.topic),
            bytes=len(delivery.payload),
            message=error.message,
        )
        if address.reply_topic is not None and request_id is not None and self._is_known(address, request_id):
            # A broken copy of a request that is known: an `error` would end the good one in its client's eyes.
            self._reject(address, request_id, delivery, "duplicate_request")
            return
        if address.reply_topic is None or address.session is None:
            return  # The session stands in the payload and cannot be seen there: there is no topic to answer on.
        writer = EventWriter(
            request_id=request_id or uuid.uuid4().hex,
            session_id=address.session,
            max_bytes=self._maker.max_event_bytes(),
        )
        payload = writer.error(code=error.code, message=error.message, retryable=error.retryable, details=error.details)
        self._outbox.publish(address.reply_topic, payload, correlation=_correlation(delivery))

    def _is_known(self, address: Address, request_id: str) -> bool:
        key = EntryKey(address.route, address.session or "", request_id)
        try:
            return self._registry.find(key) is not None or self._store.find(key) is not None
        except StoreError:
            return False

    def _reject(self, address: Address, request_id: str, delivery: Delivery, code: str) -> bool:
        assert address.reply_topic is not None
        assert address.session is not None
        message = {
            "duplicate_request": "this request_id belongs to another request of this session; use a new random one",
            "reply_topic_forbidden": f"answers go to {address.reply_topic} only; leave the Response Topic out or set it so",
        }[code]
        self._counters.refused(code)
        log.info("request.rejected", code=code, topic=_shown(delivery.topic))
        payload = events.rejected(request_id=request_id, session_id=address.session, code=code, message=message)
        self._outbox.publish(address.reply_topic, payload, correlation=_correlation(delivery))
        return True


def _correlation(delivery: Delivery) -> bytes | None:
    data = delivery.correlation
    return data if data is not None and len(data) <= _MAX_CORRELATION_BYTES else None


def _shown(topic: str) -> str:
    """A topic for the log; a client may have put anything into it."""
    return topic[:200]
