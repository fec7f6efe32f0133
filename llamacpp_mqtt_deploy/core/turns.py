"""Who is next among those that wait: lanes first, then in turn between first topic levels, then between sessions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeVar

K = TypeVar("K")

LANES: tuple[str, ...] = ("interactive", "normal", "batch")

# First levels and sessions are chosen by clients: the last turn of how many of each is remembered.
_REMEMBERED = 4096


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the queue. `session` is None for stateless requests, which need no turn within their session."""

    key: Hashable
    lane: int
    first_level: str
    session: Hashable | None
    arrived: float
    size: int = 0
    """Bytes of the request."""
    held: bool = False
    """In the queue, not to be taken yet: its journal entry is not written."""
    came_at_turn: int = 0
    """How many turns had been taken when it came; set by `Turns`."""
    number: int = 0
    """Its place among all that ever came; set by `Turns`."""
    risen_to: int = 0
    """The lane that its waiting has brought it to, when last looked at; set by `TurnIndex`."""


class Turns:
    """Remembers who had a turn when, and puts those that wait in order. Pure; the caller brings the time.

    Order: the lane (a request moves up one lane for every `aging_s` it waits, so that `batch` never starves), then the first
    level whose last turn is longest ago, then the session whose last turn is longest ago, then arrival. A session that
    had no turn yet, and a stateless request, count from when they came: a stream of new ones passes nobody for ever.
    """

    def __init__(self, aging_s: float) -> None:
        self.aging_s = aging_s
        self._turn = self._arrived = 0
        self._levels: OrderedDict[str, int] = OrderedDict()
        self._sessions: OrderedDict[Hashable, int] = OrderedDict()

    def arrive(self, ticket: Ticket) -> None:
        """Note when the ticket came, in turns."""
        self._arrived += 1
        ticket.came_at_turn, ticket.number = self._turn, self._arrived

    def recall(self, levels: Mapping[str, int]) -> None:
        """Take up when these levels had their last turns, as it was remembered elsewhere."""
        self._levels.update(levels)
        self._turn = max(self._turn, *levels.values(), 0)

    def take(self, ticket: Ticket) -> tuple[str | None, Hashable | None]:
        """The ticket has its turn, and so have its session and its level. Returns the level and the session whose last turns are
        forgotten for it, if any."""
        self._turn += 1
        level = _remember(self._levels, ticket.first_level, self._turn)
        session = None if ticket.session is None else _remember(self._sessions, ticket.session, self._turn)
        return level, session

    def first(self, tickets: Sequence[Ticket], now: float) -> Ticket | None:
        """Of these the first in the order of their turns; None of none."""
        if len(tickets) < 2:  # as on most workers at most times
            return tickets[0] if tickets else None

        def rank(ticket: Ticket) -> tuple[int, int, int, float, int]:
            level_turn = self.level_turn(ticket.first_level)
            return (self.lane(ticket, now), level_turn, self.since(ticket), ticket.arrived, ticket.number)

        return min(tickets, key=rank)

    def order(self, chains: Sequence[Sequence[Ticket]], now: float) -> Iterator[Ticket]:
        """Everybody in the order of their turns, as if nobody else came. Tickets of a chain go one after the other.

        A turn changes the rank of its own level only, and a chain belongs to one level: so each level keeps its tickets
        in order, and the levels are kept in the order of their best tickets.
        """
        turn = self._turn
        level_turns: dict[str, int] = {}
        tickets: dict[str, list[tuple[int, int, float, int, int]]] = {}

        def put(chain: int, place: int, session_turn: int | None = None) -> None:
            ticket = chains[chain][place]
            since = self.since(ticket) if session_turn is None else session_turn
            rank = (self.lane(ticket, now), since, ticket.arrived, ticket.number)
            heappush(tickets.setdefault(ticket.first_level, []), (*rank, chain))

        def rank_of(level: str) -> tuple[int, int, int, float, int, str]:
            lane, since, arrived, number, _ = tickets[level][0]
            return (lane, level_turns.get(level, self.level_turn(level)), since, arrived, number, level)

        taken = [0] * len(chains)
        for chain in range(len(chains)):
            put(chain, 0)
        levels = [rank_of(level) for level in tickets]
        heapify(levels)
        while levels:
            level = heappop(levels)[-1]
            chain = heappop(tickets[level])[-1]
            yield chains[chain][taken[chain]]
            turn += 1
            taken[chain] += 1
            level_turns[level] = turn
            if taken[chain] < len(chains[chain]):
                put(chain, taken[chain], turn)
            if tickets[level]:
                heappush(levels, rank_of(level))

    def level_turn(self, level: str) -> int:
        """When the level had its last turn; 0 for never."""
        return self._levels.get(level, 0)

    def lane(self, ticket: Ticket, now: float) -> int:
        """The lane in which it waits by now."""
        return max(0, ticket.lane - int((now - ticket.arrived) / self.aging_s))

    def since(self, ticket: Ticket) -> int:
        """The turn since which it waits: its session's last one, or the one at which it came."""
        if ticket.session is None:
            return ticket.came_at_turn
        return self._sessions.get(ticket.session, ticket.came_at_turn)


def _remember(turns: OrderedDict[K, int], name: K, turn: int) -> K | None:
    """Note its turn; returns whoever is forgotten for it."""
    turns[name] = turn
    turns.move_to_end(name)
    return turns.popitem(last=False)[0] if len(turns) > _REMEMBERED else None
