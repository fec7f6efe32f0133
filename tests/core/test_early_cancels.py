"""Cancels that overtook their requests: kept for a minute, and one client's flood pushes out his own alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.early_cancels import KEPT_S, EarlyCancels


def test_a_cancel_that_came_first_holds_for_a_minute_and_for_one_request() -> None:
    early = EarlyCancels()
    early.add("ada", "r1", 0.0)
    early.add("ada", "r2", 0.0)
    assert early.take("ada", "r1", KEPT_S - 1)
    assert not early.take("ada", "r1", KEPT_S - 1)
    assert not early.take("ada", "r2", KEPT_S)
    assert len(early) == 0


def test_a_flood_of_early_cancels_pushes_out_those_of_its_own_level_alone() -> None:
    early = EarlyCancels(per_level=10)
    early.add("modest", "r1", 0.0)
    for number in range(1000):
        early.add("greedy", number, 1.0)
    assert early.take("modest", "r1", 2.0)
    assert not early.take("greedy", 989, 2.0)
    assert early.take("greedy", 990, 2.0)
    assert len(early) == 9


def test_many_levels_together_have_a_bound_and_the_largest_gives_way() -> None:
    early = EarlyCancels(per_level=10, in_all=20)
    early.add("modest", "r1", 0.0)
    for number in range(100):
        early.add(f"greedy{number % 5}", number, 0.0)
    assert len(early) == 20
    assert early.take("modest", "r1", 1.0)


def test_what_is_over_a_minute_old_gives_way_before_what_is_not() -> None:
    early = EarlyCancels(per_level=10, in_all=10)
    for number in range(5):
        early.add("old", number, 0.0)
    for number in range(6):
        early.add("new", number, KEPT_S + 1)
    assert [early.take("new", number, KEPT_S + 1) for number in range(6)] == [True] * 6


@given(st.lists(st.tuples(st.sampled_from("aaab"), st.integers(0, 9), st.booleans()), max_size=60))
def test_early_cancels_keep_their_bounds(steps: list[tuple[str, int, bool]]) -> None:
    early = EarlyCancels(per_level=4, in_all=6)
    known: set[tuple[str, int]] = set()
    for level, key, add in steps:
        if add:
            early.add(level, key, 0.0)
            known.add((level, key))
            assert early.take(level, key, 0.0), "the newest is always kept"
            early.add(level, key, 0.0)
        else:
            assert (level, key) in known or not early.take(level, key, 0.0)
        assert len(early) <= 6
