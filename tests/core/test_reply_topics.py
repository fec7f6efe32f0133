"""Reply topics that hold ids of the payload, or that the payload names: never outside of the route's own tree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.guessing import guess_ids
from llamacpp_mqtt_deploy.core.names import FieldNames, check_fields
from llamacpp_mqtt_deploy.core.route_checks import check_routes
from llamacpp_mqtt_deploy.core.routes import MAX_TOPIC_BYTES, ReplyTemplate, RouteTopics, route_topics
from llamacpp_mqtt_deploy.core.topics import filters_overlap, topic_fault, topic_matches

OWO: dict[str, Any] = {
    "root": "llm",
    "name": "owogpt",
    "request": "owogpt/user_input",
    "reply": "owogpt/assistant_response/{session}/{client_id}/{request_id}",
    "trust_payload_session": True,
    "default_session": "default",
}
FREE = OWO | {"reply": "owogpt/assistant_response/{session}", "allow_reply_topic": True}
NAMES = FieldNames(
    {"session_id": "sessionId", "client_id": "clientId", "request_id": "requestId", "reply_topic": "replyTopic"}
)


def reply_to(body: dict[str, Any], **route: Any) -> str | None:
    topics = TopicMap("llm", "w1", (route_topics(**(OWO | route)),))
    address = topics.address("owogpt/user_input")
    assert address is not None
    read, _ = NAMES.read(body)
    return topics.with_payload(address, read, NAMES).reply_topic


def refused(body: dict[str, Any], **route: Any) -> list[str]:
    with pytest.raises(BadRequest) as caught:
        reply_to(body, **route)
    return list(caught.value.details["fields"])


def faults(**topics: Any) -> list[str]:
    return check_routes(root="llm", worker_id="w1", routes=[RouteTopics(**topics)])


# --- ids of the payload ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, topic",
    [
        ({"sessionId": "s1", "clientId": "c1", "requestId": "r1"}, "s1/c1/r1"),
        ({"sessionId": "s1", "clientId": 7, "requestId": 8}, "s1/7/8"),
        ({"sessionId": "s1", "clientId": "c1"}, "s1/c1"),
        ({"sessionId": "s1", "clientId": None, "requestId": "r1"}, "s1"),
        ({"sessionId": "ada/s1", "clientId": "c1"}, "ada/s1/c1"),
        ({}, "default"),
    ],
)
def test_the_reply_topic_ends_before_the_first_id_that_the_payload_lacks(body: dict[str, Any], topic: str) -> None:
    assert reply_to(body) == f"owogpt/assistant_response/{topic}"


@pytest.mark.parametrize("wrong", ["a/b", "+", "#", "", "a b", "x" * 65, "a\n", 1.5, True, ["c1"], {"id": "c1"}])
@pytest.mark.parametrize("name", ["clientId", "requestId", "sessionId"])
def test_an_id_that_is_no_level_never_gets_into_a_topic(name: str, wrong: Any) -> None:
    if (name, wrong) != ("sessionId", "a/b"):  # that is a session path
        assert refused({"sessionId": "s1", "clientId": "c1", "requestId": "r1"} | {name: wrong}) == [name]


def test_ids_that_make_the_reply_topic_too_long_are_refused_by_name() -> None:
    assert refused({"sessionId": "s" * 64, "clientId": "c" * 64, "requestId": "r" * 64}) == ["requestId"]


def test_a_refusal_goes_where_the_answer_would_have_gone_as_far_as_it_can_be_seen() -> None:
    topics = TopicMap("llm", "w1", (route_topics(**OWO),))
    address = topics.address("owogpt/user_input")
    assert address is not None

    def refusal_to(**ids: Any) -> str | None:
        return topics.with_ids(address, ids).reply_topic

    prefix = "owogpt/assistant_response"
    assert refusal_to(session_id="s1", client_id="c1", request_id="r1") == f"{prefix}/s1/c1/r1"
    assert refusal_to(session_id="s1", client_id="+", request_id="r1") == f"{prefix}/s1"
    assert refusal_to(client_id="c1") == f"{prefix}/default/c1"
    assert refusal_to(session_id=None, client_id="c1") is None
    assert refusal_to(session_id="#", client_id="c1") is None
    ids = guess_ids(b'{"sessionId":"s1","clientId":"c1","requestId":"r1",,}', NAMES)
    assert (ids.session_id, ids.client_id, ids.request_id) == ("s1", "c1", "r1")


# --- topics that the payload names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["s1", "s1/c1", "s1/c1/r1", "web/s1/c1/r1"])
def test_a_client_may_name_a_reply_topic_below_that_of_its_route(below: str) -> None:
    topic = f"owogpt/assistant_response/{below}"
    assert reply_to({"sessionId": "s1", "replyTopic": topic}, **FREE) == topic


@pytest.mark.parametrize(
    "topic",
    [
        "owogpt/user_input",
        "owogpt/assistant_response",
        "owogpt/assistant_response/",
        "owogpt/assistant_response/+",
        "owogpt/assistant_response/s1/#",
        "owogpt/assistant_response/s1//r1",
        "owogpt/assistant_response/a/b/c/d/e",
        "owogpt/assistant_response/../../llm/admin/w1",
        "owogpt/assistant_responses/s1",
        "other/assistant_response/s1",
        "llm/admin/w1",
        "$SYS/x",
        "",
        "owogpt/assistant_response/\ud800",
        "owogpt/assistant_response/s1\0",
        7,
        ["owogpt/assistant_response/s1"],
        "owogpt/assistant_response/" + "/".join(["x" * 64] * 3),
    ],
)
def test_no_client_can_name_a_reply_topic_elsewhere(topic: Any) -> None:
    assert refused({"sessionId": "s1", "replyTopic": topic}, **FREE) == ["replyTopic"]


def test_a_route_that_does_not_allow_it_ignores_the_reply_topic_of_a_payload() -> None:
    route = FREE | {"allow_reply_topic": False}
    topic = "owogpt/assistant_response/s1/c1"
    assert reply_to({"sessionId": "s1", "replyTopic": topic}, **route) == "owogpt/assistant_response/s1"


def test_a_client_whose_session_stands_in_the_topic_may_only_name_topics_below_it() -> None:
    route = route_topics(root="llm", name="lab", reply="lab/answer/{session}", allow_reply_topic=True)
    topics = TopicMap("llm", "w1", (route,))
    address = topics.address("llm/lab/request/ada/s1")
    assert address is not None
    names = FieldNames({}, ("reply_topic",))
    named = topics.with_payload(address, {"reply_topic": "lab/answer/ada/s1/r7"}, names)
    assert named.reply_topic == "lab/answer/ada/s1/r7"
    for other in ("lab/answer/bob/s1", "lab/answer/ada", "lab/answer/ada/s2"):
        with pytest.raises(BadRequest, match="reply_topic"):
            topics.with_payload(address, {"reply_topic": other}, names)
        assert topics.with_ids(address, {"reply_topic": other}).reply_topic == "lab/answer/ada/s1"


WORD = st.text("ab/+#.$ é\n", max_size=8)


@given(st.sampled_from([OWO, FREE]), st.dictionaries(st.sampled_from(list(NAMES.fields.values())), WORD))
def test_whatever_a_payload_says_its_answer_stays_in_the_tree_that_was_checked(
    route: dict[str, Any], body: dict[str, Any]
) -> None:
    if "replyTopic" in body:
        body["replyTopic"] = "owogpt/assistant_response/" + body["replyTopic"]
    try:
        topic = reply_to(body, **route)
    except BadRequest:
        return
    assert topic is not None
    assert topic_fault(topic) is None
    assert len(topic) <= MAX_TOPIC_BYTES
    filters = ReplyTemplate.cut(route["reply"], free=route.get("allow_reply_topic", False)).filters()
    assert any(topic_matches(each, topic) for each in filters)
    assert not filters_overlap("owogpt/user_input", topic)


# --- what is refused at start ------------------------------------------------------------------------------------------

LAB = {"name": "lab", "request": "lab/{session}", "reply": "answers/{session}"}


@pytest.mark.parametrize(
    "topics, words",
    [
        ({"reply": "answers/{client_id}/{session}"}, "only at its end"),
        ({"reply": "answers/{session}/{client_id}/{client_id}"}, "each once"),
        ({"reply": "answers/{session}/{user}"}, "nothing in braces"),
        ({"reply": "answers/{client_id}"}, "needs a level {session}"),
        ({"reply": "{session}", "allow_reply_topic": True}, "allow_reply_topic"),
        ({"reply": "answers/{session}/text", "allow_reply_topic": True}, "allow_reply_topic"),
        ({"default_session": "home"}, "trust_payload_session"),
        ({"request": "lab", "trust_payload_session": True, "default_session": "a b"}, "no session path"),
        # An answer to one of three levels would be a request.
        (
            {"request": "answers/x/{session}/ask", "reply": "answers/{session}/{client_id}/{request_id}"},
            "its own messages",
        ),
        ({"request": "answers/a/b/c", "trust_payload_session": True, "allow_reply_topic": True}, "its own messages"),
        ({"reply": "llm/{session}/{client_id}/{request_id}", "control": None}, "match the same topics"),
    ],
)
def test_reply_topics_that_cannot_be_served_are_refused_at_start(topics: dict[str, Any], words: str) -> None:
    found = faults(**(LAB | topics))
    assert any(words in fault for fault in found), found


def test_the_origins_topics_are_served() -> None:
    for route in (OWO, FREE):
        assert check_routes(root="llm", worker_id="w1", routes=[route_topics(**route)]) == []


# --- several names of a field ------------------------------------------------------------------------------------------


def test_of_several_names_of_a_field_the_first_one_that_is_there_counts() -> None:
    names = FieldNames({"system_prompt": ["systemPrompt", "prompt_template.content"]})
    assert names.of("system_prompt") == "systemPrompt"
    for body, wanted in (
        ({"systemPrompt": "a", "prompt_template": {"content": "b"}}, "a"),
        ({"prompt_template": {"content": "b"}, "systemPrompt": "a"}, "a"),
        ({"prompt_template": {"content": "b"}, "systemPrompt": None}, "b"),
        ({"prompt_template": {"content": "b"}}, "b"),
    ):
        assert names.read(body) == ({"system_prompt": wanted}, ())
    with pytest.raises(BadRequest, match="only one of"):
        names.read({"systemPrompt": "a", "system_prompt": "b"})


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"prompt": ["message", "message.text"]}, "overlap"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ["text", "text"]}, "two fields"),
        ({"client": "clientId"}, "not a field"),
    ],
)
def test_names_that_cannot_all_be_read_are_refused(fields: dict[str, Any], words: str) -> None:
    found = check_fields(fields)
    assert any(words in fault for fault in found), found
