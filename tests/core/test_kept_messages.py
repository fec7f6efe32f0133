"""Histories that earlier versions, or other hands, left in the database serve their sessions all the same."""

from __future__ import annotations

from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.history import pending_tool_calls
from llamacpp_mqtt_deploy.core.kept_messages import mended

USER = {"role": "user", "content": "hi"}


def _calling(**changes: Any) -> dict[str, Any]:
    call = {"id": "c0", "type": "function", "function": {"name": "look", "arguments": "{}"}} | changes
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_a_good_history_comes_out_as_it_is() -> None:
    good = (USER, _calling(), {"role": "tool", "tool_call_id": "c0", "content": "a wall"}, {**USER, "content": []})
    assert all(kept is message for kept, message in zip(mended(good), good, strict=True))


def test_numbers_for_ids_become_text_so_that_calls_and_results_find_each_other() -> None:
    history = mended([USER, _calling(id=7), {"role": "tool", "tool_call_id": 7, "content": "a wall"}])
    assert history[1]["tool_calls"][0]["id"] == history[2]["tool_call_id"] == "7"
    assert pending_tool_calls(history) == ()


@pytest.mark.parametrize("odd", [None, "", [], {"a": 1}, True, 1.5])
def test_an_id_of_any_type_is_a_text_afterwards(odd: Any) -> None:
    (message,) = mended([_calling(id=odd)])
    assert pending_tool_calls([message]) == (message["tool_calls"][0]["id"],)
    assert isinstance(message["tool_calls"][0]["id"], str)


@pytest.mark.parametrize(
    "function", [None, 5, {}, {"name": None, "arguments": "{}"}, {"name": ["f"], "arguments": "{}"}, {"name": {"a": 1}}]
)
def test_a_call_of_no_tool_is_left_out(function: Any) -> None:
    (message,) = mended([_calling(function=function)])
    assert message == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("arguments", [None, {"a": 1}, 5])
def test_arguments_that_are_no_text_are_none(arguments: Any) -> None:
    (message,) = mended([_calling(function={"name": "look", "arguments": arguments})])
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


@pytest.mark.parametrize("calls", ["look", 5, {"id": "c"}, [5], [None]])
def test_what_is_no_list_of_calls_is_none(calls: Any) -> None:
    assert mended([{"role": "assistant", "content": "text", "tool_calls": calls}]) == (
        {"role": "assistant", "content": "text"},
    )


def test_what_is_no_message_is_left_out() -> None:
    assert mended([5, None, "text", [], {}, {"role": "robot"}, {"role": ["user"]}, USER]) == (USER,)


def test_calls_may_come_as_a_tuple_too() -> None:
    good = {**_calling(), "tool_calls": tuple(_calling()["tool_calls"])}
    assert mended([good]) == (good,)
    (message,) = mended([{**good, "tool_calls": ({**good["tool_calls"][0], "id": 7}, 5)}])
    assert [call["id"] for call in message["tool_calls"]] == ["7"]


@pytest.mark.parametrize("odd, text", [(7, "7"), (1.5, "1.5"), (None, ""), (["c"], "")])
def test_the_id_of_a_result_is_a_text_afterwards_and_the_rest_stays(odd: Any, text: str) -> None:
    message = {"role": "tool", "tool_call_id": odd, "content": None, "name": "look"}
    assert mended([message]) == ({**message, "tool_call_id": text},)


def test_of_several_calls_the_good_ones_stay_as_they_are() -> None:
    good = _calling()["tool_calls"][0]
    (message,) = mended([{**_calling(), "content": "text", "tool_calls": [good, {"id": "c1"}, {**good, "id": ""}]}])
    assert message["tool_calls"][0] is good
    assert [call["id"] for call in message["tool_calls"]] == ["c0", "call_2"]
    assert message["content"] == "text"
