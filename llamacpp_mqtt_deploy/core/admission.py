"""Who may wait, and who is next: a bounded line in lanes, fair between first topic levels and sessions."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

from llamacpp_mqtt_deploy.core.errors import Busy, RateLimited, SessionBusy

LANES: tuple[str, ...] = ("interactive", "normal", "batch")

# First levels are chosen by clients (bounded by the broker's users): how many the line remembers the last turn of.
_REMEMBERED_LEVELS = 4096


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the line. `session` is None for stateless requests, which need no turn within their session."""

    key: Hashable
    lane: int
    first_level: str
    session: Hashable | None
    arrived: float
    held: bool = False
    """In the line, not to be taken yet: its journal entry is not written."""
    came_at_turn: int = 0
    """How many turns had been taken when it came; set by the line."""
    number: int = 0
    """Its place among all that ever came; set by the line."""


_Rank = tuple[int, int, int, float, int]


class AdmissionQueue:
    """The requests that wait for a slot. Pure: the caller holds the lock and brings the time (monotonic seconds).

    Order: the lane (a request moves up one lane for every `aging_s` it waits, so that `batch` never starves), then the first
    topic level whose last turn is longest ago, then the session whose last turn is longest ago, then arrival. A session that
    had no turn yet, and a stateless request, count from when they came: a stream of new ones passes nobody for ever. Prompts
    of one session go one at a time in order of arrival: `leave_session` lets the next one go.
    """

    def __init__(self, *, queue_size: int, session_queue: int, aging_s: float) -> None:
        self.queue_size = queue_size
        self.session_queue = session_queue
        self.aging_s = aging_s
        self._waiting: OrderedDict[Hashable, Ticket] = OrderedDict()
        self._busy_sessions: set[Hashable] = set()
        self._turn = self._admitted = 0
        self._level_turns: OrderedDict[str, int] = OrderedDict()
        self._session_turns: OrderedDict[Hashable, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._waiting.values())

    def by_lane(self) -> Mapping[str, int]:
        counts = dict.fromkeys(LANES, 0)
        for ticket in self._waiting.values():
            counts[LANES[ticket.lane]] += 1
        return counts

    def admit(self, ticket: Ticket, *, retry_after_s: float, outside: int = 0, force: bool = False) -> Ticket | None:
        """Put the ticket into the line, or raise `SessionBusy` or `Busy`.

        When the line is full the lowest lane is refused first: the newest ticket of a lower lane than the newcomer's gives up
        its place and is returned; it has to be answered with `busy`. `outside` are places taken by requests that wait no
        more and are not over either (paced answers). `force` admits whatever the limits say: a request that
        was accepted before a restart.
        """
        evicted = None
        if not force:
            if ticket.session is not None and self._waiting_in(ticket.session) >= self.session_queue:
                raise SessionBusy(
                    f"this session has {self.session_queue} prompts waiting already; send the next one when one has ended",
                    retry_after_s=retry_after_s,
                )
            if len(self._waiting) + outside >= self.queue_size:
                evicted = self._lowest_below(ticket.lane)
                if evicted is None:
                    raise Busy(
                        f"the queue is full ({self.queue_size} requests wait); try again in {retry_after_s:g} s",
                        retry_after_s=retry_after_s,
                    )
                self.remove(evicted.key)
        self._admitted += 1
        ticket.came_at_turn, ticket.number = self._turn, self._admitted
        self._waiting[ticket.key] = ticket
        return evicted

    def _waiting_in(self, session: Hashable) -> int:
        """Prompts of this session that wait for their turn; one that could go at once does not wait."""
        waiting = sum(1 for other in self._waiting.values() if other.session == session)
        return waiting if session in self._busy_sessions else max(0, waiting - 1)

    def _lowest_below(self, lane: int) -> Ticket | None:
        candidates = [ticket for ticket in self._waiting.values() if ticket.lane > lane]
        return max(candidates, key=lambda ticket: (ticket.lane, ticket.arrived), default=None)

    def next(self, now: float) -> Ticket | None:
        """Take the ticket whose turn it is, None when nobody can go."""
        ticket = min(self._runnable(), key=lambda ticket: self._rank(ticket, now), default=None)
        if ticket is None:
            return None
        del self._waiting[ticket.key]
        if ticket.session is not None:
            self._busy_sessions.add(ticket.session)
            self._remember(self._session_turns, ticket.session)
        self._remember(self._level_turns, ticket.first_level)
        return ticket

    def front(self, places: int, now: float) -> set[Hashable]:
        """Who goes when this many places are free, held tickets counted as if they were not."""
        return {ticket.key for ticket in islice(self._in_order(now, at_once=True), max(0, places))}

    def _runnable(self) -> Iterator[Ticket]:
        seen: set[Hashable] = set()
        for ticket in self._waiting.values():
            if ticket.session is not None:
                # Only the oldest prompt of a session may go, and none while one runs, or while the oldest is held.
                if ticket.session in self._busy_sessions or ticket.session in seen:
                    continue
                seen.add(ticket.session)
            if not ticket.held:
                yield ticket

    def _lane(self, ticket: Ticket, now: float) -> int:
        return max(0, ticket.lane - int((now - ticket.arrived) / self.aging_s))

    def _rank(self, ticket: Ticket, now: float) -> _Rank:
        level_turn = self._level_turns.get(ticket.first_level, 0)
        return (self._lane(ticket, now), level_turn, self._session_turn(ticket), ticket.arrived, ticket.number)

    def _session_turn(self, ticket: Ticket) -> int:
        if ticket.session is None:
            return ticket.came_at_turn
        return self._session_turns.get(ticket.session, ticket.came_at_turn)

    def _remember(self, turns: OrderedDict[str, int] | OrderedDict[Hashable, int], name: Hashable) -> None:
        self._turn += 1
        turns[name] = self._turn  # type: ignore[index]  # both kinds of keys are hashable
        turns.move_to_end(name)  # type: ignore[arg-type]
        if len(turns) > _REMEMBERED_LEVELS:
            turns.popitem(last=False)

    def leave_session(self, session: Hashable) -> None:
        """The session's running prompt has ended; its next one may go."""
        self._busy_sessions.discard(session)

    def remove(self, key: Hashable) -> Ticket | None:
        return self._waiting.pop(key, None)

    def positions(self, now: float, *, free: int = 0) -> dict[Hashable, int]:
        """Everybody's place, 1 for who is next, as if nobody else came; those for whom a place is free wait no more."""
        going = self.front(free, now)
        waiting = (ticket.key for ticket in self._in_order(now) if ticket.key not in going)
        return {key: place for place, key in enumerate(waiting, start=1)}

    def _in_order(self, now: float, *, at_once: bool = False) -> Iterator[Ticket]:
        """The order in which `next` would take them, held ones too. `at_once`: with no session's prompt ending meanwhile."""
        chains = self._chains(at_once=at_once)
        level_turns: dict[str, int] = {}
        session_turns: dict[Hashable, int] = {}
        turn = self._turn
        # Tickets of one lane and first level, best first, and one entry that counts (the latest) for each such group: a turn
        # changes the rank of the groups of its level alone, so that few are looked at again, however many wait.
        groups: dict[tuple[int, str], list[tuple[int, float, int, Ticket]]] = {}
        heads: list[tuple[_Rank, tuple[int, str]]] = []
        latest: dict[tuple[int, str], _Rank] = {}

        def rank(name: tuple[int, str]) -> _Rank:
            lane, level = name
            session_turn, arrived, number, _ = groups[name][0]
            return (lane, level_turns.get(level, self._level_turns.get(level, 0)), session_turn, arrived, number)

        def put(ticket: Ticket) -> tuple[int, str]:
            name = (self._lane(ticket, now), ticket.first_level)
            session_turn = session_turns.get(ticket.session, self._session_turn(ticket))
            heappush(groups.setdefault(name, []), (session_turn, ticket.arrived, ticket.number, ticket))
            return name

        def enter(name: tuple[int, str]) -> None:
            if groups[name]:
                latest[name] = rank(name)
                heappush(heads, (latest[name], name))

        for name in {put(chain.popleft()) for chain in chains.values()}:
            enter(name)
        while heads:
            told, name = heappop(heads)
            if told != latest[name] or not groups[name]:
                continue
            if told != rank(name):
                enter(name)
                continue
            *_, ticket = heappop(groups[name])
            yield ticket
            turn += 2  # one for the session, one for the level, as `next` counts them
            level_turns[ticket.first_level] = turn
            if ticket.session is not None:
                session_turns[ticket.session] = turn - 1
            chain = chains[ticket if ticket.session is None else ticket.session]
            for changed in {name, put(chain.popleft())} if chain else {name}:
                enter(changed)

    def _chains(self, *, at_once: bool) -> dict[Hashable, deque[Ticket]]:
        """Tickets that go one after the other: the prompts of a session; a stateless request is a chain of its own."""
        chains: dict[Hashable, deque[Ticket]] = {}
        for ticket in self._waiting.values():
            if ticket.session is None:
                chains[ticket] = deque([ticket])
            elif at_once and (ticket.session in self._busy_sessions or ticket.session in chains):
                continue
            else:
                chains.setdefault(ticket.session, deque()).append(ticket)
        return chains


class RateLimiter:
    """A token bucket per first topic level: a minute's worth at once, then evenly; sessions are free to make, levels not."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, first_level: str, now: float) -> None:
        """Raises `RateLimited` with the seconds until the next request is allowed; counts nothing."""
        if self.per_minute <= 0:
            return
        tokens = self._tokens(first_level, now)
        if tokens < 1.0:
            wait_s = round((1.0 - tokens) * 60.0 / self.per_minute, 1)
            raise RateLimited(
                f"more than {self.per_minute} requests in a minute; the next one is taken in {wait_s:g} s",
                retry_after_s=max(0.1, wait_s),
            )

    def take(self, first_level: str, now: float) -> None:
        """Count one request; raises as `check`."""
        self.check(first_level, now)
        if self.per_minute <= 0:
            return
        self._buckets[first_level] = (self._tokens(first_level, now) - 1.0, now)
        self._buckets.move_to_end(first_level)
        if len(self._buckets) > _REMEMBERED_LEVELS:
            self._buckets.popitem(last=False)

    def _tokens(self, first_level: str, now: float) -> float:
        full = float(self.per_minute)
        tokens, at = self._buckets.get(first_level, (full, now))
        return min(full, tokens + (now - at) * full / 60.0)
