"""Payloads of clients that were there before this worker: their ids, their field names, and refusals that reach them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.guessing import MAX_GUESS_BYTES, guess_ids
from llamacpp_mqtt_deploy.core.names import REQUEST_FIELDS, FieldNames, check_fields, nearest
from llamacpp_mqtt_deploy.core.requests import RequestPolicy, check_request, read_request
from llamacpp_mqtt_deploy.core.routes import is_level, is_session
from tests.support.effort import seconds_of
from tests.support.parsing import MAZE, OPEN, PORTAL, encoded, parse, refused

CHAT = RequestPolicy(
    fields={"prompt": "message.text", "session_id": "chat.id", "request_id": "message.nonce"},
    trust_payload_session=True,
)

# --- ids that are numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, session", [(42, "42"), (0, "0"), (2**64 - 1, str(2**64 - 1))])
def test_a_session_may_be_a_whole_number(number: int, session: str) -> None:
    assert parse({"sessionId": number, "message": "x"}, MAZE).session_id == session
    assert parse({"session_id": number, "message": "x"}, PORTAL).session_id == session
    raw = read_request(encoded({"sessionId": number, "message": "x"}), policy=MAZE)
    assert raw is not None
    assert raw.session_id == session


@pytest.mark.parametrize("wrong", [True, False, 4.0, 4.5, -1, 10**64, 2**64, [4], {"id": 4}, "4 2", ""])
def test_no_other_number_is_a_session_and_the_refusal_names_the_field(wrong: Any) -> None:
    assert list(refused_fields({"sessionId": wrong, "message": "x"}, MAZE)) == ["sessionId"]


def test_a_number_that_is_too_large_is_told_with_its_key() -> None:
    assert list(refused_fields({"message": "x", "extra": {"seed": 2**70}}, MAZE)) == ["seed"]
    assert list(refused_fields({"message": "x", "extra": [1, [2**70]]}, MAZE)) == ["payload"]


def test_a_request_id_may_be_a_number_only_where_the_route_maps_its_name() -> None:
    mapped = RequestPolicy(fields={"request_id": "requestId"})
    assert parse({"prompt": "x", "requestId": 17}, mapped).request_id == "17"
    assert list(refused_fields({"prompt": "x", "requestId": 1.5}, mapped)) == ["requestId"]
    assert list(refused_fields({"prompt": "x", "requestId": True}, mapped)) == ["requestId"]
    assert list(refused_fields({"prompt": "x", "request_id": 17}, OPEN)) == ["request_id"]


def refused_fields(body: Any, policy: RequestPolicy) -> dict[str, str]:
    with pytest.raises(BadRequest) as caught:
        parse(body, policy)
    fields: dict[str, str] = caught.value.details["fields"]
    return fields


# --- fields inside objects ---------------------------------------------------------------------------------------------


def test_a_field_may_lie_inside_objects_of_the_payload() -> None:
    found = parse({"message": {"text": "go north", "nonce": "n1"}, "chat": {"id": 7}, "temperature": 0.5}, CHAT)
    assert (found.prompt, found.session_id, found.request_id) == ("go north", "7", "n1")
    assert found.sampling == {"temperature": 0.5}
    assert found.warnings == ()


def test_a_path_may_go_through_several_objects() -> None:
    deep = RequestPolicy(fields={"prompt": "a.b.c", "system_prompt": "a.b.d", "max_tokens": "a.limit"})
    found = parse({"a": {"b": {"c": "x", "d": "y"}, "limit": 5}}, deep)
    assert (found.prompt, found.system_prompt, found.sampling) == ("x", "y", {"max_tokens": 5})


def test_an_absent_or_null_object_on_the_way_leaves_the_field_out() -> None:
    bodies: list[dict[str, Any]] = [{}, {"message": None}, {"message": {}}, {"message": {"text": None}}]
    for body in bodies:
        assert list(refused({"chat": {"id": "s"}, **body}, CHAT)) == ["message.text"]


def test_something_else_on_the_way_is_refused_with_what_was_expected() -> None:
    assert refused({"message": "go north", "chat": {"id": "s"}}, CHAT) == {"message": "an object with text, nonce"}
    assert refused({"message": {"text": "x"}, "chat": [1]}, CHAT) == {"chat": "an object with id"}


def test_unknown_names_inside_an_object_are_told_with_their_path() -> None:
    found = parse({"message": {"text": "x", "lang": "en", "promt": "y"}, "chat": {"id": "s"}}, CHAT)
    assert found.warnings == (
        '"message.lang" is not a field of a request and was ignored',
        '"message.promt" is not a field of a request and was ignored; did you mean "message.text"?',
    )


def test_our_own_name_beside_a_nested_one_is_understood_but_not_both() -> None:
    assert parse({"prompt": "x", "chat": {"id": "s"}}, CHAT).prompt == "x"
    assert parse({"message.text": "x", "chat": {"id": "s"}}, CHAT).prompt == "x"
    assert "message.text" in refused({"prompt": "x", "message": {"text": "y"}, "chat": {"id": "s"}}, CHAT)


def test_refusals_of_parts_name_the_whole_path() -> None:
    nested = RequestPolicy(fields={"messages": "body.turns"})
    assert list(refused({"body": {"turns": [{"role": "user"}]}}, nested)) == ["body.turns[0].content"]


def test_the_digest_of_a_nested_field_is_that_of_a_plain_one() -> None:
    nested = read_request(encoded({"message": {"text": "x"}, "chat": {"id": "s"}}), policy=CHAT)
    plain = read_request(encoded({"prompt": "x", "session_id": "s"}), policy=PORTAL)
    assert nested is not None
    assert plain is not None
    assert nested.digest == plain.digest


@pytest.mark.parametrize(
    "fields, fault",
    [
        ({"prompt": "message", "session_id": "message.session"}, "prompt (message) and session_id (message.session)"),
        ({"prompt": "a.b.c", "session_id": "a.b"}, "session_id (a.b) and prompt (a.b.c)"),
        ({"session_id": "metadata.session"}, "metadata (metadata) and session_id (metadata.session)"),
        ({"prompt": "message..text"}, "message..text"),
        ({"prompt": ".text"}, ".text"),
        ({"prompt": "message."}, "message."),
        ({"prompt": ".".join("a" * 32)}, "32 levels"),
        ({"prompt": "messages[0].content"}, "messages[0].content"),
    ],
)
def test_paths_that_cannot_work_are_refused_at_start(fields: dict[str, str], fault: str) -> None:
    found = check_fields(fields)
    assert len(found) == 1, found
    assert fault in found[0]


def test_every_fault_of_a_table_is_told_in_a_sentence() -> None:
    assert check_fields({"prompt": "x", "messages": "x"}) == ['two fields are called "x"']
    assert check_fields({"prompt": ""}) == ['prompt is called "": the name is empty']
    assert check_fields({"zzz": "x"}) == ['"zzz" is not a field of a request']
    assert check_fields({"prompt": ".".join("a" * 31)}) == []
    (overlap,) = check_fields({"prompt": "stop", "model": "stop.name"})
    assert overlap.startswith("prompt (stop) and model (stop.name) overlap")


def test_a_field_is_found_where_its_clients_write_it() -> None:
    names = FieldNames({"prompt": "message.text", "session_id": "sessionId"})
    assert (names.of("prompt"), names.of("seed")) == ("message.text", "seed")
    assert (names.of_path("prompt[2].x"), names.of_path("messages[1].content")) == (
        "message.text[2].x",
        "messages[1].content",
    )
    assert [names.at(path) for path in (["message", "text"], ["sessionId"], ["message"], ["text"], ["seed", "x"])] == [
        "prompt",
        "session_id",
        None,
        None,
        None,
    ]
    assert repr(names) == "FieldNames(fields={'prompt': 'message.text', 'session_id': 'sessionId'})"


def test_eight_unknown_names_are_told_and_no_word_is_lost_about_others() -> None:
    names = FieldNames()
    eight = [f"zz{number}" for number in range(8)]
    assert names.warnings(eight)[-1] == '"zz7" is not a field of a request and was ignored'
    nine = names.warnings([*eight, "zz8"])
    assert (len(nine), nine[-1]) == (8, '"zz7" is not a field of a request and was ignored; so were 1 others')


def test_a_name_is_looked_at_as_far_as_sixty_four_characters() -> None:
    assert nearest("_" * 60 + "stop") == "stop"
    assert nearest("_" * 62 + "stop") is None


def test_paths_beside_each_other_can_be_used() -> None:
    assert check_fields({"prompt": "message.text", "session_id": "message.session", "model": "model.name"}) == []
    assert check_fields({"prompt": "message.text", "session_id": "message.session", "stop": "options.stop"}) == []
    assert check_fields({"session_id": "metadata.session", "metadata": "extra"}) == []


@given(st.dictionaries(st.sampled_from(sorted(REQUEST_FIELDS)), st.text("ab.", max_size=5), max_size=4))
def test_fields_that_pass_the_check_find_what_was_put_at_their_paths(fields: dict[str, str]) -> None:
    if check_fields(fields):
        return
    body: dict[str, Any] = {}
    for ours, theirs in fields.items():
        *above, last = theirs.split(".")
        node = body
        for level in above:
            node = node.setdefault(level, {})
        node[last] = f"value of {ours}"
    found, unknown = FieldNames(fields).read(body)
    assert found == {ours: f"value of {ours}" for ours in fields}
    assert unknown == ()


# --- refusals that reach their client ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload, policy, found",
    [
        (b'{"sessionId":"s7","message":"x",,}', MAZE, ("s7", None)),
        (b'{"sessionId" : "u/s7", "request_id":"r1", "message":"half', MAZE, ("u/s7", "r1")),
        (b'{"message":"\xff","sessionId":42}', MAZE, ("42", None)),
        (b'{"session_id":"s7",', MAZE, ("s7", None)),
        (b'{"chat":{"name":"x","id":"s"},"message":{"nonce":"n","text":"a\n', CHAT, ("s", "n")),
        (b'{"chat":{"deep":{"id":"other"}}', CHAT, (None, None)),
        (b'{"meta":{"sessionId":"other"},"sessionId":"mine",', MAZE, ("mine", None)),
        (b'{"meta":{"sessionId":"other"},', MAZE, (None, None)),
        (b'{"list":["sessionId","x"],"message":"sessionId"', MAZE, (None, None)),
        (b'{"message":"\\"sessionId\\":\\"forged\\"",', MAZE, (None, None)),
        (b'{"sessionId":"one","sessionId":"two"}', MAZE, (None, None)),
        (b'{"sessionId":"one","session_id":"two",', MAZE, (None, None)),
        (b'{"sessionId":"a b",', MAZE, (None, None)),
        (b'{"sessionId":"a\\n",', MAZE, (None, None)),
        (b'{"sessionId":"\\u0061",', MAZE, (None, None)),
        (b'{"sessionId":"+/#",', MAZE, (None, None)),
        (b'{"sessionId":4.2,', MAZE, (None, None)),
        (b'{"sessionId":-4,', MAZE, (None, None)),
        (b'{"sessionId":4e2,', MAZE, (None, None)),
        (b'{"sessionId":' + b"4" * 65 + b",", MAZE, (None, None)),
        (b'{"request_id":17,', OPEN, (None, None)),
        (b'{"request_id":"a-1.b_2","prompt":"x', OPEN, (None, "a-1.b_2")),
        (b'{"prompt":"x", "request_id" : "q"', OPEN, (None, "q")),
        (b'{"request_id":"two words"}', OPEN, (None, None)),
        (b"hello", OPEN, (None, None)),
        (b"}{[", MAZE, (None, None)),
        (b"", MAZE, (None, None)),
    ],
)
def test_ids_are_found_in_payloads_that_cannot_be_read(
    payload: bytes, policy: RequestPolicy, found: tuple[str | None, str | None]
) -> None:
    ids = guess_ids(payload, policy.names)
    assert (ids.session_id, ids.request_id) == found


@given(st.binary(max_size=80), st.sampled_from([b"", b'{"sessionId":', b'{"sessionId":"', b'{"sessionId":"s",']))
def test_nothing_is_found_that_may_not_stand_in_a_topic(tail: bytes, head: bytes) -> None:
    ids = guess_ids(head + tail, MAZE.names)
    assert ids.session_id is None or is_session(ids.session_id)
    assert ids.request_id is None or is_level(ids.request_id)


@given(
    st.fixed_dictionaries(
        {"sessionId": st.from_regex(r"[A-Za-z0-9_.-]{1,9}", fullmatch=True), "message": st.text(max_size=20)}
    ),
    st.data(),
)
def test_what_a_good_reader_finds_is_what_is_guessed(body: dict[str, Any], data: st.DataObject) -> None:
    payload = json.dumps(body, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "replace")
    assert guess_ids(payload, MAZE.names).session_id == body["sessionId"]


def test_guessing_looks_at_the_beginning_only_and_takes_linear_time() -> None:
    late = b'{"message":"' + b"x" * MAX_GUESS_BYTES + b'","sessionId":"s"'
    assert guess_ids(late, MAZE.names).session_id is None
    for hostile in (b'{"' * 10**6, b"[" * 10**6, b'"\\' * 10**6, b"1" * 10**6, b" " * 10**6, b'{"a":' * 10**6):
        # Measured: 0.05 s at most; the bound is for a loaded machine.
        assert seconds_of(partial(guess_ids, hostile, MAZE.names)) < 0.5


def test_the_names_of_a_route_are_made_once() -> None:
    policy = RequestPolicy(fields={"prompt": "message.text"})
    assert policy.names is policy.names
    assert RequestPolicy(fields={"prompt": "x"}) == RequestPolicy(fields={"prompt": "x"})
    raw = read_request(encoded({"message": {"text": "x"}}), policy=policy)
    assert raw is not None
    assert check_request(raw, policy=policy).prompt == "x"
