"""A queue that is emptied in turn between first topic levels."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.fair_queue import FairQueue


def test_whoever_has_much_waiting_holds_up_only_himself() -> None:
    queue: FairQueue[str] = FairQueue(per_level=10, in_all=100)
    for number in range(5):
        queue.put("greedy", f"g{number}")
    queue.put("modest", "m0")
    queue.put("modest", "m1")
    assert [queue.take() for _ in range(len(queue))] == ["g0", "m0", "g1", "m1", "g2", "g3", "g4"]
    assert queue.take() is None


@given(st.lists(st.sampled_from(["a", "a", "a", "b", "c", None]), max_size=60))
def test_nothing_is_lost_and_the_bounds_hold(steps: list[str | None]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(per_level=3, in_all=5)
    waiting: list[tuple[str, int]] = []
    for number, level in enumerate(steps):
        if level is None:
            taken = queue.take()
            assert (taken is None) == (not waiting)
            if taken is not None:
                assert taken == next(item for item in waiting if item[0] == taken[0]), "in order within a level"
                waiting.remove(taken)
        elif queue.put(level, (level, number)):
            waiting.append((level, number))
        else:
            assert len(waiting) == 5 or [item[0] for item in waiting].count(level) == 3
        assert len(queue) == len(waiting) <= 5
