"""The messages of one request on a route with a format: one text, one end, nothing too long, nothing of the events' own form."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.config.settings import RouteSettings
from llamacpp_mqtt_deploy.core.events import rejected
from llamacpp_mqtt_deploy.core.fitting import fitted
from llamacpp_mqtt_deploy.core.formats.route_formats import ROUTE_FORMATS, TEXT_FORMATS, WHOLE_FORMATS
from llamacpp_mqtt_deploy.core.formats.route_rendering import RouteRendering
from tests.support.answer_events import Answered, answered, answers, occasion

RENDERED = sorted(set(ROUTE_FORMATS) - {"events"})
ENDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "json": lambda told: True,
    "tokens": lambda told: told.get("type") in ("complete", "error"),
    "content": lambda told: "done" in told or "error" in told,
    "chatbot": lambda told: told["type"] in ("done", "error"),
    "typed-chunks": lambda told: told["type"] in ("done", "error"),
    "typed-events": lambda told: told["type"] in ("message_stop", "error"),
}


def rendering(name: str) -> RouteRendering:
    return RouteRendering(name, occasion())


def encoded(answer: Answered) -> list[bytes]:
    return [json.dumps(event, separators=(",", ":")).encode() for event in answer.events]


def test_every_format_of_the_configuration_can_be_rendered() -> None:
    for name in ROUTE_FORMATS:
        assert RouteSettings(format=name).format == name
    with pytest.raises(ValueError, match="format"):
        RouteSettings(format="xml")
    assert set(ROUTE_FORMATS) > WHOLE_FORMATS | TEXT_FORMATS


@given(answers())
def test_any_legal_order_of_events_gives_exactly_one_text(answer: Answered) -> None:
    events = encoded(answer)
    text = rendering("text")
    assert [part for event in events[:-1] for part in text.parts(event)] == []
    parts = text.end(events[-1:], 10**6)
    assert len(parts) == 1
    if answer.error is None:
        assert parts == [answer.content.encode()]
    else:
        assert parts[0]
        assert not parts[0].startswith(b"{")
    assert text.parts(events[-1]) == []


@given(st.sampled_from(sorted(ENDS)), answers())
def test_any_legal_order_of_events_has_one_end_and_it_comes_last(name: str, answer: Answered) -> None:
    told = rendering(name)
    *before, last = encoded(answer)
    parts = [part for event in before for part in told.parts(event)] + told.end([last], 10**6)
    ends = [place for place, part in enumerate(parts) if ENDS[name](json.loads(part))]
    assert ends == [len(parts) - 1]
    assert told.end([last], 10**6) == []


@given(answers())
def test_an_object_has_the_names_of_its_clients(answer: Answered) -> None:
    names = {"content": "response", "request_id": "requestId", "code": "errorCode"}
    told = RouteRendering("json", occasion(request_id="r7"), answer_fields=names)
    [part] = [part for event in encoded(answer) for part in told.parts(event)]
    found = json.loads(part)
    if answer.error is None:
        assert found == {"response": answer.content, "requestId": "r7"}
    else:
        assert (found.pop("requestId"), found.pop("errorCode")) == ("r7", answer.error)
        assert list(found) == ["error"]


@given(st.sampled_from(RENDERED), answers(), st.integers(200, 1000))
def test_an_end_of_an_earlier_life_tells_the_answer_anew_in_messages_that_fit(
    name: str, answer: Answered, limit: int
) -> None:
    *before, end = encoded(answer)
    # What an end leaves out, the journal has as chunks.
    recorded = [event for event in before if b'"chunk"' in event and answer.done.get("content_omitted")]
    events = [*recorded, *fitted(end, 10**6)]
    parts = rendering(name).end(events, limit)
    assert all(len(part) <= limit for part in parts)
    assert parts or (name == "text-chunks" and not answer.content)
    whole = b"".join(rendering(name).end(events, 10**6))
    if name in TEXT_FORMATS and answer.error is None:
        assert whole == answer.content.encode()


def test_a_text_that_does_not_fit_says_that_it_was_cut() -> None:
    [part] = rendering("text").end(encoded(answered(("content", "\u20ac" * 1000)))[-1:], 500)
    text, _, mark = part.decode().partition("\n")
    assert len(part) <= 500
    assert set(text) == {"\u20ac"}
    assert mark == "[cut: the answer has 3000 bytes, and a message may have 500 here]\n"


def test_an_object_that_does_not_fit_becomes_an_error() -> None:
    answer = answered(("content", "x" * 1000))
    parts = rendering("chatbot").end(encoded(answer)[-1:], 500)
    assert json.loads(parts[0])["type"] == "metadata"
    assert json.loads(parts[-1]) == {
        "type": "error",
        "message": "The answer is longer than a message may be here (500 bytes).",
    }


@pytest.mark.parametrize("name", RENDERED)
def test_a_refusal_is_one_message_with_its_sentence(name: str) -> None:
    words = "this request_id belongs to another request"
    event = rejected(request_id="r1", session_id="web/s1", code="duplicate_request", message=words)
    [part] = rendering(name).refusal(event)
    assert words in part.decode()
    assert b"rejected" not in part
