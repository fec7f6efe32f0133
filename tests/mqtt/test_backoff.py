"""Back-off, reminders and the choice of the MQTT version, on a hand clock."""

from __future__ import annotations

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.reminding import Reminder
from llamacpp_mqtt_deploy.mqtt.backoff import Backoff, VersionChoice


class Slept(Exception):
    """Ends tenacity's loop at its first pause."""


def next_s(backoff: Backoff) -> float:
    """The pause that tenacity's loop makes after an attempt."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(float(seconds))
        raise Slept

    again = tenacity.Retrying(retry=tenacity.retry_if_result(lambda _: True), wait=backoff, sleep=sleep)
    with pytest.raises(Slept):
        again(lambda: None)
    return pauses[0]


def test_pauses_begin_at_a_tenth_of_a_second_and_double_up_to_the_most() -> None:
    backoff = Backoff(1.0, draw=lambda: 0.0)
    assert [next_s(backoff) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


@given(most=st.floats(0.1, 10.0), draws=st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1, max_size=20))
def test_a_pause_is_never_over_the_most_nor_under_half_of_a_tenth(most: float, draws: list[float]) -> None:
    source = iter(draws)
    backoff = Backoff(most, draw=lambda: next(source))
    assert all(0.05 <= next_s(backoff) <= most for _ in draws)


def test_only_a_connection_that_lasted_shortens_the_next_pause() -> None:
    backoff = Backoff(10.0, draw=lambda: 0.0)
    for _ in range(4):
        next_s(backoff)
    backoff.ended(1.0)
    assert next_s(backoff) == 1.6
    backoff.ended(60.0)
    assert next_s(backoff) == 0.1


def test_the_same_reason_is_repeated_at_growing_pauses_and_a_new_one_at_once() -> None:
    reminder = Reminder()
    said = [now for now in range(2000) if reminder.due("refused", float(now))]
    assert said == [0, 10, 70, 370]
    assert reminder.due("another", 2000.0)
    assert reminder.due("refused", 2001.0)
    reminder.clear()
    assert reminder.due("refused", 2002.0)


def test_a_stated_refusal_falls_back_at_once_and_stays_for_a_short_outage() -> None:
    choice = VersionChoice("auto")
    assert choice.in_doubt
    assert choice.refused()
    assert choice.current == "3.1.1"
    choice.answered()
    choice.lost(100.0)
    seen = []
    for now in (110.0, 161.0):
        choice.before_attempt(now)
        seen.append(choice.current)
    assert seen == ["3.1.1", "5"]


def test_silence_is_believed_the_second_time_and_checked_at_the_next_outage() -> None:
    choice = VersionChoice("auto")
    seen = []
    for silent in (True, True, False):
        if silent:
            choice.unanswered()
        else:
            choice.answered()
        seen.append(choice.current)
    for now, silent_again in ((0.0, True), (10.0, False)):
        choice.lost(now)
        seen.append(choice.current)
        if silent_again:
            assert choice.unanswered()
        choice.answered()
    seen.append(choice.current)
    assert seen == ["5", "3.1.1", "3.1.1", "5", "3.1.1", "3.1.1"]


def test_silence_never_costs_a_proven_version() -> None:
    choice = VersionChoice("auto")
    choice.answered()
    choice.lost(0.0)
    assert not any(choice.unanswered() for _ in range(20))
    assert choice.current == "5"


def test_silence_on_both_versions_alternates() -> None:
    choice = VersionChoice("auto")
    seen = []
    for _ in range(8):
        seen.append(choice.current)
        choice.unanswered()
    assert seen == ["5", "5", "3.1.1", "3.1.1", "5", "5", "3.1.1", "3.1.1"]


def test_a_message_that_cannot_be_read_three_times_is_fetched_in_3_1_1() -> None:
    choice = VersionChoice("auto")
    choice.answered()
    for _ in range(2):
        choice.unreadable()
    choice.readable()
    for _ in range(3):
        assert choice.current == "5"
        choice.unreadable()
    assert choice.current == "3.1.1"


@given(
    st.sampled_from(["5", "3.1.1"]),
    st.lists(st.sampled_from(["answered", "refused", "unanswered", "unreadable", "lost"]), max_size=30),
)
def test_a_fixed_version_is_never_left(setting: str, events: list[str]) -> None:
    choice = VersionChoice(setting)  # type: ignore[arg-type]
    for number, event in enumerate(events):
        if event == "lost":
            choice.lost(float(number * 100))
        else:
            getattr(choice, event)()
        choice.before_attempt(float(number * 100 + 90))
        assert choice.current == setting
        assert not choice.in_doubt
