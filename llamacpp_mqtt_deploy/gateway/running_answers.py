"""The answers under way: one place for each id, ends for those whose client went away, all of them ended at shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from llamacpp_mqtt_deploy.client.async_answer import AsyncAnswer
from llamacpp_mqtt_deploy.client.async_bus import AsyncBusClient
from llamacpp_mqtt_deploy.client.exceptions import AnswerError

Name = tuple[str, str]
"""Session path and request id."""

MOST_AWAITED = 1000
"""Answers whose client may come back; beyond it they are cancelled at once."""


class Running:
    """Begins answers on the bus and ends those that nobody reads any more.

    A client that named its request may come back for it: its answer goes on for `retry_grace_s` after it went away. All others
    are cancelled at once.
    """

    def __init__(self, bus: AsyncBusClient, *, retry_grace_s: float) -> None:
        self._bus = bus
        self._retry_grace_s = retry_grace_s
        self._answers: dict[Name, AsyncAnswer] = {}
        self._awaited: dict[Name, asyncio.TimerHandle] = {}
        self._closing = False

    async def begin(self, *, session: str, request_id: str, request: Mapping[str, Any], streams: bool) -> AsyncAnswer:
        """Ask for an answer. Who asks again with the same id takes it over: the older reader's answer ends with an error.

        Raises BusError and ValueError.
        """
        name = (session, request_id)
        await self._bus.listen(session)  # may wait; from here on nothing does, or two who ask at once would both begin
        if (timer := self._awaited.pop(name, None)) is not None:
            timer.cancel()
        if (older := self._answers.pop(name, None)) is not None:
            older.fail(AnswerError("duplicate_request", "The same request was sent again; its answer goes there."))
        cut = request.get("stream", True)  # "sentence"
        answer = await self._bus.ask(
            session=session,
            request_id=request_id,
            **{name: value for name, value in request.items() if name != "stream"},
            stream=cut if streams else False,
        )
        self._answers[name] = answer
        return answer

    def leave(self, answer: AsyncAnswer, *, may_come_back: bool) -> None:
        """Whoever read this answer is gone; nothing to do when it had ended."""
        name = (answer.session, answer.request_id)
        if self._answers.get(name) is not answer:
            return  # somebody else reads it now
        del self._answers[name]
        if answer.ended:
            return
        if may_come_back and self._retry_grace_s > 0 and len(self._awaited) < MOST_AWAITED and not self._closing:
            self._awaited[name] = asyncio.get_running_loop().call_later(
                self._retry_grace_s, self._give_up, name, answer
            )
            answer.abandon()
        else:
            self._cancel(answer)

    def end_all(self) -> None:
        """The gateway stops: every reader gets an error that says so; what its client named goes on at the worker."""
        self._closing = True
        for name in list(self._awaited):
            self._awaited.pop(name).cancel()
        for answer in list(self._answers.values()):
            if not answer.ended:
                self._cancel(answer, AnswerError("shutting_down", "The gateway is shutting down.", retryable=True))

    @property
    def count(self) -> int:
        return len(self._answers)

    def _give_up(self, name: Name, answer: AsyncAnswer) -> None:
        self._awaited.pop(name, None)
        self._bus.cancel_request(answer)

    def _cancel(self, answer: AsyncAnswer, error: AnswerError | None = None) -> None:
        self._bus.cancel_request(answer)
        answer.fail(error or AnswerError("cancelled", "The client went away."))
