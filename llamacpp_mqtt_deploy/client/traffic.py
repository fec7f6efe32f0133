"""The messages of a client: publishes requests and cancels, hands each event to the answer that waits for it."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
UNSENT_CANCELS = 1000
UNSENT_CANCELS_S = 600.0
"""How long a cancel waits for the broker: what it would stop has met the worker's own limit by then."""
UNHEARD_CANCELS_S = 120.0
"""How long a cancel is repeated that the broker had nobody to give to: a worker may take longer than we to come back to it."""
REPEAT_CANCELS_S = 1.0


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
        self._filters: dict[str, None] = {}
        """Reply subscriptions, least recently used first."""
        self._in_use: Counter[str] = Counter()
        """Those that somebody waits for, or is about to."""
        self._giving_up = threading.Lock()
        """Held while subscriptions are given up, over calls into the connection: never taken in its callbacks."""
        self._unsent_cancels: dict[tuple[str, str], float] = {}
        """Sessions and ids of the cancels that the broker has not acknowledged, oldest first, and since when."""
        self._unheard_cancels: list[tuple[str, str]] = []
        """Those of them that the broker had nobody to give to."""
        self._repeated_at = 0.0
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
            self._unsent_cancels.pop(key, None)  # the same request again is not what was to be stopped
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

    @contextlib.contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """Within it the subscription of this session may be made and is kept; others that nobody needs for long are given up.

        Known before it is made: whoever is stopped in between leaves nothing behind that would be kept for ever.
        """
        mine = self.reply_filter(session)
        # As a whole, or a subscription that another thread has just found there would be given up.
        with self._giving_up:
            for name in self._take(mine):
                self.connection.unsubscribe(name)
        try:
            yield
        finally:
            with self._lock:
                self._in_use[mine] -= 1
                if not self._in_use[mine]:
                    del self._in_use[mine]

    def _take(self, mine: str) -> list[str]:
        """Note that this subscription is in use; those to be given up for it."""
        with self._lock:
            self._in_use[mine] += 1
            self._filters.pop(mine, None)
            self._filters[mine] = None
            excess = len(self._filters) - KEPT_FILTERS
            if excess <= 0:
                return []
            busy = {self.reply_filter(session) for session, _ in self._live} | self._in_use.keys()
            dropped = [name for name in self._filters if name not in busy][:excess]
            for name in dropped:
                del self._filters[name]
        return dropped

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
        expiry_s = None if answer.timeout_s is None else expiry_of(answer.timeout_s)

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
        else:
            self._cancel_again(answer)

    def cancel(self, answer: F, taken: Callable[[], None] = lambda: None) -> bool:
        """Ask the worker to stop, calling `taken` when the broker has the message; False when it cannot be sent now. Then it is sent
        when the connection is back."""
        key = (answer.session, answer.request_id)
        with self._lock:
            if not self._closed and key not in self._unsent_cancels:
                while len(self._unsent_cancels) >= UNSENT_CANCELS:
                    del self._unsent_cancels[next(iter(self._unsent_cancels))]
                self._unsent_cancels[key] = time.monotonic()
        return self._send_cancel(key, taken)

    def _send_cancel(self, key: tuple[str, str], taken: Callable[[], None] = lambda: None) -> bool:
        session, request_id = key
        payload = orjson.dumps({"action": "cancel", "request_id": request_id})

        def acknowledged(value: int, _reason: str) -> None:
            with self._lock:
                if value == NO_MATCHING_SUBSCRIBERS and key in self._unsent_cancels:
                    self._unheard_cancels.append(key)
                else:
                    self._unsent_cancels.pop(key, None)
            taken()

        try:
            return self.connection.publish(self.topic("control", session), payload, on_ack=acknowledged)
        except BusError:
            return False

    def repeat_cancels(self, now: float) -> None:
        """Send the cancels again that nobody has heard."""
        with self._lock:
            if not self._unheard_cancels or now < self._repeated_at + REPEAT_CANCELS_S:
                return
            self._repeated_at = now
            unheard = set(self._unheard_cancels) & self._unsent_cancels.keys()
            self._unheard_cancels = []
            for key in [key for key in unheard if self._unsent_cancels[key] < now - UNHEARD_CANCELS_S]:
                unheard.discard(key)
                del self._unsent_cancels[key]
        for key in unheard:
            self._send_cancel(key)

    def _cancel_again(self, answer: F) -> None:
        """A request that was to be stopped while the connection was lost went out again: it is stopped behind it."""
        key = (answer.session, answer.request_id)
        with self._lock:
            unsent = key in self._unsent_cancels
        if unsent:
            self._send_cancel(key)

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
            self.board.note(rest, payload, retain=retain)
            return
        if kind == "health":
            self.health.note(rest, payload, retain=retain)
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
        with self._lock:
            since = time.monotonic() - UNSENT_CANCELS_S
            self._unsent_cancels = {key: at for key, at in self._unsent_cancels.items() if at >= since}
            awaited = {key for key, answer in self._live.items() if not answer.ended}
            unsent = [key for key in self._unsent_cancels if key not in awaited]  # those follow their requests
            self._unheard_cancels = []
        for key in unsent:
            self._send_cancel(key)
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


def expiry_of(timeout_s: float) -> int:
    """The Message Expiry Interval of what nobody waits for after so many seconds."""
    return max(1, math.ceil(min(LONGEST_EXPIRY_S, timeout_s)))


def _probe_name(answer: FollowedAnswer) -> str:
    """The transaction of the `ping` that asks on behalf of this answer whether anybody is there."""
    return f"probe-{answer.request_id}"[:64]
