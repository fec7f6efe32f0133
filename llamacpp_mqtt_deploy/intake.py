"""A delivered message becomes a job, a refusal or an answer to a control: in order of receipt, in one thread."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from llamacpp_mqtt_deploy.controls import Controls
from llamacpp_mqtt_deploy.core import events
from llamacpp_mqtt_deploy.core.errors import Busy, Internal, RequestError
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.letters import guess_request_id
from llamacpp_mqtt_deploy.core.requests import Generate, Letter, check_request, read_letter
from llamacpp_mqtt_deploy.core.topics import Address, TopicMap
from llamacpp_mqtt_deploy.deliveries import Deliveries
from llamacpp_mqtt_deploy.endings import Endings
from llamacpp_mqtt_deploy.jobs import Job, JobBook
from llamacpp_mqtt_deploy.policies import Policies
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Outbox, Store, StoreError
from llamacpp_mqtt_deploy.responder import Responder
from llamacpp_mqtt_deploy.tally import Tally
from llamacpp_mqtt_deploy.timers import Timers

log = structlog.get_logger(__name__)

# Protocol, section 1: longer Correlation Data is not mirrored (it would be stored and sent with every event).
_MAX_CORRELATION_BYTES = 64
# One commit for a burst: as many messages as are there, at most this many, so that the first need not wait for the last.
_BURST = 64
# What the inbox holds at most, whatever the number of messages: a thousand megabyte requests would fill a small device.
_INBOX_BYTES = 32 * 1024 * 1024
# How long the link's thread may wait for a place in the inbox before the message is left to the broker.
_OFFER_WAIT_S = 1.0


@dataclass(slots=True)
class _Accepted:
    """A request of the current burst: in the line, held until the journal has it."""

    job: Job
    evicted: Job | None


class JobMaker:
    """Builds a job with its responder; the same for fresh requests and for those recovered from the journal."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        timers: Timers,
        policies: Callable[[], Policies],
        max_event_bytes: Callable[[], int],
        crowd: Callable[[], int],
    ) -> None:
        self._outbox = outbox
        self._timers = timers
        self._crowd = crowd
        self._policies = policies
        self.max_event_bytes = max_event_bytes

    def make(self, *, entry: Entry, address: Address, request: Generate, received_at: float, deadline: float) -> Job:
        assert address.session is not None
        assert address.reply_topic is not None
        policies = self._policies()
        streaming = policies.settings.streaming
        responder = Responder(
            outbox=self._outbox,
            topic=address.reply_topic,
            writer=EventWriter(
                request_id=entry.key.request_id, session_id=address.session, max_bytes=self.max_event_bytes()
            ),
            correlation=entry.correlation,
            silent=request.stream is False or policies.routes[address.route].mode == "off",
            wake=self._timers.after,
            coalesce_min_s=streaming.coalesce_min_s,
            crowd=self._crowd,
            coalesce_max_chars=streaming.coalesce_max_chars,
        )
        job = Job(
            key=entry.key,
            entry=entry,
            address=address,
            request=request,
            responder=responder,
            session=None if request.mode == "messages" else (address.route, address.session),
            received_at=received_at,
            deadline=deadline,
        )
        responder.on_overflow = lambda: job.stop.set("outbox_full")
        return job


class Intake:
    """Reads the inbox. Address first, then the letter, then admission; journal, acknowledgement, first event, in that order."""

    def __init__(
        self,
        *,
        topics: TopicMap,
        outbox: Outbox,
        store: Store,
        book: JobBook,
        maker: JobMaker,
        controls: Controls,
        admin: Callable[[Delivery, bytes | None], None],
        endings: Endings,
        tally: Tally,
        policies: Callable[[], Policies],
        deliveries: Deliveries,
        inbox_messages: int,
    ) -> None:
        self._topics = topics
        self._outbox = outbox
        self._store = store
        self._book = book
        self._maker = maker
        self._controls = controls
        self._admin = admin
        self._endings = endings
        self._tally = tally
        self._policies = policies
        self._deliveries = deliveries
        self._inbox: queue.Queue[Delivery | None] = queue.Queue(maxsize=inbox_messages)
        self._inbox_bytes = 0
        self._bytes_lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="intake", daemon=True)
        self._let_in = threading.Event()
        self._shut = False
        self.beat_at = time.monotonic()

    # --- the inbox -----------------------------------------------------------------------------------------------------

    def offer(self, delivery: Delivery) -> bool:
        """From the link's thread: take the message, or say that the inbox is full. Waits a moment for a place."""
        with self._bytes_lock:
            if self._inbox_bytes and self._inbox_bytes + len(delivery.payload) > _INBOX_BYTES:
                return False
            self._inbox_bytes += len(delivery.payload)
        try:
            self._inbox.put(delivery, timeout=_OFFER_WAIT_S)
        except queue.Full:
            with self._bytes_lock:
                self._inbox_bytes -= len(delivery.payload)
            self._tally.add("inbox_full")
            return False
        return True

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
        if self._thread.is_alive():
            try:
                self._inbox.put(None, timeout=timeout_s)
            except queue.Full:
                return
            self._thread.join(timeout_s)

    def _loop(self) -> None:
        closing = False
        while not closing:
            self.beat_at = time.monotonic()
            if not self._let_in.wait(1.0):
                continue
            if self._shut:
                return
            try:
                burst = [self._inbox.get(timeout=1.0)]
            except queue.Empty:
                continue
            while len(burst) < _BURST and burst[-1] is not None:
                try:
                    burst.append(self._inbox.get_nowait())
                except queue.Empty:
                    break
            closing = burst[-1] is None
            deliveries = [delivery for delivery in burst if delivery is not None]
            with self._bytes_lock:
                self._inbox_bytes -= sum(len(delivery.payload) for delivery in deliveries)
            self._take_in(deliveries)

    # --- a burst -------------------------------------------------------------------------------------------------------

    def _take_in(self, deliveries: list[Delivery]) -> None:
        """Requests that come in a burst share one commit. A control message sees all requests before it accepted."""
        pending: list[tuple[Delivery, _Accepted | None]] = []
        for delivery in deliveries:
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
        """Take in a burst, or part of one: journal, acknowledge in order of receipt, then say the first word to each.

        A defect on the way costs these requests, never the thread that reads all others.
        """
        accepted = [item for _, item in pending if item is not None]
        refusal = self._journal(accepted)
        for delivery, _ in pending:
            self._outbox.acknowledge(delivery)
        try:
            self._let_go(accepted, refusal)
        except Exception:
            log.exception("intake.failed", requests=len(accepted))
            for item in accepted:
                self._endings.failed(item.job, Internal("the worker failed on this request; its log says why"))

    def _journal(self, accepted: list[_Accepted]) -> Internal | None:
        if not accepted:
            return None
        try:
            self._store.accept([item.job.entry for item in accepted])
        except StoreError as problem:
            log.error("journal.failed", step="accept", problem=str(problem), requests=len(accepted))
            return Internal("the worker cannot write its journal (is its disk full?); nothing was run")
        except Exception:
            log.exception("intake.failed", requests=len(accepted))
            return Internal("the worker failed on this request; its log says why")
        self._tally.add("accepted", len(accepted))
        return None

    def _let_go(self, accepted: list[_Accepted], refusal: Internal | None) -> None:
        """Open the line to these requests, or end them when the journal did not take them."""
        for item in accepted:
            if item.evicted is not None:
                self._endings.failed(
                    item.evicted, Busy("the queue is full and a more urgent request took this place", retry_after_s=10)
                )
        if refusal is not None:
            for item in accepted:
                self._endings.failed(item.job, refusal)
            return
        waiting = [item.job for item in accepted if self._book.must_wait(item.job)]
        positions = self._book.positions() if waiting else {}
        self._book.commit([item.job for item in accepted])
        for item in accepted:
            job = item.job
            if self._book.was_cancelled(job.key):
                self._controls.cancel(job)
            elif job in waiting and job.key in positions:
                job.position = positions[job.key]
                job.responder.queued(position=job.position, reason=job.wait_reason)

    # --- one message ---------------------------------------------------------------------------------------------------

    def _other(self, delivery: Delivery) -> None:
        """Everything but requests: control, admin, and what is none of our business."""
        address = self._topics.address(delivery.topic)
        if delivery.retain:
            self._tally.add("ignored")
            log.warning("message.ignored", topic=_shown(delivery.topic), reason="retained: requests are not kept")
        elif address is None:
            self._tally.add("ignored")
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
        letter: Letter | None = None
        try:
            letter = read_letter(delivery.payload, policy=policy)
            if letter is None:
                return None
            if address.session is None:
                address = self._topics.with_session(address.route, letter.session_id)
            if delivery.response_topic is not None and delivery.response_topic != address.reply_topic:
                self._reject(address, letter.request_id or uuid.uuid4().hex, delivery, "reply_topic_forbidden")
                return None
            return self._enter(delivery, address, letter, check_request(letter, policy=policy), pending)
        except RequestError as error:
            request_id = (letter.request_id if letter else None) or guess_request_id(delivery.payload)
            self._refuse(address, request_id, delivery, error)
            return None

    def _enter(
        self,
        delivery: Delivery,
        address: Address,
        letter: Letter,
        request: Generate,
        pending: list[tuple[Delivery, _Accepted | None]],
    ) -> _Accepted | None:
        assert address.session is not None
        key = EntryKey(address.route, address.session, request.request_id or uuid.uuid4().hex)
        if request.request_id is not None and self._sent_again(delivery, address, key, letter.digest, pending):
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
            digest=letter.digest,
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
        return _Accepted(job, self._book.enter(job))

    def _sent_again(
        self,
        delivery: Delivery,
        address: Address,
        key: EntryKey,
        digest: str,
        pending: list[tuple[Delivery, _Accepted | None]],
    ) -> bool:
        """Whether this id is known: then its state is told once more (protocol, section 5), and nothing runs twice."""
        job = self._book.find(key)
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
        terminal = entry.terminal or self._deliveries.unstored(key)
        if terminal is not None:
            self._deliveries.send(key, entry.reply_topic, terminal, _correlation(delivery))
            return True
        # In the journal, not ended and not inside: its end is being written at this moment, and will be published.
        return True

    # --- refusals ------------------------------------------------------------------------------------------------------

    def _refuse(self, address: Address, request_id: str | None, delivery: Delivery, error: RequestError) -> None:
        """Answer with one `error` event; nothing was accepted, nothing is remembered."""
        self._tally.refused(error.code)
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
            return  # The session stood in the payload and cannot be read: there is no topic to answer on.
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
            return self._book.find(key) is not None or self._store.find(key) is not None
        except StoreError:
            return False

    def _reject(self, address: Address, request_id: str, delivery: Delivery, code: str) -> bool:
        assert address.reply_topic is not None
        assert address.session is not None
        message = {
            "duplicate_request": "this request_id belongs to another request of this session; use a new random one",
            "reply_topic_forbidden": f"answers go to {address.reply_topic} only; leave the Response Topic out or set it so",
        }[code]
        self._tally.refused(code)
        log.info("request.rejected", code=code, topic=_shown(delivery.topic))
        payload = events.rejected(request_id=request_id, session_id=address.session, code=code, message=message)
        return self._outbox.publish(address.reply_topic, payload, correlation=_correlation(delivery)) or True


def _correlation(delivery: Delivery) -> bytes | None:
    data = delivery.correlation
    return data if data is not None and len(data) <= _MAX_CORRELATION_BYTES else None


def _shown(topic: str) -> str:
    """A topic for the log; a client may have put anything into it."""
    return topic[:200]
