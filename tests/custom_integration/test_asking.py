"""One request of Home Assistant on its way, without Home Assistant: what is handed out, sent again, given up and cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.custom_integration.integration import module

asking = module("asking")
rules = module("resend_rules")


class Wire:
    """What was published, and the request that is asked."""

    def __init__(self, **options: Any) -> None:
        self.deliveries = 0
        self.cancels = 0
        self.sent = asyncio.Event()
        self.asking = asking.Asking("r", rules.ResendRules(**options), deliver=self._deliver, cancel=self._cancel)

    def _deliver(self) -> None:
        self.deliveries += 1
        self.sent.set()

    def _cancel(self) -> None:
        self.cancels += 1

    def event(self, kind: str, **fields: Any) -> None:
        self.asking.take({"type": kind, "request_id": "r", **fields})

    async def text(self) -> str:
        return "".join([piece.text async for piece in self.asking.pieces() if piece.kind == "content"])


def test_an_answer_comes_in_pieces_and_what_waits_is_put_together() -> None:
    async def ask() -> None:
        wire = Wire()
        pieces = wire.asking.pieces()
        first = asyncio.ensure_future(anext(pieces))
        await wire.sent.wait()
        wire.event("chunk", seq=0, reasoning="hm")
        assert await first == asking.Piece("reasoning", "hm")
        for seq, text in enumerate("abc", 1):
            wire.event("chunk", seq=seq, content=text)
        wire.event("done", seq=4, full_content="abcd")
        assert [piece async for piece in pieces] == [asking.Piece("content", "abcd")]
        wire.asking.close()
        assert (wire.deliveries, wire.cancels) == (1, 0)

    asyncio.run(ask())


def test_a_broker_that_was_away_brings_another_delivery_and_the_snapshot_the_rest() -> None:
    async def ask() -> None:
        wire = Wire()
        text = asyncio.ensure_future(wire.text())
        await wire.sent.wait()
        wire.event("chunk", seq=0, content="one ")
        wire.asking.away("offline")
        wire.sent.clear()
        wire.asking.back(15.0)
        async with asyncio.timeout(5):
            await wire.sent.wait()
        wire.event("snapshot", content="one two ", next_seq=2)
        wire.event("chunk", seq=2, content="three")
        wire.event("done", seq=3, full_content="one two three")
        assert await text == "one two three"
        assert wire.deliveries == 2

    asyncio.run(ask())


def test_a_lost_chunk_is_asked_for_again() -> None:
    async def ask() -> None:
        wire = Wire()
        text = asyncio.ensure_future(wire.text())
        await wire.sent.wait()
        wire.sent.clear()
        wire.event("chunk", seq=1, content="b")
        async with asyncio.timeout(5):
            await wire.sent.wait()
        wire.event("snapshot", content="ab", next_seq=2)
        wire.event("done", seq=2, content_omitted=True)
        assert await text == "ab"

    asyncio.run(ask())


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "ANSWER_WITHIN_S", 0.01)
    monkeypatch.setattr(rules, "AWAY_LIMIT_S", 0.01)

    async def ask() -> None:
        wire = Wire()
        with pytest.raises(asking.Unanswered) as unanswered:
            await wire.text()
        assert unanswered.value.why == "unanswered"
        assert wire.deliveries == rules.RESEND_LIMIT + 1
        away = Wire()
        away.asking.away("no_worker")
        with pytest.raises(asking.Unanswered) as unanswered:
            await away.text()
        assert unanswered.value.why == "no_worker"
        away.asking.close()
        assert (away.deliveries, away.cancels) == (0, 0), "what was never sent needs no cancel"

    asyncio.run(ask())


def test_whoever_stops_waiting_cancels_on_the_worker() -> None:
    async def ask() -> None:
        wire = Wire()
        text = asyncio.ensure_future(wire.text())
        await wire.sent.wait()
        text.cancel()
        with pytest.raises(asyncio.CancelledError):
            await text
        wire.asking.close()
        assert wire.cancels == 1

    asyncio.run(ask())


def test_what_is_given_up_from_outside_tells_what_has_come_and_is_cancelled() -> None:
    async def ask() -> None:
        wire = Wire()
        pieces = wire.asking.pieces()
        first = asyncio.ensure_future(anext(pieces))
        await wire.sent.wait()
        wire.event("chunk", seq=0, content="a")
        assert await first == asking.Piece("content", "a")
        wire.event("chunk", seq=1, content="b")
        wire.asking.give_up("lost")
        assert await anext(pieces) == asking.Piece("content", "b")
        with pytest.raises(asking.Unanswered, match="lost"):
            await anext(pieces)
        wire.asking.close()
        assert (wire.deliveries, wire.cancels) == (1, 1)

    asyncio.run(ask())
