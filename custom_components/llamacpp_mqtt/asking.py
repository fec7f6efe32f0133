"""One request on its way: takes its events, hands out what is new, sends it again by the protocol's rules, ends in bounded time.

Of the world it knows asyncio's clock and two functions that it is given. Knows no Home Assistant.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .answer_reader import AnswerReader
from .resend_rules import Abandon, Deliver, ResendRules, WhyEnded


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of the answer's text, or of the thinking before it."""

    kind: Literal["content", "reasoning"]
    text: str


class Unanswered(Exception):
    """No end of the answer can be had."""

    def __init__(self, why: WhyEnded) -> None:
        super().__init__(why)
        self.why: WhyEnded = why


class Asking:
    """`deliver` publishes the request, `cancel` tells the worker to stop; neither waits."""

    def __init__(
        self, request_id: str, rules: ResendRules, *, deliver: Callable[[], None], cancel: Callable[[], None]
    ) -> None:
        self.reader = AnswerReader(request_id)
        self._rules = rules
        self._deliver = deliver
        self._cancel = cancel
        self._given_up: WhyEnded | None = None
        self._changed = asyncio.Event()
        self._pieces: deque[Piece] = deque()
        self._loop = asyncio.get_running_loop()

    @property
    def end(self) -> Mapping[str, Any] | None:
        """The terminal event, once it is here."""
        return self.reader.end

    def take(self, event: Mapping[str, Any]) -> None:
        """An event of this request, in order of arrival."""
        if self.reader.end is not None:
            return
        known = self.reader.next_seq
        news = self.reader.feed(event)
        if self.reader.heard:
            progress = not self.reader.lacks or self.reader.next_seq > known
            self._rules.heard(self._loop.time(), progress=progress)
        if news is not None:
            self._keep("reasoning", news.reasoning)
            self._keep("content", news.content)
        self._changed.set()

    def away(self, why: WhyEnded) -> None:
        """The broker or the worker is gone."""
        self._rules.away(self._loop.time(), why)
        self._changed.set()

    def back(self, heartbeat_s: float) -> None:
        """Both are there, and subscribed."""
        self._rules.heartbeat_s = heartbeat_s
        self._rules.back()
        self._changed.set()

    def give_up(self, why: WhyEnded) -> None:
        """No event of it can come any more."""
        self._given_up = why
        self._changed.set()

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is new, until the end; raises `Unanswered` where there is none to be had."""
        while True:
            self._changed.clear()
            while self._pieces:
                yield self._pieces.popleft()
            if self.reader.end is not None:
                return
            if self._given_up is not None:
                raise Unanswered(self._given_up)
            now = self._loop.time()
            move = self._rules.decide(now, lacks=self.reader.lacks, cut_short=self.reader.cut_short)
            if isinstance(move, Abandon):
                raise Unanswered(move.why)
            if isinstance(move, Deliver):
                self._rules.sent(now)
                self._deliver()
                continue
            try:
                async with asyncio.timeout(move.until - now):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def close(self) -> None:
        """Nobody waits for the end any more: where it is not here, the worker shall stop."""
        if self.reader.end is None and self._rules.was_sent:
            self._cancel()

    def _keep(self, kind: Literal["content", "reasoning"], text: str) -> None:
        """Text of one kind is put together while nobody takes it: what waits is bounded by the length of the answer."""
        if not text:
            return
        if self._pieces and self._pieces[-1].kind == kind:
            self._pieces[-1] = Piece(kind, self._pieces[-1].text + text)
        else:
            self._pieces.append(Piece(kind, text))
