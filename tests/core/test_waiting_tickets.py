"""What is counted as tickets come and go, beside the same counted anew from all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.admission import EXACT_PLACES, AdmissionQueue, QueueLimits
from llamacpp_mqtt_deploy.core.queue_places import Counted, Measure
from llamacpp_mqtt_deploy.core.turns import Ticket
from llamacpp_mqtt_deploy.core.waiting_tickets import BesidePaced, WaitingTickets

LEVELS = ("a", "b", "c")
PLACES = Measure("places", 9, lambda _: 1, "")
BYTES = Measure("bytes", 9, lambda each: each.size, "")

_wishes = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(LEVELS),
        st.sampled_from([None, "s", "t"]),
        st.floats(0, 100),
        st.integers(0, 50),
    ),
    max_size=20,
)


def _tickets(wishes: Sequence[tuple[int, str, str | None, float, int]], first: int = 0) -> list[Ticket]:
    return [
        Ticket(
            key=f"k{first + n}",
            lane=lane,
            first_level=level,
            session=session and f"{level}/{session}",
            arrived=arrived,
            size=size,
            number=first + n,
        )
        for n, (lane, level, session, arrived, size) in enumerate(wishes)
    ]


def _held(tickets: Sequence[Ticket], measure: Measure, level: str) -> int:
    return sum(measure.of(each) for each in tickets if each.first_level == level)


def _largest(left: Sequence[Ticket], paced: Sequence[Ticket], measure: Measure, *, but: str) -> tuple[str, int] | None:
    levels = sorted({each.first_level for each in left} - {but})
    found = max(levels, key=lambda level: _held([*left, *paced], measure, level), default=None)
    return None if found is None else (found, _held([*left, *paced], measure, found))


def _last(left: Sequence[Ticket], level: str, lower_than: int) -> Ticket | None:
    mine = [each for each in left if each.first_level == level and each.lane > lower_than]
    return max(mine, key=lambda each: (each.lane, each.arrived, each.number), default=None)


@given(_wishes, _wishes, st.data())
def test_whatever_comes_and_goes_the_counts_are_those_of_what_is_there(
    wishes: list[tuple[int, str, str | None, float, int]],
    pacing: list[tuple[int, str, str | None, float, int]],
    data: st.DataObject,
) -> None:
    tickets = _tickets(wishes)
    paced = _tickets(pacing, first=1000)
    waiting = WaitingTickets()
    for ticket in tickets:
        waiting.add(ticket)
    for key in data.draw(st.lists(st.sampled_from([each.key for each in tickets] or ["none"]), unique=True)):
        gone = waiting.remove(key)
        assert gone == next((each for each in tickets if each.key == key), None)
        tickets = [each for each in tickets if each.key != key]
        assert waiting.remove(key) is None

    assert (len(waiting), list(waiting)) == (len(tickets), tickets)
    assert {each for chain in waiting.chains().values() for each in chain.values()} == set(tickets)
    for session in ("a/s", "b/t"):
        mine = [each for each in tickets if each.session == session]
        assert waiting.in_session(session) == len(mine)
        assert list(waiting.chains().get(session, {}).values()) == mine
    beside = BesidePaced(waiting, paced)
    for measure in (PLACES, BYTES):
        assert beside.held(measure) == sum(map(measure.of, tickets))
        for level in LEVELS:
            assert beside.held(measure, level) == _held(tickets, measure, level)
    leaving, left = Counted(), list(tickets)
    _ask(beside, leaving, left, paced)
    for ticket in data.draw(st.lists(st.sampled_from(tickets), unique=True)) if tickets else []:
        leaving.add(ticket)
        left.remove(ticket)
        if data.draw(st.booleans()):
            _ask(beside, leaving, left, paced)
    _ask(beside, leaving, left, paced)


def _ask(beside: BesidePaced, leaving: Counted, left: Sequence[Ticket], paced: Sequence[Ticket]) -> None:
    for level in LEVELS:
        for measure in (PLACES, BYTES):
            assert beside.largest(measure, but=level, without=leaving) == _largest(left, paced, measure, but=level)
        for lower_than in (-1, 0, 1, 2):
            assert beside.last(level, lower_than=lower_than, without=leaving) == _last(left, level, lower_than)


def test_a_ticket_under_a_key_that_waits_takes_its_place() -> None:
    waiting = WaitingTickets()
    old, new = (Ticket("k", 1, "a", "a/s", arrived=0.0, size=size, number=size) for size in (3, 5))
    waiting.add(old)
    waiting.add(new)
    assert (list(waiting), waiting.held(BYTES), waiting.in_session("a/s")) == ([new], 5, 1)
    assert waiting.remove("k") is new
    assert (len(waiting), waiting.held(BYTES), dict(waiting.chains()), list(waiting.levels())) == (0, 0, {}, [])


@given(_wishes, st.floats(100, 400), st.integers(0, 5))
def test_who_is_next_is_the_first_of_the_whole_order(
    wishes: list[tuple[int, str, str | None, float, int]], now: float, turns: int
) -> None:
    queue = AdmissionQueue(limits=QueueLimits(queue_size=100, session_queue=100, share=1.0), aging_s=30.0)
    for ticket in _tickets(wishes):
        queue.admit(ticket, retry_after_s=1.0)
    for _ in range(turns):
        queue.next(now)  # their sessions stay busy
    heads = list(queue._heads())
    expected = next(queue.turns.order([(head,) for head in heads], now), None)
    assert queue.turns.first(heads, now) is expected
    assert queue.front(1, now) == (set() if expected is None else {expected.key})
    assert queue.next(now) is expected


def _long(number: int) -> AdmissionQueue:
    queue = AdmissionQueue(limits=QueueLimits(queue_size=10_000, session_queue=4, share=1.0), aging_s=1e9)
    for n in range(number):
        queue.admit(Ticket(f"k{n}", 1, f"u{n % 2}", None, arrived=float(n // 2)), retry_after_s=1.0)
    urgent = Ticket("urgent", 0, "u0", None, arrived=float(number))
    queue.admit(urgent, retry_after_s=1.0)
    return queue


def test_of_more_than_a_thousand_a_place_is_told_by_how_many_came_before() -> None:
    assert _long(EXACT_PLACES - 1).positions(0.0)["urgent"] == 1
    queue = _long(EXACT_PLACES)
    assert queue.positions(0.0)["urgent"] == EXACT_PLACES + 1
    assert queue.positions(0.0)["k0"] == 1
    assert queue.positions(0.0, free=2)["k0"] == 1, "the urgent one and one more go at once"
    ticket = queue.next(0.0)
    assert ticket is not None
    assert ticket.key == "urgent", "who is next does not depend on it"


def test_who_pushes_out_many_costs_a_few_looks_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = QueueLimits(queue_size=100_000, session_queue=4, max_bytes=2_000_000, share=1.0)
    queue = AdmissionQueue(limits=limits, aging_s=1e9)
    for n in range(2000):
        queue.admit(
            Ticket(f"k{n}", 1, "many" if n % 2 else f"u{n % 20}", None, arrived=n, size=1000), retry_after_s=1.0
        )
    looks = 0

    def counted(ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **named: Any) -> Any:
            nonlocal looks
            looks += 1
            return ask(*args, **named)

        return asked

    monkeypatch.setattr(WaitingTickets, "held", counted(WaitingTickets.held))
    monkeypatch.setattr(WaitingTickets, "places", counted(WaitingTickets.places))
    monkeypatch.setattr(Counted, "held", counted(Counted.held))
    newcomer = Ticket("large", 1, "me", None, arrived=2000, size=500_000)
    leaving = queue.admit(newcomer, retry_after_s=1.0)
    assert [each.key for each in leaving] == [f"k{n}" for n in range(1999, 999, -2)], "the newest of who holds most"
    assert looks < 50 * len(leaving), "not one for each that is about to leave"
