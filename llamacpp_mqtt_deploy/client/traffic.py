"""The messages of a client: publishes requests and cancels, hands each event to the answer that waits for it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import orjson

from llamacpp_mqtt_deploy.client.acks import PendingAcks
from llamacpp_mqtt_deploy.client.address import BrokerAddress, not_permitted
from llamacpp_mqtt_deploy.client.answer import Answer
from llamacpp_mqtt_deploy.client.connection import (
    NO_MATCHING_SUBSCRIBERS,
    NOT_AUTHORIZED,
    PACKET_TOO_LARGE,
    REFUSED,
    Connection,
)
from llamacpp_mqtt_deploy.client.exceptions import BusError, NotPermitted
from llamacpp_mqtt_deploy.client.explain_end import nobody, silent
from llamacpp_mqtt_deploy.client.retry import RetryRules
from llamacpp_mqtt_deploy.client.workers import StatusBoard

log = logging.getLogger(__name__)  # the host program's log: this part is a library

LIVE_ANSWERS = 1000
KEPT_SESSIONS = 64  # reply subscriptions that are kept for the next request of their session


class Traffic:
    """The messages of one client. Every method may be called from any thread; `changed` is set when the watch has to look."""

    def __init__(self, address: BrokerAddress, *, root: str) -> None:
        self.address = address
        self.root = root
        self.connection = Connection(
            address,
            on_message=self._received,
            on_ready=self._back,
            on_lost=self._lost,
            on_refused=self._refused,
        )
        self.acks = PendingAcks()
        self.board = StatusBoard()
        self.health = StatusBoard()
        self.changed = threading.Event()
        self._lock = threading.Lock()
        self._live: dict[tuple[str, str], Answer] = {}
        self._sessions: dict[str, float] = {}
        """Subscribed sessions, least recently used first."""
        self._closed = False

    def topic(self, kind: str, rest: str) -> str:
        return f"{self.root}/{kind}/{rest}"

    # --- the answers that wait ---------------------------------------------------------------------------------------

    def add(self, answer: Answer) -> None:
        """Take an answer that is about to be published; raises `BusError`, and ValueError when its id is in use."""
        key = (answer.session, answer.request_id)
        with self._lock:
            if self._closed:
                raise BusError("The bus client is closed.")
            # The watch may not have looked since an answer ended; its place and its id are free all the same.
            if len(self._live) >= LIVE_ANSWERS:
                self._live = {name: known for name, known in self._live.items() if not known.ended}
            if len(self._live) >= LIVE_ANSWERS:
                raise BusError(f"{LIVE_ANSWERS} requests wait for their answers already.")
            if key in self._live and not self._live[key].ended:
                raise ValueError(f"request_id {answer.request_id!r} is in use")
            self._live[key] = answer
            # Marked before it is published: the watch must not find it unsent and publish it too.
            answer.note(lambda rules: rules.sent(time.monotonic()))

    def live(self) -> list[Answer]:
        with self._lock:
            return list(self._live.values())

    def drop_ended(self) -> list[Answer]:
        """Forget what has ended; returns what has not."""
        with self._lock:
            self._live = {key: answer for key, answer in self._live.items() if not answer.ended}
            return list(self._live.values())

    def close(self) -> list[Answer]:
        """Take no more answers; returns those that still wait."""
        with self._lock:
            self._closed = True
            live = list(self._live.values())
            self._live.clear()
        return live

    # --- out ---------------------------------------------------------------------------------------------------------

    def listen(self, session: str) -> None:
        """Subscribe to the events of a session; raises `NotPermitted` and `BrokerUnreachable`."""
        self.connection.subscribe(self.topic("reply", session))
        with self._lock:
            self._sessions.pop(session, None)
            self._sessions[session] = time.monotonic()
            busy = {session for session, _ in self._live} | {session}
            idle = [name for name in self._sessions if name not in busy]
            dropped = idle[: max(0, len(self._sessions) - KEPT_SESSIONS)]
            for name in dropped:
                del self._sessions[name]
        for name in dropped:
            self.connection.unsubscribe(self.topic("reply", name))

    def send_again(self, answer: Answer) -> None:
        """Publish the same request once more: it was, or its events were, lost on the way."""
        log.info(
            "request.sent_again request=%s session=%s sends=%d", answer.request_id, answer.session, answer.sends + 1
        )
        answer.note(lambda rules: rules.sent(time.monotonic()))
        self.publish(answer)

    def publish(self, answer: Answer) -> None:
        """Publish the request; what becomes of it comes with the answer."""
        topic = self.topic("request", answer.session)
        expiry_s = None if answer.timeout_s is None else max(1, math.ceil(answer.timeout_s))

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
            self.changed.set()

        try:
            if not self.connection.publish(topic, answer.payload, expiry_s=expiry_s, on_ack=acknowledged):
                answer.note(lambda rules: rules.offline(time.monotonic()))
                if self.connection.ready:  # back already, and the callback came before our note
                    answer.note(RetryRules.back)
        except BusError as error:
            answer.fail(error)

    def cancel(self, answer: Answer, acknowledged: threading.Event | None = None) -> bool:
        """Ask the worker to stop, setting `acknowledged` when the broker has taken it; False when it cannot be sent."""
        payload = orjson.dumps({"action": "cancel", "request_id": answer.request_id})

        def on_ack(_value: int, _reason: str) -> None:
            if acknowledged is not None:
                acknowledged.set()

        try:
            return self.connection.publish(self.topic("control", answer.session), payload, on_ack=on_ack)
        except BusError:
            return False

    def probe(self, answer: Answer, now: float) -> None:
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
                self.changed.set()

    def _note_ack(self, session: str, event: Mapping[str, Any]) -> None:
        if self.acks.note(event):
            return
        for answer in self.live():
            if answer.session == session and _probe_name(answer) == event.get("transaction"):
                answer.note(RetryRules.alive)
                self.changed.set()

    def _back(self) -> None:
        for answer in self.live():
            answer.note(RetryRules.back)
        self.changed.set()

    def _lost(self) -> None:
        now = time.monotonic()
        for answer in self.live():
            answer.note(lambda rules: rules.offline(now))
        self.changed.set()

    def _refused(self, topic_filter: str, reason: str) -> None:
        for answer in self.live():
            if self.topic("reply", answer.session) == topic_filter:
                answer.fail(NotPermitted(not_permitted("subscribe to", topic_filter, self.address, reason)))


def _probe_name(answer: Answer) -> str:
    """The transaction of the `ping` that asks on behalf of this answer whether anybody is there."""
    return f"probe-{answer.request_id}"[:64]
