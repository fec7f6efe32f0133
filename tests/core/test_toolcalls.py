"""The tool calls of an engine are checked like everything else that comes from outside."""

from __future__ import annotations

import pytest

from llamacpp_mqtt_deploy.core.deltas import ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.core.toolcalls import MAX_ARGUMENTS_CHARS, MAX_CALLS, checked_call, whole


def test_an_answer_may_call_as_many_tools_as_a_request_may_bring_results_for() -> None:
    assert (MAX_CALLS, MAX_ARGUMENTS_CHARS) == (128, 2**20)


@pytest.mark.parametrize("call_id", ["c", "x" * 128, "call 1 ~", "0"])
def test_an_id_that_a_client_can_send_back_is_kept(call_id: str) -> None:
    assert checked_call(3, call_id, "f", "{}") == ToolCall(3, call_id, "f", "{}")


@pytest.mark.parametrize("call_id", ["x" * 129, "é", "a\n", ["c"], 1.5])
def test_an_id_that_a_client_could_not_send_back_is_replaced_by_the_number_of_the_call(call_id: object) -> None:
    assert checked_call(3, call_id, "f", "").id == "call_3"


def test_an_id_and_a_name_that_are_not_told_stay_away() -> None:
    for nothing in (None, ""):
        assert checked_call(0, nothing, nothing, "1") == ToolCall(0, None, None, "1")


def test_a_name_may_have_sixty_four_characters() -> None:
    assert checked_call(0, "c", "n" * 64, "").name == "n" * 64
    assert checked_call(0, "c", "wähle aus", "").name == "wähle aus"
    for unfit in ("n" * 65, "a\nb", 7, ["f"]):
        with pytest.raises(EngineFailed, match="by a name that no tool can have"):
            checked_call(0, "c", unfit, "")


def test_half_a_surrogate_pair_in_the_arguments_is_replaced() -> None:
    assert checked_call(0, "c", "f", '"\ud83d"').arguments == '"\ufffd"'
    assert [whole(text) for text in ("plain", "é 😀", "\ude00a")] == ["plain", "é 😀", "\ufffda"]
