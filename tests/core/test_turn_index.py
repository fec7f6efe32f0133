"""A long queue lets the same requests go, in the same order, as a look at all that wait would."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core import admission, turns
from llamacpp_mqtt_deploy.core.admission import AdmissionQueue, QueueLimits
from llamacpp_mqtt_deploy.core.turn_index import TurnIndex
from llamacpp_mqtt_deploy.core.turns import Ticket, Turns

AGING_S = 30.0
LEVELS = "abcdefghij"
STEPS = {"admit": 40, "next": 25, "leave": 12, "remove": 5, "again": 2, "hold": 2, "wait": 10, "release": 6, "aging": 1}


class _Queue(AdmissionQueue):
    def force(self, ticket: Ticket) -> None:
        self.admit(ticket, retry_after_s=1.0, force=True)


class _Both:
    """The same steps with an index from the first ticket on, and with none."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        limits = QueueLimits(queue_size=1000, session_queue=100, share=1.0)
        self._queues = {above: _Queue(limits=limits, aging_s=AGING_S) for above in (-1, 10**9)}
        self._tickets: list[tuple[Ticket, Ticket]] = []

    def do(self, step: str, *given: Any) -> list[Any]:
        """Call this method of both; of a pair of tickets each gets its own."""
        found = []
        for place, (above, queue) in enumerate(self._queues.items()):
            self._patch.setattr(admission, "_INDEXED_ABOVE", above)
            found.append(getattr(queue, step)(*[each[place] if isinstance(each, tuple) else each for each in given]))
        return found

    def admit(self, key: str, lane: int, level: str, session: str | None, now: float, *, held: bool) -> None:
        path = session and f"{level}/{session}"
        two = Ticket(key, lane, level, path, now, held=held), Ticket(key, lane, level, path, now, held=held)
        self._tickets.append(two)
        self.do("force", two)

    def next(self, now: float) -> Ticket | None:
        with_index, without = self.do("next", now)
        assert getattr(with_index, "key", None) == getattr(without, "key", None)
        return with_index  # type: ignore[no-any-return]

    def release(self) -> None:
        for each in self._tickets:
            each[0].held = each[1].held = False


@pytest.mark.parametrize("remembered", [3, 4096])
@pytest.mark.parametrize("seed", range(40))
def test_who_is_next_does_not_depend_on_how_he_is_found(
    monkeypatch: pytest.MonkeyPatch, seed: int, remembered: int
) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(turns, "_REMEMBERED", remembered)
    both, now, came = _Both(monkeypatch), 0.1, 0
    busy: list[str] = []

    def anybody() -> str:
        return f"k{chance.randrange(max(0, came - 30), came + 1)}"

    for _ in range(400):
        match chance.choices(list(STEPS), list(STEPS.values()))[0]:
            case "admit":
                level, session = chance.choice(LEVELS), chance.choice((None, "s", "t"))
                both.admit(f"k{came}", chance.randrange(3), level, session, now, held=chance.random() < 0.1)
                came += 1
            case "again":
                both.admit(anybody(), 1, chance.choice(LEVELS), chance.choice((None, "s")), now, held=False)
            case "next":
                went = both.next(now)
                busy += [] if went is None or went.session is None else [str(went.session)]
            case "release":
                both.release()
            case "hold":
                busy.append(f"{chance.choice(LEVELS)}/s")
                both.do("hold_session", busy[-1])
            case "leave" if busy:
                free = busy.pop(chance.randrange(len(busy)))
                busy = [each for each in busy if each != free]
                both.do("leave_session", free)
            case "remove":
                both.do("remove", anybody())
            case "wait":
                now += chance.choice([0.0, 0.1, 3.0, AGING_S, 29.999999])
            case "aging":
                both.do("set_aging", chance.choice([10.0, AGING_S, 0.3]))
    both.release()
    for session in busy:
        both.do("leave_session", session)
    while (went := both.next(now)) is not None:
        both.do("leave_session", went.session)
    assert both.do("__len__") == [0, 0]


def _long_queue(number: int) -> AdmissionQueue:
    queue = AdmissionQueue(limits=QueueLimits(queue_size=100_000, session_queue=4, share=1.0), aging_s=AGING_S)
    for n in range(number):
        session = f"u{n % 7}/s{n // 2}" if n % 3 else None
        queue.admit(Ticket(f"k{n}", n % 3, f"u{n % 7}", session, n / 100), retry_after_s=1.0)
    return queue


def test_in_a_long_queue_a_few_looks_tell_who_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, looks = _long_queue(5000), 0
    look = AdmissionQueue._may_go

    def counted(queue: AdmissionQueue, ticket: Ticket) -> bool:
        nonlocal looks
        looks += 1
        return look(queue, ticket)

    monkeypatch.setattr(AdmissionQueue, "_may_go", counted)
    monkeypatch.setattr(Turns, "first", lambda *_: pytest.fail("a look at all that wait"))
    now = 50.0
    for _ in range(1000):
        now += 0.01
        ticket = queue.next(now)
        assert ticket is not None
        if ticket.session is not None:
            queue.leave_session(ticket.session)
    assert looks < 10 * 5000, "some for each that rose a lane or went"


def test_the_index_is_made_anew_when_most_of_it_is_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    make = TurnIndex.__init__

    def counted(*args: Any, **named: Any) -> None:
        nonlocal made
        made += 1
        make(*args, **named)

    monkeypatch.setattr(TurnIndex, "__init__", counted)
    queue = _long_queue(1000)
    for n in range(30_000):  # whoever comes is cancelled at once, and nobody of the others is let go
        queue.admit(Ticket(f"gone{n}", 2, "gone", None, 10.0), retry_after_s=1.0)
        queue.remove(f"gone{n}")
        if n % 100 == 0:
            queue.next(10.0)
    assert 1 < made < 20
    index = queue._index
    assert index is not None
    assert not index.outgrown(2 * len(queue))


def test_while_nobody_is_let_go_those_who_come_and_leave_are_not_kept() -> None:
    queue = _long_queue(1000)
    longest = 0
    for n in range(30_000):  # every slot is taken, and nobody asks who is next
        queue.admit(Ticket(f"gone{n}", 2, "gone", None, 10.0), retry_after_s=1.0)
        queue.remove(f"gone{n}")
        index = queue._index
        assert index is not None
        longest = max(longest, index._entries + len(index._order) + len(index._rises))
    assert longest < 9 * 1001


def test_a_queue_that_became_short_keeps_no_index() -> None:
    queue = _long_queue(200)
    assert queue._index is not None
    while len(queue) > 60:
        ticket = queue.next(2.0)
        assert ticket is not None
        if ticket.session is not None:
            queue.leave_session(ticket.session)
    queue.next(2.0)
    assert queue._index is None


def test_the_moment_at_which_a_request_rises_is_the_same_to_the_last_bit() -> None:
    arrived, aging_s, now = 4.0234204843655, 26.73627246406697, 30.75969294843247
    assert now < arrived + aging_s, "by its sum with the pause it has not waited long enough; by the quotient it has"
    queue = AdmissionQueue(limits=QueueLimits(queue_size=1000, session_queue=4, share=1.0), aging_s=aging_s)
    for n in range(200):
        queue.admit(Ticket(f"later{n}", 2, "b", None, 30.0), retry_after_s=1.0)
    queue.admit(Ticket("normal", 1, "a", None, arrived), retry_after_s=1.0)
    queue.admit(Ticket("urgent", 0, "b", None, 30.0), retry_after_s=1.0)
    ticket = queue.next(now)
    assert ticket is not None
    assert ticket.key == "normal"
