"""What bounds the store: how much of a history goes, and whose ended requests are forgotten first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from llamacpp_mqtt_deploy.ports import HistoryChange
from llamacpp_mqtt_deploy.stores.bounds import excess, first_level_of, messages_to_forget
from tests.support.store_cases import NOW, SESSION, entry, key, new_store

MIB = 1024 * 1024
EXCHANGE = [("user", 5), ("assistant", 5)]


# --- histories -------------------------------------------------------------------------------------------------------


def test_a_history_within_its_bound_loses_nothing() -> None:
    assert messages_to_forget(EXCHANGE * 10, 100) == 0
    assert messages_to_forget([], 0) == 0


def test_a_history_over_its_bound_shrinks_to_three_quarters_of_it() -> None:
    assert messages_to_forget(EXCHANGE * 10, 80) == 8  # 60 bytes are left
    assert messages_to_forget(EXCHANGE * 10, 79) == 10
    assert messages_to_forget(EXCHANGE * 10, 99) == 6


def test_a_history_is_cut_before_a_prompt_and_never_in_its_last_exchange() -> None:
    called = [("user", 5), ("assistant", 5), ("tool", 50), ("assistant", 5)]
    assert messages_to_forget([*called, *EXCHANGE], 60) == 4
    assert messages_to_forget([*EXCHANGE, *called], 20) == 2
    assert messages_to_forget(called, 20) == 0
    assert messages_to_forget([("assistant", 50), *EXCHANGE], 20) == 1


@pytest.mark.parametrize("too_much", [0, 1])
def test_a_history_may_have_four_mebibytes_where_nothing_else_is_said(too_much: int, tmp_path: Path) -> None:
    store = new_store("memory", tmp_path)
    store.open()
    answer = {"role": "assistant", "content": ""}
    prompt = {"role": "user", "content": ""}
    room = 4 * MIB - 2 * len(orjson.dumps(prompt)) - 2 * len(orjson.dumps(answer)) + too_much
    for number, text in enumerate(("x" * (room - 1), "x")):
        store.accept([entry(str(number))])
        history = HistoryChange(session=SESSION, append=(prompt | {"content": text}, answer))
        store.finish(key(str(number)), b"", now=NOW, history=history)
    assert len(store.history(SESSION)) == (2 if too_much else 4)
    store.close()


# --- ended requests --------------------------------------------------------------------------------------------------


def test_the_first_level_of_a_session_is_what_an_access_list_binds() -> None:
    assert [first_level_of(session) for session in ("ada", "ada/phone", "")] == ["ada", "ada", ""]


def test_within_the_bound_everything_is_remembered() -> None:
    assert excess({("a", True): 50, ("b", True): 30, ("b", False): 20}, 100) == []
    assert excess({}, 0) == []


def test_one_first_level_may_hold_half_of_what_is_remembered() -> None:
    assert excess({("a", True): 90}, 100) == [("a", True, 40)]
    assert excess({("a", True): 52, ("b", True): 20}, 101) == [("a", True, 1)]
    assert excess({("a", True): 50}, 101) == []


def test_beyond_all_shares_whoever_holds_most_is_cut_first() -> None:
    held = {("small", True): 30, ("large", True): 45, ("middle", True): 40}
    assert excess(held, 100) == [("large", True, 15)]
    assert excess({("a", True): 5, ("b", True): 6, ("c", True): 6, ("d", True): 4}, 12) == [
        ("b", True, 6),
        ("c", True, 3),
    ]


def test_what_no_broker_took_is_cut_after_all_that_one_took() -> None:
    assert excess({("a", True): 5, ("a", False): 60, ("b", False): 20}, 100) == [("a", True, 5), ("a", False, 10)]
    assert excess({("a", False): 45, ("b", True): 40, ("c", False): 30}, 100) == [("b", True, 15)]
    assert excess({("a", False): 45, ("b", True): 10, ("c", False): 50}, 100) == [("b", True, 5)]
    assert excess({("a", False): 45, ("b", True): 10, ("c", False): 50}, 91) == [("c", False, 4), ("b", True, 10)]


def test_what_one_level_gave_up_for_its_share_is_not_counted_twice() -> None:
    held = {("a", True): 60, ("b", False): 50, ("c", False): 50, ("d", False): 10}
    assert excess(held, 100) == [("a", True, 10), ("a", True, 50), ("b", False, 10)]


def test_sixty_four_mebibytes_of_ended_requests_are_remembered_where_nothing_else_is_said(tmp_path: Path) -> None:
    """Half of it for one first level, and each with half a kibibyte for what it is beside its answer."""
    store = new_store("memory", tmp_path)
    store.open()
    for number in range(9):
        store.accept([entry(str(number))])
    for number in range(8):
        store.finish(key(str(number)), bytes(4 * MIB - 512), now=NOW)
    limits: dict[str, Any] = {"now": NOW, "remember_s": 600.0, "ttl_s": 600.0, "max_sessions": 10}
    assert store.purge(**limits).entries == 0
    store.finish(key("8"), b"", now=NOW)
    assert store.purge(**limits).entries == 1
    assert store.find(key("0")) is None
    store.close()
