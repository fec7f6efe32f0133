"""The answers under way: one place for each id, ends for those whose client went away, all of them ended at shutdown."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from llamacpp_mqtt_deploy.client.async_answer import AsyncAnswer
from llamacpp_mqtt_deploy.client.async_bus import AsyncBusClient
from llamacpp_mqtt_deploy.client.exceptions import AnswerError
from llamacpp_mqtt_deploy.core.errors import ShuttingDown
from llamacpp_mqtt_deploy.gateway.problems import COME_BACK_S, AnotherRequest

Name = tuple[str, str]
"""Session path and request id."""

MOST_AWAITED = 1000
"""Answers whose client may come back; for one more, the first level that has the most of them gives up its oldest."""


@dataclass(frozen=True, slots=True)
class _Read:
    """An answer that somebody reads, and a hash of what it answers."""

    answer: AsyncAnswer
    request: bytes


@dataclass(frozen=True, slots=True)
class _Awaited:
    """An answer whose client may come back until the timer has run."""

    answer: AsyncAnswer
    timer: asyncio.TimerHandle
    request: bytes


class Running:
    """Begins answers on the bus and ends those that nobody reads any more.

    A client that named its request may come back for it: its answer goes on for `retry_grace_s` after it went away. All others
    are cancelled at once.
    """

    def __init__(self, bus: AsyncBusClient, *, retry_grace_s: float) -> None:
        self._bus = bus
        self._retry_grace_s = retry_grace_s
        self._answers: dict[Name, _Read] = {}
        self._awaited: dict[Name, _Awaited] = {}
        self._closing = False

    async def begin(self, *, session: str, request_id: str, request: Mapping[str, Any], streams: bool) -> AsyncAnswer:
        """Ask for an answer. Who asks again with the same id takes it over: the older reader's answer ends with an error. Another
        request under this id, which the worker would reject, changes nothing for the first.

        Raises AnotherRequest, BusError, ShuttingDown and ValueError.
        """
        name, mark = (session, request_id), _mark(request)
        await self._bus.listen(session)  # may wait; from here on nothing does, or two who ask at once would both begin
        if self._closing:  # its body, or the broker's answer, took longer than the drain
            raise ShuttingDown("The gateway is shutting down.", retry_after_s=COME_BACK_S)
        self._refuse_another(name, mark)
        if (awaited := self._awaited.pop(name, None)) is not None:
            awaited.timer.cancel()
        if (read := self._answers.pop(name, None)) is not None:
            read.answer.fail(
                AnswerError("duplicate_request", "The same request was sent again; its answer goes there.")
            )
        cut = request.get("stream", True)  # "sentence"
        answer = await self._bus.ask(
            session=session, request_id=request_id, **_without_stream(request), stream=cut if streams else False
        )
        self._answers[name] = _Read(answer, mark)
        return answer

    def check(self, *, session: str, request_id: str, request: Mapping[str, Any]) -> None:
        """Raise AnotherRequest where a different request under this id is under way."""
        self._refuse_another((session, request_id), _mark(request))

    def under_way(self, *, session: str, request_id: str) -> bool:
        """Whether this request is read, or waits for its client to come back."""
        name = (session, request_id)
        return name in self._answers or name in self._awaited

    def _refuse_another(self, name: Name, mark: bytes) -> None:
        known = self._answers.get(name) or self._awaited.get(name)
        if known is not None and known.request != mark:
            raise AnotherRequest(
                "This id belongs to another request of this session, which is not answered yet.",
                fields={"request_id": "a new one for each request"},
            )

    def leave(self, answer: AsyncAnswer, *, may_come_back: bool) -> None:
        """Whoever read this answer is gone; nothing to do when it had ended."""
        name = (answer.session, answer.request_id)
        read = self._answers.get(name)
        if read is None or read.answer is not answer:
            return  # somebody else reads it now
        del self._answers[name]
        if answer.ended:
            return
        if may_come_back and self._retry_grace_s > 0 and not self._closing:
            timer = asyncio.get_running_loop().call_later(self._retry_grace_s, self._give_up, name)
            self._awaited[name] = _Awaited(answer, timer, read.request)
            answer.abandon()
            if len(self._awaited) > MOST_AWAITED:
                self._give_up_one()
        else:
            self._cancel(answer)

    def end_all(self) -> None:
        """The gateway stops: every reader gets an error that says so; what its client named goes on at the worker."""
        self._closing = True
        for name in list(self._awaited):
            self._awaited.pop(name).timer.cancel()
        for read in list(self._answers.values()):
            if not read.answer.ended:
                self._cancel(read.answer, AnswerError("shutting_down", "The gateway is shutting down.", retryable=True))

    @property
    def count(self) -> int:
        return len(self._answers)

    def _give_up_one(self) -> None:
        """Of who has the most, so that a key whose clients leave all the time takes no place from the others."""
        levels = Counter(_first_level(session) for session, _ in self._awaited)
        ((most, _),) = levels.most_common(1)
        self._give_up(next(name for name in self._awaited if _first_level(name[0]) == most))

    def _give_up(self, name: Name) -> None:
        awaited = self._awaited.pop(name)
        awaited.timer.cancel()
        self._bus.cancel_request(awaited.answer)

    def _cancel(self, answer: AsyncAnswer, error: AnswerError | None = None) -> None:
        self._bus.cancel_request(answer)
        answer.fail(error or AnswerError("cancelled", "The client went away."))


def _first_level(session: str) -> str:
    return session.partition("/")[0]


def _without_stream(request: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name != "stream"}


def _mark(request: Mapping[str, Any]) -> bytes:
    """What two requests have in common that are the same but for how their answers are told."""
    return hashlib.sha256(orjson.dumps(_without_stream(request), option=orjson.OPT_SORT_KEYS)).digest()
