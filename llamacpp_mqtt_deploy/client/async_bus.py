"""The client of the bus for asyncio programs: `BusClient`'s conduct, one connection, no thread for any stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from llamacpp_mqtt_deploy.client.acks import new_transaction
from llamacpp_mqtt_deploy.client.address import BrokerAddress, Transport, Version, not_permitted, tls_context
from llamacpp_mqtt_deploy.client.asking import (
    Patience,
    check_names,
    counted_of,
    history_of,
    own_session,
    prepared,
    written,
)
from llamacpp_mqtt_deploy.client.async_answer import AsyncAnswer
from llamacpp_mqtt_deploy.client.async_connection import AsyncConnection
from llamacpp_mqtt_deploy.client.exceptions import AnswerLost, BrokerUnreachable, BusError, NotPermitted, NoWorker
from llamacpp_mqtt_deploy.client.followed import MAX_ANSWER_CHARS
from llamacpp_mqtt_deploy.client.paho_client import REFUSED
from llamacpp_mqtt_deploy.client.traffic import LIVE_ANSWERS, Traffic, expiry_of
from llamacpp_mqtt_deploy.client.watch import look_after
from llamacpp_mqtt_deploy.client.workers import QUIET_S, StatusBoard

log = logging.getLogger(__name__)  # the host program's log: this part is a library

LOOK_EVERY_S = 0.05
"""Pause between two looks at all answers, however often they change: a look at 1000 of them takes a millisecond or two."""


class AsyncAck:
    """A place for the answer to one control message."""

    def __init__(self) -> None:
        self.transaction = new_transaction()
        self._arrived: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

    def give(self, event: Mapping[str, Any]) -> None:
        if not self._arrived.done():
            self._arrived.set_result(event)

    def refuse(self, error: BusError) -> None:
        """The broker does not deliver the message."""
        if not self._arrived.done():
            self._arrived.set_exception(error)

    async def wait(self, timeout_s: float) -> Mapping[str, Any] | None:
        """The ack, None when it does not come in time; raises what `refuse` was told."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._arrived
        except TimeoutError:
            return None


class AsyncBusClient:
    """Asks a worker over the bus. Use it as an async context manager; it belongs to the loop that opened it.

    `tls` is True (the system's authorities) or a ready `ssl.SSLContext`; `protocol` is `auto`, `5` or `3.1.1`; for
    `transport="unix"` `host` is the path of the socket. `answer_within_s` bounds the silence before the first event,
    `resend_limit` the deliveries in a row that bring nothing, `offline_limit_s` an outage of the broker, `live_answers` and
    `max_answer_chars` what is waited for at once. With `whole_levels` one subscription serves all sessions below a first level,
    so that a new session costs no way to the broker and back. Errors are `BusError`s.
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
        live_answers: int = LIVE_ANSWERS,
        max_answer_chars: int = MAX_ANSWER_CHARS,
        whole_levels: bool = False,
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
        self._max_answer_chars = max_answer_chars
        self._changed = asyncio.Event()
        self._traffic: Traffic[AsyncConnection, AsyncAnswer, AsyncAck] = Traffic(
            self.address,
            root=root,
            connect=AsyncConnection,
            place=AsyncAck,
            wake=self._changed.set,
            whole_levels=whole_levels,
            live_answers=live_answers,
        )
        self._connection = self._traffic.connection
        self._watch: asyncio.Task[None] | None = None
        self._status_refused: NotPermitted | None = None
        self._closed = False
        self._own_session: str | None = None

    # --- open and close ----------------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Connect; raises `BrokerUnreachable` or `BrokerRefused`."""
        await self._connection.open()
        try:
            await self._connection.subscribe(self._traffic.topic("status", "+"))
        except NotPermitted as error:
            self._status_refused = error  # allowed by the recommended access list, but no condition for an answer
        except BusError:
            await self._connection.close()
            raise
        except BaseException:  # cancelled: nobody else will close it
            await self._connection.close(timeout_s=0.0)
            raise
        self._watch = asyncio.create_task(self._look_after_answers(), name="lmd-bus-watch")
        return self

    async def close(self) -> None:
        """Cancel what still runs and disconnect; takes about two seconds at most and is idempotent. When this is cancelled it hangs
        up at once."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        graceful_s = 0.0
        try:
            await self._cancel_all(self._traffic.close())
            graceful_s = 2.0
        finally:
            await self._connection.close(timeout_s=graceful_s)

    async def _cancel_all(self, live: Sequence[AsyncAnswer]) -> None:
        left = len(live)
        taken = asyncio.Event()

        def one_taken() -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                taken.set()

        for answer in live:
            if not self._traffic.cancel(answer, one_taken):
                one_taken()
            answer.fail(AnswerLost("The bus client was closed before the answer was complete."))
        if live:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await taken.wait()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

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

    async def ask(
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
    ) -> AsyncAnswer:
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
        answer = AsyncAnswer(
            self,
            session=asking.session,
            request_id=asking.request_id,
            payload=asking.payload,
            rules=asking.rules,
            expects_text=asking.expects_text,
            max_chars=self._max_answer_chars,
        )
        async with self._listening(answer.session):
            self._traffic.add(answer)
        self._traffic.publish(answer)
        return answer

    async def listen(self, session: str) -> None:
        """Subscribe to the events of a session, as `ask` does; raises `NotPermitted` and `BrokerUnreachable`."""
        async with self._listening(session):
            pass

    @contextlib.asynccontextmanager
    async def _listening(self, session: str) -> AsyncIterator[None]:
        """Be subscribed to the events of a session within it; raises as `listen`."""
        with self._traffic.listening(session):
            await self._connection.subscribe(self._traffic.reply_filter(session))
            yield

    # --- control, status, history ------------------------------------------------------------------------------------

    async def control(
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
        async with self._listening(session):
            return await self._order(topic, action, timeout_s=timeout_s, request_id=request_id, **fields)

    async def _order(
        self, topic: str, action: str, *, timeout_s: float, request_id: str | None, **fields: Any
    ) -> Mapping[str, Any]:
        """Publish a control message and wait for its ack."""
        with self._traffic.acks.awaiting() as ack:
            message = {"action": action, "transaction": ack.transaction, "request_id": request_id, **fields}
            payload = written({name: value for name, value in message.items() if value is not None})

            def acknowledged(value: int, reason: str) -> None:
                if value >= REFUSED:
                    ack.refuse(NotPermitted(not_permitted("publish to", topic, self.address, reason)))

            # Expires when our wait is over: a worker that comes back later must not do what nobody waits for any more.
            if not self._connection.publish(topic, payload, expiry_s=expiry_of(timeout_s), on_ack=acknowledged):
                raise BrokerUnreachable(
                    f"The connection to the broker at {self.address} is lost; it is being restored."
                )
            event = await ack.wait(timeout_s)
        if event is None:
            raise NoWorker(self._traffic.unanswered(f"On {topic} {action} was not answered within {timeout_s:g} s"))
        return event

    async def count_tokens(
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
        return counted_of(await self.control(session, "count_tokens", timeout_s=timeout_s, **fields))

    async def history(self, session: str | None = None, *, timeout_s: float = 10.0) -> list[Mapping[str, Any]]:
        """The messages that the worker remembers of this session; raises `AnswerError` where it may not tell."""
        return history_of(await self.control(session, "history", timeout_s=timeout_s))

    async def status(self, *, wait_s: float = 1.0, required: bool = False) -> dict[str, Mapping[str, Any]]:
        """The retained status of every worker by its id; waits at most this long for the first one.

        Where the broker does not allow it there is none; `required` raises `NotPermitted` then.
        """
        if self._status_refused is None:
            await self._first_of(self._traffic.board, wait_s)
        elif required:
            raise self._status_refused
        return self._traffic.board.all()

    async def health(self, *, wait_s: float = 1.0) -> dict[str, Mapping[str, Any]]:
        """The retained health of every worker by its id; waits at most this long for the first one. Raises `NotPermitted`."""
        await self._connection.subscribe(self._traffic.topic("health", "+"))
        await self._first_of(self._traffic.health, wait_s)
        return self._traffic.health.all()

    async def _first_of(self, board: StatusBoard, wait_s: float) -> None:
        """Wait until something is known, and until what comes right behind it is, too."""
        arrived = asyncio.Event()
        board.on_change = arrived.set
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                if not board.all():
                    await arrived.wait()
                await asyncio.sleep(QUIET_S)

    def workers_online(self) -> list[str]:
        """The workers whose status says that they take or finish requests, as far as it has arrived."""
        return self._traffic.board.online()

    def workers(self) -> dict[str, Mapping[str, Any]]:
        """The latest status of every worker, without waiting."""
        return self._traffic.board.all()

    def heard_at(self) -> dict[str, float]:
        """When (monotonic seconds) the latest status of a worker came from itself; none of those whose status the broker had kept."""
        return self._traffic.board.heard_at()

    def loads(self) -> dict[str, Mapping[str, Any]]:
        """The latest health of every worker, without waiting; empty before `health` was called."""
        return self._traffic.health.all()

    @property
    def status_readable(self) -> bool:
        """Whether the broker lets us read who is there; without it nobody's absence is known."""
        return self._status_refused is None

    def cancel_request(self, answer: AsyncAnswer) -> bool:
        """Ask the worker to stop, also when nobody here waits for its end any more; False when it cannot be sent."""
        return self._traffic.cancel(answer)

    # --- for its answers ---------------------------------------------------------------------------------------------

    def _cancel(self, answer: AsyncAnswer) -> None:
        self._traffic.cancel(answer)
        self._changed.set()

    def _abandon(self, answer: AsyncAnswer) -> None:
        answer.fail(AnswerLost("Nobody listens to this answer any more."))
        self._changed.set()

    async def _look_after_answers(self) -> None:
        while True:
            try:
                pause_s = look_after(self._traffic, offline_limit_s=self._patience.offline_limit_s)
            except Exception:
                log.exception("bus.watch_failed")
                pause_s = 1.0
            # Python 3.11's wait_for loses a cancellation that comes with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
            self._changed.clear()
            await asyncio.sleep(LOOK_EVERY_S)
