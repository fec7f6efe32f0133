"""Control and admin messages, from a program or from a person at a shell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.errors import BadRequest, PayloadTooLarge
from llamacpp_mqtt_deploy.core.requests import (
    AdminCommand,
    ControlCommand,
    RequestPolicy,
    check_counted,
    parse_admin,
    parse_control,
)
from tests.support.parsing import encoded


@pytest.mark.parametrize("action", ["cancel", "reset", "delete", "history", "ping"])
def test_a_control_message_is_an_object_or_the_bare_action(action: str) -> None:
    expected = ControlCommand(action=action, transaction="t1")  # type: ignore[arg-type]
    assert parse_control(encoded({"action": action, "transaction": "t1"})) == expected
    assert parse_control(f" {action}\n".encode()) == ControlCommand(action=action)  # type: ignore[arg-type]


def test_a_request_id_belongs_to_cancel() -> None:
    assert parse_control(b'{"action":"cancel","request_id":"r1","x":1}') == ControlCommand(
        action="cancel", request_id="r1"
    )
    assert parse_control(b'{"action":"reset","request_id":"r1"}').request_id is None


@pytest.mark.parametrize(
    "action", ["cancel_all", "drain", "resume", "reload", "restart_engine", "unload", "keep_awake"]
)
def test_an_admin_message_is_an_object_or_the_bare_action(action: str) -> None:
    expected = AdminCommand(action=action, transaction="t1")  # type: ignore[arg-type]
    assert parse_admin(encoded({"action": action, "transaction": "t1"})) == expected
    assert parse_admin(action.encode()) == AdminCommand(action=action)  # type: ignore[arg-type]


def test_usage_is_asked_for_by_level_and_days() -> None:
    assert parse_admin(b"usage") == AdminCommand(action="usage", days=1, limit=100, offset=0)
    asked = {"action": "usage", "days": 7, "first_level": "route:maze", "limit": 10, "offset": 20}
    assert parse_admin(encoded(asked)) == AdminCommand(
        action="usage", days=7, first_level="route:maze", limit=10, offset=20
    )


def test_keep_awake_takes_its_seconds_as_a_number_or_a_word() -> None:
    hour = AdminCommand(action="keep_awake", seconds=3600)
    assert parse_admin(b"keep_awake 3600") == hour
    assert parse_admin(b'{"action":"keep_awake","seconds":3600}') == hour
    assert parse_admin(b"keep_awake") == AdminCommand(action="keep_awake")
    assert parse_admin(b"keep_awake 0") == AdminCommand(action="keep_awake", seconds=0)
    for bad in (b"keep_awake long", b"keep_awake nan", b"keep_awake -1", b"keep_awake 604801", b"keep_awake 1 h"):
        with pytest.raises(BadRequest):
            parse_admin(bad)


def test_a_choice_of_model_needs_its_name() -> None:
    assert parse_admin(b"model qwen3:4b") == AdminCommand(action="model", model="qwen3:4b")
    assert parse_admin(b'{"action":"model","model":"two words"}') == AdminCommand(action="model", model="two words")
    for bad in (b"model", b'{"action":"model"}', b'{"action":"model","model":""}', b"model " + b"x" * 257):
        with pytest.raises(BadRequest) as caught:
            parse_admin(bad)
        assert "model" in caught.value.details["fields"] or "action" in caught.value.details["fields"]


def test_what_belongs_to_another_action_is_passed_over() -> None:
    assert parse_admin(b'{"action":"drain","seconds":3,"model":"x","level":"info"}') == AdminCommand(action="drain")


def test_a_log_level_needs_its_level() -> None:
    assert parse_admin(b"log_level debug") == AdminCommand(action="log_level", level="debug")
    assert parse_admin(b'{"action":"log_level","level":"info"}') == AdminCommand(action="log_level", level="info")
    for bad in (b"log_level", b"log_level loud", b'{"action":"log_level"}', b"log_level debug now"):
        with pytest.raises(BadRequest):
            parse_admin(bad)


@pytest.mark.parametrize(
    "payload, field",
    [
        (b"", "action"),
        (b"stop", "action"),
        (b"cancel all", "action"),
        (b"{}", "action"),
        (b'{"action":7}', "action"),
        (b'{"action":"drain"}', "action"),
        (b'{"action":"cancel","request_id":"a b"}', "request_id"),
        (b'{"action":"cancel","transaction":7}', "transaction"),
        (b'{"action":"cancel","transaction":"%s"}' % (b"x" * 65), "transaction"),
        (b'{"action":', "payload"),
        (b"\xff", "payload"),
    ],
)
def test_a_bad_control_message_is_refused_by_name(payload: bytes, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_control(payload)
    assert field in caught.value.details["fields"]


def test_the_ack_of_a_bad_control_message_can_carry_what_was_readable() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_control(b'{"action":"explode","transaction":"t1"}')
    assert caught.value.details["action"] == "explode"
    assert caught.value.details["transaction"] == "t1"
    with pytest.raises(BadRequest) as caught:
        parse_admin(b'{"action":"log_level","transaction":"t2"}')
    assert caught.value.details["transaction"] == "t2"


@pytest.mark.parametrize("transaction", ["t" * 64, ""])
def test_a_transaction_may_have_sixty_four_characters(transaction: str) -> None:
    assert parse_control(encoded({"action": "ping", "transaction": transaction})).transaction == transaction
    with pytest.raises(BadRequest) as caught:
        parse_control(encoded({"action": "explode", "transaction": transaction}))
    assert caught.value.details["transaction"] == transaction


def test_the_ack_of_a_bad_message_carries_nothing_that_could_not_be_sent_back() -> None:
    for unfit in ("t" * 65, 7, None):
        with pytest.raises(BadRequest) as caught:
            parse_control(encoded({"action": "explode", "transaction": unfit}))
        assert "transaction" not in caught.value.details


def test_words_that_are_no_order_are_not_taken_for_the_order_they_begin_with() -> None:
    for parser, words in ((parse_control, b"cancel r1"), (parse_control, b"cancel it now"), (parse_admin, b"drain it")):
        with pytest.raises(BadRequest) as caught:
            parser(words)
        assert {"action", "level"} & set(caught.value.details["fields"])


def test_a_null_in_a_control_message_is_as_good_as_absent() -> None:
    assert parse_control(b'{"action":"cancel","request_id":null,"transaction":null}') == ControlCommand(action="cancel")


def test_a_control_message_may_have_four_kibibytes() -> None:
    whole = b'{"action":"cancel","x":"' + b"x" * (4096 - 26) + b'"}'
    assert parse_control(whole).action == "cancel"
    with pytest.raises(PayloadTooLarge):
        parse_control(b" " + whole)


def test_a_control_message_is_small() -> None:
    with pytest.raises(PayloadTooLarge):
        parse_control(b'{"action":"cancel","x":"' + b"x" * 5000 + b'"}')


@given(st.binary(max_size=64), st.sampled_from([b"", b"{", b'{"action":"cancel",', b'{"action":']))
def test_any_bytes_give_an_order_or_a_refusal(tail: bytes, head: bytes) -> None:
    for parser in (parse_control, parse_admin):
        try:
            found: object = parser(head + tail)
        except BadRequest as refusal:
            found = refusal
        assert isinstance(found, ControlCommand | AdminCommand | BadRequest)


def test_a_control_of_other_blanks_than_jsons_is_refused() -> None:
    for parser in (parse_control, parse_admin):
        with pytest.raises(BadRequest):
            parser("\x85".encode())


def test_only_a_count_may_be_as_long_as_a_request() -> None:
    fields = {"action": "count_tokens", "transaction": "t1", "prompt": "x" * 9000, "temperature": 3}
    command = parse_control(encoded(fields), max_count_bytes=10_000)
    assert (command.action, command.transaction, len(command.counted["prompt"])) == ("count_tokens", "t1", 9000)
    for longer in (fields | {"prompt": "x" * 20_000}, fields | {"action": "ping", "x": "count_tokens"}):
        with pytest.raises(PayloadTooLarge) as caught:
            parse_control(encoded(longer), max_count_bytes=10_000)
        assert caught.value.details["transaction"] == "t1"
        assert caught.value.details["action"] == longer["action"]


def test_what_is_counted_is_checked_as_in_a_request() -> None:
    policy = RequestPolicy(fields={"prompt": "message"})
    assert (
        check_counted({"message": "hello", "temperature": "none", "request_id": "!"}, policy=policy).prompt == "hello"
    )
    with pytest.raises(BadRequest) as caught:
        check_counted({"message": ""}, policy=policy)
    assert caught.value.details["fields"] == {"message": "a text that is not empty"}
    with pytest.raises(BadRequest):
        check_counted({}, policy=policy)
