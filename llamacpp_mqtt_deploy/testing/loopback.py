"""A link to the broker inside this process: the same contract as the real link, without a network."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from llamacpp_mqtt_deploy.core.outbox_budget import MIB, OutboxBudget
from llamacpp_mqtt_deploy.core.topics import topic_fault
from llamacpp_mqtt_deploy.ports import Delivery, LinkInfo, LinkState, Published, Retained, Share
from llamacpp_mqtt_deploy.stopping import Deadline, wait_for
from llamacpp_mqtt_deploy.testing.loopback_broker import LoopbackBroker, LoopbackClient, StoredMessage

__all__ = ["LoopbackBroker", "LoopbackClient", "LoopbackLink"]

log = structlog.get_logger(__name__)

_KEPT_BYTES = 65_536
"""Of a payload that is longer than `max_incoming_bytes`."""


@dataclass(slots=True)
class _Publish:
    message: StoredMessage
    expiry_s: int | None
    on_done: Callable[[bool], None] | None
    gives_back: Callable[[], None]
    sent_in: int = 0


class LoopbackLink:
    """One connection to a `LoopbackBroker`; see `ports.Link` for the contract."""

    def __init__(
        self,
        broker: LoopbackBroker,
        *,
        client_id: str = "loopback-link",
        outbox_messages: int = 5000,
        outbox_mib: int = 64,
        retry_s: float = 0.02,
        protocol: str = "5",
        max_incoming_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._broker = broker
        self._max_incoming_bytes = max_incoming_bytes
        self._client_id = client_id
        self._budget = OutboxBudget(most_messages=outbox_messages, most_bytes=outbox_mib * MIB)
        self._retry_s = retry_s
        self._protocol = protocol
        self._actions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._state: LinkState = "connecting"
        self._detail = ""
        self._generation = 0
        self._reconnects = 0
        self._last_puback_at: float | None = None
        self._outbox: dict[int, _Publish] = {}
        self._next_key = 0
        self._stalled = False

    def open(
        self,
        *,
        will: Retained,
        on_delivery: Callable[[Delivery], bool],
        on_online: Callable[[LinkInfo], None],
        on_lost: Callable[[LinkInfo], None],
    ) -> None:
        self._will, self._on_delivery, self._on_online, self._on_lost = will, on_delivery, on_online, on_lost
        self._thread = threading.Thread(target=self._run, name="loopback-link", daemon=True)
        self._thread.start()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        on_done: Callable[[bool], None] | None = None,
        share: Share = "event",
        content_type: str = "application/json",
    ) -> Published:
        fault = topic_fault(topic)
        limit = self._broker.max_payload_bytes
        if fault is not None or (limit is not None and len(payload) > limit):
            log.warning(
                "publish.unfit", topic=ascii(topic), bytes=len(payload), why=fault or "the payload is too large"
            )
            return "unfit"
        with self._changed:
            if self._state in ("closed", "taken_over") or (qos == 0 and self._state != "online"):
                return "full"
            size, answer = len(topic) + len(payload) + len(correlation or b""), share == "answer"
            if not self._budget.take(size, answer=answer):
                return "full"
            gives_back = functools.partial(self._budget.give_back, size, answer=answer)
            self._put(topic, payload, qos, retain, correlation, expiry_s, on_done, gives_back, content_type)
        return "queued"

    def room_for_answers(self, largest: int, *, timeout_s: float = 0.0) -> int:
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(lambda: self._budget.room_for_answers(largest), timeout_s)
            return self._budget.room_for_answers(largest)

    def acknowledge(self, delivery: Delivery) -> None:
        if delivery.receipt is not None:
            self._actions.put(lambda: self._send_ack(delivery.receipt))

    def subscribe(
        self,
        filters: Sequence[tuple[str, int]],
        *,
        timeout_s: float,
        retained: bool = False,
        give_up: Callable[[], bool] | None = None,
    ) -> Mapping[str, str]:
        if threading.current_thread() is self._thread:
            raise RuntimeError("subscribe was called from a callback of the link; it would wait for itself")
        return self._ask(
            lambda: self._broker.take_subscription(self._client_id, filters, retained=retained),
            timeout_s=timeout_s,
            give_up=give_up,
        )

    def unsubscribe(self, filters: Sequence[str], *, timeout_s: float) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("unsubscribe was called from a callback of the link; it would wait for itself")
        self._ask(lambda: self._broker.end_subscription(self._client_id, filters), timeout_s=timeout_s, give_up=None)

    def _ask(
        self,
        question: Callable[[], Mapping[str, str] | None],
        *,
        timeout_s: float,
        give_up: Callable[[], bool] | None,
    ) -> Mapping[str, str]:
        """What the broker refused; `question` gives None when it has forgotten this client."""
        answers: list[Mapping[str, str] | None] = []
        answered = threading.Event()

        def act() -> None:
            answers.append(question() if self._state == "online" else None)
            answered.set()

        if self._state != "online":
            raise ConnectionError("not connected to the broker")
        self._actions.put(act)
        if not wait_for(answered, timeout_s=timeout_s, give_up=give_up):
            raise TimeoutError(f"no SUBACK within {timeout_s} s")
        answer = answers[0]
        if answer is None:
            raise ConnectionError("the connection was lost while waiting for SUBACK")
        return answer

    def info(self) -> LinkInfo:
        with self._changed:
            online = self._state == "online"
            return LinkInfo(
                state=self._state,
                detail=self._detail,
                protocol=self._protocol if online else None,
                max_payload_bytes=self.max_payload_bytes(),
                reconnects=self._reconnects,
                unacknowledged=len(self._outbox),
                outbox_bytes=self._budget.bytes_held(),
                last_puback_at=self._last_puback_at,
            )

    def max_payload_bytes(self) -> int | None:
        return self._broker.max_payload_bytes

    def flush(self, deadline: Deadline) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._outbox, deadline.remaining_s())

    def close(self, deadline: Deadline, *, last_message: Retained | None = None) -> None:
        thread = self._thread
        if thread is None or self._state == "closed":
            self._state = "closed"
            return
        said = last_message is None or self._state == "taken_over"
        if not said and last_message is not None and self._state == "online":
            done = threading.Event()
            with self._changed:
                self._put(
                    last_message.topic,
                    last_message.payload,
                    1,
                    True,
                    None,
                    None,
                    lambda well: done.set() if well else None,
                    lambda: None,
                )
            said = done.wait(deadline.remaining_s())
        self._actions.put(lambda: self._leave(with_will=not said))
        self._actions.put(None)
        if thread is not threading.current_thread():
            thread.join(deadline.remaining_s() + 1.0)

    # --- the link's thread ---

    def _run(self) -> None:
        self._connect()
        while True:
            try:
                action = self._actions.get(timeout=self._retry_s if self._waits() else None)
            except queue.Empty:
                if self._state == "online":
                    self._broker.release(self._client_id)
                    self._drop("lost", "The inbox was full; connecting again so that the broker delivers again.")
                self._connect()
                continue
            if action is None:
                return
            try:
                action()
            except Exception:
                log.exception("link.callback_failed")

    def _waits(self) -> bool:
        return self._stalled or self._state in ("connecting", "lost", "refused")

    def _connect(self) -> None:
        if self._state in ("closed", "taken_over"):
            return
        self._stalled = False
        generation = self._generation + 1
        present = self._broker.admit(
            self._client_id,
            will=self._will,
            deliver=lambda mid, message: self._actions.put(lambda: self._hand_over(generation, mid, message)),
            drop=lambda state, detail: self._actions.put(lambda: self._dropped(generation, state, detail)),
        )
        if present is None:
            self._detail = "The broker is stopped."
            return
        with self._changed:
            self._generation = generation
            self._reconnects += generation > 1
            self._state, self._detail = "online", ""
        self._call(lambda: self._on_online(self.info()))
        self._broker.resume(self._client_id)
        for key in list(self._outbox):
            self._send(key)

    def _dropped(self, generation: int, state: LinkState, detail: str) -> None:
        if generation == self._generation and self._state == "online":
            self._drop(state, detail)

    def _drop(self, state: LinkState, detail: str) -> None:
        with self._changed:
            self._state, self._detail = state, detail
            self._stalled = False
        self._call(lambda: self._on_lost(self.info()))

    def _hand_over(self, generation: int, mid: int, message: StoredMessage) -> None:
        # After one refused delivery the following ones wait too: acknowledgements and order must not skip it.
        if generation != self._generation or self._state != "online" or (self._stalled and mid):
            return
        delivery = self._broker.as_delivery(mid, message, (generation, mid))
        if self._max_incoming_bytes is not None and len(delivery.payload) > self._max_incoming_bytes():
            kept = delivery.payload[:_KEPT_BYTES]
            delivery = replace(delivery, payload=kept, left_out=len(delivery.payload) - len(kept))
        try:
            taken = self._on_delivery(delivery)
        except Exception:
            log.exception("link.callback_failed")
            taken = False
        if not taken and mid:
            self._stalled = True

    def _send_ack(self, receipt: object) -> None:
        match receipt:
            case (int() as generation, int() as mid) if generation == self._generation and self._state == "online":
                self._broker.take_acknowledgement(self._client_id, mid)

    def _put(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        retain: bool,
        correlation: bytes | None,
        expiry_s: int | None,
        on_done: Callable[[bool], None] | None,
        gives_back: Callable[[], None],
        content_type: str = "application/json",
    ) -> None:
        message = StoredMessage(
            content_type=content_type,
            topic=topic,
            payload=payload,
            qos=min(qos, 1),
            retain=retain,
            correlation=correlation,
            expires_at=self._broker.expires_at(expiry_s),
        )
        self._next_key += 1
        key = self._next_key
        self._outbox[key] = _Publish(message, expiry_s, on_done, gives_back)
        self._actions.put(lambda: self._send(key))

    def _send(self, key: int) -> None:
        publish = self._outbox.get(key)
        if publish is None or self._state != "online" or publish.sent_in == self._generation:
            return
        publish.sent_in = generation = self._generation
        self._broker.take_publish(
            publish.message, lambda refusal: self._actions.put(lambda: self._acked(generation, key, refusal))
        )

    def _acked(self, generation: int, key: int, refusal: str | None) -> None:
        if generation != self._generation or self._state != "online":
            return
        with self._changed:
            publish = self._outbox.pop(key, None)
            if publish is not None:
                publish.gives_back()
            self._last_puback_at = time.monotonic()
            self._changed.notify_all()
        if publish is None:
            return
        if refusal is not None:
            log.warning("publish.refused", topic=publish.message.topic, why=refusal)
        if publish.on_done is not None:
            on_done = publish.on_done
            self._call(lambda: on_done(refusal is None))

    def _leave(self, *, with_will: bool) -> None:
        if self._state == "online":
            self._broker.release(self._client_id, with_will=with_will)
        with self._changed:
            self._state, self._detail = "closed", ""
            given_up, self._outbox = list(self._outbox.values()), {}
            self._changed.notify_all()
        for publish in given_up:
            if publish.on_done is not None:
                on_done = publish.on_done
                self._call(lambda on_done=on_done: on_done(False))  # type: ignore[misc]

    @staticmethod
    def _call(callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            log.exception("link.callback_failed")
