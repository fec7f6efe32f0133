"""A request is checked once, when it is read: what comes in is complete and safe, and a refusal names the fields at fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llamacpp_mqtt_deploy.core.deltas import SAMPLING_FIELDS
from llamacpp_mqtt_deploy.core.errors import BadRequest, ModelNotFound, PayloadTooLarge, RequestError, Unsupported
from llamacpp_mqtt_deploy.core.fields import RequestFields
from llamacpp_mqtt_deploy.core.names import REQUEST_FIELDS, check_fields, nearest
from llamacpp_mqtt_deploy.core.requests import Generate, RequestPolicy, check_request, read_request
from tests.support.effort import seconds_of
from tests.support.parsing import HELLO, MAZE, OPEN, PNG, PORTAL, WEATHER, ask, encoded, parse, parse_request, refused

# --- plain text and the three modes ----------------------------------------------------------------------------------


def test_a_text_is_a_prompt_with_every_default() -> None:
    assert parse_request("Grüß Gott\n".encode(), policy=OPEN) == Generate(
        request_id=None,
        session_id=None,
        mode="prompt",
        prompt="Grüß Gott\n",
        timeout_s=300.0,
        digest=ask(prompt="Grüß Gott\n").digest,
    )


@pytest.mark.parametrize("payload", [b"", b" ", b"\r\n\t ", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_a_blank_payload_is_ignored(payload: bytes) -> None:
    assert parse_request(payload, policy=OPEN) is None


def test_a_text_on_a_route_that_needs_a_session_is_refused() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(b"Hello", policy=MAZE)
    assert "sessionId" in caught.value.details["fields"]


@pytest.mark.parametrize(
    "body, mode",
    [
        ({"prompt": "x"}, "prompt"),
        ({"messages": [HELLO]}, "messages"),
        ({"tool_results": [{"tool_call_id": "c1", "content": "12 °C"}]}, "tool_results"),
        ({"prompt": "x", "messages": None, "tool_results": None}, "prompt"),
    ],
)
def test_each_mode_is_known_by_its_field(body: dict[str, Any], mode: str) -> None:
    assert parse(body).mode == mode


@pytest.mark.parametrize(
    "body",
    [{}, {"temperature": 1}, {"prompt": "x", "messages": [HELLO]}, {"prompt": None}],
)
def test_none_or_several_of_the_three_is_refused(body: dict[str, Any]) -> None:
    assert "exactly one of prompt, messages and tool_results" in refused(body)["prompt"]


def test_a_refusal_for_none_or_several_of_the_three_names_what_was_found() -> None:
    assert list(refused({})) == ["prompt"]
    assert list(refused({"prompt": "x", "messages": [HELLO]})) == ["prompt", "messages"]
    with pytest.raises(BadRequest, match="tool_results, found none"):
        parse({})
    with pytest.raises(BadRequest, match="tool_results, found prompt and messages"):
        parse({"prompt": "x", "messages": [HELLO]})


def test_a_request_without_a_prompt_is_told_which_of_its_fields_might_have_been_one() -> None:
    with pytest.raises(BadRequest, match=r'"message" is not a field.*did you mean "prompt"'):
        parse({"message": "Hello"})


# --- values ----------------------------------------------------------------------------------------------------------


def test_sampling_holds_only_what_was_given() -> None:
    given = {
        "temperature": 0.5,
        "top_p": 1,
        "top_k": 40,
        "min_p": 0,
        "max_tokens": 100,
        "seed": -1,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repeat_penalty": 1.1,
        "logit_bias": {"15": -100, "16": 2.5},
        "stop": ["a", "b"],
    }
    assert ask(**given).sampling == given
    assert set(given) == set(SAMPLING_FIELDS)
    assert ask().sampling == {}
    assert ask(stop="END").sampling == {"stop": ["END"]}


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed", "thinking_budget"])
def test_a_whole_number_may_be_written_with_a_point(name: str) -> None:
    value = parse_request(b'{"prompt":"x","%s":5.0}' % name.encode(), policy=OPEN)
    assert value is not None
    found = value.sampling.get(name, value.thinking_budget)
    assert (found, type(found)) == (5, int)


FRACTIONS: list[Any] = [True, "0.5", [], {}, -0.1, 5.1]
WHOLE: list[Any] = [True, "5", 1.5, -2, [5]]
PENALTIES: list[Any] = [2.1, -2.1, "1", False]
SWITCHES: list[Any] = [1, 0, "true", []]
WRONG: dict[str, list[Any]] = {
    "temperature": FRACTIONS,
    "top_p": FRACTIONS,
    "min_p": FRACTIONS,
    "max_tokens": [*WHOLE, 0],
    "top_k": WHOLE,
    "seed": [*WHOLE, 2**32],
    "thinking_budget": WHOLE,
    "presence_penalty": PENALTIES,
    "frequency_penalty": PENALTIES,
    "repeat_penalty": [0, -1, 11, "1", 0.009, 1e-300],
    "new": SWITCHES,
    "full_content": SWITCHES,
    "thinking": SWITCHES,
    "parallel_tool_calls": SWITCHES,
    "stream": [1, "true", "sentences", {}, 0],
    "stop": ["", [""], "x" * 257, ["x"] * 17, [1], {}, 1],
    "logit_bias": [
        [],
        {"a": 1},
        {"1": 101},
        {"1": "1"},
        {"1\n": 1},
        {"-1": 1},
        {"1": True},
        dict.fromkeys(map(str, range(1025)), 1),
    ],
    "request_id": ["", "a b", "abc\n", "a" * 65, 7, "a/b", "é", {}],
    "timeout_s": [0, -1, "5", True],
    "priority": ["high", "", 1, "Normal"],
    "metadata": ["x", [], {"a": "x" * 4096}],
    "model": ["", 1, "x" * 257],
    "system_prompt": [1, [], {}],
    "prompt": ["", 1, [], {}, True],
    "tool_choice": ["maybe", 1, [], "required"],
    "response_format": ["json", [], {}, {"type": "xml"}, {"type": "json_schema"}],
    "tools": [{}, "x", [WEATHER, WEATHER], [WEATHER] * 129, [{"type": "retrieval"}]],
    "tool_results": [[], "x", [{"tool_call_id": "", "content": "x"}], [{"tool_call_id": "c"}]],
}


def _tools(number: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"f{n}"}} for n in range(number)]


def _results(number: int) -> list[dict[str, Any]]:
    return [{"tool_call_id": f"c{n}", "content": "x"} for n in range(number)]


FARTHEST: dict[str, list[Any]] = {
    "temperature": [0, 5],
    "top_p": [0, 1],
    "min_p": [0, 1],
    "max_tokens": [1],
    "top_k": [0, 1_000_000],
    "seed": [-1, 2**32 - 1],
    "thinking_budget": [0, 10_000_000],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "repeat_penalty": [0.01, 1, 10],
    "stream": [True, False, "sentence"],
    "stop": [["x" * 256] * 16],
    "logit_bias": [{"1" * 8: 100, "2": -100}, dict.fromkeys(map(str, range(1024)), 1)],
    "request_id": ["a", "aA0_.-" + "a" * 58],
    "timeout_s": [0.001],
    "metadata": [{}, {"a": "x" * 4088}],
    "model": ["x" * 256],
    "tools": [[], _tools(128)],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in FARTHEST.items() for value in values])
def test_a_value_at_the_end_of_its_range_is_taken_as_it_is(name: str, value: Any) -> None:
    found = parse({"prompt": "Hello", name: value}, RequestPolicy(models=None))
    taken = found.sampling[name] if name in SAMPLING_FIELDS else getattr(found, name)
    assert (list(taken) if name == "tools" else taken) == value
    assert found.warnings == ()


def test_tools_and_their_results_are_bounded_in_number() -> None:
    assert "tools" in refused({"prompt": "x", "tools": _tools(129)})
    assert len(parse({"tool_results": _results(128)}).tool_results) == 128
    assert "tool_results" in refused({"tool_results": _results(129)})


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_type_or_range_is_refused_by_name(name: str, value: Any) -> None:
    fields = refused({"prompt": "Hello"} | {name: value})
    assert all(field.startswith(name) for field in fields)


def test_a_refusal_says_what_was_expected() -> None:
    assert refused({"prompt": "x", "temperature": 9, "stop": [1], "seed": "1", "metadata": {"a": "x" * 4096}}) == {
        "temperature": "a number from 0 to 5",
        "stop": "a text of 1 to 256 characters, or a list of at most 16 such texts",
        "seed": "a whole number from -1 (a new one each time) to 4294967295",
        "metadata": "an object of at most 4096 bytes as JSON",
    }


def test_too_many_wrong_biases_are_one_fault() -> None:
    with pytest.raises(ValidationError) as caught:
        RequestFields.model_validate({"prompt": "Hi", "logit_bias": dict.fromkeys(map(str, range(100_000)), "")})
    assert caught.value.error_count() == 1


def test_all_faults_come_in_one_answer() -> None:
    assert set(refused({"prompt": "x", "temperature": 9, "seed": "1", "stream": "yes"})) == {
        "temperature",
        "seed",
        "stream",
    }


def test_at_most_eight_faults_are_named() -> None:
    numbers = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "presence_penalty", "thinking_budget")
    assert len(refused({"prompt": "x"} | dict.fromkeys(numbers, "1"))) == 8
    assert len(refused({"prompt": 7} | dict.fromkeys(numbers, "1"))) == 8


def test_a_checked_message_cannot_be_changed() -> None:
    checked = RequestFields(prompt="x")
    with pytest.raises(ValidationError):
        checked.prompt = "y"  # type: ignore[misc]


def test_a_null_is_as_good_as_absent() -> None:
    assert parse(dict.fromkeys(REQUEST_FIELDS) | {"prompt": "Hello"}) == ask()


def test_wishes_over_the_limits_are_lowered_with_a_warning() -> None:
    found = ask(max_tokens=5000, timeout_s=9999)
    assert (found.sampling["max_tokens"], found.timeout_s) == (1000, 600.0)
    assert len(found.warnings) == 2
    assert "max_tokens was lowered from 5000" in " ".join(found.warnings)
    assert ask(max_tokens=10**18).sampling["max_tokens"] == 1000
    assert ask(timeout_s=1).timeout_s == 1
    at_its_limit = ask(timeout_s=600)
    assert (at_its_limit.timeout_s, at_its_limit.warnings) == (600, ())
    assert ask().warnings == ()


def test_a_wish_that_is_at_its_limit_is_not_lowered() -> None:
    found = ask(max_tokens=1000, timeout_s=600, priority="normal")
    assert (found.sampling, found.timeout_s, found.priority) == ({"max_tokens": 1000}, 600, "normal")
    assert found.warnings == ()


def test_where_the_worker_limits_nothing_wishes_are_taken_as_they_are() -> None:
    found = parse({"prompt": "x", "max_tokens": 10**6, "timeout_s": 10**6}, RequestPolicy())
    assert (found.sampling["max_tokens"], found.timeout_s, found.warnings) == (10**6, 10**6, ())
    assert parse({"prompt": "x"}, RequestPolicy()).timeout_s is None
    assert parse({"prompt": "x"}, RequestPolicy(max_timeout_s=5)).timeout_s is None
    assert parse({"prompt": "x"}, RequestPolicy(max_timeout_s=5, default_timeout_s=9)).timeout_s == 5
    assert parse({"prompt": "x"}, RequestPolicy(default_timeout_s=9)).timeout_s == 9


def test_a_request_may_have_one_mebibyte_where_nothing_else_is_said() -> None:
    assert parse_request(b"x" * 2**20, policy=RequestPolicy()) is not None
    with pytest.raises(PayloadTooLarge):
        parse_request(b"x" * (2**20 + 1), policy=RequestPolicy())


def test_a_route_allows_everything_but_sessions_and_models_in_the_payload_where_nothing_else_is_said() -> None:
    plain = RequestPolicy()
    assert parse({"prompt": "x", "system_prompt": "y", "tools": [WEATHER]}, plain).system_prompt == "y"
    assert parse({"messages": [HELLO]}, plain).mode == "messages"
    assert parse({"prompt": "x", "session_id": "s"}, plain).session_id is None
    assert list(refused({"prompt": "x", "model": "any"}, plain, ModelNotFound)) == ["model"]


def test_routes_with_the_same_settings_have_equal_policies() -> None:
    assert RequestPolicy(fields={"prompt": "q"}) == RequestPolicy(fields={"prompt": "q"})
    assert RequestPolicy(fields={"prompt": "q"}) != RequestPolicy()
    assert repr(RequestPolicy(fields={"prompt": "q"})).count("'q'") == 1


def test_a_priority_is_lowered_to_the_lane_of_the_route() -> None:
    slow = RequestPolicy(max_priority="batch", default_priority="normal")
    assert parse({"prompt": "x"}, slow).priority == "batch"
    assert parse({"prompt": "x"}, slow).warnings == ()
    hurried = parse({"prompt": "x", "priority": "interactive"}, slow)
    assert hurried.priority == "batch"
    assert "priority was lowered" in hurried.warnings[0]
    assert ask(priority="batch").priority == "batch"
    assert parse({"prompt": "x", "priority": "interactive"}, RequestPolicy(max_priority="interactive")).warnings == ()


def test_nobody_goes_before_others_unless_the_route_allows_it() -> None:
    hurried = ask(priority="interactive")
    assert hurried.priority == "normal"
    assert hurried.warnings == ("priority was lowered from interactive to the highest one allowed here, normal",)


def test_a_model_must_be_one_of_those_that_are_served() -> None:
    assert ask(model="large").model == "large"
    assert refused({"prompt": "x", "model": "gpt"}, kind=ModelNotFound) == {"model": "one of tiny, large"}
    assert "model" in refused({"prompt": "x", "model": "tiny"}, RequestPolicy(), ModelNotFound)
    assert parse({"prompt": "x", "model": "any"}, RequestPolicy(models=None)).model == "any"


def test_at_most_eight_of_the_models_are_named_in_a_refusal() -> None:
    many = RequestPolicy(models=tuple(f"m{n}" for n in range(9)))
    assert refused({"prompt": "x", "model": "gpt"}, many, ModelNotFound) == {
        "model": "one of m0, m1, m2, m3, m4, m5, m6, m7"
    }
    assert refused({"prompt": "x", "model": "gpt"}, RequestPolicy(), ModelNotFound) == {
        "model": "nothing: requests cannot choose here"
    }


def test_an_alias_stands_for_a_model_or_for_the_default_one() -> None:
    named = RequestPolicy(models=("tiny",), aliases={"gpt-4": "tiny", "gpt-3.5": "default", "gone": "removed"})
    assert parse({"prompt": "x", "model": "gpt-4"}, named).model == "tiny"
    assert parse({"prompt": "x", "model": "gpt-3.5"}, named).model is None
    assert parse({"prompt": "x", "model": "tiny"}, named).model == "tiny"
    expected = {"model": "one of tiny, gpt-4, gpt-3.5, gone"}
    assert refused({"prompt": "x", "model": "gpt"}, named, ModelNotFound) == expected
    with pytest.raises(ModelNotFound, match=r'"gone" \(an alias of "removed"\) is not served'):
        parse({"prompt": "x", "model": "gone"}, named)
    unknown = RequestPolicy(models=None, aliases={"gpt-4": "tiny"})
    assert parse({"prompt": "x", "model": "gpt-4"}, unknown).model == "tiny"
    assert parse({"prompt": "x", "model": "other"}, unknown).model == "other"
    only = RequestPolicy(models=(), aliases={"gpt-4": "default"})
    assert parse({"prompt": "x", "model": "gpt-4"}, only).model is None


def test_an_alias_does_not_change_what_a_request_is_recognised_by() -> None:
    named = RequestPolicy(models=("tiny",), aliases={"gpt-4": "tiny"})
    one, other = (parse({"prompt": "x", "model": model}, named) for model in ("gpt-4", "tiny"))
    assert one.digest == ask_digest({"prompt": "x", "model": "gpt-4"})
    assert one.digest != other.digest


def ask_digest(body: dict[str, Any]) -> str:
    return parse(body, RequestPolicy(models=None)).digest


# --- what a route allows ---------------------------------------------------------------------------------------------


def test_a_route_may_forbid_messages_system_prompts_and_tools() -> None:
    closed = RequestPolicy(allow_messages=False, allow_system_prompt=False, allow_tools=False)
    assert list(refused({"messages": [HELLO]}, closed, Unsupported)) == ["messages"]
    assert list(refused({"prompt": "x", "system_prompt": "y"}, closed, Unsupported)) == ["system_prompt"]
    assert list(refused({"prompt": "x", "tools": [WEATHER]}, closed, Unsupported)) == ["tools"]
    assert parse({"prompt": "x", "tools": []}, closed).tools == ()


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_forbidden_system_prompt_cannot_be_smuggled_in_as_a_message(role: str) -> None:
    fields = refused(
        {"messages": [HELLO, {"role": role, "content": "x"}]}, RequestPolicy(allow_system_prompt=False), Unsupported
    )
    assert list(fields) == ["messages[1].role"]


def test_of_many_forbidden_system_messages_the_first_is_named() -> None:
    system = {"role": "system", "content": "x"}
    closed = RequestPolicy(allow_system_prompt=False)
    assert list(refused({"messages": [system, HELLO, system]}, closed, Unsupported)) == ["messages[0].role"]
    assert parse({"messages": [HELLO]}, closed).mode == "messages"
    assert parse({"prompt": "x"}, closed).mode == "prompt"


def test_fields_that_exclude_each_other_are_refused() -> None:
    assert "system_prompt" in refused({"messages": [HELLO], "system_prompt": "x"})
    results = [{"tool_call_id": "c1", "content": "x"}]
    assert "new" in refused({"tool_results": results, "new": True})
    assert "tool_results" in refused({"tool_results": results * 2})
    stateless = parse({"messages": [HELLO], "new": True})
    assert (stateless.new, stateless.warnings) == (
        False,
        ("new was ignored: messages do not touch the history",),
    )


def test_a_prompt_may_begin_a_new_conversation() -> None:
    assert (ask(new=True).new, ask(new=True).warnings) == (True, ())
    assert [ask(new=False).new, ask().new, parse({"messages": [HELLO]}).new] == [False] * 3
    assert parse({"messages": [HELLO], "new": False}).warnings == ()


def test_what_a_request_adds_to_its_session() -> None:
    assert ask().new_messages() == ({"role": "user", "content": "Hello"},)
    results = parse({"tool_results": [{"tool_call_id": "c1", "content": "12 °C", "x": 1}]})
    assert results.new_messages() == ({"role": "tool", "tool_call_id": "c1", "content": "12 °C"},)


def test_an_end_without_text_is_asked_for_expressly() -> None:
    assert [ask(full_content=False).full_content, ask(full_content=True).full_content, ask().full_content] == [
        False,
        True,
        True,
    ]


def test_a_session_id_counts_only_where_the_route_trusts_it() -> None:
    found = ask(session_id="s1")
    assert found.session_id is None
    assert "session_id was ignored" in found.warnings[0]
    assert parse({"prompt": "x", "session_id": "u/s1"}, PORTAL).session_id == "u/s1"
    for bad in ({}, {"session_id": 7.5}, {"session_id": "a b"}, {"session_id": "a\n"}, {"session_id": "a/b/c"}):
        assert "session_id" in refused({"prompt": "x", **bad}, PORTAL)


# --- names of existing clients ---------------------------------------------------------------------------------------


def test_a_maze_game_is_served_as_it_is() -> None:
    found = parse({"sessionId": "player-7", "message": "go north"}, MAZE)
    assert (found.session_id, found.prompt, found.warnings) == ("player-7", "go north", ())


def test_a_web_portal_is_served_as_it_is() -> None:
    first = {"session_id": "s1", "message": "Hi", "system_prompt": "Be kind.", "temperature": 0.7, "top_p": 0.9}
    found = parse(first | {"max_tokens": 200}, PORTAL)
    assert (found.prompt, found.system_prompt) == ("Hi", "Be kind.")
    assert found.sampling == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 200}
    assert parse({"session_id": "s1", "messages": [HELLO]}, PORTAL).mode == "messages"


def test_refusals_speak_of_the_clients_own_names() -> None:
    assert set(refused({"sessionId": [7], "message": 8}, MAZE)) == {"sessionId", "message"}
    with pytest.raises(BadRequest, match="exactly one of message, messages and tool_results"):
        parse({"sessionId": "s"}, MAZE)


def test_our_own_name_of_a_renamed_field_is_understood_but_not_both() -> None:
    assert parse({"session_id": "s", "prompt": "x"}, MAZE).prompt == "x"
    assert "message" in refused({"sessionId": "s", "prompt": "x", "message": "y"}, MAZE)


def test_names_can_be_swapped() -> None:
    swapped = RequestPolicy(fields={"prompt": "system_prompt", "system_prompt": "prompt"})
    found = parse({"prompt": "S", "system_prompt": "P"}, swapped)
    assert (found.prompt, found.system_prompt) == ("P", "S")


def test_a_table_of_names_is_checked() -> None:
    assert check_fields({"prompt": "message", "session_id": "sessionId"}) == []
    assert check_fields({"promt": "message"}) == ['"promt" is not a field of a request; did you mean "prompt"?']
    assert len(check_fields({"prompt": "x", "messages": "x", "model": ""})) == 2


# --- unknown names ---------------------------------------------------------------------------------------------------


def test_unknown_fields_are_named_with_the_nearest_known_name() -> None:
    assert ask(max_token=5).warnings == (
        '"max_token" is not a field of a request and was ignored; did you mean "max_tokens"?',
    )
    assert ask(id_slot=0, lora=[], cache_prompt=False).sampling == {}
    assert 'did you mean "message"' in parse({"sessionId": "s", "message": "x", "promt": "y"}, MAZE).warnings[0]


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("max_completion_tokens", "max_tokens"),
        ("n_predict", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("sessionId", "session_id"),
        ("repetition_penalty", "repeat_penalty"),
        ("tempreture", "temperature"),
        ("responseFormat", "response_format"),
        ("timeout", "timeout_s"),
        ("zzz", None),
        ("", None),
        ("_", None),
    ],
)
def test_the_nearest_name_of(wrong: str, right: str | None) -> None:
    assert nearest(wrong) == right


def test_at_most_eight_unknown_fields_are_named() -> None:
    warnings = ask(**{f"zz{number}": 1 for number in range(1000)}).warnings
    assert len(warnings) == 8
    assert "992 others" in warnings[-1]
    assert len(ask(**{"x" * 100_000: 1}).warnings[0]) < 200


# --- digests ---------------------------------------------------------------------------------------------------------

KNOWN = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1).filter(lambda text: text.isprintable())},
    optional={
        "request_id": st.text("abc019_.-", min_size=1, max_size=8),
        "temperature": st.floats(0, 5),
        "seed": st.integers(-1, 2**32 - 1),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
        "stream": st.sampled_from([True, False, "sentence"]),
        "logit_bias": st.dictionaries(
            st.text("0123456789", min_size=1, max_size=3), st.integers(-100, 100), max_size=3
        ),
        "response_format": st.just({"type": "json_object"}),
    },
)


@given(KNOWN, st.randoms(use_true_random=False))
def test_the_digest_knows_content_but_not_its_writing(body: dict[str, Any], random: Any) -> None:
    pairs = list(body.items())
    random.shuffle(pairs)
    again = parse_request(json.dumps(dict(pairs), indent=3, ensure_ascii=False).encode(), policy=OPEN)
    assert again is not None
    first = parse(body)
    assert first.digest == again.digest
    assert first.digest == parse({**body, "metadata": {"try": 2}, "timeout_s": 7, "max_token": 1, "model": None}).digest
    assert first.digest == parse(body, RequestPolicy(max_tokens=1, max_priority="batch", models=None)).digest


@given(KNOWN, KNOWN)
def test_requests_of_different_content_have_different_digests(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (parse(one).digest == parse(other).digest) is same


# --- anything at all -------------------------------------------------------------------------------------------------

ANY_JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from(["user", "assistant", "tool", "text", "image_url", "function", "json_schema", "auto", PNG, "x\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "image_url", "url", "function", "name", "tool_calls", "id", "schema",
                 "json_schema", "parameters", "tool_call_id", "arguments", "$ref", "@user", "[key]", ""]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)  # fmt: skip
POLICIES = st.sampled_from([OPEN, MAZE, PORTAL, RequestPolicy(models=None, allow_messages=False, allow_tools=False)])


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from([*sorted(REQUEST_FIELDS), "message", "sessionId", "x"]), ANY_JSON, max_size=5),
    POLICIES,
)
def test_any_object_gives_a_request_or_a_refusal_that_names_a_field(
    body: dict[str, Any], policy: RequestPolicy
) -> None:
    try:
        found = parse(body, policy)
    except RequestError as refusal:
        fields = refusal.details["fields"]
        text = json.dumps([fields, refusal.message], ensure_ascii=False)
    else:
        fields = ["none at fault"]
        text = json.dumps(
            [found.sampling, found.messages, found.tools, found.metadata, found.warnings], ensure_ascii=False
        )
    assert fields
    text.encode()


@given(st.binary(max_size=64), st.sampled_from([b"", b"{", b'{"prompt":', b'{"prompt":"x",']))
def test_any_bytes_give_a_request_or_one_of_our_errors(tail: bytes, head: bytes) -> None:
    try:
        found: object = parse_request(head + tail, policy=OPEN)
    except RequestError as refusal:
        found = refusal
    assert found is None or isinstance(found, Generate | BadRequest | Unsupported)


def test_no_refusal_drags_the_clients_text_along() -> None:
    secret = "my secret prompt"
    for body in ({"prompt": [secret]}, {"prompt": "x", "temperature": secret}, {"messages": [{"role": secret}]}):
        with pytest.raises(BadRequest) as caught:
            parse(body)
        error: BaseException | None = caught.value
        while error is not None:
            assert secret not in str(error)
            error = error.__cause__ or error.__context__


# --- payloads that are refused later ----------------------------------------------------------------------------------


def test_a_refusal_can_be_answered_under_the_clients_own_id() -> None:
    raw = read_request(encoded({"request_id": "r1", "sessionId": "s1", "message": 7}), policy=MAZE)
    assert raw is not None
    assert (raw.request_id, raw.session_id) == ("r1", "s1")
    with pytest.raises(BadRequest):
        check_request(raw, policy=MAZE)


def test_an_id_out_of_shape_is_no_id() -> None:
    raw = read_request(encoded({"request_id": "r\n1", "session_id": ["s"], "prompt": "x"}), policy=OPEN)
    assert raw is not None
    assert (raw.request_id, raw.session_id) == (None, None)


def test_ordinary_requests_cost_little() -> None:
    payload = encoded({"request_id": "r1", "prompt": "Name three rivers.", "temperature": 0.2, "max_tokens": 100})

    def parse() -> None:
        for _ in range(200):
            parse_request(payload, policy=OPEN)

    assert seconds_of(parse) / 200 < 0.002  # measured: 0.03 ms; the bound is for a loaded machine
