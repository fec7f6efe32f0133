"""The client of the bus: requests out, answers in, after the client rules of the protocol, usable from any thread."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import orjson

from llamacpp_mqtt_deploy.client.acks import PendingAck
from llamacpp_mqtt_deploy.client.address import BrokerAddress, Transport, Version, not_permitted, tls_context
from llamacpp_mqtt_deploy.client.answer import Answer
from llamacpp_mqtt_deploy.client.asking import (
    Patience,
    check_names,
    counted_of,
    history_of,
    own_session,
    prepared,
    written,
)
from llamacpp_mqtt_deploy.client.connection import Connection
from llamacpp_mqtt_deploy.client.exceptions import AnswerLost, BrokerUnreachable, BusError, NotPermitted, NoWorker
from llamacpp_mqtt_deploy.client.paho_client import REFUSED
from llamacpp_mqtt_deploy.client.traffic import Traffic, expiry_of
from llamacpp_mqtt_deploy.client.watch import Watch
from llamacpp_mqtt_deploy.core.routes import is_level


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
        self.address = BrokerAddress(
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
        self._patience = Patience(
            answer_within_s=answer_within_s, resend_limit=resend_limit, offline_limit_s=offline_limit_s
        )
        self._changed = threading.Event()
        self._traffic: Traffic[Connection, Answer, PendingAck] = Traffic(
            self.address, root=root, connect=Connection, place=PendingAck, wake=self._changed.set
        )
        self._connection = self._traffic.connection
        self._watch = Watch(self._traffic, changed=self._changed, offline_limit_s=offline_limit_s)
        self._status_refused: NotPermitted | None = None
        self._closing = False
        self._own_session: str | None = None

    # --- open and close ----------------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Connect; raises `BrokerUnreachable` or `BrokerRefused`."""
        self._connection.open()
        try:
            self._connection.subscribe(self._traffic.topic("status", "+"))
        except NotPermitted as error:
            self._status_refused = error  # allowed by the recommended access list, but no condition for an answer
        except BaseException:  # Ctrl-C, too, leaves no thread behind
            self._connection.close()
            raise
        self._watch.start()
        return self

    def close(self) -> None:
        """Cancel what still runs and disconnect; takes about two seconds at most and is idempotent."""
        if self._closing:
            return
        live = self._traffic.close()
        self._closing = True
        self._watch.stop()
        acknowledged = [threading.Event() for _ in live]
        for answer, event in zip(live, acknowledged, strict=True):
            if not self._traffic.cancel(answer, event.set):
                event.set()
            answer.fail(AnswerLost("The bus client was closed before the answer was complete."))
        ends_at = time.monotonic() + 1.0
        for event in acknowledged:
            event.wait(max(0.0, ends_at - time.monotonic()))
        self._changed.set()
        self._connection.close()
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
    def connected(self) -> bool:
        """Whether the broker is there and every subscription is granted, at this moment."""
        return self._connection.ready

    @property
    def session(self) -> str:
        """The session of requests that name none: `{user}/{random}`, made once for this client."""
        if self._own_session is None:
            self._own_session = own_session(self.address.username)
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
        asking = prepared(
            session=session or self.session,
            request_id=request_id,
            patience=self._patience,
            stream=stream,
            timeout_s=timeout_s,
            fields={"prompt": prompt, "messages": messages, "system_prompt": system_prompt, **fields},
        )
        answer = Answer(
            self,
            session=asking.session,
            request_id=asking.request_id,
            payload=asking.payload,
            rules=asking.rules,
            expects_text=asking.expects_text,
        )
        with self._listening(answer.session):
            self._traffic.add(answer)
        self._traffic.publish(answer)
        self._changed.set()
        return answer

    @contextlib.contextmanager
    def _listening(self, session: str) -> Iterator[None]:
        """Be subscribed to the events of a session within it; raises `NotPermitted` and `BrokerUnreachable`."""
        with self._traffic.listening(session):
            self._connection.subscribe(self._traffic.reply_filter(session))
            yield

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
        """Send a control message (`cancel`, `reset`, `delete`, `history`, `ping`, `count_tokens`) and return the worker's `ack`.

        The ack's `status` is `ok` or `error` (with a `code`). Raises `NoWorker` when none comes in time, `NotPermitted`.
        """
        session = session or self.session
        check_names(session, request_id)
        topic = self._traffic.topic("control", session)
        with self._listening(session):
            return self._order(topic, action, timeout_s=timeout_s, request_id=request_id, **fields)

    def admin(self, worker: str, action: str, *, timeout_s: float = 10.0, **fields: Any) -> Mapping[str, Any]:
        """Send an admin message (`drain`, `resume`, `cancel_all`, ...) to one worker and return its `ack`.

        The ack's `status` is `ok` or `error` (with a `code`). Raises `NoWorker` when none comes in time, `NotPermitted`.
        """
        if not is_level(worker):
            raise ValueError(f"worker {worker!r}: letters, digits, _ . and -, at most 64")
        self._connection.subscribe(self._traffic.topic("admin-reply", worker))
        return self._order(self._traffic.topic("admin", worker), action, timeout_s=timeout_s, **fields)

    def _order(self, topic: str, action: str, *, timeout_s: float, **fields: Any) -> Mapping[str, Any]:
        """Publish a control or admin message and wait for its ack."""
        unanswered = f"On {topic} {action} was not answered within {timeout_s:g} s"
        with self._traffic.acks.awaiting() as ack:
            message = {"action": action, "transaction": ack.transaction, **fields}
            payload = written({name: value for name, value in message.items() if value is not None})

            def acknowledged(value: int, reason: str) -> None:
                if value >= REFUSED:
                    ack.refuse(NotPermitted(not_permitted("publish to", topic, self.address, reason)))

            # Expires when our wait is over: a worker that comes back later must not do what nobody waits for any more.
            if not self._connection.publish(topic, payload, expiry_s=expiry_of(timeout_s), on_ack=acknowledged):
                raise BrokerUnreachable(
                    f"The connection to the broker at {self.address} is lost; it is being restored."
                )
            event = ack.wait(timeout_s)
        if event is None:
            raise NoWorker(self._traffic.unanswered(unanswered))
        return event

    def tell(self, session: str, action: str, *, timeout_s: float = 1.0) -> bool:
        """Send a control message and wait only for the broker to take it; whether it did. Never raises."""
        taken = threading.Event()
        try:
            payload = orjson.dumps({"action": action})
            published = self._connection.publish(
                self._traffic.topic("control", session), payload, on_ack=lambda _value, _reason: taken.set()
            )
        except BusError:
            return False
        return published and taken.wait(timeout_s)

    def count_tokens(
        self,
        prompt: str | None = None,
        *,
        session: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        system_prompt: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        model: str | None = None,
        timeout_s: float = 10.0,
    ) -> int:
        """The tokens of a prompt (without its session's history) or of `messages`, as the worker's model would get them.

        Raises `AnswerError` where the worker cannot tell, `unsupported`, or its engine is asleep or away, `engine_unavailable`.
        """
        fields: dict[str, Any] = {
            "prompt": prompt,
            "messages": messages,
            "system_prompt": system_prompt,
            "tools": tools,
            "model": model,
        }
        return counted_of(self.control(session, "count_tokens", timeout_s=timeout_s, **fields))

    def history(self, session: str | None = None, *, timeout_s: float = 10.0) -> list[Mapping[str, Any]]:
        """The messages that the worker remembers of this session; raises `AnswerError` where it may not tell."""
        return history_of(self.control(session, "history", timeout_s=timeout_s))

    def status(self, *, wait_s: float = 1.0, required: bool = False) -> dict[str, Mapping[str, Any]]:
        """The retained status of every worker by its id; waits at most this long for the first one.

        Where the broker does not allow it there is none; `required` raises `NotPermitted` then.
        """
        if self._status_refused is None:
            self._traffic.board.wait(wait_s)
        elif required:
            raise self._status_refused
        return self._traffic.board.all()

    def health(self, *, wait_s: float = 1.0) -> dict[str, Mapping[str, Any]]:
        """The retained health of every worker by its id; waits at most this long for the first one. Raises `NotPermitted`."""
        self._connection.subscribe(self._traffic.topic("health", "+"))
        self._traffic.health.wait(wait_s)
        return self._traffic.health.all()

    def workers_online(self) -> list[str]:
        """The workers whose status says that they take or finish requests, as far as it has arrived."""
        return self._traffic.board.online()

    # --- for its answers ---------------------------------------------------------------------------------------------

    def _cancel(self, answer: Answer) -> None:
        self._traffic.cancel(answer)

    def _wake(self) -> None:
        self._changed.set()

    def _alive(self) -> bool:
        return self._watch.alive()
