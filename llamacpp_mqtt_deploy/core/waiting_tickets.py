"""What waits in a queue in memory, counted as it comes and goes: a newcomer costs as little before a long queue as before a short one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from llamacpp_mqtt_deploy.core.queue_places import Counted, Measure
from llamacpp_mqtt_deploy.core.turns import Ticket

_Row = tuple[float, int, Ticket]
"""When it arrived and its number, which is its own: rows can be compared."""


@dataclass(slots=True)
class _Level:
    """What one first level holds; the tickets of each lane in the order of their arrival."""

    places: int = 0
    size: int = 0
    lanes: dict[int, list[_Row]] = field(default_factory=dict)


class WaitingTickets:
    """The tickets of a queue by key, by session and by first level. Pure.

    A chain are the tickets that go one after the other: those of a session, in the order in which they were added; a ticket without
    a session is a chain of its own.
    """

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Ticket] = {}
        self._chains: dict[Hashable, dict[int, Ticket]] = {}
        self._levels: dict[str, _Level] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Ticket]:
        """In the order in which they were added."""
        return iter(self._by_key.values())

    def __reversed__(self) -> Iterator[Ticket]:
        return reversed(self._by_key.values())

    def add(self, ticket: Ticket) -> None:
        """Its `number` must be its own."""
        if ticket.key in self._by_key:
            self.remove(ticket.key)
        self._by_key[ticket.key] = ticket
        self._chains.setdefault(ticket if ticket.session is None else ticket.session, {})[ticket.number] = ticket
        self._size += ticket.size
        level = self._levels.setdefault(ticket.first_level, _Level())
        level.places += 1
        level.size += ticket.size
        insort(level.lanes.setdefault(ticket.lane, []), (ticket.arrived, ticket.number, ticket))

    def remove(self, key: Hashable) -> Ticket | None:
        """Take the ticket out; None when it is not there."""
        ticket = self._by_key.pop(key, None)
        if ticket is None:
            return None
        name = ticket if ticket.session is None else ticket.session
        chain = self._chains[name]
        del chain[ticket.number]
        if not chain:
            del self._chains[name]
        self._size -= ticket.size
        level = self._levels[ticket.first_level]
        level.places -= 1
        level.size -= ticket.size
        if not level.places:
            del self._levels[ticket.first_level]
            return ticket
        rows = level.lanes[ticket.lane]
        del rows[bisect_left(rows, (ticket.arrived, ticket.number))]
        return ticket

    def chains(self) -> Mapping[Hashable, Mapping[int, Ticket]]:
        """The chains by session, or by the ticket that is one."""
        return self._chains

    def head(self, chain: Hashable) -> Ticket | None:
        """Who goes first of this session, or the ticket itself that is a chain."""
        tickets = self._chains.get(chain)
        return None if tickets is None else next(iter(tickets.values()))

    def in_session(self, session: Hashable) -> int:
        """How many prompts of this session wait."""
        return len(self._chains.get(session, ()))

    def levels(self) -> Iterator[tuple[str, int, int]]:
        """The first levels of those that wait, each with its places and bytes."""
        return ((name, level.places, level.size) for name, level in self._levels.items())

    def held(self, measure: Measure, level: str | None = None) -> int:
        """As `Waiting.held`."""
        by_size = measure.name == "bytes"
        if level is None:
            return self._size if by_size else len(self._by_key)
        found = self._levels.get(level)
        return 0 if found is None else found.size if by_size else found.places

    def places(self, level: str) -> int:
        """How many of this first level wait."""
        found = self._levels.get(level)
        return 0 if found is None else found.places

    def newest(self, level: str, *, lower_than: int) -> Iterator[Ticket]:
        """Of this first level those in lanes lower than this one, the lowest lane first, in each the newest first."""
        found = self._levels.get(level)
        lanes = {} if found is None else found.lanes
        for lane in sorted((lane for lane in lanes if lane > lower_than), reverse=True):
            for _, _, ticket in reversed(lanes[lane]):
                yield ticket


class BesidePaced:
    """Satisfies `Waiting`: what waits, and what is paced and counts for its own level. For one newcomer: nothing comes or goes
    meanwhile, so that who loses his place is found where the last one was."""

    def __init__(self, waiting: WaitingTickets, paced: Sequence[Ticket]) -> None:
        self._waiting = waiting
        self._paced = Counted(paced)
        self._largest: dict[tuple[str, str], list[tuple[int, str]]] = {}
        """By measure and who is left out: what each level holds, as a negative number, and its name. A heap; its numbers may be
        those of before."""
        self._newest: dict[tuple[str, int], tuple[Ticket | None, Iterator[Ticket]]] = {}
        """By level and lane: who was found last, and those behind him."""

    def held(self, measure: Measure, level: str | None = None) -> int:
        return self._waiting.held(measure, level)

    def largest(self, measure: Measure, *, but: str, without: Counted) -> tuple[str, int] | None:
        heap = self._largest.get((measure.name, but))
        if heap is None:
            levels = (level for level, _, _ in self._waiting.levels() if level != but)
            heap = [(-self._left(measure, level, without), level) for level in levels]
            heapify(heap)
            self._largest[measure.name, but] = heap
        while heap:
            before, level = heap[0]
            left = self._left(measure, level, without)
            if self._waiting.places(level) <= without.places(level):
                heappop(heap)
            elif left == -before:
                return level, left
            else:
                heapreplace(heap, (-left, level))
        return None

    def _left(self, measure: Measure, level: str, without: Counted) -> int:
        held = self._waiting.held(measure, level) + self._paced.held(measure, level)
        return held - without.held(measure, level)

    def last(self, level: str, *, lower_than: int = -1, without: Counted) -> Ticket | None:
        found, behind = self._newest.get((level, lower_than)) or (
            None,
            self._waiting.newest(level, lower_than=lower_than),
        )
        while found is None or found.key in without.keys:
            found = next(behind, None)
            if found is None:
                return None
        self._newest[level, lower_than] = (found, behind)
        return found
