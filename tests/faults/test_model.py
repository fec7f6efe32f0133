"""The reference model of the contract, on histories made by hand: the good ones pass, each bad one is told by its promise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.faults.model import Story, history_of

TOPIC = "llm/reply/c0/s1"


def event(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, "request_id": "r1", "session_id": "c0/s1"} | fields)


def chunk(seq: int, content: str) -> str:
    return event("chunk", seq=seq, content=content)


def done(text: str | None = "abcdef", *, seq: int = 3, reason: str = "stop", **more: Any) -> str:
    told = {"content_omitted": True} if text is None else {"full_content": text}
    return event("done", seq=seq, final=True, finish_reason=reason, **told, **more)


def error(code: str, **fields: Any) -> str:
    return event("error", final=True, code=code, message="why", retryable=True, **fields)


A, B, C = chunk(0, "ab"), chunk(1, "cd"), chunk(2, "ef")
START = event("start", protocol=1)


def broken(*events: str, expected: str | None = "abcdef", cancelled: bool = False) -> list[str]:
    """The promises that this history breaks."""
    story = Story("r1", "c0/s1", expected=expected, cancelled=cancelled)
    for payload in events:
        story.feed(TOPIC, payload)
    return [found.promise for found in story.close()]


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([event("queued"), START, A, B, C, done()], id="as it should be"),
        pytest.param([START, A, A, B, A, B, C, done(), done()], id="all of it twice"),
        pytest.param([START, A, B, C, done(), START, A, B, C, done()], id="the whole stream again after its end"),
        pytest.param(
            [A, C, event("snapshot", content="abcd", next_seq=2), C, done()], id="a hole that a snapshot closes"
        ),
        pytest.param([A, C, done()], id="a hole that the end closes"),
        pytest.param([A, C, done(None), A, B, C, done(None)], id="a hole that the chunks close when they come again"),
        pytest.param([done(seq=0)], id="the end alone"),
        pytest.param([START, event("queued"), START, A, B, C, done()], id="begun again before the first chunk"),
        pytest.param([A, B, error("interrupted")], id="the worker died in mid-stream"),
        pytest.param([A, B, error("engine_lost", seq=2, partial_content="abcd")], id="the engine died in mid-stream"),
        pytest.param(
            [event("progress", processed=1), event("ping", state="prompt"), A, B, C, done()], id="signs of life"
        ),
    ],
)
def test_what_the_contract_allows_passes(events: list[str]) -> None:
    assert broken(*events) == []


@pytest.mark.parametrize(
    "events, promise",
    [
        pytest.param([], "lost", id="nothing at all"),
        pytest.param([START, A, B], "lost", id="no end"),
        pytest.param([A, B, C, done(), error("interrupted")], "twice", id="done, then an error"),
        pytest.param([A, B, C, done(), done(dropped=1)], "twice", id="two ends that differ in one field"),
        pytest.param([A, B, chunk(1, "xy"), C, done()], "twice", id="a chunk with two contents"),
        pytest.param(
            [A, B, error("interrupted"), START, A, chunk(1, "c")], "twice", id="begun again after its first chunk"
        ),
        pytest.param([A, chunk(1, "xy"), C, done()], "torn", id="the end does not say what the chunks said"),
        pytest.param([A, chunk(1, "xy"), C, done("abxyef")], "torn", id="another request's text in between"),
        pytest.param(
            [A, event("snapshot", content="xxcd", next_seq=2), C, done()], "torn", id="a snapshot of another text"
        ),
        pytest.param([A, B, C, done(seq=2)], "torn", id="more chunks than the end counts"),
        pytest.param(
            [A, B, error("engine_lost", seq=2, partial_content="abxx")], "torn", id="a partial text that was not told"
        ),
        pytest.param([A, C, done(None)], "hole", id="a chunk that never came and no text in the end"),
        pytest.param([A, B, C, done(), "{broken"], "form", id="no JSON"),
        pytest.param(
            [A, B, C, event("done", seq=3, full_content="abcdef", finish_reason="stop")], "form", id="not final"
        ),
        pytest.param([A, event("chunk", seq=1, content=""), done("ab", seq=2)], "form", id="an empty chunk"),
        pytest.param([event("rejected", code="duplicate_request"), A, B, C, done()], "form", id="rejected"),
        pytest.param([error("busy", seq=0)], "code", id="refused though within its share"),
        pytest.param([A, done("ab", seq=1, reason="cancelled")], "code", id="cancelled by nobody"),
    ],
)
def test_what_breaks_a_promise_is_told(events: list[str], promise: str) -> None:
    assert promise in broken(*events)


def test_a_cancelled_answer_is_a_beginning_of_the_right_one() -> None:
    assert broken(A, done("ab", seq=1, reason="cancelled"), cancelled=True) == []
    assert broken(A, done("", seq=0, reason="cancelled"), cancelled=True) == ["torn", "torn"]
    assert "torn" in broken(chunk(0, "xy"), done("xy", seq=1, reason="cancelled"), cancelled=True)


def test_an_event_of_another_session_is_told() -> None:
    story = Story("r1", "c0/s1")
    story.feed("llm/reply/c0/s2", done(seq=0))
    assert [found.promise for found in story.close()] == ["form"]


def test_history_holds_what_ended_with_done_and_cancelled_text_but_no_errors() -> None:
    turns = [
        ("one", json.loads(done("1"))),
        ("two", json.loads(error("interrupted"))),
        ("three", json.loads(done("", reason="cancelled"))),
        ("four", json.loads(done("4", reason="cancelled"))),
        ("five", None),
    ]
    assert [message["content"] for message in history_of(turns)] == ["one", "1", "four", "4"]
