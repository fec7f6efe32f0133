"""A broker inside one process, for tests and demonstrations: sessions, retained messages, wills, QoS 1."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from llamacpp_mqtt_deploy.core.topics import filter_fault, topic_matches
from llamacpp_mqtt_deploy.ports import Delivery, LinkState, Retained

SESSION_QUEUE = 1000
"""Messages kept for an absent client, as mosquitto does; the newest are lost beyond it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMessage:
    topic: str
    payload: bytes
    qos: int
    retain: bool = False
    correlation: bytes | None = None
    response_topic: str | None = None
    expires_at: float | None = None
    content_type: str | None = None


@dataclass(slots=True)
class _Session:
    """What the broker remembers of a client id, connected or not."""

    filters: dict[str, int] = field(default_factory=dict)
    queued: deque[StoredMessage] = field(default_factory=deque)
    inflight: dict[int, StoredMessage] = field(default_factory=dict)
    last_mid: int = 0
    deliver: Callable[[int, StoredMessage], None] | None = None
    drop: Callable[[LinkState, str], None] | None = None
    will: Retained | None = None


class LoopbackBroker:
    """Retained messages, sessions, wills and QoS 1 in memory, with controls for tests.

    Routing happens in the publisher's thread, under the broker's lock; each link hands out its deliveries in its own thread.
    """

    def __init__(self, *, max_payload_bytes: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_payload_bytes = max_payload_bytes
        self._clock = clock
        self._lock = threading.RLock()
        self._sessions: dict[str, _Session] = {}
        self._retained: dict[str, StoredMessage] = {}
        self._refused_filters: dict[str, str] = {}
        self._refused_topics: dict[str, str] = {}
        self._pubacks_held = False
        self._held: list[Callable[[], None]] = []
        self._running = True
        self._clients = 0

    # --- controls ---

    def hold_pubacks(self) -> None:
        """Route publishes but keep their PUBACKs back until `release_pubacks`."""
        with self._lock:
            self._pubacks_held = True

    def release_pubacks(self) -> None:
        with self._lock:
            self._pubacks_held = False
            held, self._held = self._held, []
        for send in held:
            send()

    def drop_connection(self, client_id: str | None = None) -> None:
        """Cut this client's connection, or all: their wills are published, and the links come back by themselves."""
        with self._lock:
            ids = [client_id] if client_id is not None else list(self._sessions)
            for each in ids:
                self._cut(each, "lost", "The connection was cut.")

    def stop(self, *, forget: bool = False) -> None:
        """Cut everything and take no connection until `start`; `forget` loses sessions and retained messages too."""
        with self._lock:
            self._running = False
            self.drop_connection()
            if forget:
                self._sessions.clear()
                self._retained.clear()

    def start(self) -> None:
        with self._lock:
            self._running = True

    def refuse(self, topic_filter: str, reason: str = "Not authorized") -> None:
        """Refuse subscriptions to exactly this filter from now on."""
        with self._lock:
            self._refused_filters[topic_filter] = reason

    def allow(self, topic_filter: str) -> None:
        """Grant subscriptions to this filter again."""
        with self._lock:
            self._refused_filters.pop(topic_filter, None)

    def refuse_publish(self, topic_filter: str, reason: str = "Not authorized") -> None:
        """Refuse publishes to topics that match this filter from now on."""
        with self._lock:
            self._refused_topics[topic_filter] = reason

    def retained(self, topic: str) -> bytes | None:
        """The retained payload of a topic, None when there is none or it has expired."""
        with self._lock:
            message = self._retained.get(topic)
            return None if message is None or self._expired(message) else message.payload

    def unacknowledged(self, client_id: str) -> int:
        """Messages delivered to this client, or queued for it, that it has not acknowledged."""
        with self._lock:
            session = self._sessions.get(client_id)
            return 0 if session is None else len(session.inflight) + len(session.queued)

    def client(self, client_id: str | None = None) -> LoopbackClient:
        """A small client for tests and demonstrations."""
        with self._lock:
            self._clients += 1
            return LoopbackClient(self, client_id or f"client-{self._clients}")

    # --- what links and clients call ---

    def admit(
        self,
        client_id: str,
        *,
        will: Retained | None,
        deliver: Callable[[int, StoredMessage], None],
        drop: Callable[[LinkState, str], None],
    ) -> bool | None:
        """Take a connection; whether a session was there, None when the broker is stopped."""
        with self._lock:
            if not self._running:
                return None
            present = client_id in self._sessions
            session = self._sessions.setdefault(client_id, _Session())
            if session.drop is not None:
                self._cut(client_id, "taken_over", "Another client connected under the same client id.")
            session.deliver, session.drop, session.will = deliver, drop, will
            return present

    def resume(self, client_id: str) -> None:
        """Deliver again what the session holds, in order; called once the link has announced itself."""
        with self._lock:
            session = self._sessions.get(client_id)
            if session is None or session.deliver is None:
                return
            for mid, message in list(session.inflight.items()):
                session.deliver(mid, message)
            queued, session.queued = session.queued, deque()
            for message in queued:
                self._enqueue(session, message)

    def release(self, client_id: str, *, forget: bool = False, with_will: bool = False) -> None:
        with self._lock:
            session = self._sessions.get(client_id)
            if session is None:
                return
            will = session.will if with_will else None
            session.deliver = session.drop = session.will = None
            if forget:
                del self._sessions[client_id]
            if will is not None:
                self._route(StoredMessage(topic=will.topic, payload=will.payload, qos=1, retain=True))

    def _cut(self, client_id: str, state: LinkState, detail: str) -> None:
        session = self._sessions.get(client_id)
        if session is None or session.drop is None:
            return
        drop = session.drop
        # As mosquitto 2.0: a takeover does not fire the will.
        self.release(client_id, with_will=state != "taken_over")
        drop(state, detail)

    def take_subscription(
        self, client_id: str, filters: Sequence[tuple[str, int]], *, retained: bool
    ) -> dict[str, str] | None:
        """Subscribe; the refused filters with the reason, None when the broker has forgotten this client."""
        refused: dict[str, str] = {}
        with self._lock:
            session = self._sessions.get(client_id)
            if session is None:
                return None
            for topic_filter, qos in filters:
                fault = filter_fault(topic_filter) or self._refused_filters.get(topic_filter)
                if fault is not None:
                    refused[topic_filter] = fault
                    continue
                session.filters[topic_filter] = min(qos, 1)
                if retained:
                    for message in list(self._retained.values()):
                        if topic_matches(topic_filter, message.topic):
                            self._enqueue(session, replace(message, qos=min(message.qos, qos)))
        return refused

    def end_subscription(self, client_id: str, filters: Sequence[str]) -> dict[str, str] | None:
        """Unsubscribe; None when the broker has forgotten this client."""
        with self._lock:
            session = self._sessions.get(client_id)
            if session is None:
                return None
            for each in filters:
                session.filters.pop(each, None)
        return {}

    def take_publish(self, message: StoredMessage, puback: Callable[[str | None], None]) -> None:
        """Route a message, then acknowledge it; `puback(None)` is success, else the reason of the refusal."""
        with self._lock:
            refusal = next((why for f, why in self._refused_topics.items() if topic_matches(f, message.topic)), None)
            if refusal is None:
                self._route(message)
            if self._pubacks_held and message.qos:
                self._held.append(lambda: puback(refusal))
                return
        puback(refusal)

    def take_acknowledgement(self, client_id: str, mid: int) -> None:
        with self._lock:
            session = self._sessions.get(client_id)
            if session is not None:
                session.inflight.pop(mid, None)

    # --- routing ---

    def _route(self, message: StoredMessage) -> None:
        if message.retain:
            self._retained.pop(message.topic, None)
            if message.payload:
                self._retained[message.topic] = message
        for session in list(self._sessions.values()):
            granted = [qos for f, qos in session.filters.items() if topic_matches(f, message.topic)]
            if granted:
                self._enqueue(session, replace(message, qos=min(message.qos, max(granted)), retain=False))

    def _enqueue(self, session: _Session, message: StoredMessage) -> None:
        if self._expired(message):
            return
        if session.deliver is None:
            if message.qos and len(session.queued) < SESSION_QUEUE:
                session.queued.append(message)
            return
        mid = 0
        if message.qos:
            session.last_mid = mid = session.last_mid % 65535 + 1
            session.inflight[mid] = message
        session.deliver(mid, message)

    def _expired(self, message: StoredMessage) -> bool:
        return message.expires_at is not None and self._clock() >= message.expires_at

    def as_delivery(self, mid: int, message: StoredMessage, receipt: object) -> Delivery:
        remaining = None if message.expires_at is None else max(0.0, message.expires_at - self._clock())
        return Delivery(
            topic=message.topic,
            payload=message.payload,
            qos=message.qos,
            retain=message.retain,
            received_at=time.monotonic(),
            response_topic=message.response_topic,
            correlation=message.correlation,
            expiry_s=remaining,
            receipt=receipt if mid else None,
        )

    def expires_at(self, expiry_s: float | None) -> float | None:
        return None if expiry_s is None else self._clock() + expiry_s


class LoopbackClient:
    """The other side of the bus in a test: publishes at once, receives from a queue, acknowledges what it receives."""

    def __init__(self, broker: LoopbackBroker, client_id: str) -> None:
        self.client_id = client_id
        self._broker = broker
        self._arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        if broker.admit(client_id, will=None, deliver=self._deliver, drop=self._dropped) is None:
            raise ConnectionError("the loopback broker is stopped")

    def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Subscribe; retained messages arrive too. Raises PermissionError when one is refused."""
        refused = self._broker.take_subscription(self.client_id, [(each, qos) for each in filters], retained=True)
        if refused:
            raise PermissionError(f"subscriptions refused: {refused}")

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        response_topic: str | None = None,
        expiry_s: float | None = None,
    ) -> None:
        message = StoredMessage(
            topic=topic,
            payload=payload,
            qos=qos,
            retain=retain,
            correlation=correlation,
            response_topic=response_topic,
            expires_at=self._broker.expires_at(expiry_s),
        )
        self._broker.take_publish(message, self._acked)

    def receive(self, timeout_s: float = 5.0) -> Delivery:
        """The next message. Raises TimeoutError when none comes."""
        try:
            return self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no message within {timeout_s} s") from None

    def waiting(self) -> list[Delivery]:
        """Everything that has arrived and was not received yet, at once."""
        found: list[Delivery] = []
        while not self._arrived.empty():
            found.append(self._arrived.get())
        return found

    def close(self) -> None:
        self._broker.release(self.client_id, forget=True)

    def _dropped(self, state: LinkState, detail: str) -> None:
        """A cut client stays away; its session goes on to queue."""

    def _acked(self, refusal: str | None) -> None:
        """A test's publish needs no answer."""

    def _deliver(self, mid: int, message: StoredMessage) -> None:
        self._arrived.put(self._broker.as_delivery(mid, message, None))
        self._broker.take_acknowledgement(self.client_id, mid)
