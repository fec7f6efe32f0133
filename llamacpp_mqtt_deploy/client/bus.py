"""The client of the bus: requests out, answers in, after the client rules of the protocol, usable from any thread."""

from __future__ import annotations

import logging
import math
import secrets
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import orjson

from llamacpp_mqtt_deploy.client.acks import AckDesk
from llamacpp_mqtt_deploy.client.address import Address, Transport, Version, not_permitted, tls_context
from llamacpp_mqtt_deploy.client.answer import Answer
from llamacpp_mqtt_deploy.client.board import StatusBoard
from llamacpp_mqtt_deploy.client.connection import (
    NO_MATCHING_SUBSCRIBERS,
    NOT_AUTHORIZED,
    PACKET_TOO_LARGE,
    REFUSED,
    Connection,
)
from llamacpp_mqtt_deploy.client.endings import given_up, nobody
from llamacpp_mqtt_deploy.client.errors import (
    AnswerError,
    AnswerLost,
    BrokerUnreachable,
    BusError,
    NotPermitted,
    NoWorker,
)
from llamacpp_mqtt_deploy.client.patience import GiveUp, Patience, Probe, Send, Wait, Why
from llamacpp_mqtt_deploy.core.topics import is_level, is_session

log = logging.getLogger(__name__)  # the host program's log: this part is a library

LIVE_ANSWERS = 1000
KEPT_SESSIONS = 64  # reply subscriptions that are kept for the next request of their session


class BusClient:
    """Asks a worker over the bus. Use it as a context manager; every method may be called from any thread.

    `tls` is True (the system's authorities) or a ready `ssl.SSLContext`; `protocol` is `auto`, `5` or `3.1.1`; for
    `transport="unix"` `host` is the path of the socket. `answer_within_s` bounds the silence before the first event,
    `resend_limit` the deliveries in a row that bring nothing, `offline_limit_s` an outage of the broker. Errors are
    `BusError`s.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int | None = None,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: bool | ssl.SSLContext = False,
        root: str = "llm",
        protocol: Version = "auto",
        transport: Transport = "tcp",
        websocket_path: str = "/mqtt",
        client_id: str | None = None,
        keepalive_s: int = 30,
        connect_timeout_s: float = 10.0,
        answer_within_s: float = 10.0,
        resend_limit: int = 5,
        offline_limit_s: float = 60.0,
    ) -> None:
        self.root = root
        self.address = Address(
            host=host,
            port=port,
            transport=transport,
            websocket_path=websocket_path,
            protocol=protocol,
            username=username,
            password=password,
            tls=tls_context() if tls is True else tls or None,
            client_id=client_id,
            keepalive_s=keepalive_s,
            connect_timeout_s=connect_timeout_s,
        )
        self._answer_within_s = answer_within_s
        self._resend_limit = resend_limit
        self._offline_limit_s = offline_limit_s
        self._connection = Connection(
            self.address,
            on_message=self._received,
            on_ready=self._back,
            on_lost=self._lost,
            on_refused=self._refused,
        )
        self._lock = threading.Lock()
        self._live: dict[tuple[str, str], Answer] = {}
        self._sessions: dict[str, float] = {}
        """Subscribed sessions, least recently used first."""
        self._acks = AckDesk()
        self._board = StatusBoard()
        self._status_refused = False
        self._changed = threading.Event()
        self._closing = False
        self._watch = threading.Thread(target=self._watch_over, name="lmd-bus-watch", daemon=True)
        self._own_session: str | None = None

    # --- open and close ----------------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Connect; raises `BrokerUnreachable` or `BrokerRefused`."""
        self._connection.open()
        try:
            self._connection.subscribe(self._topic("status", "+"))
        except NotPermitted:
            self._status_refused = True  # allowed by the recommended access list, but no condition for an answer
        except BusError:
            self._connection.close()
            raise
        self._watch.start()
        return self

    def close(self) -> None:
        """Cancel what still runs and disconnect; takes about two seconds at most and is idempotent."""
        if self._closing:
            return
        with self._lock:
            self._closing = True
            live = list(self._live.values())
            self._live.clear()
        acknowledged = [threading.Event() for _ in live]
        for answer, event in zip(live, acknowledged, strict=True):
            if not self._send_cancel(answer.session, answer.request_id, event):
                event.set()
            answer.fail(AnswerLost("The bus client was closed before the answer was complete."))
        ends_at = time.monotonic() + 1.0
        for event in acknowledged:
            event.wait(max(0.0, ends_at - time.monotonic()))
        self._changed.set()
        self._connection.close()
        if self._watch.is_alive():
            self._watch.join(1.0)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def protocol(self) -> Literal["5", "3.1.1"] | None:
        """The MQTT version in use, None before `open`."""
        return self._connection.protocol

    @property
    def session(self) -> str:
        """The session of requests that name none: `{user}/{random}`, made once for this client."""
        if self._own_session is None:
            first = self.address.username or "cli"
            if not is_level(first):
                raise BusError(
                    f"The user name {first!r} cannot be the first level of a session (letters, digits, _ . and -, at most 64)."
                    " Name a session yourself, and let the access list allow it."
                )
            self._own_session = f"{first}/{secrets.token_hex(6)}"
        return self._own_session

    # --- ask ---------------------------------------------------------------------------------------------------------

    def ask(
        self,
        prompt: str | None = None,
        *,
        session: str | None = None,
        system_prompt: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        stream: bool | Literal["sentence"] = True,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **fields: Any,
    ) -> Answer:
        """Publish a request and return its answer at once; iterate over it for the text.

        Give one of `prompt`, `messages` or `tool_results`; `fields` are the protocol's other request fields, those that are
        None are left out. Raises `NotPermitted`, `BrokerUnreachable` and ValueError; all else comes with the answer.
        """
        session = session or self.session
        request_id = request_id or secrets.token_hex(12)
        _check(session, request_id)
        request: dict[str, Any] = {
            "request_id": request_id,
            "prompt": prompt,
            "messages": messages,
            "system_prompt": system_prompt,
        }
        request |= {"stream": None if stream is True else stream, "timeout_s": timeout_s, **fields}
        payload = orjson.dumps({name: value for name, value in request.items() if value is not None})
        answer = Answer(
            self,
            session=session,
            request_id=request_id,
            payload=payload,
            patience=Patience(
                streams=stream is not False,
                timeout_s=timeout_s,
                answer_within_s=self._answer_within_s,
                resend_limit=self._resend_limit,
                offline_limit_s=self._offline_limit_s,
            ),
        )
        self._listen(session)
        with self._lock:
            if self._closing:
                raise BusError("The bus client is closed.")
            if len(self._live) >= LIVE_ANSWERS:
                raise BusError(f"{LIVE_ANSWERS} requests wait for their answers already.")
            if (session, request_id) in self._live:
                raise ValueError(f"request_id {request_id!r} is in use")
            self._live[session, request_id] = answer
            # Marked before it is published: the watch must not find it unsent and publish it too.
            answer.note(lambda patience: patience.sent(time.monotonic()))
        self._publish(answer)
        self._changed.set()
        return answer

    # --- control, status, history ------------------------------------------------------------------------------------

    def control(
        self,
        session: str | None,
        action: str,
        *,
        request_id: str | None = None,
        timeout_s: float = 10.0,
        **fields: Any,
    ) -> Mapping[str, Any]:
        """Send a control message (`cancel`, `reset`, `delete`, `history`, `ping`) and return the worker's `ack`.

        The ack's `status` is `ok` or `error` (with a `code`). Raises `NoWorker` when none comes in time, `NotPermitted`.
        """
        session = session or self.session
        _check(session, request_id)
        self._listen(session)
        topic = self._topic("control", session)
        with self._acks.awaiting() as ack:
            message = {"action": action, "request_id": request_id, "transaction": ack.transaction, **fields}
            payload = orjson.dumps({name: value for name, value in message.items() if value is not None})

            def acknowledged(value: int, reason: str) -> None:
                if value >= REFUSED:
                    ack.refuse(not_permitted("publish to", topic, self.address, reason))

            if not self._connection.publish(topic, payload, on_ack=acknowledged):
                raise BrokerUnreachable(
                    f"The connection to the broker at {self.address} is lost; it is being restored."
                )
            event = ack.wait(timeout_s)
        if event is None:
            raise NoWorker(self._nobody(f"The control message {action} was not answered within {timeout_s:g} s"))
        return event

    def tell(self, session: str, action: str, *, timeout_s: float = 1.0) -> bool:
        """Send a control message and wait only for the broker to take it; whether it did. Never raises."""
        taken = threading.Event()
        try:
            payload = orjson.dumps({"action": action})
            published = self._connection.publish(
                self._topic("control", session), payload, on_ack=lambda _value, _reason: taken.set()
            )
        except BusError:
            return False
        return published and taken.wait(timeout_s)

    def history(self, session: str | None = None, *, timeout_s: float = 10.0) -> list[Mapping[str, Any]]:
        """The messages that the worker remembers of this session; raises `AnswerError` where it may not tell."""
        ack = self.control(session, "history", timeout_s=timeout_s)
        if ack.get("status") != "ok":
            raise AnswerError(
                str(ack.get("code") or "unsupported"), str(ack.get("message") or "The history is not told.")
            )
        messages = ack.get("messages")
        return list(messages) if isinstance(messages, list) else []

    def status(self, *, wait_s: float = 1.0) -> dict[str, Mapping[str, Any]]:
        """The retained status of every worker by its id; waits at most this long for the first one."""
        if not self._status_refused:
            self._board.wait(wait_s)
        return self._board.all()

    def workers_online(self) -> list[str]:
        """The workers whose status says that they take or finish requests, as far as it has arrived."""
        return self._board.online()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _topic(self, kind: str, rest: str) -> str:
        return f"{self.root}/{kind}/{rest}"

    def _listen(self, session: str) -> None:
        self._connection.subscribe(self._topic("reply", session))
        with self._lock:
            self._sessions.pop(session, None)
            self._sessions[session] = time.monotonic()
            busy = {session for session, _ in self._live} | {session}
            idle = [name for name in self._sessions if name not in busy]
            dropped = idle[: max(0, len(self._sessions) - KEPT_SESSIONS)]
            for name in dropped:
                del self._sessions[name]
        for name in dropped:
            self._connection.unsubscribe(self._topic("reply", name))

    def _send_again(self, answer: Answer) -> None:
        log.info(
            "request.sent_again request=%s session=%s sends=%d", answer.request_id, answer.session, answer.sends + 1
        )
        answer.note(lambda patience: patience.sent(time.monotonic()))
        self._publish(answer)

    def _publish(self, answer: Answer) -> None:
        topic = self._topic("request", answer.session)
        expiry_s = None if answer.timeout_s is None else max(1, math.ceil(answer.timeout_s))

        def acknowledged(value: int, reason: str) -> None:
            if value == NO_MATCHING_SUBSCRIBERS:
                answer.note(Patience.nobody)
            elif value == NOT_AUTHORIZED:
                answer.fail(NotPermitted(not_permitted("publish to", topic, self.address, reason)))
            elif value >= REFUSED:
                hint = " Its message_size_limit is smaller than the request." if value == PACKET_TOO_LARGE else ""
                answer.fail(BusError(f"The broker at {self.address} does not take the request: {reason}.{hint}"))
            else:
                return
            self._changed.set()

        try:
            if not self._connection.publish(topic, answer.payload, expiry_s=expiry_s, on_ack=acknowledged):
                answer.note(lambda patience: patience.offline(time.monotonic()))
                if self._connection.ready:  # back already, and the callback came before our note
                    answer.note(Patience.back)
        except BusError as error:
            answer.fail(error)

    def _cancel(self, answer: Answer) -> None:
        self._send_cancel(answer.session, answer.request_id)

    def _send_cancel(self, session: str, request_id: str, acknowledged: threading.Event | None = None) -> bool:
        payload = orjson.dumps({"action": "cancel", "request_id": request_id})

        def on_ack(_value: int, _reason: str) -> None:
            if acknowledged is not None:
                acknowledged.set()

        try:
            return self._connection.publish(self._topic("control", session), payload, on_ack=on_ack)
        except BusError:
            return False

    def _wake(self) -> None:
        self._changed.set()

    def _alive(self) -> bool:
        return not self._closing and self._watch.is_alive()

    # --- the watch: sends again, gives up ----------------------------------------------------------------------------

    def _watch_over(self) -> None:
        while not self._closing:
            try:
                pause_s = self._look_after_all()
            except Exception:
                log.exception("bus.watch_failed")
                pause_s = 1.0
            self._changed.wait(pause_s)
            self._changed.clear()

    def _look_after_all(self) -> float:
        """Do what is due for each answer; returns the seconds until the next thing is."""
        now = time.monotonic()
        nearest = now + 1.0
        with self._lock:
            self._live = {key: answer for key, answer in self._live.items() if not answer.ended}
            live = list(self._live.values())
        online = self._board.online()
        heartbeat_s = self._board.heartbeat_s()
        if live and not self._connection.thread_lives():
            for answer in live:
                answer.fail(AnswerLost("The network thread of the bus client has ended; open a new client."))
        for answer in live:
            match answer.decide(now, heartbeat_s=heartbeat_s, worker_online=bool(online)):
                case Wait(until):
                    nearest = min(nearest, until)
                case Send():
                    self._send_again(answer)
                case Probe():
                    self._probe(answer, now)
                case GiveUp(why):
                    self._give_up(answer, why)
        return max(0.01, nearest - now)

    def _probe(self, answer: Answer, now: float) -> None:
        payload = orjson.dumps({"action": "ping", "transaction": probe_name(answer)})
        answer.note(lambda patience: patience.probed(now))
        self._connection.publish(self._topic("control", answer.session), payload)

    def _give_up(self, answer: Answer, why: Why) -> None:
        # A worker that comes later finds request and cancel in this order, and does not work for nobody.
        self._send_cancel(answer.session, answer.request_id)
        answer.fail(
            given_up(
                why,
                broker=str(self.address),
                sends=answer.sends,
                workers=self._board.online(),
                offline_limit_s=self._offline_limit_s,
                nobody=self._nobody("The request was not answered"),
            )
        )

    def _nobody(self, what: str) -> str:
        return nobody(what, status=self._topic("status", "#"), broker=str(self.address), known=self._board.summary())

    # --- paho's thread: only looks up and hands over -------------------------------------------------------------------

    def _received(self, topic: str, payload: bytes, retain: bool) -> None:
        kind, _, rest = topic.removeprefix(f"{self.root}/").partition("/")
        if kind == "status":
            self._board.note(rest, payload)
            return
        if kind != "reply" or retain:
            return
        try:
            event = orjson.loads(payload)
        except orjson.JSONDecodeError:
            log.warning("event.unreadable topic=%s bytes=%d", topic, len(payload))
            return
        if not isinstance(event, dict):
            return
        if event.get("type") == "ack":
            self._note_ack(rest, event)
            return
        with self._lock:
            answer = self._live.get((rest, str(event.get("request_id"))))
        if answer is not None:
            answer.deliver(event)
            if answer.ended or answer.lacks_a_chunk:
                self._changed.set()

    def _note_ack(self, session: str, event: Mapping[str, Any]) -> None:
        if self._acks.note(event):
            return
        for answer in self._all_live():
            if answer.session == session and probe_name(answer) == event.get("transaction"):
                answer.note(Patience.alive)
                self._changed.set()

    def _all_live(self) -> list[Answer]:
        with self._lock:
            return list(self._live.values())

    def _back(self) -> None:
        for answer in self._all_live():
            answer.note(Patience.back)
        self._changed.set()

    def _lost(self) -> None:
        now = time.monotonic()
        for answer in self._all_live():
            answer.note(lambda patience: patience.offline(now))
        self._changed.set()

    def _refused(self, topic_filter: str, reason: str) -> None:
        for answer in self._all_live():
            if self._topic("reply", answer.session) == topic_filter:
                answer.fail(NotPermitted(not_permitted("subscribe to", topic_filter, self.address, reason)))


def probe_name(answer: Answer) -> str:
    """The transaction of the `ping` that asks on behalf of this answer whether anybody is there."""
    return f"probe-{answer.request_id}"[:64]


def _check(session: str, request_id: str | None) -> None:
    if not is_session(session):
        raise ValueError(
            f"session {session!r}: one or two levels of letters, digits, _ . and -, at most 64 each (`alice/kitchen`)"
        )
    if request_id is not None and not is_level(request_id):
        raise ValueError(f"request_id {request_id!r}: letters, digits, _ . and -, at most 64")
