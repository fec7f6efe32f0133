"""Histograms: every value is in one bucket, and what is read agrees with itself."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.histogram import COMMIT_BOUNDS_S, REQUEST_BOUNDS_S, Histogram


@given(st.lists(st.floats(0, 1000, allow_nan=False)))
def test_a_bucket_counts_the_values_up_to_its_bound(values: list[float]) -> None:
    histogram = Histogram(REQUEST_BOUNDS_S)
    for value in values:
        histogram.observe(value)
    reading = histogram.read()
    for bound, counted in zip((*reading.bounds, math.inf), reading.cumulative, strict=True):
        assert counted == sum(value <= bound for value in values)
    assert reading.count == len(values)
    assert math.isclose(reading.sum, sum(values), abs_tol=1e-9)


def test_bounds_rise_from_ten_milliseconds_to_ten_minutes() -> None:
    assert (REQUEST_BOUNDS_S[0], REQUEST_BOUNDS_S[-1]) == (0.01, 600.0)
    for bounds in (REQUEST_BOUNDS_S, COMMIT_BOUNDS_S):
        assert list(bounds) == sorted(set(bounds))


def test_a_reading_does_not_change_when_more_is_observed() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(0.5)
    reading = histogram.read()
    histogram.observe(0.5)
    assert (reading.count, reading.sum) == (1, 0.5)
