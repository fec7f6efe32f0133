"""Fields of a payload become a prompt: what they hold is text, and there is never more of it than was allowed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.config.loading import ConfigurationError, load
from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.prompt_templates import PromptTemplate, template_faults
from llamacpp_mqtt_deploy.core.requests import RequestPolicy, check_request, read_request
from llamacpp_mqtt_deploy.core.route_checks import check_routes
from llamacpp_mqtt_deploy.core.routes import route_topics

STATE = PromptTemplate(
    text="{hero.name} stands at {place} and has {hero.hp} HP {{of 9}}. {hero.name}, what now?",
    defaults={"hero.name": "Somebody"},
    field_chars=20,
    chars=100,
)


def fill(text: str, content: dict[str, Any], **more: Any) -> str:
    return PromptTemplate(text=text, **more).fill(content)


def refused(template: PromptTemplate, content: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(BadRequest) as caught:
        template.fill(content)
    fields: dict[str, str] = caught.value.details["fields"]
    assert all(name in caught.value.message for name in fields)
    return fields


def test_fields_of_a_payload_become_a_sentence() -> None:
    assert STATE.fields == ("hero.name", "place", "hero.hp")
    told = STATE.fill({"hero": {"name": "Ada", "hp": 7}, "place": "the gate", "extra": [1]})
    assert told == "Ada stands at the gate and has 7 HP {of 9}. Ada, what now?"


@pytest.mark.parametrize(
    "value, text",
    [("x", "x"), (7, "7"), (1.5, "1.5"), (True, "true"), ([1, 2], "[1,2]"), ({"a": {"b": None}}, '{"a":{"b":null}}')],
)
def test_what_is_no_text_is_told_as_json(value: Any, text: str) -> None:
    assert fill("<{field}>", {"field": value}) == f"<{text}>"


def test_a_missing_field_has_its_default_or_is_named() -> None:
    assert STATE.fill({"place": "a", "hero": {"hp": 1, "name": None}}).startswith("Somebody stands")
    assert list(refused(STATE, {})) == ["place", "hero.hp"]
    assert list(refused(STATE, {"place": "a", "hero": "Ada"})) == ["hero.hp"]
    assert list(refused(STATE, {"place": None, "hero": {"hp": 1}})) == ["place"]


def test_a_long_field_and_a_long_prompt_are_refused() -> None:
    assert refused(STATE, {"place": "x" * 21, "hero": {"hp": 1}}) == {"place": "at most 20 characters, found 21"}
    assert refused(STATE, {"place": list(range(20)), "hero": {"hp": 1}}).keys() == {"place"}
    long = {"place": "x" * 20, "hero": {"hp": "y" * 20, "name": "z" * 20}}
    assert list(refused(STATE, long)) == ["payload"]
    assert list(refused(PromptTemplate(text="{a}"), {"a": " \n"})) == ["payload"]


def test_what_a_payload_holds_is_never_read_as_a_placeholder() -> None:
    content = {"a": "{b} {{b}} {a} {a.__class__} %s $b", "b": "secret"}
    assert fill("{a}|{{b}}", content) == "{b} {{b}} {a} {a.__class__} %s $b|{b}"


FIELD = st.sampled_from(["a", "b.c", "b.d", "ä"])
PART = st.one_of(FIELD.map("{{{}}}".format), st.sampled_from(["{{", "}}", "{{a}}", "text ", "\n"]))
VALUE = st.text("ab{}.%\\ ", max_size=9)


@given(st.lists(PART, max_size=8), VALUE, VALUE)
def test_the_prompt_is_the_template_with_each_field_in_its_place(parts: list[str], one: str, two: str) -> None:
    text = "x" + "".join(parts)
    assert template_faults(text, {}) == []
    content = {"a": one, "b": {"c": two, "d": one}, "ä": two}
    values = {"{a}": one, "{b.c}": two, "{b.d}": one, "{ä}": two, "{{": "{", "}}": "}", "{{a}}": "{a}"}
    assert fill(text, content) == "x" + "".join(values.get(part, part) for part in parts)


@pytest.mark.parametrize(
    "text, defaults",
    [
        ("", {}),
        (" \n", {}),
        ("{", {}),
        ("a } b", {}),
        ("{a b}", {}),
        ("{}", {}),
        ("{a.}", {}),
        ("{.a}", {}),
        ("{a..b}", {}),
        ("{a{b}}", {}),
        ("{a}", {"b": "x"}),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_at_start(text: str, defaults: dict[str, str]) -> None:
    assert template_faults(text, defaults)
    with pytest.raises(ConfigurationError, match="prompt_template"):
        load(
            None,
            {"routes.maze.prompt_template": text, "routes.maze.prompt_defaults": json.dumps(defaults)},
            environ={},
        )


def test_a_topic_for_a_template_needs_one() -> None:
    with pytest.raises(ConfigurationError, match="is missing, and prompt_template_topic is set"):
        load(None, {"routes.maze.prompt_template_topic": "maze/state/{session}"}, environ={})


# --- as requests -------------------------------------------------------------------------------------------------------

MAZE = RequestPolicy(
    fields={"prompt": "message", "session_id": "game.id", "request_id": "requestId"},
    trust_payload_session=True,
    prompt_template=STATE,
)
BOTH: dict[str, Any] = {
    "name": "maze",
    "request": "maze/user_input",
    "reply": "maze/out/{session}",
    "trust_payload_session": True,
}


def test_of_a_payload_for_the_template_only_the_ids_are_fields_of_a_request() -> None:
    state = {
        "game": {"id": 7},
        "requestId": "r1",
        "hero": {"name": "Ada", "hp": 7},
        "place": "the gate",
        "message": "ignored",
        "prompt": "ignored",
        "temperature": "warm",
        "messages": [{"role": "system", "content": "x"}],
        "tools": "a sword",
    }
    raw = read_request(json.dumps(state).encode(), policy=MAZE, templated=True)
    assert raw is not None
    assert (raw.session_id, raw.request_id, raw.unknown) == ("7", "r1", ())
    request = check_request(raw, policy=MAZE)
    assert request.prompt == "Ada stands at the gate and has 7 HP {of 9}. Ada, what now?"
    assert (request.mode, request.sampling, request.warnings) == ("prompt", {}, ())
    other = read_request(json.dumps(state | {"tools": "a bow"}).encode(), policy=MAZE, templated=True)
    assert other is not None
    assert other.digest != raw.digest  # the same id with another state is another request


def test_the_ordinary_topic_of_the_route_takes_ordinary_requests() -> None:
    raw = read_request(b'{"message":"go north","game":{"id":"s1"}}', policy=MAZE)
    assert raw is not None
    assert check_request(raw, policy=MAZE).prompt == "go north"


def test_a_text_is_no_payload_for_a_template() -> None:
    with pytest.raises(BadRequest, match=r"a JSON object with hero\.name, place, hero\.hp"):
        read_request(b"just a text", policy=MAZE, templated=True)


def test_the_topic_says_that_a_payload_is_for_the_template() -> None:
    routes = [route_topics(root="llm", prompt_template_topic="maze/state", **BOTH)]
    topics = TopicMap("llm", "w1", tuple(routes))
    addresses = {topic: topics.address(topic) for topic in ("maze/user_input", "maze/state")}
    told = {topic: (each.kind, each.templated, each.session) for topic, each in addresses.items() if each is not None}
    assert told == {"maze/user_input": ("request", False, None), "maze/state": ("request", True, None)}
    assert {"maze/user_input", "maze/state"} <= set(topics.request_filters())
    address = addresses["maze/state"]
    assert address is not None
    assert topics.with_payload(address, {"session_id": "s1"}, MAZE.names).reply_topic == "maze/out/s1"


@pytest.mark.parametrize(
    "topic, words",
    [
        ("maze/user_input", "would run twice"),
        ("maze/state/{session}", "must hold no {session}"),
        ("maze/out/s1", "its own messages"),
        ("maze/#", "wildcard"),
    ],
)
def test_a_topic_for_a_template_that_cannot_be_served_is_refused_at_start(topic: str, words: str) -> None:
    routes = [route_topics(root="llm", prompt_template_topic=topic, **BOTH)]
    found = check_routes(root="llm", worker_id="w1", routes=routes)
    assert any(words in fault for fault in found), found
