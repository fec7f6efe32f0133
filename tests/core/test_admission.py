"""The waiting line and the rate limiter, by their promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.admission import AdmissionQueue, QueueLimits
from llamacpp_mqtt_deploy.core.errors import Busy, RateLimited, SessionBusy
from llamacpp_mqtt_deploy.core.rates import RateLimiter
from llamacpp_mqtt_deploy.core.turns import Ticket, Turns


def _line(
    queue_size: int = 100,
    session_queue: int = 4,
    aging_s: float = 30.0,
    share: float = 1.0,
    max_bytes: int = 1_000_000,
) -> AdmissionQueue:
    limits = QueueLimits(queue_size=queue_size, session_queue=session_queue, share=share, max_bytes=max_bytes)
    return AdmissionQueue(limits=limits, aging_s=aging_s)


def _ticket(
    key: str, *, lane: int = 1, level: str = "a", session: str | None = None, at: float = 0.0, size: int = 0
) -> Ticket:
    return Ticket(key=key, lane=lane, first_level=level, session=session, arrived=at, size=size)


def _flood(line: AdmissionQueue, level: str, number: int, *, size: int = 0) -> None:
    _admit(line, *[_ticket(f"{level}{n}", level=level, at=n, size=size) for n in range(number)])


def _evicted(line: AdmissionQueue, ticket: Ticket, paced: Sequence[Ticket] = ()) -> list[object]:
    return [other.key for other in line.admit(ticket, retry_after_s=5.0, paced=paced)]


def _held(line: AdmissionQueue) -> Counter[str]:
    return Counter(ticket.first_level for ticket in line)


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


def test_a_full_queue_gives_the_place_of_an_own_lower_lane_to_a_higher_one() -> None:
    line = _line(queue_size=2)
    _admit(line, _ticket("b1", lane=2, at=0), _ticket("b2", lane=2, at=1))
    assert _evicted(line, _ticket("i", lane=0, at=2)) == ["b2"]
    with pytest.raises(Busy) as refusal:
        line.admit(_ticket("b3", lane=2, at=3), retry_after_s=5.0)
    assert refusal.value.details["retry_after_s"] == 5.0


def test_a_newcomer_takes_the_newest_place_of_whoever_holds_most() -> None:
    line = _line(queue_size=6)
    _flood(line, "greedy", 4)
    _admit(line, _ticket("m0", level="modest", at=10), _ticket("m1", level="modest", at=11))
    assert _evicted(line, _ticket("n0", level="new", at=20)) == ["greedy3"]
    with pytest.raises(Busy):
        line.admit(_ticket("more", level="greedy", at=21), retry_after_s=5.0)


def test_two_levels_never_push_each_other_out_in_turn() -> None:
    line = _line(queue_size=1)
    _flood(line, "a", 1)
    with pytest.raises(Busy):
        line.admit(_ticket("b0", level="b"), retry_after_s=5.0)
    line = _line(queue_size=3)
    _flood(line, "a", 3)
    assert _evicted(line, _ticket("b0", level="b")) == ["a2"]
    for level in "ab":
        with pytest.raises(Busy):
            line.admit(_ticket("more", level=level), retry_after_s=5.0)


def test_an_urgent_request_of_the_level_that_holds_most_takes_a_place_of_its_own() -> None:
    line = _line(queue_size=4)
    _flood(line, "greedy", 3)
    _admit(line, _ticket("m", level="modest", lane=2, at=5))
    assert _evicted(line, _ticket("urgent", level="greedy", lane=0, at=6)) == ["greedy2"]


def test_an_urgent_request_of_a_level_that_holds_fewer_takes_the_place_of_whoever_holds_most() -> None:
    line = _line(queue_size=4)
    _flood(line, "greedy", 3)
    _admit(line, _ticket("m", level="modest", lane=2, at=5))
    assert _evicted(line, _ticket("urgent", level="modest", lane=0, at=6)) == ["greedy2"]
    # Now both hold as many: from here on it costs its own.
    assert _evicted(line, _ticket("another", level="modest", lane=0, at=7)) == ["m"]


def test_urgent_requests_put_out_nobody_elses_however_many_come() -> None:
    line = _line(queue_size=4)
    _admit(line, *[_ticket(f"m{n}", level="modest", lane=2, at=n) for n in range(2)])
    _admit(line, *[_ticket(f"g{n}", level="greedy", lane=0, at=n) for n in range(2)])
    for number in range(5):
        with pytest.raises(Busy):
            line.admit(_ticket(f"more{number}", level="greedy", lane=0, at=9), retry_after_s=5.0)


def test_of_whoever_holds_most_the_lowest_lane_goes_first() -> None:
    line = _line(queue_size=3)
    lanes = [2, 1, 0]
    _admit(line, *[_ticket(f"lane{lane}", level="greedy", lane=lane, at=n) for n, lane in enumerate(lanes)])
    assert _evicted(line, _ticket("modest", level="modest", lane=2, at=3)) == ["lane2"]


def test_a_level_alone_may_fill_the_queue_and_keeps_to_its_share_when_others_wait() -> None:
    line = _line(queue_size=8, share=0.5)
    _admit(line, _ticket("m", level="modest"))
    _flood(line, "greedy", 4)
    with pytest.raises(Busy, match="your share"):
        line.admit(_ticket("more", level="greedy", at=4), retry_after_s=5.0)
    line.remove("m")
    _admit(line, *[_ticket(f"more{n}", level="greedy", at=4 + n) for n in range(4)])
    assert len(line) == 8


def test_large_requests_are_shared_by_their_bytes() -> None:
    line = _line(max_bytes=1000)
    _flood(line, "greedy", 10, size=100)
    assert _evicted(line, _ticket("m0", level="modest", size=150)) == ["greedy9", "greedy8"]
    assert _evicted(line, _ticket("m1", level="modest", size=350)) == ["greedy7", "greedy6", "greedy5"]
    with pytest.raises(Busy, match="MiB"):
        line.admit(_ticket("m2", level="modest", size=50), retry_after_s=5.0)
    assert _held(line) == {"greedy": 5, "modest": 2}


def test_a_level_keeps_to_its_share_of_the_bytes_when_others_wait() -> None:
    line = _line(max_bytes=1000, share=0.5)
    _admit(line, _ticket("m", level="modest", size=10))
    _flood(line, "greedy", 5, size=100)
    with pytest.raises(Busy, match="your share"):
        line.admit(_ticket("more", level="greedy", size=100), retry_after_s=5.0)


def test_a_request_larger_than_all_bytes_has_a_place_in_an_empty_queue_only() -> None:
    line = _line(max_bytes=1000)
    assert _evicted(line, _ticket("large", size=5000)) == []
    with pytest.raises(Busy):
        line.admit(_ticket("second", size=5000), retry_after_s=5.0)
    assert line.next(0.0) is not None
    assert _evicted(line, _ticket("small", level="b", size=10)) == []
    with pytest.raises(Busy):
        line.admit(_ticket("third", size=5000), retry_after_s=5.0)


def test_answers_that_are_paced_take_places_of_their_own_level_alone() -> None:
    line = _line(queue_size=4)
    paced = [_ticket(f"p{n}", level="greedy") for n in range(4)]
    with pytest.raises(Busy):
        line.admit(_ticket("more", level="greedy"), retry_after_s=5.0, paced=paced)
    for number in range(4):
        assert _evicted(line, _ticket(f"m{number}", level="modest"), paced) == []
    with pytest.raises(Busy):
        line.admit(_ticket("m4", level="modest"), retry_after_s=5.0, paced=paced)


def test_however_many_levels_pace_answers_there_are_bounds() -> None:
    line = _line(queue_size=2)
    paced = [_ticket(f"p{n}", level=f"l{n}") for n in range(4)]
    with pytest.raises(Busy):
        line.admit(_ticket("new", level="new"), retry_after_s=5.0, paced=paced)


def test_a_request_of_an_earlier_life_has_its_place_whatever_the_limits() -> None:
    line = _line(queue_size=1, max_bytes=1)
    for number in range(3):
        assert line.admit(_ticket(f"{number}", size=10), retry_after_s=5.0, force=True) == []
    assert len(line) == 3


_ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from("aaabbcde"),
        st.integers(0, 2),
        st.sampled_from(["come", "come", "come", "go"]),
        st.integers(0, 9),
    ),
    max_size=80,
)


@given(_ARRIVALS, st.integers(1, 12), st.integers(1, 40), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_the_queue_keeps_its_bounds_and_nobody_within_an_even_part_of_it_is_put_out_by_another_level(
    arrivals: list[tuple[str, int, str, int]], queue_size: int, max_bytes: int, share: float
) -> None:
    line = _line(queue_size=queue_size, max_bytes=max_bytes, share=share)
    for number, (level, lane, step, size) in enumerate(arrivals):
        if step == "go":
            line.next(float(number))
            continue
        before = list(line)
        newcomer = _ticket(str(number), lane=lane, level=level, at=number, size=size)
        try:
            gone = line.admit(newcomer, retry_after_s=1.0)
        except Busy:
            assert list(line) == before, "a refusal costs nobody anything"
            continue
        assert set(line) == (set(before) | {newcomer}) - set(gone)
        assert len(line) <= queue_size
        assert sum(ticket.size for ticket in line) <= max([max_bytes, *(ticket.size for ticket in line)])
        held_before = Counter(ticket.first_level for ticket in before)
        if _held(line)[level] > held_before[level] > 0 and set(held_before) - {level}:
            assert _held(line)[level] <= ceil(share * queue_size)
        assert all(each.lane > lane for each in gone if each.first_level == level)
        losers = {each.first_level for each in gone} - {level}
        for loser in losers:
            places, sizes = _held(line), Counter[str]()
            for ticket in line:
                sizes[ticket.first_level] += ticket.size
            assert places[loser] >= places[level] or sizes[loser] >= sizes[level], "it still holds no less"


@given(_ARRIVALS, st.integers(2, 12))
def test_a_level_below_its_even_part_of_a_full_queue_is_never_refused(
    arrivals: list[tuple[str, int, str, int]], queue_size: int
) -> None:
    line = _line(queue_size=queue_size)
    for number, (level, lane, _, _) in enumerate(arrivals):
        held = _held(line)
        even = queue_size // len({*held, level})
        try:
            line.admit(_ticket(str(number), lane=lane, level=level, at=number), retry_after_s=1.0)
        except Busy:
            assert held[level] >= even


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
        # The first level is a part of the session's path: one session is never of two levels.
        _ticket(str(n), lane=lane, level=level, session=session and f"{level}/{session}", at=at)
        for n, (lane, level, session, at) in enumerate(arrivals)
    ]
    _admit(line, *tickets)
    told = line.positions(100.0)
    assert sorted(told.values()) == list(range(1, len(tickets) + 1))
    order = _order(line, now=100.0)
    assert order == sorted(told, key=lambda key: told[key]), "the place that was told is the turn that was taken"
    assert sorted(order, key=str) == sorted((ticket.key for ticket in tickets), key=str)
    for session in {ticket.session for ticket in tickets} - {None}:
        mine = [ticket.key for ticket in tickets if ticket.session == session]
        assert [key for key in order if key in mine] == mine


def test_a_queue_holds_sixty_four_mebibytes_and_half_of_it_for_one_level_where_nothing_else_is_said() -> None:
    mib = 1024 * 1024
    line = AdmissionQueue(limits=QueueLimits(queue_size=10, session_queue=4), aging_s=30.0)
    _admit(line, _ticket("m", level="modest", size=1))
    _admit(line, _ticket("g0", level="greedy", size=1), _ticket("g1", level="greedy", size=32 * mib - 1))
    with pytest.raises(Busy, match="your share"):
        line.admit(_ticket("g2", level="greedy", size=1), retry_after_s=5.0)
    assert line.remove("m") is not None
    _admit(line, _ticket("g2", level="greedy", size=32 * mib))
    with pytest.raises(Busy, match=r"64 MiB of requests wait"):
        line.admit(_ticket("g3", level="greedy", size=1), retry_after_s=5.0)


def test_the_lanes_are_counted_by_their_names() -> None:
    line = _line()
    assert line.by_lane() == {"interactive": 0, "normal": 0, "batch": 0}
    _admit(line, *[_ticket(f"{n}", lane=lane) for n, lane in enumerate((0, 2, 2))])
    assert line.by_lane() == {"interactive": 1, "normal": 0, "batch": 2}


def test_a_ticket_is_taken_out_once() -> None:
    line = _line()
    ticket = _ticket("one")
    _admit(line, ticket)
    assert line.remove("one") is ticket
    assert line.remove("one") is None
    assert len(line) == 0


def test_a_session_that_is_held_waits_until_it_is_let_go() -> None:
    line = _line()
    line.hold_session("s")
    _admit(line, _ticket("one", session="s"))
    assert line.next(0.0) is None
    assert line.front(5, 0.0) == set()
    line.leave_session("s")
    assert line.front(0, 0.0) == line.front(-1, 0.0) == set()
    assert line.front(1, 0.0) == {"one"}
    assert line.next(0.0) is not None


def test_however_many_places_are_free_one_prompt_of_a_session_goes_at_a_time() -> None:
    line = _line()
    _admit(line, _ticket("one", session="s"), _ticket("two", session="s", at=1.0), _ticket("other", at=2.0))
    assert line.front(3, 2.0) == {"one", "other"}
    assert line.positions(2.0, free=3) == {"two": 1}


def test_one_prompt_of_an_idle_session_goes_at_once_and_does_not_count_as_waiting() -> None:
    line = _line(session_queue=1)
    _admit(line, _ticket("goes", session="s"), _ticket("waits", session="s"))
    with pytest.raises(SessionBusy) as refusal:
        line.admit(_ticket("more", session="s"), retry_after_s=7.0)
    assert refusal.value.details["retry_after_s"] == 7.0
    assert "1 prompts" in refusal.value.message
    _admit(line, _ticket("other", session="t"), _ticket("stateless"))


def test_a_queue_shared_evenly_by_two_gives_half_to_the_second_one() -> None:
    line = _line(queue_size=2)
    _flood(line, "a", 2)
    assert _evicted(line, _ticket("b0", level="b")) == ["a1"]
    with pytest.raises(Busy):
        line.admit(_ticket("b1", level="b"), retry_after_s=5.0)


def test_paced_answers_of_others_leave_as_many_places_again() -> None:
    line = _line(queue_size=2)
    paced = [_ticket(f"p{n}", level=f"l{n}") for n in range(3)]
    assert line.admit(_ticket("new", level="new"), retry_after_s=5.0, paced=paced) == []
    with pytest.raises(Busy):
        line.admit(_ticket("newer", level="newer"), retry_after_s=5.0, paced=paced)


def test_a_request_moves_up_one_lane_each_time_it_has_waited_so_long() -> None:
    for now, order in ((105.0, ["normal", "batch"]), (109.9, ["normal", "batch"]), (110.0, ["batch", "normal"])):
        line = _line(aging_s=10.0)
        _admit(line, _ticket("batch", lane=2, at=100.0), _ticket("normal", lane=1, at=104.0))
        assert _order(line, now=now) == order


def test_a_level_that_had_no_turn_yet_goes_before_one_that_had() -> None:
    line = _line()
    _admit(line, _ticket("a0", level="a"))
    assert line.next(0.0) is not None
    _admit(line, _ticket("a1", level="a", at=1.0), _ticket("b0", level="b", at=2.0))
    assert _order(line, now=2.0) == ["b0", "a1"]


def test_the_turns_of_four_thousand_levels_and_sessions_are_remembered() -> None:
    turns = Turns(aging_s=30.0)

    def take(name: str) -> None:
        turns.take(_ticket(name, level=name, session=f"{name}/s"))

    take("quiet")
    take("busy")
    for number in range(4094):
        take(f"other{number}")
    assert len(turns._levels) == len(turns._sessions) == 4096
    take("busy")
    take("one more")
    assert len(turns._levels) == len(turns._sessions) == 4096
    assert ("quiet" in turns._levels, "busy" in turns._levels) == (False, True)
    assert ("quiet/s" in turns._sessions, "busy/s" in turns._sessions) == (False, True)


def test_a_new_ticket_is_not_held_and_of_no_size() -> None:
    ticket = Ticket(key="k", lane=1, first_level="a", session=None, arrived=0.0)
    assert (ticket.size, ticket.held) == (0, False)


def test_the_rate_limiter_gives_a_minutes_worth_at_once_and_then_evenly() -> None:
    rates = RateLimiter(60)
    for _ in range(60):
        rates.take("ada", 0.0)
    with pytest.raises(RateLimited) as refusal:
        rates.take("ada", 0.0)
    assert refusal.value.details["retry_after_s"] == pytest.approx(1.0)
    rates.take("bob", 0.0)
    rates.take("ada", 1.01)


def test_a_minutes_worth_may_be_used_in_advance_by_what_is_allowed_to() -> None:
    rates = RateLimiter(2)
    for _ in range(2):
        rates.take("ada", 0.0)
    with pytest.raises(RateLimited):
        rates.take("ada", 0.0)
    for _ in range(2):
        rates.take("ada", 0.0, ahead=True)
    with pytest.raises(RateLimited) as refusal:
        rates.take("ada", 0.0, ahead=True)
    assert refusal.value.details["retry_after_s"] == pytest.approx(30.0)
    with pytest.raises(RateLimited):
        rates.take("ada", 80.0)
    rates.take("ada", 91.0)


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


def test_a_rate_of_nothing_limits_nothing() -> None:
    for off in (0, -1):
        rates = RateLimiter(off)
        for _ in range(1000):
            rates.take("ada", 0.0)
        assert rates._buckets == {}, "nor does it remember anybody"


def test_whoever_waits_a_little_less_than_it_takes_is_told_of_a_tenth_of_a_second() -> None:
    rates = RateLimiter(60)
    for _ in range(60):
        rates.take("ada", 0.0)
    with pytest.raises(RateLimited) as refusal:
        rates.check("ada", 0.99)
    assert refusal.value.details["retry_after_s"] == 0.1
    with pytest.raises(
        RateLimited, match=r"more than 60 messages in a minute; the next one is taken in 0\.7 s"
    ) as refusal:
        rates.take("ada", 0.26)
    assert refusal.value.details["retry_after_s"] == 0.7
    rates.check("ada", 1.0)
    rates.check("ada", 1.0)  # which counts nothing


def test_a_level_that_was_quiet_for_long_has_no_more_than_a_minutes_worth() -> None:
    rates = RateLimiter(3)
    rates.take("ada", 0.0)
    for _ in range(3):
        rates.take("ada", 10_000.0)
    with pytest.raises(RateLimited):
        rates.take("ada", 10_000.0)


def test_the_last_four_thousand_levels_are_told_apart() -> None:
    rates = RateLimiter(2)
    for name in ("ada", "bob", "bob", "ada"):
        rates.take(name, 0.0)
    for number in range(4094):
        rates.take(f"other{number}", 0.0)
    for name in ("ada", "bob"):
        with pytest.raises(RateLimited):
            rates.check(name, 0.0)
    rates.take("one too many", 0.0)  # bob, who was quiet for longest, is forgotten
    rates.take("bob", 0.0)
    rates.take("bob", 0.0)
    with pytest.raises(RateLimited):
        rates.check("bob", 0.0)
