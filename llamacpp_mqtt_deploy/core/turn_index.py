"""Who is next in a long queue, found without a look at all that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush, heapreplace
from math import inf, nextafter

from llamacpp_mqtt_deploy.core.turns import Ticket, Turns

# A moment before a ticket rises it is looked at again: whether it has risen is for `Turns.lane` to say, by the same arithmetic.
_BEFORE_RISE_S = 1e-6
# Entries that hold no more stay until they come to the top, but no more of them than this for each ticket.
_GROWN = 8

_Entry = tuple[int, int, float, int, Ticket]
"""Within a level: lane, turn since which it waits, arrival, its number, which no other has."""
_Rank = tuple[int, int, int, float, int, str]
"""Between levels, by the first of each: lane, the level's last turn, and as above; the level."""


class TurnIndex:
    """The tickets that may go in the order of `turns`. Pure; made of those that may go just now, and told of those that come
    (`add`) and of `level_forgotten`. Whoever may go no more is found out when he comes to the top (`may_go`).

    Each level keeps its tickets in a heap, and the levels are in a heap by what each one's first was when last looked at: it may
    have come down since, never up.
    """

    def __init__(
        self, tickets: Iterable[Ticket], turns: Turns, now: float, *, may_go: Callable[[Ticket], bool]
    ) -> None:
        self._turns = turns
        self._may_go = may_go
        self._levels: dict[str, list[_Entry]] = {}
        self._rises: list[tuple[float, int, Ticket]] = []
        """When a ticket may come up by a lane."""
        self._entries = 0
        for ticket in tickets:
            self._note_lane(ticket, now)
            self._levels.setdefault(ticket.first_level, []).append(self._entry(ticket))
            self._entries += 1
        for entries in self._levels.values():
            heapify(entries)
        self._ranks = {level: self._rank(entries[0]) for level, entries in self._levels.items()}
        """The one entry of each level in `_order` that counts."""
        self._order = list(self._ranks.values())
        heapify(self._order)

    def outgrown(self, waiting: int) -> bool:
        """Whether it is time for a new one: most of what this one holds is of before. So many tickets wait."""
        return self._entries + len(self._order) + len(self._rises) > _GROWN * waiting

    def add(self, ticket: Ticket) -> None:
        """It may go from now on, or waits since another turn than before."""
        self._note_lane(ticket, ticket.arrived)  # all that it has risen since, it rises in the next `first`
        self._put(self._entry(ticket))

    def level_forgotten(self, level: str) -> None:
        """Nobody knows any more when this level had its last turn: it counts as never."""
        if level in self._levels:
            self._come_up(self._levels[level][0])

    def first(self, now: float) -> Ticket | None:
        """The first that may go and is not held."""
        self._rise(now)
        held: list[_Entry] = []
        found = None
        while self._order and found is None:
            rank = self._order[0]
            level = rank[-1]
            if self._ranks.get(level) is not rank:
                heappop(self._order)
            elif (top := self._top(level, held)) is None:
                heappop(self._order)
                del self._ranks[level]
            elif (actual := self._rank(top)) != rank:
                self._ranks[level] = actual
                heapreplace(self._order, actual)
            else:
                found = top[-1]
        for entry in held:
            self._put(entry)
        return found

    def _put(self, entry: _Entry) -> None:
        entries = self._levels.setdefault(entry[-1].first_level, [])
        heappush(entries, entry)
        self._entries += 1
        if entries[0] is entry:
            self._come_up(entry)

    def _come_up(self, first: _Entry) -> None:
        """This entry is the first of its level, which may come up by it."""
        rank = self._rank(first)
        before = self._ranks.get(rank[-1])
        if before is None or rank < before:
            self._ranks[rank[-1]] = rank
            heappush(self._order, rank)

    def _top(self, level: str, held: list[_Entry]) -> _Entry | None:
        """The first entry of the level that holds; those of held tickets are taken out."""
        entries = self._levels[level]
        while entries:
            lane, since, _, _, ticket = top = entries[0]
            if (lane, since) == (ticket.risen_to, self._turns.since(ticket)) and self._may_go(ticket):
                if not ticket.held:
                    return top
                held.append(top)
            heappop(entries)
            self._entries -= 1
        del self._levels[level]
        return None

    def _rise(self, now: float) -> None:
        """Those whose time has come have waited long enough for a lane further up."""
        while self._rises and self._rises[0][0] <= now:
            ticket = heappop(self._rises)[-1]
            if self._may_go(ticket):
                before = ticket.risen_to
                self._note_lane(ticket, now)
                if ticket.risen_to != before:
                    self._put(self._entry(ticket))

    def _note_lane(self, ticket: Ticket, now: float) -> None:
        ticket.risen_to = self._turns.lane(ticket, now)
        if ticket.risen_to > 0:
            lanes = ticket.lane - ticket.risen_to + 1
            at = ticket.arrived + lanes * self._turns.aging_s - _BEFORE_RISE_S
            heappush(self._rises, (max(at, nextafter(now, inf)), ticket.number, ticket))

    def _entry(self, ticket: Ticket) -> _Entry:
        return (ticket.risen_to, self._turns.since(ticket), ticket.arrived, ticket.number, ticket)

    def _rank(self, entry: _Entry) -> _Rank:
        lane, since, arrived, number, ticket = entry
        return (lane, self._turns.level_turn(ticket.first_level), since, arrived, number, ticket.first_level)
