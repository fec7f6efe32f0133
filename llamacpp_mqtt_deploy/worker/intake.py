"""A delivered message becomes a job, a refusal or an answer to a control: in order of receipt, in one thread."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from functools import lru_cache

import structlog

from llamacpp_mqtt_deploy.core.addresses import Address, TopicMap
from llamacpp_mqtt_deploy.core.errors import BadRequest, RequestError
from llamacpp_mqtt_deploy.core.guessing import guess_ids
from llamacpp_mqtt_deploy.core.payloads import is_blank
from llamacpp_mqtt_deploy.core.requests import RawRequest, check_request, read_request
from llamacpp_mqtt_deploy.ports import Delivery
from llamacpp_mqtt_deploy.worker.admitting import MAX_CORRELATION_BYTES, Admission
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.control import Controls
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.inbox import Inbox
from llamacpp_mqtt_deploy.worker.message_log import MessageLog
from llamacpp_mqtt_deploy.worker.own_errors import out_of_memory
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.refusals import Received, Refusals, first_level_of
from llamacpp_mqtt_deploy.worker.session_topics import SessionTopics

log = structlog.get_logger(__name__)

# One commit for a burst: as many messages as are there, at most this many, so that the first need not wait for the last.
_BURST = 64
# What a topic says is asked twice for each message, once in the link's thread; a topic can be 64 KiB long.
_REMEMBERED_TOPICS, _REMEMBERED_TOPIC_CHARS = 256, 256


class Intake:
    """Reads the inbox. Address first, then the payload, then admission; journal, acknowledgement, first event, in that order.

    `expect` is called in the link's thread for each message that may be a request, before it is read.
    """

    def __init__(
        self,
        *,
        topics: TopicMap,
        answers: Answers,
        refusals: Refusals,
        admission: Admission,
        controls: Controls,
        session_topics: SessionTopics,
        admin: Callable[[Delivery, bytes | None], None],
        counters: Counters,
        policies: Callable[[], Policies],
        message_log: MessageLog,
        inbox_messages: int,
        expect: Callable[[], None] = lambda: None,
    ) -> None:
        self._topics = topics
        self._answers = answers
        self._refusals = refusals
        self._admission = admission
        self._controls = controls
        self._session_topics = session_topics
        self._admin = admin
        self._counters = counters
        self._policies = policies
        self._log = message_log
        self._known_address = lru_cache(_REMEMBERED_TOPICS)(topics.address)
        self._inbox = Inbox(max_messages=inbox_messages)
        self._expect = expect
        self._thread = threading.Thread(target=self._loop, name="intake", daemon=True)
        self._may_read = threading.Event()
        self._shut = False
        self.beat_at = time.monotonic()

    def offer(self, delivery: Delivery) -> bool:
        """The link's thread: take the message, or say that there is no place for it (`Inbox.offer`)."""
        address = self._address(delivery.topic)
        if not self._inbox.offer(delivery, first_level_of(address, delivery.topic)):
            return False
        if address is not None and address.kind == "request":
            self._expect()  # while our thread wakes up and reads the message
        return True

    def _address(self, topic: str) -> Address | None:
        short = len(topic) <= _REMEMBERED_TOPIC_CHARS
        return self._known_address(topic) if short else self._topics.address(topic)

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

    def beat(self) -> None:
        """The thread is alive, whatever it waits for."""
        self.beat_at = time.monotonic()

    def _loop(self) -> None:
        while not self._may_read.wait(1.0):
            self.beat()
        while not self._shut:
            self.beat()
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
        for delivery in burst:
            try:
                message = self._received(delivery)
                if self._is_request(message):
                    assert message.address is not None
                    self._receive(message, message.address)
                else:
                    self._admission.commit()
                    self._other(message)
            except Exception:
                # A defect: the message is acknowledged all the same, or the broker would deliver it for ever.
                log.exception("intake.failed", topic=delivery.topic[:200])
            self._admission.read(delivery)
        self._admission.commit()

    def _is_request(self, message: Received) -> bool:
        """Whether it asks for an answer: on some routes an empty message resets its session instead."""
        address, delivery = message.address, message.delivery
        if address is None or address.kind != "request" or delivery.retain:
            return False
        if self._policies().routes[address.route].empty_payload != "reset":
            return True
        return delivery.left_out > 0 or not is_blank(delivery.payload)

    def _received(self, delivery: Delivery) -> Received:
        data = delivery.correlation
        mirrored = data if data is not None and len(data) <= MAX_CORRELATION_BYTES else None
        return Received(delivery, self._address(delivery.topic), mirrored)

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
        elif address.kind == "control":
            self._controls.handle(
                address, message.delivery.payload, message.correlation, left_out=message.delivery.left_out
            )
        else:
            self._session_topics.handle(message, address)

    def _receive(self, message: Received, address: Address) -> None:
        """One request up to its place in the queue; refusals are answered here."""
        payload = message.delivery.payload
        policies = self._policies()
        policy = policies.routes[address.route].parse
        raw: RawRequest | None = None
        try:
            raw = read_request(payload, policy=policy, templated=address.templated, left_out=message.delivery.left_out)
            if raw is None:
                self._check_empty(address)
                return
            address = self._topics.with_payload(address, raw.body, policy.names)
            asked_for = message.delivery.response_topic
            if asked_for is not None and asked_for != address.reply_topic:
                request_id = raw.request_id or uuid.uuid4().hex
                self._refusals.reject(message, address, request_id, "reply_topic_forbidden")
                return
            allowed = policies.parse_for(address.route, address.first_level)
            self._admission.enter(message, address, raw, check_request(raw, policy=allowed))
        except (RequestError, MemoryError) as problem:
            error = problem if isinstance(problem, RequestError) else self._starved(message)
            ids = raw.ids() if raw is not None else guess_ids(payload, policy.names).ids()
            self._refusals.refuse(message, self._topics.with_ids(address, ids), ids.get("request_id"), error)

    def _check_empty(self, address: Address) -> None:
        if self._policies().routes[address.route].empty_payload == "error":
            words = "a prompt, and it is empty"
            raise BadRequest(f"payload: expected {words}", fields={"payload": words})

    def _starved(self, message: Received) -> RequestError:
        self._counters.starved()
        # Without its stack: that would take memory too.
        log.error("request.out_of_memory", topic=message.shown_topic(), bytes=message.delivery.payload_bytes)
        return out_of_memory()
