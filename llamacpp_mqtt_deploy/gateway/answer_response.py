"""One answer to one HTTP response: rendered as it comes, alive while it waits, cancelled when its reader goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.types import Message, Receive, Scope, Send

from llamacpp_mqtt_deploy.client.async_answer import AsyncAnswer
from llamacpp_mqtt_deploy.client.exceptions import BusError
from llamacpp_mqtt_deploy.client.followed import Done
from llamacpp_mqtt_deploy.core.formats.rendering import Renderer, Whole
from llamacpp_mqtt_deploy.gateway.problems import told
from llamacpp_mqtt_deploy.gateway.replies import send_reply
from llamacpp_mqtt_deploy.gateway.running_answers import Running

log = structlog.get_logger(__name__)

# A reverse proxy that gathers an answer before it passes it on would turn a stream into a long silence.
STREAM_HEADERS = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}

_NEWS = frozenset({"chunk", "snapshot", "done"})
"""Events after which an answer cannot fail with a status of its own any more."""


class Cut(Exception):
    """The connection has to be cut: the one sign that an unfinished answer can give to a reader without a form for errors."""


class SlowReader(Cut):
    """The client takes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Times of a stream in seconds: between two signs of life, and for one write to a reader that takes nothing."""

    heartbeat_s: float
    slow_reader_s: float


class AnswerResponse:
    """An ASGI response for an answer that has been asked for. With `renderer` it streams, without it comes whole.

    Until the first piece of the answer nothing is sent, for at most one heartbeat, so that what fails at once fails with its
    status; `eager` sends from the first event on, for formats whose events say more than the answer. `cut_when_failed` is for those
    that cannot tell an error in a stream.
    """

    def __init__(
        self,
        answer: AsyncAnswer,
        running: Running,
        *,
        whole: Whole,
        renderer: Renderer | None,
        pace: Pace,
        may_come_back: bool,
        eager: bool = False,
        cut_when_failed: bool = False,
        note: Callable[..., None] = lambda **_: None,
    ) -> None:
        self._answer = answer
        self._running = running
        self._whole = whole
        self._renderer = renderer
        self._pace = pace
        self._may_come_back = may_come_back
        self._eager = eager
        self._cut_when_failed = cut_when_failed
        self._note = note
        self._started = False
        self._told_at = 0.0
        """When the client was last sent something; a time of the loop."""
        self._headers = {"x-request-id": answer.request_id}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(self._pace.slow_reader_s):
                    await send(message)
            except TimeoutError:
                raise SlowReader(f"nothing was taken for {self._pace.slow_reader_s:g} s") from None

        watching = asyncio.create_task(self._watch(receive))
        try:
            if self._renderer is None:
                await self._send_whole(bounded)
            else:
                await self._send_stream(self._renderer, bounded)
        finally:
            watching.cancel()
            self._leave()

    def _leave(self) -> None:
        self._running.leave(self._answer, may_come_back=self._may_come_back)

    async def _watch(self, receive: Receive) -> None:
        """Wait until the client goes away; then the answer is at its end here."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave()

    # --- whole -------------------------------------------------------------------------------------------------------

    async def _send_whole(self, send: Send) -> None:
        while await self._answer.poll() is not None:
            pass  # nothing is shown before the end, and nothing must pile up either
        outcome = self._answer.outcome
        reply = self._whole.answer(done_event(outcome)) if isinstance(outcome, Done) else self._failure(outcome)
        self._note(outcome=_name(outcome))
        await send_reply(send, reply, headers=self._headers)

    def _failure(self, error: BusError | None) -> Any:
        assert error is not None
        log.info("request.failed", request=self._answer.request_id, session=self._answer.session, why=str(error))
        return self._whole.failure(told(error))

    # --- streamed ----------------------------------------------------------------------------------------------------

    async def _send_stream(self, renderer: Renderer, send: Send) -> None:
        waiting = b""
        self._told_at = asyncio.get_running_loop().time()
        async for event in self._events():
            if event is None:
                waiting += renderer.ping()
                self._told_at = asyncio.get_running_loop().time()
                ready = True
            else:
                if not self._started and _fails(event):
                    await self._fail_whole(event, send)
                    return
                waiting += renderer.event(event)
                ready = self._started or self._eager or event["type"] in _NEWS
            if ready and (waiting or not self._started):
                await self._begin(renderer, send)
                if waiting:
                    await send({"type": "http.response.body", "body": waiting, "more_body": True})
                    self._told_at = asyncio.get_running_loop().time()
                waiting = b""
        await self._finish(renderer, waiting, send)

    async def _events(self) -> AsyncIterator[Mapping[str, Any] | None]:
        """The events of the answer; None when the client has been told nothing for so long that a sign of life is due, though there
        may have been events that this format has no words for."""
        loop, heartbeat_s = asyncio.get_running_loop(), self._pace.heartbeat_s
        while True:
            left_s = self._told_at + heartbeat_s - loop.time()
            reading = await self._answer.poll(left_s) if left_s > 0 else None
            if reading is not None:
                yield reading.event
            elif self._answer.ended and not self._answer.has_more:
                return
            else:
                yield None

    async def _begin(self, renderer: Renderer, send: Send) -> None:
        if self._started:
            return
        self._started = True
        named = {**STREAM_HEADERS, **self._headers, "content-type": renderer.content_type}
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            }
        )

    async def _fail_whole(self, event: Mapping[str, Any], send: Send) -> None:
        reply = self._whole.answer(event) if event["type"] == "done" else self._whole.failure(event)
        self._note(outcome=str(event.get("code") or event.get("finish_reason")))
        await send_reply(send, reply, headers=self._headers)

    async def _finish(self, renderer: Renderer, waiting: bytes, send: Send) -> None:
        outcome = self._answer.outcome
        self._note(outcome=_name(outcome))
        if not renderer.ended and isinstance(outcome, BusError):
            error = told(outcome)
            log.info("request.failed", request=self._answer.request_id, session=self._answer.session, why=str(outcome))
            if not self._started:
                await self._fail_whole(error, send)
                return
            waiting += renderer.event(error)
        await self._begin(renderer, send)
        cut = renderer.failed and self._cut_when_failed
        await send({"type": "http.response.body", "body": waiting, "more_body": cut})
        if cut:
            raise Cut("the answer failed after its first piece, and this format has no other way to say so")


def done_event(done: Done) -> dict[str, Any]:
    """The end of an answer with all of its text, also where that came in chunks alone."""
    event = {**done.event, "full_content": done.content, "message": done.message}
    event.pop("content_omitted", None)
    return event | ({"full_reasoning": done.reasoning} if done.reasoning else {})


def _fails(event: Mapping[str, Any]) -> bool:
    return event["type"] == "error" or (event["type"] == "done" and event.get("finish_reason") == "cancelled")


def _name(outcome: Done | BusError | None) -> str:
    match outcome:
        case Done():
            return outcome.finish_reason
        case BusError():
            return str(told(outcome)["code"])
        case None:
            return "left"
