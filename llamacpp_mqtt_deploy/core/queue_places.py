"""Whose place it is: the rules by which a newcomer comes into a bounded queue whose places and bytes first topic levels share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, Protocol

from llamacpp_mqtt_deploy.core.errors import Busy, SessionBusy
from llamacpp_mqtt_deploy.core.turns import Ticket

_MIB = 1024 * 1024
_NOTHING = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What may wait. While others wait too, one first level holds at most `share` (0 to 1) of the places and of the bytes."""

    queue_size: int
    session_queue: int
    max_bytes: int = 64 * _MIB
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that the queue has a limited amount of, and how much of it a ticket takes."""

    name: Literal["places", "bytes"]
    limit: int
    of: Callable[[Ticket], int]
    full: str


class Counted:
    """Tickets, and how much they hold, counted as they are added."""

    def __init__(self, tickets: Iterable[Ticket] = ()) -> None:
        self.tickets: list[Ticket] = []
        self.keys: set[Hashable] = set()
        self._in_all = [0, 0]
        self._levels: dict[str, list[int]] = {}
        for ticket in tickets:
            self.add(ticket)

    def add(self, ticket: Ticket) -> None:
        self.tickets.append(ticket)
        self.keys.add(ticket.key)
        for held in (self._in_all, self._levels.setdefault(ticket.first_level, [0, 0])):
            held[0] += 1
            held[1] += ticket.size

    def places(self, level: str) -> int:
        """How many tickets of this first level there are."""
        return self._levels.get(level, _NOTHING)[0]

    def held(self, measure: Measure, level: str | None = None) -> int:
        """What this first level holds; without one, all together."""
        held = self._in_all if level is None else self._levels.get(level, _NOTHING)
        return held[measure.name == "bytes"]


class Waiting(Protocol):
    """Those that wait, as the rules ask for them: in memory, or in a database that several workers share. `without` are tickets that
    are about to leave; from one question to the next they become more only."""

    def held(self, measure: Measure, level: str | None = None) -> int:
        """What this first level holds; without one, all together."""

    def largest(self, measure: Measure, *, but: str, without: Counted) -> tuple[str, int] | None:
        """Of the other first levels that wait the one that holds most, and how much; of equal ones the first by its name."""

    def last(self, level: str, *, lower_than: int = -1, without: Counted) -> Ticket | None:
        """The newest of the lowest lane of this first level, among lanes lower than this one."""


def make_room(
    newcomer: Ticket,
    waiting: Waiting,
    limits: QueueLimits,
    *,
    retry_after_s: float,
    paced: Sequence[Ticket] = (),
) -> list[Ticket]:
    """Who has to leave so that this one may wait, mostly nobody. Raises `Busy`, and then nobody has to.

    In a full queue the newest of the lowest lane of the level that holds most, as long as that level then still holds no
    less than the newcomer's: so nobody loses a place to another level while it holds no more than an even part of the
    queue, however urgent the newcomer is. Else the newest of the lowest lane below the newcomer's among those of its own
    level. `paced` are requests that wait no more and are not over either: they count for their own level alone.
    """
    leaving, being_paced = Counted(), Counted(paced)
    for measure in _measures(limits):
        while (problem := _problem(newcomer, measure, waiting, leaving, being_paced, limits.share)) is not None:
            ticket = (
                None if problem == _OVER_SHARE else _of_the_largest(newcomer, measure, waiting, leaving, being_paced)
            )
            if ticket is None:
                ticket = waiting.last(newcomer.first_level, lower_than=newcomer.lane, without=leaving)
            if ticket is None:
                raise Busy(f"{problem} ({measure.full}); try again in {retry_after_s:g} s", retry_after_s=retry_after_s)
            leaving.add(ticket)
    return leaving.tickets


def check_session(waiting: int, limits: QueueLimits, *, busy: bool, retry_after_s: float) -> None:
    """Raises `SessionBusy` where the session has as many prompts waiting for their turn as it may have; one that could go at once,
    since none of the session runs (`busy`), does not wait."""
    most = limits.session_queue
    if (waiting if busy else max(0, waiting - 1)) >= most:
        raise SessionBusy(
            f"this session has {most} prompts waiting already; send the next one when one has ended",
            retry_after_s=retry_after_s,
        )


_FULL = "the queue is full"
_OVER_SHARE = "your share of the queue is taken"


def _measures(limits: QueueLimits) -> tuple[Measure, Measure]:
    return (
        Measure("places", limits.queue_size, lambda _: 1, f"{limits.queue_size} requests wait"),
        Measure("bytes", limits.max_bytes, lambda each: each.size, f"{limits.max_bytes / _MIB:g} MiB of requests wait"),
    )


def _problem(
    newcomer: Ticket,
    measure: Measure,
    waiting: Waiting,
    leaving: Counted,
    paced: Counted,
    share: float,
) -> str | None:
    """Why the newcomer has no place; None when it has one."""
    level, wanted = newcomer.first_level, measure.of(newcomer)
    total = waiting.held(measure) - leaving.held(measure)
    of_level = waiting.held(measure, level) - leaving.held(measure, level)
    being_paced = paced.held(measure, level)
    mine = of_level + being_paced
    # A first request has its place whatever its size, or one that is larger than a share could never come in.
    if mine and total > of_level and mine + wanted > ceil(measure.limit * share):
        return _OVER_SHARE
    # Places of paced answers cannot be taken back, so those of others do not count, up to as many again.
    mine_and_queue = total + being_paced
    if mine_and_queue and mine_and_queue + wanted > measure.limit:
        return _FULL
    if total + paced.held(measure) + wanted > 2 * max(measure.limit, wanted):
        return _FULL
    return None


def _of_the_largest(
    newcomer: Ticket, measure: Measure, waiting: Waiting, leaving: Counted, paced: Counted
) -> Ticket | None:
    """What the level that holds most gives up, if it then still holds no less than the newcomer's."""
    level = newcomer.first_level
    found = waiting.largest(measure, but=level, without=leaving)
    ticket = None if found is None else waiting.last(found[0], without=leaving)
    if found is None or ticket is None:
        return None
    mine = waiting.held(measure, level) - leaving.held(measure, level) + paced.held(measure, level)
    return ticket if found[1] - measure.of(ticket) >= mine + measure.of(newcomer) else None
