"""A clock that is set while the worker runs."""

from __future__ import annotations

from llamacpp_mqtt_deploy.service.clock_jumps import ClockJumps


class Hands:
    """Two clocks: one can be set."""

    def __init__(self) -> None:
        self.wall = 1_800_000_000.0
        self.steady = 50.0
        self.jumps = ClockJumps(wall=lambda: self.wall, steady=lambda: self.steady)

    def pass_s(self, seconds: float, *, set_by: float = 0.0) -> float:
        self.steady += seconds
        self.wall += seconds + set_by
        return self.jumps.look()[1]


def test_time_that_passes_is_no_jump() -> None:
    hands = Hands()
    assert [hands.pass_s(seconds) for seconds in (0.0, 5.0, 86400.0 * 400)] == [0.0, 0.0, 0.0]


def test_a_clock_that_is_set_is_noticed_once() -> None:
    hands = Hands()
    year_s = 365 * 86400.0
    assert hands.pass_s(5.0, set_by=year_s) == year_s
    assert hands.pass_s(5.0) == 0.0
    assert hands.pass_s(5.0, set_by=-year_s) == -year_s


def test_a_clock_that_is_trimmed_is_not_noticed() -> None:
    hands = Hands()
    assert hands.pass_s(5.0, set_by=0.5) == hands.pass_s(5.0, set_by=-59.0) == 0.0
