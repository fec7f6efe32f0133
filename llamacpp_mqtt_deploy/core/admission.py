"""Who may wait, on one worker: a bounded queue whose places and bytes are shared between first topic levels."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import islice

from llamacpp_mqtt_deploy.core.queue_places import QueueLimits, check_session, make_room
from llamacpp_mqtt_deploy.core.turn_index import TurnIndex
from llamacpp_mqtt_deploy.core.turns import LANES, Ticket, Turns
from llamacpp_mqtt_deploy.core.waiting_tickets import BesidePaced, WaitingTickets

__all__ = ["EXACT_AT_ONCE", "EXACT_PLACES", "AdmissionQueue", "QueueLimits"]

EXACT_AT_ONCE = 128
"""In a longer queue a newcomer's place is not told at once: to find it takes looking at all that wait, and the queue is held meanwhile."""

_INDEXED_ABOVE = 128
"""In a longer queue who is next is looked up, in a shorter one looked for: most queues are short, and then nothing is kept."""

EXACT_PLACES = 1000
"""In a longer queue a request's place is told by how many came before it."""


class AdmissionQueue:
    """The requests that wait for a slot. Pure: the caller holds the lock and brings the time (monotonic seconds).

    Who has a place is said in `make_room`, who goes next in `Turns`. Prompts of one session go one at a time: `leave_session` lets
    the next one go.
    """

    def __init__(self, *, limits: QueueLimits, aging_s: float) -> None:
        self.limits = limits
        self.turns = Turns(aging_s)
        self._waiting = WaitingTickets()
        self._busy_sessions: set[Hashable] = set()
        self._index: TurnIndex | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._waiting)

    def set_aging(self, aging_s: float) -> None:
        """From now on a request moves up one lane for so many seconds that it waits."""
        if aging_s != self.turns.aging_s:
            self.turns.aging_s = aging_s
            self._index = None

    def by_lane(self) -> Mapping[str, int]:
        counts = dict.fromkeys(LANES, 0)
        for ticket in self._waiting:
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
                busy = ticket.session in self._busy_sessions
                check_session(
                    self._waiting.in_session(ticket.session), self.limits, busy=busy, retry_after_s=retry_after_s
                )
            if self._waiting or paced:  # nobody has to make room for a first one, whatever its size
                waiting = BesidePaced(self._waiting, paced)
                leaving = make_room(ticket, waiting, self.limits, retry_after_s=retry_after_s, paced=paced)
            for other in leaving:
                self.remove(other.key)
        self.remove(ticket.key)
        self.turns.arrive(ticket)
        self._waiting.add(ticket)
        self._is_new_head(ticket)
        # Here too: while every slot is taken nobody asks who is next. Of a time that is past, which does not matter (`TurnIndex.first`).
        self._look_after_the_index(ticket.arrived)
        return leaving

    # --- through and out -----------------------------------------------------------------------------------------------

    def next(self, now: float) -> Ticket | None:
        """Take the ticket whose turn it is, None when nobody can go."""
        ticket = self._first(now)
        if ticket is None:
            return None
        if ticket.session is not None:
            self._busy_sessions.add(ticket.session)
        self.remove(ticket.key)
        level, session = self.turns.take(ticket)
        if self._index is not None and level is not None:
            self._index.level_forgotten(level)
        if session is not None:
            self._is_new_head(self._waiting.head(session))
        return ticket

    def _first(self, now: float) -> Ticket | None:
        self._look_after_the_index(now)
        if self._index is None:
            return self.turns.first([head for head in self._heads() if not head.held], now)
        return self._index.first(now)

    def _look_after_the_index(self, now: float) -> None:
        """Have one where many wait, none where few do, and no old one."""
        waiting = len(self._waiting)
        if 2 * waiting <= _INDEXED_ABOVE:
            self._index = None
        elif waiting > _INDEXED_ABOVE if self._index is None else self._index.outgrown(waiting):
            self._index = TurnIndex(self._heads(), self.turns, now, may_go=self._may_go)

    def _may_go(self, ticket: Ticket) -> bool:
        chain = ticket if ticket.session is None else ticket.session
        return ticket.session not in self._busy_sessions and self._waiting.head(chain) is ticket

    def _is_new_head(self, ticket: Ticket | None) -> None:
        """Perhaps this one may go from now on."""
        if self._index is not None and ticket is not None:
            self._index.add(ticket)

    def hold_session(self, session: Hashable) -> None:
        """Let no prompt of the session go before `leave_session`, as if one of them ran."""
        self._busy_sessions.add(session)

    def leave_session(self, session: Hashable) -> None:
        """The session's running prompt has ended; its next one may go."""
        self._busy_sessions.discard(session)
        self._is_new_head(self._waiting.head(session))

    def remove(self, key: Hashable) -> Ticket | None:
        """Take the ticket out of the queue; None when it is not there."""
        ticket = self._waiting.remove(key)
        if ticket is not None and ticket.session is not None:
            self._is_new_head(self._waiting.head(ticket.session))
        return ticket

    # --- looking -------------------------------------------------------------------------------------------------------

    def front(self, places: int, now: float) -> set[Hashable]:
        """Who goes when this many places are free, held tickets counted as if they were not."""
        if places <= 0:
            return set()
        heads = list(self._heads())
        if len(heads) > places:
            heads = list(islice(self.turns.order([(head,) for head in heads], now), places))
        return {head.key for head in heads}

    def positions(self, now: float, *, free: int = 0) -> dict[Hashable, int]:
        """Everybody's place, 1 for who is next, as if nobody else came; those for whom a place is free wait no more.

        Of more than `EXACT_PLACES` their places by arrival.
        """
        going = self.front(free, now)
        order: Iterator[Ticket] = iter(self._waiting)
        if len(self._waiting) <= EXACT_PLACES:
            order = self.turns.order([tuple(chain.values()) for chain in self._waiting.chains().values()], now)
        waiting = (ticket.key for ticket in order if ticket.key not in going)
        return {key: place for place, key in enumerate(waiting, start=1)}

    def last_places(self, count: int) -> dict[Hashable, int]:
        """The places by arrival of those who came last, so many."""
        last = islice(reversed(self._waiting), count)
        return {ticket.key: len(self._waiting) - behind for behind, ticket in enumerate(last)}

    def _heads(self) -> Iterator[Ticket]:
        """The first of each chain, but of the sessions that are busy."""
        for session, chain in self._waiting.chains().items():
            if session not in self._busy_sessions:
                yield next(iter(chain.values()))
