"""The jobs of this worker (accepted requests that have not ended), with their queue, slots and rates behind one lock."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llamacpp_mqtt_deploy.core.addresses import Address
from llamacpp_mqtt_deploy.core.admission import EXACT_AT_ONCE, EXACT_PLACES, AdmissionQueue, QueueLimits
from llamacpp_mqtt_deploy.core.early_cancels import EarlyCancels
from llamacpp_mqtt_deploy.core.errors import RateLimited, ShuttingDown
from llamacpp_mqtt_deploy.core.formats.route_rendering import RouteRendering
from llamacpp_mqtt_deploy.core.rates import RateLimiter
from llamacpp_mqtt_deploy.core.requests import Generate
from llamacpp_mqtt_deploy.core.spending import Estimate, LedgerRow, LevelLimits, Quotas, Spent
from llamacpp_mqtt_deploy.core.turns import LANES, Ticket
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, Pending
from llamacpp_mqtt_deploy.stopping import StopSignal
from llamacpp_mqtt_deploy.worker.accumulator import AnswerAccumulator
from llamacpp_mqtt_deploy.worker.responder import Responder
from llamacpp_mqtt_deploy.worker.waiting_threads import WaitingThreads

JobPhase = Literal["queued", "running", "pacing", "ending", "ended"]


@dataclass(slots=True, eq=False)
class Job:
    """One accepted request on its way. `received_at` and `deadline` are monotonic seconds.

    `session` names whose turn it takes: None for stateless requests. `forgotten` is set by a reset: the end of this job then
    writes no history.
    """

    key: EntryKey
    entry: Entry
    address: Address
    request: Generate
    responder: Responder
    session: tuple[str, str] | None
    received_at: float
    deadline: float
    stop: StopSignal = field(default_factory=StopSignal)
    answer: AnswerAccumulator = field(default_factory=AnswerAccumulator)
    phase: JobPhase = "queued"
    wait_reason: str = "waiting"
    position: int = 0
    quiet_until: float = 0.0
    """As long as it waits in the queue there is nothing to be done for it before (monotonic seconds)."""
    starts: int = 0
    estimate: Estimate = field(default_factory=Estimate)
    """What it may come to cost."""
    started_at: float | None = None
    """When it got a slot, and when it gave it back."""
    released_at: float | None = None
    prompt_done: bool = False
    guessed_fit: bool = False
    """Its history was fitted without a count by the engine: it may be too long."""
    opened: bool = False
    """The engine has taken it up; before that it only waits for the engine."""
    live: bool = False
    """Its chunks go out as they are generated; otherwise the answer is collected and paced."""
    accepting: Pending | None = None
    """What writes the request to the journal; None for one of an earlier life."""
    unjournaled: bool = False
    """The journal does not have it: it was not accepted, whatever came of it meanwhile."""
    marking: Pending | None = None
    """What writes to the journal that the stream begins; the chunks wait for it."""
    forgotten: bool = False
    told: bool = False
    """Its terminal event is on its way; a moment later the job leaves."""
    rendering: RouteRendering | None = None
    """What makes messages of its events, on a route with a format."""
    ticket: Ticket | None = None
    """Its place in the queue, also when it waits no more."""
    _ended: bool = False

    def hurry(self) -> None:
        """Let the journal have the request now: somebody would have to wait for it."""
        if self.accepting is not None:
            self.accepting.hurry()

    @property
    def lane(self) -> int:
        return LANES.index(self.request.priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How full the worker is."""

    slots: int
    busy: int
    queued: int
    lanes: Mapping[str, int]


class JobRegistry:
    """All jobs between their acceptance and their terminal event.

    Owner of the lock: it is held for arithmetic only. Publishing, storing and calling back is left to the callers.
    """

    def __init__(
        self,
        *,
        limits: QueueLimits,
        aging_s: float,
        max_requests_per_minute: int,
        slots: int,
        levels: LevelLimits | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._takers = WaitingThreads(self._lock)
        self._queue = AdmissionQueue(limits=limits, aging_s=aging_s)
        self._rates = RateLimiter(max_requests_per_minute)
        self._quotas = Quotas(levels)
        self._rates.own = self._quotas.limits.own_requests_per_minute
        self._jobs: OrderedDict[EntryKey, Job] = OrderedDict()
        self._of_session: dict[tuple[str, str], dict[EntryKey, Job]] = {}
        """The same by route and session path, stateless ones included."""
        self._paced: dict[EntryKey, Ticket] = {}
        """Those of whom the engine is done, and which go out in small pieces."""
        self._early = EarlyCancels()
        self._changing: Counter[tuple[str, str]] = Counter()
        self._slots = slots
        self._held: set[Job] = set()
        self.wait_reason = "waiting"
        """What those in the queue wait for, as `queued` tells it; set when the engine comes and goes."""
        self.engine_away_since: float | None = None
        """Since when the engine cannot be reached (monotonic seconds); None when it can."""
        self.slot_freed: Callable[[], object] = lambda: None
        """Called when a slot may be free; must return at once."""
        self._pausing = False
        self._draining = False
        self._closed = False
        # Seconds that a slot is held, smoothed; for `retry_after_s`.
        self._mean_run_s = 5.0

    # --- limits that a reload can change ----------------------------------------------------------------------------

    def set_limits(
        self,
        *,
        limits: QueueLimits,
        aging_s: float,
        max_requests_per_minute: int,
        levels: LevelLimits | None = None,
    ) -> None:
        with self._lock:
            self._quotas.limits = levels or LevelLimits()
            self._rates.own = self._quotas.limits.own_requests_per_minute
            self._queue.limits = limits
            self._queue.set_aging(aging_s)
            self._rates.per_minute = max_requests_per_minute

    def set_slots(self, slots: int) -> None:
        """How many jobs may run at once; running ones beyond a lower number finish."""
        with self._lock:
            self._slots = max(1, slots)
            self._call_takers(self._slots)
        self.slot_freed()

    def set_context(self, tokens: int | None) -> None:
        """The engine's context: no request can cost more."""
        with self._lock:
            self._quotas.context_tokens = tokens

    # --- quotas --------------------------------------------------------------------------------------------------------

    @property
    def limits_tokens(self) -> bool:
        """Whether anybody's tokens are limited."""
        return self._quotas.limits.limit_tokens

    def reconcile(self, rows: Iterable[LedgerRow]) -> None:
        """Count what the ledger has from an earlier life of the worker, and from other workers of a pool."""
        with self._lock:
            self._quotas.reconcile(rows)

    def check_quota(self, first_level: str, now: float) -> None:
        """Raises RateLimited when the level has no tokens left on the day of `now` (seconds since the epoch)."""
        with self._lock:
            self._quotas.check(first_level, now, retry_after_s=self._retry_after_s())

    def spend(self, spent: Spent, now: float) -> None:
        """A request has cost this; `now` is seconds since the epoch."""
        with self._lock:
            self._quotas.spend(spent, now)

    # --- entering ------------------------------------------------------------------------------------------------------

    def enter(self, job: Job, *, recovered: bool = False) -> list[Job]:
        """Give the job a place in the queue, held until `commit`; returns the jobs that lost their place to it.

        Raises ShuttingDown, RateLimited, SessionBusy, Busy. A recovered job was accepted before a restart: no limit applies.
        """
        with self._lock:
            retry_after_s = self._retry_after_s()
            if not recovered:
                if self._draining or self._closed:
                    raise ShuttingDown("the worker takes no new requests at the moment; try again later")
                self._rates.check(job.address.first_level, job.received_at)
                self._quotas.check(job.address.first_level, job.entry.accepted_at, retry_after_s=retry_after_s)
            job.wait_reason = self.wait_reason
            job.ticket = _ticket(job)
            paced = list(self._paced.values())
            leaving = self._queue.admit(job.ticket, retry_after_s=retry_after_s, paced=paced, force=recovered)
            if not recovered:
                # Counted once it has its place: whoever is told to come back later has spent nothing.
                self._rates.take(job.address.first_level, job.received_at)
            self._quotas.set_aside(job.key, job.address.first_level, job.estimate, job.entry.accepted_at)
            self._jobs[job.key] = job
            self._of_session.setdefault((job.key.route, job.key.session), {})[job.key] = job
            return [self._jobs[ticket.key] for ticket in leaving]  # type: ignore[index]  # our own keys

    def commit(self, jobs: Sequence[Job]) -> None:
        """These are in the journal: they may be taken now."""
        with self._lock:
            for job in jobs:
                if job.ticket is not None:
                    job.ticket.held = False
            self._call_takers(len(jobs))

    def check_rate(self, first_level: str, received_at: float) -> None:
        """Raises RateLimited when the level may send no request now, ShuttingDown when the worker is closed; counts nothing."""
        with self._lock:
            if self._closed:
                raise ShuttingDown("the worker takes no new requests at the moment; try again later")
            self._rates.check(first_level, received_at)

    def take_rate(self, first_level: str, received_at: float) -> None:
        """Count a request that has its place in a queue elsewhere."""
        # Those of one burst were checked before any of them counted.
        with self._lock, contextlib.suppress(RateLimited):
            self._rates.take(first_level, received_at)

    def count_control(self, first_level: str, *, ahead: bool = False) -> None:
        """Count a control against the level's rate; raises RateLimited. `ahead` as in `RateLimiter.check`."""
        with self._lock:
            self._rates.take(first_level, time.monotonic(), ahead=ahead)

    def _retry_after_s(self) -> float:
        rounds = (len(self._queue) + 1) / max(1, self._slots)
        return float(min(120, max(1, round(rounds * self._mean_run_s))))

    # --- running -------------------------------------------------------------------------------------------------------

    def take(self, timeout_s: float) -> Job | None:
        """The next job for a free slot; None after the timeout or when closed."""
        with self._lock:
            job = self._take_now()
            if job is None and not self._closed:
                self._takers.wait(timeout_s)
                job = self._take_now()
            return job

    def _call_takers(self, most: int) -> None:
        """Wake as many threads as can find something to do, at most so many."""
        self._takers.wake(min(most, self._free(), len(self._queue)))

    def _take_now(self) -> Job | None:
        if self._closed or self._pausing or len(self._held) >= self._slots:
            return None
        ticket = self._queue.next(time.monotonic())
        if ticket is None:
            return None
        job = self._jobs[ticket.key]  # type: ignore[index]  # our own keys
        job.phase = "running"
        job.started_at = time.monotonic()
        self._held.add(job)
        return job

    def waiting(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of these jobs, in the queue and perhaps still held, that will not be taken at once."""
        with self._lock:
            going = self._queue.front(self._free(), time.monotonic())
            return [job for job in jobs if job.phase == "queued" and job.key not in going]

    def idle_slots(self) -> int:
        """For how many requests of a common queue there is a slot here, beside those that have a place in this queue."""
        with self._lock:
            return 0 if self._draining or self._closed else max(0, self._free() - len(self._queue))

    def _free(self) -> int:
        return 0 if self._pausing else max(0, self._slots - len(self._held))

    def release_slot(self, job: Job, *, pacing: bool = False) -> None:
        """The engine is done with this job; the next one may have its slot."""
        with self._lock:
            if job not in self._held:
                return
            self._held.discard(job)
            if job.phase == "running":
                job.phase = "pacing" if pacing else "ending"
                if pacing and job.ticket is not None and self._jobs.get(job.key) is job:
                    self._paced[job.key] = job.ticket
            job.released_at = time.monotonic()
            if job.started_at is not None:
                self._mean_run_s += 0.2 * (time.monotonic() - job.started_at - self._mean_run_s)
            self._call_takers(1)
        self.slot_freed()

    # --- ending --------------------------------------------------------------------------------------------------------

    def claim_end(self, job: Job) -> bool:
        """Whoever gets True writes the terminal event of this job; nobody gets it twice."""
        with self._lock:
            if job._ended:  # noqa: SLF001  # the registry owns it
                return False
            job._ended = True  # noqa: SLF001
            self._unqueue(job)
            return True

    def hold_end(self, job: Job) -> None:
        """Its terminal event waits for the journal: it is ending until `leave`, and its session's next prompt waits too."""
        with self._lock:
            if job.phase != "ended":
                job.phase = "ending"
                self._paced_no_more(job)

    def leave(self, job: Job) -> None:
        """The terminal event is stored: the job is gone, and its session's next prompt may go.

        Its slot stays taken until `release_slot`: an engine that does not end a request cannot take another.
        """
        with self._lock:
            job.phase = "ended"
            self._unqueue(job)
            self._paced_no_more(job)
            if self._jobs.get(job.key) is job:
                del self._jobs[job.key]
                name = (job.key.route, job.key.session)
                del self._of_session[name][job.key]
                if not self._of_session[name]:
                    del self._of_session[name]
                self._quotas.release(job.key)
            if job.session is not None and not self._session_runs(job.session):
                self._queue.leave_session(job.session)
            self._call_takers(1)
            self._idle.notify_all()

    def _paced_no_more(self, job: Job) -> None:
        if job.ticket is not None and self._paced.get(job.key) is job.ticket:
            del self._paced[job.key]

    def withdraw(self, job: Job) -> bool:
        """Take a job that waits out of the queue, to be ended by the caller; False when it does not wait (any more)."""
        with self._lock:
            return self._unqueue(job)

    def _unqueue(self, job: Job) -> bool:
        """Whether it waited: a place under its key may be that of a job that came after it, of the same request."""
        return self._jobs.get(job.key) is job and self._queue.remove(job.key) is not None

    def hold_session(self, session: tuple[str, str]) -> None:
        """Let no further prompt of this session go before as many `free_session`: its history is being changed."""
        with self._lock:
            self._changing[session] += 1
            self._queue.hold_session(session)

    def free_session(self, session: tuple[str, str]) -> None:
        with self._lock:
            self._changing[session] -= 1
            if not self._changing[session]:
                del self._changing[session]
            if not self._session_runs(session):
                self._queue.leave_session(session)
                self._call_takers(1)

    def _session_runs(self, session: tuple[str, str]) -> bool:
        return session in self._changing or any(
            job.session == session and job.phase != "queued" for job in self._of_session.get(session, {}).values()
        )

    # --- looking -------------------------------------------------------------------------------------------------------

    def find(self, key: EntryKey) -> Job | None:
        with self._lock:
            return self._jobs.get(key)

    def untold(self, key: EntryKey) -> Job | None:
        """The job of this request as clients know it: None as soon as its end is on its way. Who asks after that has perhaps not heard it."""
        job = self.find(key)
        return None if job is None or job.told else job

    def all(self) -> list[Job]:
        with self._lock:
            return list(self._jobs.values())

    def running(self) -> int:
        """How many slots are taken just now; looked at for each read of an engine, so without the lock."""
        return len(self._held)

    def all_held_slots(self) -> list[Job]:
        """Jobs that hold a slot, also those that were ended from outside because their engine did not return."""
        with self._lock:
            return list(self._held)

    def of_session(self, session: tuple[str, str]) -> list[Job]:
        """Jobs whose replies go to this session (route, session path), stateless ones included, oldest first."""
        with self._lock:
            return list(self._of_session.get(session, {}).values())

    def positions_at_once(self, newcomers: int) -> dict[EntryKey, int] | None:
        """As `positions`, at least of so many who came last; None where it would keep those waiting who cannot wait."""
        with self._lock:
            waiting = len(self._queue)
            if waiting > EXACT_PLACES:
                return dict(self._queue.last_places(newcomers))  # type: ignore[arg-type]  # our own keys
        return self.positions() if waiting <= EXACT_AT_ONCE else None

    def positions(self) -> dict[EntryKey, int]:
        """The places of those that wait, 1 for who is next."""
        with self._lock:
            return dict(self._queue.positions(time.monotonic(), free=self._free()))  # type: ignore[arg-type]  # our own keys

    def load(self) -> Load:
        """Slots and queue for health and status."""
        with self._lock:
            return Load(
                slots=self._slots,
                busy=len(self._held),
                queued=len(self._queue),
                lanes=self._queue.by_lane(),
            )

    def __len__(self) -> int:
        with self._lock:
            return len(self._jobs)

    # --- cancels that came first -----------------------------------------------------------------------------------------

    def remember_cancel(self, first_level: str, key: EntryKey) -> None:
        with self._lock:
            self._early.add(first_level, key, time.monotonic())

    def was_cancelled(self, job: Job) -> bool:
        """Whether a cancel for this request came before it; asked once."""
        with self._lock:
            return self._early.take(job.address.first_level, job.key, time.monotonic())

    # --- draining --------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Refuse new requests; accepted ones go on."""
        with self._lock:
            self._draining = True

    def resume(self) -> bool:
        """Take requests again; False when the worker is stopping, which nobody takes back."""
        with self._lock:
            if self._pausing or self._closed:
                return False
            self._draining = False
            return True

    def pause(self) -> None:
        """Take nothing new and start no more of the queued ones, for good: they stay in the journal for the next start."""
        with self._lock:
            self._draining = True
            self._pausing = True

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until no job runs or is paced (queued ones do not count while paused)."""

        def idle() -> bool:
            return all(job.phase == "queued" for job in self._jobs.values())

        with self._lock:
            return self._idle.wait_for(idle, timeout_s)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._takers.wake_all()
            self._idle.notify_all()


def _ticket(job: Job) -> Ticket:
    return Ticket(
        key=job.key,
        lane=job.lane,
        first_level=job.address.first_level,
        session=job.session,
        arrived=job.received_at,
        size=len(job.entry.payload),
        held=True,
    )
