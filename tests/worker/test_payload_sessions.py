"""Routes whose clients write the session into the payload: every refusal reaches its client as far as he can be known."""

from __future__ import annotations

from typing import Any

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from llamacpp_mqtt_deploy.worker.answers import Answers
from tests.support.whole_worker import Bus

GAME: dict[str, Any] = {
    "routes__game__request": "game/input",
    "routes__game__reply": "game/assistant_response/{session}",
    "routes__game__trust_payload_session": True,
    "routes__game__fields": {"prompt": "message.text", "session_id": "sessionId", "request_id": "requestId"},
}


def _publish(bus: Bus, payload: bytes) -> None:
    bus.sender.publish("game/input", payload)


def _event(bus: Bus, session: str, **wanted: Any) -> dict[str, Any]:
    return bus.listener.until(_topic=f"game/assistant_response/{session}", **wanted)


def test_a_session_id_that_is_a_number_is_answered_on_its_digits(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(engine, **GAME)
    _publish(bus, b'{"sessionId":42,"requestId":7,"message":{"text":"go north"}}')
    done = _event(bus, "42", type="done")
    assert (done["session_id"], done["request_id"], done["full_content"]) == ("42", "7", "go north")


@pytest.mark.parametrize(
    "payload, code",
    [
        (b'{"sessionId":"s7","requestId":"r7","message":{"text":7}}', "bad_request"),
        (b'{"sessionId":"s7","requestId":"r7","message":"go north"}', "bad_request"),
        (b'{"sessionId":"s7","requestId":"r7","message":{"text":"go north"},,}', "bad_request"),
        (b'{"sessionId":"s7","requestId":"r7","message":{"text":"\xff"}}', "bad_request"),
        (b'{"sessionId":"s7","requestId":"r7","message":{"text":"' + b"x" * 1000 + b'"}}', "payload_too_large"),
    ],
)
def test_a_refusal_goes_to_the_session_in_the_payload(bus: Bus, payload: bytes, code: str) -> None:
    bus.worker(**GAME, limits__max_request_bytes=512)
    _publish(bus, payload)
    refusal = _event(bus, "s7", type="error")
    assert (refusal["request_id"], refusal["session_id"], refusal["code"]) == ("r7", "s7", code)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"sessionId":"+","message":{"text":"x"}}',
        b'{"sessionId":"a/b/c",',
        b'{"sessionId":"../../admin",',
        b'{"sessionId":"a\\nb",',
        b'{"sessionId":true,"message":{"text":"x"}}',
        b'{"message":{"text":"x","sessionId":"inner"},',
        b"plain text",
    ],
)
def test_nothing_is_published_for_a_session_that_cannot_be_read(
    bus: Bus, payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[object] = []
    monkeypatch.setattr(Answers, "publish", lambda _, *answer, **more: refusals.append((answer, more)))
    bus.worker(**GAME)
    _publish(bus, payload)
    _publish(bus, b'{"sessionId":"after","message":{"text":"x"}}')
    _event(bus, "after", type="done")
    assert refusals == []
    topics = {event["_topic"] for event in bus.listener.events if event["_topic"].startswith("game/")}
    assert topics == {"game/assistant_response/after"}


def test_a_broken_copy_of_a_running_request_does_not_end_it(bus: Bus) -> None:
    bus.worker(**GAME)
    _publish(bus, b'{"sessionId":"s7","requestId":"r7","message":{"text":"go north"}}')
    _event(bus, "s7", type="done")
    _publish(bus, b'{"sessionId":"s7","requestId":"r7","message":{"text":"go north"}')
    told = _event(bus, "s7", type="rejected")
    assert (told["request_id"], told["code"]) == ("r7", "duplicate_request")


FULL = GAME | {
    "routes__game__reply": "game/assistant_response/{session}/{client_id}/{request_id}",
    "routes__game__default_session": "everybody",
    "routes__game__fields": {"prompt": "message", "client_id": "clientId", "request_id": "requestId"},
}


def test_a_payload_without_a_session_belongs_to_the_default_session(bus: Bus) -> None:
    bus.worker(**FULL)
    _publish(bus, b"just a text")
    assert _event(bus, "everybody", type="done")["full_content"] == "just a text"
    _publish(bus, b'{"message":"with an id","clientId":"c1"}')
    assert _event(bus, "everybody/c1", type="done")["full_content"] == "with an id"


def test_a_refusal_goes_to_the_ids_of_the_payload(bus: Bus) -> None:
    bus.worker(**FULL)
    _publish(bus, b'{"message":7,"clientId":"c1","requestId":"r1"}')
    assert _event(bus, "everybody/c1/r1", type="error")["fields"] == {"message": "a text that is not empty"}
    _publish(bus, b'{"message":"x","clientId":"c/1","requestId":"r2"}')
    assert list(_event(bus, "everybody", type="error")["fields"]) == ["clientId"]


def test_a_request_that_is_sent_again_is_answered_where_it_was_answered_first(bus: Bus) -> None:
    bus.worker(**FULL)
    payload = b'{"message":"x","clientId":"c1","requestId":"r1"}'
    _publish(bus, payload)
    first = _event(bus, "everybody/c1/r1", type="done")
    _publish(bus, payload)
    _publish(bus, b'{"message":"after","clientId":"c1","requestId":"r2"}')
    _event(bus, "everybody/c1/r2", type="done")
    ends = [event for event in bus.listener.events if event.get("request_id") == "r1" and event["type"] == "done"]
    assert ends == [first, first]
