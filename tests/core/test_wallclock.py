"""Spans between two times bear a clock that was set in between."""

from __future__ import annotations

import pytest

from llamacpp_mqtt_deploy.core.wallclock import elapsed_s, mended

NOW = 1_800_000_000.0
NEW_YEAR_2020 = 1_577_836_800.0


@pytest.mark.parametrize("moment", [NOW, NOW - 5, NOW + 3600, NEW_YEAR_2020])
def test_a_time_that_can_be_true_is_kept(moment: float) -> None:
    assert mended(moment, NOW) == moment


@pytest.mark.parametrize("moment", [NOW + 3600.5, NEW_YEAR_2020 - 0.5, 0.0])
def test_a_time_of_a_wrong_clock_is_now(moment: float) -> None:
    assert mended(moment, NOW) == NOW
    assert elapsed_s(moment, NOW) == 0.0


def test_while_the_clock_was_never_set_its_times_are_kept() -> None:
    assert mended(100.0, 160.0) == 100.0
    assert elapsed_s(100.0, NEW_YEAR_2020 - 1) == NEW_YEAR_2020 - 101
    assert elapsed_s(100.0, NEW_YEAR_2020) == 0.0


def test_time_goes_on_and_never_back() -> None:
    assert elapsed_s(NOW - 60, NOW) == 60.0
    assert elapsed_s(NOW + 60, NOW) == 0.0
