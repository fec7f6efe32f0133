"""Who may wait, on one worker: a bounded queue whose places and bytes are shared between first topic levels."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import islice

from llamacpp_mqtt_deploy.core.queue_places import Measure, QueueLimits, check_session, make_room
from llamacpp_mqtt_deploy.core.turns import LANES, Ticket, Turns

__all__ = ["AdmissionQueue", "QueueLimits"]


class AdmissionQueue:
    """The requests that wait for a slot. Pure: the caller holds the lock and brings the time (monotonic seconds).

    Who has a place is said in `make_room`, who goes next in `Turns`. Prompts of one session go one at a time: `leave_session` lets
    the next one go.

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
            if ticket.session is not None:
                in_session = sum(other.session == ticket.session for other in self._waiting.values())
                busy = ticket.session in self._busy_sessions
                check_session(in_session, self.limits, busy=busy, retry_after_s=retry_after_s)
            if self._waiting or paced:  # nobody has to make room for a first one, whatever its size
                waiting = _InMemory(list(self._waiting.values()), paced)
                leaving = make_room(ticket, waiting, self.limits, retry_after_s=retry_after_s, paced=paced)
            for other in leaving:
                self.remove(other.key)
        self.turns.arrive(ticket)
        self._waiting[ticket.key] = ticket
        return leaving

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
        if at_once and len(self._waiting) == 1:  # as on most workers at most times: nothing has to be put in order
            ticket = next(iter(self._waiting.values()))
            goes = ticket.session not in self._busy_sessions and (held_too or not ticket.held)
            return iter((ticket,) if goes else ())
        chains: dict[Hashable, list[Ticket]] = {}
        for ticket in self._waiting.values():
            # A stateless request is a chain of its own, and the prompts of a session go one after the other.
            chains.setdefault(ticket if ticket.session is None else ticket.session, []).append(ticket)
        if at_once:
            free = (chain for session, chain in chains.items() if session not in self._busy_sessions)
            firsts = [chain[:1] for chain in free if held_too or not chain[0].held]
            return self.turns.order(firsts, now)
        return self.turns.order(list(chains.values()), now)


class _InMemory:
    """Satisfies `Waiting`: what waits at this moment."""

    def __init__(self, waiting: Sequence[Ticket], paced: Sequence[Ticket]) -> None:
        self._waiting = waiting
        self._paced = paced
        self._by_level: dict[str, Counter[str]] = {}

    def held(self, measure: Measure, level: str | None = None) -> int:
        held = self._by_level.get(measure.name)
        if held is None:
            held = self._by_level[measure.name] = _by_level(self._waiting, measure)
        return held.total() if level is None else held[level]

    def largest(self, measure: Measure, *, but: str, without: Sequence[Ticket]) -> tuple[str, int] | None:
        left = [each for each in self._waiting if each not in without]
        held = _by_level([*left, *self._paced], measure)
        others = {each.first_level for each in left} - {but}
        level = max(sorted(others), key=lambda level: held[level], default=None)
        return None if level is None else (level, held[level])

    def last(self, level: str, *, lower_than: int = -1, without: Sequence[Ticket]) -> Ticket | None:
        mine = (each for each in self._waiting if each.first_level == level and each.lane > lower_than)
        return max(
            (each for each in mine if each not in without),
            key=lambda each: (each.lane, each.arrived, each.number),
            default=None,
        )


def _by_level(tickets: Sequence[Ticket], measure: Measure) -> Counter[str]:
    held: Counter[str] = Counter()
    for ticket in tickets:
        held[ticket.first_level] += measure.of(ticket)
    return held
