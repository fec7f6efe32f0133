"""The interface between the worker and the journal that the workers of a pool share: who waits, who runs what, who is alive.

The journal is a `Store` whose writes are fenced: a worker that lost its lease (it was stopped, cut off, or too slow) can
change nothing of a request any more that another worker may have taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, Store, StoreError


class LeaseLost(StoreError):
    """This worker's lease on the request (or altogether) is over: another worker has it or may have it. Publish nothing of it
    and write nothing. To whoever knows no pools it is a journal that cannot be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker of the pool as it registers itself."""

    worker_id: str
    instance: str
    slots: int
    models: tuple[str, ...] = ()
    """Names that requests may ask for; a request without one goes to any worker."""
    version: str = ""
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSeen:
    """A registered worker as the database has it. `lease_left_s` is by the database's clock and negative once it is over."""

    member: Member
    fence: int
    lease_left_s: float
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRequest:
    """A checked request on its way into the common queue."""

    entry: Entry
    first_level: str
    lane: int
    """Index into `core.turns.LANES`."""
    in_turn: bool
    """Whether it waits for the earlier prompts of its session (`prompt`, not `messages`)."""
    model: str | None = None
    replaces: float | None = None
    """`ended_at` of an ended entry with this key, as `find` gave it, that this request takes the place of."""


Claim = Literal["run", "cancelled", "forgotten", "expired", "evicted", "interrupted", "ended"]
"""Why a worker has an entry: to run it, or to end it: cancelled by its client while it waited (`forgotten`: by a reset, so that the
end writes no history), its time limit passed, it lost its place in the queue, the worker that streamed it died. `ended`: to publish
the end that a dead worker has stored, and perhaps not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """An entry that is this worker's now. `entry.starts` counts the starts on all workers."""

    entry: Entry
    waited_s: float = 0.0
    """Seconds since it was enqueued, by the database's clock: those of two workers may differ by minutes."""
    why: Claim = "run"
    by_own_level: bool = False
    """For `evicted`: a more urgent request of the same first level took the place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enqueued:
    """What became of one `PoolRequest`."""

    position: int = 0
    """Its place, 1 for who is next; 0 where a worker has a slot free for it, and where so many wait that `watched` tells it a moment
    later."""
    known: Entry | None = None
    """There was an entry with this key already, in any state: nothing was enqueued. An ended one is replaced, as in
    `Store.accept`, only by a request that names it in `replaces`."""
    owner: int | None = None
    """For a known one that runs: the fence of the worker that runs it."""
    refused: RequestError | None = None
    """`Busy` or `SessionBusy`: it has no place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """What a cancel found."""

    claimed: tuple[Claimed, ...] = ()
    """Those that waited: this worker's now, to be ended."""
    running_here: tuple[EntryKey, ...] = ()
    running_elsewhere: int = 0
    """Their workers have been told."""
    ended: bool = False
    """For one key: its end is stored."""


NoticeKind = Literal["work", "cancel", "forget", "snapshot"]


@dataclass(frozen=True, slots=True)
class Notice:
    """What another worker wants of this one. `work`: something may be claimed; the others name a request that runs here."""

    kind: NoticeKind
    key: EntryKey | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """The lease goes on. `cancelled` and `forgotten` are the requests of this worker for which that was asked, in case a notice
    got lost."""

    cancelled: tuple[EntryKey, ...] = ()
    forgotten: tuple[EntryKey, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLoad:
    """How full the pool is."""

    members: tuple[MemberSeen, ...]
    queued: Mapping[str, int] = field(default_factory=dict)
    """By lane."""
    oldest_wait_s: float = 0.0


class SharedJournal(Store, Protocol):
    """A store in a database that several workers use at once. `open` connects; before `join` only what reads works.

    Of `Store`, `unfinished` gives what this worker owns, `undelivered` the ends that it wrote or took over; `mark_started`,
    `mark_streaming`, `finish` and their `_soon` forms fail with LeaseLost where the entry is no longer this worker's. A
    `finish`, `reset` or `free_session` that lets the next prompt of a session go wakes the workers (`work`). All durations are
    measured by the database's clock. Under an unknown key a `finish` raises LeaseLost too, and changes no history.
    """

    def join(self, member: Member) -> int:
        """Register and begin the lease; returns the fence, a number higher than all given before. An earlier registration of the
        same worker_id is over at once: what it had can be taken over. Joining again after LeaseLost gives a new fence."""

    def update(self, member: Member) -> None:
        """Other slots, models, or draining: a member that drains is given nothing by `claim`."""

    def renew(self) -> Renewed:
        """Extend the lease. Raises LeaseLost once another worker has taken over, StoreError while the database is away."""

    def leave(self) -> None:
        """The end of the membership: what waits goes to others; never raises."""

    def listen(self, on_notice: Callable[[Notice], None]) -> None:
        """Call back for each notice, in the store's thread: it must return at once. After a lost connection one `work` is made up,
        since notices may be missing."""

    def enqueue(
        self, requests: Sequence[PoolRequest], *, limits: QueueLimits, retry_after_s: float, aging_s: float
    ) -> tuple[list[Enqueued], list[Claimed]]:
        """Journal these and put them into the common queue, durably, in this order and in one transaction; what has no place or
        is known is not. The second list is this worker's now, to be ended: what lost its place to them, and what was cancelled before
        it came. Wakes workers."""

    def claim(self, free: int, *, models: Sequence[str], aging_s: float, prefer_for_s: float) -> list[Claimed]:
        """Take up to `free` requests whose turn it is, plus those whose time limit passed (whatever `free` is; a few at a time).

        Turns as in `core.turns.Turns`: the lane, then the first level whose last turn is longest ago, then the session, then
        arrival; prompts of one session one at a time, never before an earlier one has ended. A request whose session ran last
        on another live member with a free slot is left to that one for `prefer_for_s` after it came (its engine has the
        session's prompt in its cache)."""

    def release(self, keys: Sequence[EntryKey]) -> None:
        """Give back what was claimed and not started (a drain, a worker that stops), or only to be ended: others may claim it at
        once."""

    def cancel(
        self, session: tuple[str, str], request_id: str | None, *, forget: bool = False, remember_s: float = 60.0
    ) -> Cancelled:
        """Cancel one request or all unfinished ones of the session. An unknown id is remembered for so long: the request is then
        claimed as `cancelled` at once when it comes."""

    def hold_session(self, session: tuple[str, str], *, hold_s: float) -> None:
        """Let no prompt of the session be claimed until `free_session`, or for so long."""

    def free_session(self, session: tuple[str, str]) -> None: ...

    def running_in(self, session: tuple[str, str]) -> int:
        """How many requests of the session some worker has and has not ended."""

    def begun_sessions(self, route: str, *, age_s: float) -> Sequence[str]:
        """Sessions of the route with requests under way that were there so many seconds ago: of some of them nothing else is known
        yet."""

    def ask_snapshot(self, key: EntryKey) -> bool:
        """Ask the worker that runs it to publish a snapshot; False when none does."""

    def watched(self, keys: Sequence[EntryKey]) -> Mapping[EntryKey, int]:
        """Of these keys those that still wait, with their positions."""

    def overdue(self) -> list[MemberSeen]:
        """Members whose lease is over."""

    def take_over(self, fence: int) -> list[Claimed]:
        """End another member's membership, if its lease is (still) over, and return what it had: what it streamed as
        `interrupted`, and its stored ends that no broker acknowledged as `ended`, this worker's now. What had no chunk yet waits
        again, in its old place. At most one worker gets them."""

    def load(self) -> PoolLoad: ...

    def lead(self) -> bool:
        """Whether this worker is the one that publishes the pool's status; one at a time is, as long as it is connected."""
