"""The journal's time when somebody sets the clock of the machine."""

from __future__ import annotations

import pytest

from llamacpp_mqtt_deploy.worker.journal_clock import BELIEVED_AFTER_S, NOTICED_S, JournalClock

YEAR_S = 365 * 86400.0
NOON = 1_800_000_000.0


class Hands:
    """Two clocks of which one can be set, and the journal's after the first half minute."""

    def __init__(self) -> None:
        self.set_by = self.passed = 0.0
        self.clock = JournalClock(wall=lambda: NOON + self.passed + self.set_by, steady=lambda: 50.0 + self.passed)
        self.later(BELIEVED_AFTER_S)

    def later(self, seconds: float) -> float:
        """How much later it is for the journal than it was in the beginning."""
        self.passed += seconds
        return self.clock.now() - NOON


def test_time_passes() -> None:
    hands = Hands()
    assert hands.later(5.0) == BELIEVED_AFTER_S + 5.0
    assert hands.later(YEAR_S) == BELIEVED_AFTER_S + 5.0 + YEAR_S
    assert hands.clock.set_forward_s == 0.0


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S, 7200.0, NOTICED_S, -NOTICED_S])
def test_a_clock_that_is_set_for_a_moment_is_not_followed(jump_s: float) -> None:
    hands = Hands()
    hands.set_by = jump_s
    assert hands.later(1.0) == BELIEVED_AFTER_S + 1.0
    assert hands.later(BELIEVED_AFTER_S - 2.0) == 2 * BELIEVED_AFTER_S - 1.0
    hands.set_by = 0.0
    assert hands.later(1.0) == 2 * BELIEVED_AFTER_S
    hands.set_by = jump_s
    assert hands.later(2.0) == 2 * BELIEVED_AFTER_S + 2.0, "the half minute begins anew"
    assert hands.clock.set_forward_s == 0.0


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S])
def test_a_clock_that_stays_where_it_was_set_is_followed_and_told_once(jump_s: float) -> None:
    hands = Hands()
    hands.set_by = jump_s
    hands.later(0.0)
    assert hands.later(BELIEVED_AFTER_S) == 2 * BELIEVED_AFTER_S + jump_s
    assert hands.later(1.0) == 2 * BELIEVED_AFTER_S + jump_s + 1.0
    assert hands.clock.set_forward_s == max(0.0, jump_s)
    hands.clock.told(hands.clock.set_forward_s)
    assert hands.clock.set_forward_s == 0.0


def test_in_the_first_half_minute_the_later_time_is_the_right_one() -> None:
    hands = Hands()
    young = JournalClock(wall=lambda: NOON + hands.passed + hands.set_by, steady=lambda: hands.passed)
    hands.set_by = -YEAR_S
    hands.passed += BELIEVED_AFTER_S - 1.0
    assert young.now() == NOON + hands.passed - YEAR_S
    hands.set_by = 0.0
    assert young.now() == NOON + hands.passed
    assert young.set_forward_s == YEAR_S


def test_a_clock_that_is_trimmed_is_followed_at_once() -> None:
    hands = Hands()
    hands.set_by = NOTICED_S - 1.0
    assert hands.later(1.0) == BELIEVED_AFTER_S + NOTICED_S
    hands.set_by = 2 * NOTICED_S - 2.0
    assert hands.later(1.0) == BELIEVED_AFTER_S + 2 * NOTICED_S
