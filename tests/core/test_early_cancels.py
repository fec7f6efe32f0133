"""Cancels that overtook their requests: kept for a minute, and one client's flood pushes out his own alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.early_cancels import EarlyCancels


def test_a_cancel_that_came_first_holds_for_a_minute_and_for_one_request() -> None:
    early = EarlyCancels()
    early.add("ada", "r1", 0.0)
    early.add("ada", "r2", 0.0)
    assert early.take("ada", "r1", 59.0)
    assert not early.take("ada", "r1", 59.0)
    assert not early.take("ada", "r2", 60.0)
    assert len(early) == 0
    assert early._levels == {}, "nothing is kept of a level without any"


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
        early.add("new", number, 61.0)
    assert [early.take("new", number, 61.0) for number in range(6)] == [True] * 6


def test_a_level_has_a_hundred_early_cancels_and_all_together_ten_thousand() -> None:
    early = EarlyCancels()
    for number in range(101):
        early.add("greedy", number, 0.0)
    assert len(early) == 100
    for number in range(10_000):
        early.add(f"level{number // 100}", number, 0.0)
    assert len(early) == 10_000
    assert not early.take("level0", 0, 0.0), "of those that hold most the first gives way"
    assert early.take("level99", 9999, 0.0)


def test_a_cancel_that_is_sent_again_counts_once_and_from_then_on() -> None:
    early = EarlyCancels(per_level=2)
    early.add("ada", "r1", 0.0)
    early.add("ada", "r2", 10.0)
    early.add("ada", "r1", 20.0)
    assert len(early) == 2
    early.add("ada", "r3", 30.0)
    assert not early.take("ada", "r2", 30.0), "the oldest gave way"
    assert early.take("ada", "r1", 79.0)
    assert early.take("ada", "r3", 89.0)


def test_where_ten_thousand_levels_have_one_each_the_next_one_pushes_out_the_first() -> None:
    early = EarlyCancels()
    for number in range(12_000):
        early.add(f"level{number:05}", "r", 0.0)
    assert len(early) == 10_000
    assert not early.take("level00000", "r", 0.0)
    assert early.take("level11999", "r", 0.0)
    assert len(early._levels) == 9999, "nothing is kept of a level without any"


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
