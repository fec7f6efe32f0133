"""The waiting line and the rate limiter, by their promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.admission import AdmissionQueue, RateLimiter, Ticket
from llamacpp_mqtt_deploy.core.errors import Busy, RateLimited, SessionBusy


def _line(queue_size: int = 100, session_queue: int = 4, aging_s: float = 30.0) -> AdmissionQueue:
    return AdmissionQueue(queue_size=queue_size, session_queue=session_queue, aging_s=aging_s)


def _ticket(key: str, *, lane: int = 1, level: str = "a", session: str | None = None, at: float = 0.0) -> Ticket:
    return Ticket(key=key, lane=lane, first_level=level, session=session, arrived=at)


def _admit(line: AdmissionQueue, *tickets: Ticket) -> None:
    for ticket in tickets:
        line.admit(ticket, retry_after_s=5.0)


def _order(line: AdmissionQueue, now: float = 0.0) -> list[object]:
    taken = []
    while (ticket := line.next(now)) is not None:
        taken.append(ticket.key)
        if ticket.session is not None:
            line.leave_session(ticket.session)
    return taken


def test_the_higher_lane_goes_first_and_arrival_decides_within_it() -> None:
    line = _line()
    _admit(line, _ticket("n1", at=1), _ticket("b", lane=2, at=0), _ticket("i", lane=0, at=3), _ticket("n2", at=2))
    assert _order(line, now=3) == ["i", "n1", "n2", "b"]


def test_batch_never_starves_behind_a_stream_of_interactive_requests() -> None:
    line = _line(aging_s=10.0)
    _admit(line, _ticket("batch", lane=2, level="batch", at=0.0))
    taken = []
    for second in range(60):
        _admit(line, _ticket(f"i{second}", lane=0, level="chatty", at=float(second)))
        ticket = line.next(float(second))
        assert ticket is not None
        taken.append(ticket.key)
        if ticket.key == "batch":
            break
    assert taken[-1] == "batch"
    assert len(taken) <= 21


def test_first_levels_take_turns_however_many_sessions_one_makes() -> None:
    line = _line()
    _admit(line, *[_ticket(f"g{n}", level="greedy", session=f"greedy/{n}", at=n) for n in range(5)])
    _admit(line, _ticket("m0", level="modest", at=10), _ticket("m1", level="modest", at=11))
    order = _order(line, now=11)
    assert order[:4] == ["g0", "m0", "g1", "m1"]


def test_prompts_of_one_session_keep_their_order_whatever_their_lane() -> None:
    line = _line()
    _admit(line, _ticket("slow", lane=2, session="s", at=0), _ticket("urgent", lane=0, session="s", at=1))
    assert _order(line, now=1) == ["slow", "urgent"]


def test_a_session_that_runs_lets_nobody_of_its_own_pass() -> None:
    line = _line()
    _admit(line, _ticket("one", session="s"), _ticket("two", session="s", at=1))
    assert line.next(1.0) is not None
    assert line.next(1.0) is None
    line.leave_session("s")
    assert line.next(1.0) is not None


def test_a_held_ticket_is_not_taken_and_holds_its_session_back() -> None:
    line = _line()
    held = _ticket("one", session="s")
    held.held = True
    _admit(line, held, _ticket("two", session="s", at=1), _ticket("other", at=2))
    assert _order(line, now=2) == ["other"]
    assert line.front(1, 2.0) == {"one"}


def test_a_full_line_gives_the_place_of_the_lowest_lane_to_a_higher_one() -> None:
    line = _line(queue_size=2)
    _admit(line, _ticket("b1", lane=2, at=0), _ticket("b2", lane=2, at=1))
    evicted = line.admit(_ticket("i", lane=0, at=2), retry_after_s=5.0)
    assert evicted is not None
    assert evicted.key == "b2"
    with pytest.raises(Busy) as refusal:
        line.admit(_ticket("b3", lane=2, at=3), retry_after_s=5.0)
    assert refusal.value.details["retry_after_s"] == 5.0


def test_the_running_prompt_does_not_count_among_a_sessions_waiting_ones() -> None:
    line = _line(session_queue=2)
    _admit(line, _ticket("r", session="s"))
    assert line.next(0.0) is not None
    _admit(line, _ticket("w1", session="s"), _ticket("w2", session="s"))
    with pytest.raises(SessionBusy):
        line.admit(_ticket("w3", session="s"), retry_after_s=5.0)


def test_a_session_does_not_starve_behind_a_stream_of_new_ones_of_its_level() -> None:
    for newcomer in (None, "new"):
        line = _line(aging_s=1e9)
        _admit(line, _ticket("first", lane=0, session="old"))
        assert line.next(0.0) is not None
        line.leave_session("old")
        _admit(line, _ticket("second", lane=0, session="old", at=1.0))
        taken = []
        for second in range(2, 10):
            session = None if newcomer is None else f"{newcomer}{second}"
            _admit(line, _ticket(f"{second}", lane=0, session=session, at=float(second)))
            ticket = line.next(float(second))
            assert ticket is not None
            taken.append(ticket.key)
        assert "second" in taken[:2]


def test_places_count_turns_and_leave_out_those_that_go_at_once() -> None:
    line = _line()
    _admit(line, *[_ticket(f"g{n}", level="greedy", at=n) for n in range(3)], _ticket("m", level="modest", at=10))
    assert line.positions(11.0) == {"g0": 1, "m": 2, "g1": 3, "g2": 4}
    assert line.front(2, 11.0) == {"g0", "m"}
    assert line.positions(11.0, free=2) == {"g1": 1, "g2": 2}


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.sampled_from([None, "s", "t"]), st.floats(0, 100)),
        max_size=40,
    )
)
def test_everybody_admitted_is_taken_exactly_once_and_sessions_keep_their_order(
    wishes: list[tuple[int, str, str | None, float]],
) -> None:
    line = _line(session_queue=100)
    arrivals = sorted(wishes, key=lambda wish: wish[3])
    tickets = [
        _ticket(str(n), lane=lane, level=level, session=session, at=at)
        for n, (lane, level, session, at) in enumerate(arrivals)
    ]
    _admit(line, *tickets)
    told = line.positions(100.0)
    assert sorted(told.values()) == list(range(1, len(tickets) + 1))
    order = _order(line, now=100.0)
    assert order == sorted(told, key=lambda key: told[key]), "the place that was told is the turn that was taken"
    assert sorted(order, key=str) == sorted((ticket.key for ticket in tickets), key=str)
    for session in ("s", "t"):
        mine = [ticket.key for ticket in tickets if ticket.session == session]
        assert [key for key in order if key in mine] == mine


def test_the_rate_limiter_gives_a_minutes_worth_at_once_and_then_evenly() -> None:
    rates = RateLimiter(60)
    for _ in range(60):
        rates.take("ada", 0.0)
    with pytest.raises(RateLimited) as refusal:
        rates.take("ada", 0.0)
    assert refusal.value.details["retry_after_s"] == pytest.approx(1.0)
    rates.take("bob", 0.0)
    rates.take("ada", 1.01)


@given(st.lists(st.floats(0, 5), max_size=200), st.integers(1, 30))
def test_no_minute_holds_more_than_twice_the_limit(gaps: list[float], per_minute: int) -> None:
    rates = RateLimiter(per_minute)
    now, taken = 0.0, []
    for gap in gaps:
        now += gap
        try:
            rates.take("ada", now)
            taken.append(now)
        except RateLimited:
            pass
    for start in taken:
        assert sum(1 for at in taken if start <= at < start + 60) <= 2 * per_minute + 1
