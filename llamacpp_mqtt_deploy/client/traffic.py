"""The messages of a client: publishes requests and cancels, hands each event to the answer that waits for it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import orjson

from llamacpp_mqtt_deploy.client.acks import AwaitedAck, PendingAcks
from llamacpp_mqtt_deploy.client.address import BrokerAddress, not_permitted
from llamacpp_mqtt_deploy.client.exceptions import BusError, NotPermitted
from llamacpp_mqtt_deploy.client.explain_end import nobody, silent
from llamacpp_mqtt_deploy.client.followed import FollowedAnswer
from llamacpp_mqtt_deploy.client.paho_client import (
    NO_MATCHING_SUBSCRIBERS,
    NOT_AUTHORIZED,
    PACKET_TOO_LARGE,
    REFUSED,
)
from llamacpp_mqtt_deploy.client.retry import RetryRules
from llamacpp_mqtt_deploy.client.workers import StatusBoard

log = logging.getLogger(__name__)  # the host program's log: this part is a library

LIVE_ANSWERS = 1000
LONGEST_EXPIRY_S = 0xFFFFFFFF
"""What MQTT's Message Expiry Interval can hold (section 3.3.2.3.3): 136 years."""
KEPT_FILTERS = 64  # reply subscriptions that are kept for the next request of their session


class Publisher(Protocol):
    """What the messages need of a connection; both kinds have it."""

    @property
    def ready(self) -> bool: ...

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        expiry_s: int | None = None,
        on_ack: Callable[[int, str], None] = ...,
    ) -> bool: ...

    def unsubscribe(self, topic_filter: str) -> None: ...


C = TypeVar("C", bound=Publisher)
F = TypeVar("F", bound=FollowedAnswer)
K = TypeVar("K", bound=AwaitedAck)


class Traffic(Generic[C, F, K]):
    """The messages of one client. Every method may be called from any thread, none waits; `wake` says that the watch has to look.

    `connect` makes the connection from the address and the callbacks, `place` the waiting place of an ack. With `whole_levels`
    one subscription serves all sessions below a first level.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        root: str,
        connect: Callable[..., C],
        place: Callable[[], K],
        wake: Callable[[], None],
        whole_levels: bool = False,
        live_answers: int = LIVE_ANSWERS,
    ) -> None:
        self.address = address
        self.root = root
        self.connection: C = connect(
            address,
            on_message=self._received,
            on_ready=self._back,
            on_lost=self._lost,
            on_refused=self._refused,
        )
        self.acks: PendingAcks[K] = PendingAcks(place)
        self.board = StatusBoard()
        self.health = StatusBoard()
        self.wake = wake
        self._whole_levels = whole_levels
        self._live_answers = live_answers
        self._lock = threading.Lock()
        self._live: dict[tuple[str, str], F] = {}
        self._filters: dict[str, float] = {}
        """Reply subscriptions, least recently used first."""
        self._closed = False

    def topic(self, kind: str, rest: str) -> str:
        return f"{self.root}/{kind}/{rest}"

    # --- the answers that wait ---------------------------------------------------------------------------------------

    def add(self, answer: F) -> None:
        """Take an answer that is about to be published; raises `BusError`, and ValueError when its id is in use."""
        key = (answer.session, answer.request_id)
        with self._lock:
            if self._closed:
                raise BusError("The bus client is closed.")
            # The watch may not have looked since an answer ended; its place and its id are free all the same.
            if len(self._live) >= self._live_answers:
                self._live = {name: known for name, known in self._live.items() if not known.ended}
            if len(self._live) >= self._live_answers:
                raise BusError(f"{self._live_answers} requests wait for their answers already.")
            if key in self._live and not self._live[key].ended:
                raise ValueError(f"request_id {answer.request_id!r} is in use")
            self._live[key] = answer
            # Marked before it is published: the watch must not find it unsent and publish it too.
            answer.note(lambda rules: rules.sent(time.monotonic()))

    def live(self) -> list[F]:
        with self._lock:
            return list(self._live.values())

    def drop_ended(self) -> list[F]:
        """Forget what has ended; returns what has not."""
        with self._lock:
            self._live = {key: answer for key, answer in self._live.items() if not answer.ended}
            return list(self._live.values())

    def close(self) -> list[F]:
        """Take no more answers; returns those that still wait."""
        with self._lock:
            self._closed = True
            live = [answer for answer in self._live.values() if not answer.ended]
            self._live.clear()
        return live

    # --- out ---------------------------------------------------------------------------------------------------------

    def reply_filter(self, session: str) -> str:
        """What to subscribe to for the events of a session."""
        if self._whole_levels:
            return self.topic("reply", f"{session.partition('/')[0]}/#")
        return self.topic("reply", session)

    def listening(self, session: str) -> None:
        """The subscription of this session is there and in use; those that nobody needs for long are given up."""
        with self._lock:
            now = time.monotonic()
            mine = self.reply_filter(session)
            self._filters.pop(mine, None)
            self._filters[mine] = now
            excess = len(self._filters) - KEPT_FILTERS
            dropped: list[str] = []
            if excess > 0:
                busy = {self.reply_filter(session) for session, _ in self._live} | {mine}
                dropped = [name for name in self._filters if name not in busy][:excess]
            for name in dropped:
                del self._filters[name]
        for name in dropped:
            self.connection.unsubscribe(name)

    def send_again(self, answer: F) -> None:
        """Publish the same request once more: it was, or its events were, lost on the way."""
        log.info(
            "request.sent_again request=%s session=%s sends=%d", answer.request_id, answer.session, answer.sends + 1
        )
        answer.note(lambda rules: rules.sent(time.monotonic()))
        self.publish(answer)

    def publish(self, answer: F) -> None:
        """Publish the request; what becomes of it comes with the answer."""
        topic = self.topic("request", answer.session)
        expiry_s = None if answer.timeout_s is None else min(LONGEST_EXPIRY_S, max(1, math.ceil(answer.timeout_s)))

        def acknowledged(value: int, reason: str) -> None:
            if value == NO_MATCHING_SUBSCRIBERS:
                answer.note(RetryRules.nobody)
            elif value == NOT_AUTHORIZED:
                answer.fail(NotPermitted(not_permitted("publish to", topic, self.address, reason)))
            elif value >= REFUSED:
                hint = " Its message_size_limit is smaller than the request." if value == PACKET_TOO_LARGE else ""
                answer.fail(BusError(f"The broker at {self.address} does not take the request: {reason}.{hint}"))
            else:
                return
            self.wake()

        try:
            if not self.connection.publish(topic, answer.payload, expiry_s=expiry_s, on_ack=acknowledged):
                answer.note(lambda rules: rules.offline(time.monotonic()))
                if self.connection.ready:  # back already, and the callback came before our note
                    answer.note(RetryRules.back)
        except BusError as error:
            answer.fail(error)

    def cancel(self, answer: F, taken: Callable[[], None] = lambda: None) -> bool:
        """Ask the worker to stop, calling `taken` when the broker has the message; False when it cannot be sent."""
        payload = orjson.dumps({"action": "cancel", "request_id": answer.request_id})
        try:
            return self.connection.publish(
                self.topic("control", answer.session), payload, on_ack=lambda _value, _reason: taken()
            )
        except BusError:
            return False

    def probe(self, answer: F, now: float) -> None:
        """Ask whether anybody is there on behalf of this answer."""
        payload = orjson.dumps({"action": "ping", "transaction": _probe_name(answer)})
        answer.note(lambda rules: rules.probed(now))
        self.connection.publish(self.topic("control", answer.session), payload)

    def nobody(self, what: str) -> str:
        """The sentence for an answer that did not come, with what is known of the workers."""
        return nobody(what, status=self.topic("status", "#"), broker=str(self.address), known=self.board.summary())

    def unanswered(self, what: str) -> str:
        """The sentence for a control or admin message without an ack."""
        online = self.board.online()
        return silent(what, online) if online else self.nobody(what)

    # --- in: paho's thread only looks up and hands over --------------------------------------------------------------

    def _received(self, topic: str, payload: bytes, retain: bool) -> None:
        kind, _, rest = topic.removeprefix(f"{self.root}/").partition("/")
        if kind == "status":
            self.board.note(rest, payload)
            return
        if kind == "health":
            self.health.note(rest, payload)
            return
        if kind not in ("reply", "admin-reply") or retain:
            return
        try:
            event = orjson.loads(payload)
        except orjson.JSONDecodeError:
            log.warning("event.unreadable topic=%s bytes=%d", topic, len(payload))
            return
        if not isinstance(event, dict):
            return
        if kind == "admin-reply":
            self.acks.note(event)
            return
        if event.get("type") == "ack":
            self._note_ack(rest, event)
            return
        with self._lock:
            answer = self._live.get((rest, str(event.get("request_id"))))
        if answer is not None:
            answer.deliver(event)
            if answer.ended or answer.lacks_a_chunk:
                self.wake()

    def _note_ack(self, session: str, event: Mapping[str, Any]) -> None:
        if self.acks.note(event):
            return
        for answer in self.live():
            if answer.session == session and _probe_name(answer) == event.get("transaction"):
                answer.note(RetryRules.alive)
                self.wake()

    def _back(self) -> None:
        for answer in self.live():
            answer.note(RetryRules.back)
        self.wake()

    def _lost(self) -> None:
        now = time.monotonic()
        for answer in self.live():
            answer.note(lambda rules: rules.offline(now))
        self.wake()

    def _refused(self, topic_filter: str, reason: str) -> None:
        for answer in self.live():
            if self.reply_filter(answer.session) == topic_filter:
                answer.fail(NotPermitted(not_permitted("subscribe to", topic_filter, self.address, reason)))


def _probe_name(answer: FollowedAnswer) -> str:
    """The transaction of the `ping` that asks on behalf of this answer whether anybody is there."""
    return f"probe-{answer.request_id}"[:64]
