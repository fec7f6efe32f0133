"""Who may wait: a bounded queue whose places and bytes are shared between first topic levels."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil

from llamacpp_mqtt_deploy.core.errors import Busy, SessionBusy
from llamacpp_mqtt_deploy.core.turns import LANES, Ticket, Turns

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What may wait. While others wait too, one first level holds at most `share` (0 to 1) of the places and of the bytes."""

    queue_size: int
    session_queue: int
    max_bytes: int = 64 * _MIB
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class _Measure:
    """Something that the queue has a limited amount of, and how much of it a ticket takes."""

    limit: int
    of: Callable[[Ticket], int]
    full: str

    def by_level(self, tickets: Sequence[Ticket]) -> Counter[str]:
        held: Counter[str] = Counter()
        for ticket in tickets:
            held[ticket.first_level] += self.of(ticket)
        return held


class AdmissionQueue:
    """The requests that wait for a slot. Pure: the caller holds the lock and brings the time (monotonic seconds).

    Who goes next is said in `Turns`. Prompts of one session go one at a time: `leave_session` lets the next one go.

    What a level holds is counted anew for each newcomer, from the tickets themselves: there are few, and no count can go wrong.
    """

    def __init__(self, *, limits: QueueLimits, aging_s: float) -> None:
        self.limits = limits
        self.turns = Turns(aging_s)
        self._waiting: OrderedDict[Hashable, Ticket] = OrderedDict()
        self._busy_sessions: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._waiting.values())

    def by_lane(self) -> Mapping[str, int]:
        counts = dict.fromkeys(LANES, 0)
        for ticket in self._waiting.values():
            counts[LANES[ticket.lane]] += 1
        return counts

    # --- in ------------------------------------------------------------------------------------------------------------

    def admit(
        self, ticket: Ticket, *, retry_after_s: float, paced: Sequence[Ticket] = (), force: bool = False
    ) -> list[Ticket]:
        """Put the ticket into the queue and return those that lost their place to it, or raise `SessionBusy` or `Busy`.

        `paced` are requests that wait no more and are not over either: they count for their own level alone. `force` admits
        whatever the limits say: a request that was accepted before a restart.
        """
        leaving: list[Ticket] = []
        if not force:
            self._check_session(ticket, retry_after_s)
            leaving = self._make_room(ticket, paced, retry_after_s)
            for other in leaving:
                self.remove(other.key)
        self.turns.arrive(ticket)
        self._waiting[ticket.key] = ticket
        return leaving

    def _check_session(self, ticket: Ticket, retry_after_s: float) -> None:
        most = self.limits.session_queue
        if ticket.session is not None and self._waiting_in(ticket.session) >= most:
            raise SessionBusy(
                f"this session has {most} prompts waiting already; send the next one when one has ended",
                retry_after_s=retry_after_s,
            )

    def _waiting_in(self, session: Hashable) -> int:
        """Prompts of this session that wait for their turn; one that could go at once does not wait."""
        waiting = sum(1 for other in self._waiting.values() if other.session == session)
        return waiting if session in self._busy_sessions else max(0, waiting - 1)

    # --- whose place it is ---------------------------------------------------------------------------------------------

    def _make_room(self, newcomer: Ticket, paced: Sequence[Ticket], retry_after_s: float) -> list[Ticket]:
        """Who has to leave so that this one may wait, mostly nobody. Raises `Busy`, and then nobody has to.

        In a full queue the newest of the lowest lane of the level that holds most, as long as that level then still holds no
        less than the newcomer's: so nobody loses a place to another level while it holds no more than an even part of the
        queue, however urgent the newcomer is. Else the newest of the lowest lane below the newcomer's among those of its own
        level.
        """
        limits = self.limits
        places = _Measure(limits.queue_size, lambda _: 1, f"{limits.queue_size} requests wait")
        sizes = _Measure(limits.max_bytes, lambda each: each.size, f"{limits.max_bytes / _MIB:g} MiB of requests wait")
        waiting, leaving = list(self._waiting.values()), []
        for measure in (places, sizes):
            while (problem := self._problem(newcomer, measure, waiting, paced)) is not None:
                ticket = None if problem == _OVER_SHARE else _of_the_largest(newcomer, measure, waiting, paced)
                if ticket is None:
                    ticket = _last(each for each in waiting if _is_less_urgent(each, newcomer))
                if ticket is None:
                    raise Busy(
                        f"{problem} ({measure.full}); try again in {retry_after_s:g} s", retry_after_s=retry_after_s
                    )
                waiting.remove(ticket)
                leaving.append(ticket)
        return leaving

    def _problem(
        self, newcomer: Ticket, measure: _Measure, waiting: Sequence[Ticket], paced: Sequence[Ticket]
    ) -> str | None:
        """Why the newcomer has no place; None when it has one."""
        level, wanted = newcomer.first_level, measure.of(newcomer)
        in_queue, being_paced = measure.by_level(waiting), measure.by_level(paced)
        total, mine = in_queue.total(), in_queue[level] + being_paced[level]
        # A first request has its place whatever its size, or one that is larger than a share could never come in.
        if mine and total > in_queue[level] and mine + wanted > ceil(measure.limit * self.limits.share):
            return _OVER_SHARE
        # Places of paced answers cannot be taken back, so those of others do not count, up to as many again.
        mine_and_queue = total + being_paced[level]
        if mine_and_queue and mine_and_queue + wanted > measure.limit:
            return _FULL
        if total + being_paced.total() + wanted > 2 * max(measure.limit, wanted):
            return _FULL
        return None

    # --- through and out -----------------------------------------------------------------------------------------------

    def next(self, now: float) -> Ticket | None:
        """Take the ticket whose turn it is, None when nobody can go."""
        ticket = next(self._in_order(now, at_once=True, held_too=False), None)
        if ticket is None:
            return None
        self.remove(ticket.key)
        if ticket.session is not None:
            self._busy_sessions.add(ticket.session)
        self.turns.take(ticket)
        return ticket

    def hold_session(self, session: Hashable) -> None:
        """Let no prompt of the session go before `leave_session`, as if one of them ran."""
        self._busy_sessions.add(session)

    def leave_session(self, session: Hashable) -> None:
        """The session's running prompt has ended; its next one may go."""
        self._busy_sessions.discard(session)

    def remove(self, key: Hashable) -> Ticket | None:
        """Take the ticket out of the queue; None when it is not there."""
        return self._waiting.pop(key, None)

    # --- looking -------------------------------------------------------------------------------------------------------

    def front(self, places: int, now: float) -> set[Hashable]:
        """Who goes when this many places are free, held tickets counted as if they were not."""
        return {ticket.key for ticket in islice(self._in_order(now, at_once=True), max(0, places))}

    def positions(self, now: float, *, free: int = 0) -> dict[Hashable, int]:
        """Everybody's place, 1 for who is next, as if nobody else came; those for whom a place is free wait no more."""
        going = self.front(free, now)
        waiting = (ticket.key for ticket in self._in_order(now) if ticket.key not in going)
        return {key: place for place, key in enumerate(waiting, start=1)}

    def _in_order(self, now: float, *, at_once: bool = False, held_too: bool = True) -> Iterator[Ticket]:
        """The order in which `next` would take them. `at_once`: with no session's prompt ending meanwhile."""
        chains: dict[Hashable, list[Ticket]] = {}
        for ticket in self._waiting.values():
            # A stateless request is a chain of its own, and the prompts of a session go one after the other.
            chains.setdefault(ticket if ticket.session is None else ticket.session, []).append(ticket)
        if at_once:
            free = (chain for session, chain in chains.items() if session not in self._busy_sessions)
            firsts = [chain[:1] for chain in free if held_too or not chain[0].held]
            return self.turns.order(firsts, now)
        return self.turns.order(list(chains.values()), now)


_FULL = "the queue is full"
_OVER_SHARE = "your share of the queue is taken"


def _is_less_urgent(ticket: Ticket, newcomer: Ticket) -> bool:
    return ticket.first_level == newcomer.first_level and ticket.lane > newcomer.lane


def _last(tickets: Iterator[Ticket]) -> Ticket | None:
    """The newest of the lowest lane."""
    return max(tickets, key=lambda each: (each.lane, each.arrived, each.number), default=None)


def _of_the_largest(
    newcomer: Ticket, measure: _Measure, waiting: Sequence[Ticket], paced: Sequence[Ticket]
) -> Ticket | None:
    """What the level that holds most gives up, if it then still holds no less than the newcomer's."""
    held = measure.by_level([*waiting, *paced])
    others = {each.first_level for each in waiting} - {newcomer.first_level}
    largest = max(sorted(others), key=lambda level: held[level], default=None)
    ticket = _last(each for each in waiting if each.first_level == largest)
    if largest is None or ticket is None:
        return None
    after_me = held[newcomer.first_level] + measure.of(newcomer)
    return ticket if held[largest] - measure.of(ticket) >= after_me else None
