"""What clients ask for on the topics of a session: which session, which prompt, and nothing that the topic does not mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.addresses import SessionChange, TopicMap
from llamacpp_mqtt_deploy.core.errors import BadRequest, RequestError
from llamacpp_mqtt_deploy.core.names import FieldNames
from llamacpp_mqtt_deploy.core.route_checks import check_routes
from llamacpp_mqtt_deploy.core.routes import is_session, route_topics
from llamacpp_mqtt_deploy.core.session_changes import MAX_SYSTEM_PROMPT_BYTES, WantedChange, read_change
from llamacpp_mqtt_deploy.core.topics import topic_matches

OWO: dict[str, Any] = {
    "root": "llm",
    "name": "owogpt",
    "request": "owogpt/user_input",
    "reply": "owogpt/assistant_response/{session}",
    "trust_payload_session": True,
    "reset_topic": "owogpt/clear_history",
    "delete_topic": "owogpt/delete_session",
    "system_prompt_topic": "owogpt/template",
    "hint_topic": "owogpt/hint/{session}",
    "session_topic": "owogpt/session",
    "session_reply_topic": "owogpt/session/response",
}
LAB: dict[str, Any] = {"root": "llm", "name": "lab", "reset_topic": "lab/forget/{session}"}
NAMES = FieldNames({"session_id": "chat.id", "system_prompt": ["systemPrompt", "prompt_template.content"]})


def read(kind: SessionChange, body: Any, session: str | None = None) -> WantedChange:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_change(kind, payload, session=session, names=NAMES)


# --- topics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "topic, kind, session",
    [
        ("owogpt/clear_history", "reset", None),
        ("owogpt/clear_history/s1", "reset", "s1"),
        ("owogpt/clear_history/ada/s1", "reset", "ada/s1"),
        ("owogpt/delete_session/s1", "delete", "s1"),
        ("owogpt/template/s1", "system_prompt", "s1"),
        ("owogpt/template", "system_prompt", None),
        ("owogpt/session", "new_session", None),
    ],
)
def test_a_topic_says_what_to_do_and_may_name_the_session(topic: str, kind: str, session: str | None) -> None:
    topics = TopicMap("llm", "w1", (route_topics(**OWO),))
    address = topics.address(topic)
    assert address is not None
    assert (address.kind, address.route, address.session) == (kind, "owogpt", session)
    assert address.first_level == "route:owogpt"
    assert any(topic_matches(each, topic) for each in topics.control_filters())


@pytest.mark.parametrize(
    "topic",
    ["owogpt/clear_history/a/b/c", "owogpt/clear_history/", "owogpt/clear", "owogpt/template/+", "owogpt/hint/s1"],
)
def test_no_other_topic_is_taken_for_one(topic: str) -> None:
    assert TopicMap("llm", "w1", (route_topics(**OWO),)).address(topic) is None


def test_where_the_request_topic_names_the_session_so_do_the_others() -> None:
    topics = TopicMap("llm", "w1", (route_topics(**LAB),))
    address = topics.address("lab/forget/ada/s1")
    assert address is not None
    assert (address.kind, address.session, address.first_level) == ("reset", "ada/s1", "ada")
    assert topics.address("lab/forget") is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"reset_topic": "lab/forget"}, "anybody could name anybody's session"),
        ({"reset_topic": "llm/lab/request/{session}"}, "would run twice"),
        ({"hint_topic": "lab/hint"}, "needs a level {session}"),
        ({"hint_topic": "lab/forget/{session}"}, "its own messages"),
        ({"hint_topic": "llm/lab/reply/{session}"}, "would mix"),
        ({"session_topic": "lab/session"}, "go together"),
        ({"session_topic": "lab/session", "session_reply_topic": "lab/session"}, "its own messages"),
        ({"session_topic": "lab/{session}", "session_reply_topic": "lab/new"}, "can hold no {session}"),
        ({"session_topic": "lab/new", "session_reply_topic": "llm/admin/w1"}, "its own messages"),
        ({"delete_topic": "lab/+"}, "wildcard"),
    ],
)
def test_topics_that_cannot_be_served_are_refused_at_start(change: dict[str, Any], words: str) -> None:
    found = check_routes(root="llm", worker_id="w1", routes=[route_topics(**(LAB | change))])
    assert any(words in fault for fault in found), found


def test_two_projects_cannot_share_a_topic() -> None:
    other = OWO | {
        "name": "maze",
        "request": "maze/in",
        "reply": "maze/out/{session}",
        "hint_topic": "maze/hint/{session}",
    }
    found = check_routes(root="llm", worker_id="w1", routes=[route_topics(**OWO), route_topics(**other)])
    assert any("owogpt/clear_history" in fault for fault in found)


# --- payloads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, session",
    [
        ({"session_id": "s1"}, "s1"),
        ({"sessionId": 7}, "7"),
        ({"chat": {"id": "ada/s1"}}, "ada/s1"),
        ({"target": "s1"}, "s1"),
        (b"s1", "s1"),
        ({"target": "all"}, None),
        (b"all", None),
        ({}, None),
        (b"", None),
        ({"sessionId": None}, None),
    ],
)
def test_the_payload_names_the_session_or_all_of_them(body: Any, session: str | None) -> None:
    for kind in ("reset", "delete"):
        assert read(kind, body).session == session


def test_a_session_in_the_topic_goes_before_one_in_the_payload() -> None:
    assert read("reset", {"sessionId": "other"}, session="s1").session == "s1"
    assert read("reset", {"target": "all"}, session="s1").session == "s1"
    assert read("delete", b"please", session="s1").session == "s1"


@pytest.mark.parametrize("wrong", ["+", "a/b/c", "", "a b", True, -1, 1.5, ["s1"], {"id": "s1"}])
def test_what_is_no_session_changes_none(wrong: Any) -> None:
    with pytest.raises(BadRequest, match="sessionId"):
        read("reset", {"sessionId": wrong})


@pytest.mark.parametrize(
    "body, prompt, reset",
    [
        ({"template": "Be kind."}, "Be kind.", True),
        ({"template": {"content": "Be kind.", "name": "kind"}, "reset": False}, "Be kind.", False),
        ({"system_prompt": "Be kind.", "reset": True}, "Be kind.", True),
        ({"prompt_template": {"content": "Be kind."}}, "Be kind.", True),
        ({"prompt_template": "Be kind."}, "Be kind.", True),
        ({"systemPrompt": "Be kind.", "reset": None}, "Be kind.", True),
        (b"Be kind.", "Be kind.", True),
        ({"template": ""}, None, True),
    ],
)
def test_a_system_prompt_is_a_text_or_an_object_with_its_content(body: Any, prompt: str | None, reset: bool) -> None:
    wanted = read("system_prompt", body, session="s1")
    assert (wanted.kind, wanted.session, wanted.system_prompt, wanted.reset) == ("system_prompt", "s1", prompt, reset)


@pytest.mark.parametrize(
    "body, field",
    [
        ({}, "template"),
        (b"", "template"),
        ({"template": 7}, "template"),
        ({"template": {"text": "x"}}, "template"),
        ({"template": "x", "reset": "no"}, "reset"),
        ({"template": "x" * (MAX_SYSTEM_PROMPT_BYTES + 1)}, "template"),
        (b'{"template": "x"', "payload"),
        (b"\xff", "payload"),
    ],
)
def test_what_is_no_system_prompt_is_refused_by_name(body: Any, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read("system_prompt", body, session="s1")
    assert list(caught.value.details["fields"]) == [field]


@given(st.sampled_from(["reset", "delete", "system_prompt"]), st.binary(max_size=40), st.booleans())
def test_whatever_comes_the_session_is_one_or_the_message_is_refused(
    kind: SessionChange, payload: bytes, named: bool
) -> None:
    try:
        wanted = read(kind, payload, session="s1" if named else None)
    except RequestError:
        return
    assert wanted.session == "s1" if named else wanted.session is None or is_session(wanted.session)
