"""This worker's membership in its pool: the lease, what other workers ask of it, and taking over from those that are gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import structlog

from llamacpp_mqtt_deploy.pool_ports import LeaseLost, Member, Notice, SharedJournal
from llamacpp_mqtt_deploy.ports import EntryKey, StoreError
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.journaled import JournaledRequests
from llamacpp_mqtt_deploy.worker.pooled.claiming import Claims
from llamacpp_mqtt_deploy.worker.pooled.queue_watch import WaitingRequests

log = structlog.get_logger(__name__)

_TICK_S = 0.25
_LOOK_FOR_OVERDUE_S = 0.5
# So late it may be known here what others serve.
_OTHERS_EVERY_S = 2.0
# More than any write is waited for, and than it takes from a claim to a job.
_DISOWN_AFTER_S = 40.0
_LONGEST_OVERDUE_S = 10 * 365 * 86400.0
# Of a lease: two renewals may fail before others may take over.
_RENEWALS_A_LEASE = 3


class Membership:
    """A thread of its own: joins, renews, takes over. `describe` gives this worker as others are to see it, just now."""

    def __init__(
        self,
        *,
        journal: SharedJournal,
        registry: JobRegistry,
        claims: Claims,
        requests: JournaledRequests,
        waiting: WaitingRequests,
        background: Background,
        cancel: Callable[[Job], object],
        describe: Callable[[], Member],
        know_models: Callable[[tuple[str, ...]], object],
        lease_s: float,
    ) -> None:
        self._journal = journal
        self._registry = registry
        self._claims = claims
        self._requests = requests
        self._waiting = waiting
        self._background = background
        self._cancel = cancel
        self._describe = describe
        self._know_models = know_models
        self._lease_s = lease_s
        self._told: Member | None = None
        """As the others see this worker; None while it is no member."""
        self._trouble = ""
        """Why the lease could not be renewed, as it was told last."""
        self._begun = False
        """Whether this member claims already."""
        self._unknown: dict[EntryKey, float] = {}
        """What may have to be given back, since when (monotonic seconds)."""
        self._wanted = False
        self._renew_at = self._overdue_at = self._others_at = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="membership", daemon=True)
        self.beat_at = time.monotonic()
        """When the thread last came round, for the watchdog (monotonic seconds)."""

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Become a member: at once, or in the thread where the database is away just now."""
        try:
            self._join()
        except StoreError as problem:
            self._troubled(problem)
        self._journal.listen(self._on_notice)
        self._wanted = True

    def close(self, timeout_s: float) -> None:
        """Leave: what waits goes to others at once."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._told is not None:
            self._told = None
            self._journal.leave()

    # --- the thread ----------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._closed.wait(_TICK_S):
            self.beat_at = time.monotonic()
            if not self._wanted:
                continue
            try:
                self._tick(time.monotonic())
            except LeaseLost:
                self._lost()
            except StoreError as problem:
                self._troubled(problem)
            except Exception:
                log.exception("pool.membership_failed")

    def _tick(self, now: float) -> None:
        if self._told is None:
            self._join()
        elif not self._begun:
            self._begin()
        member = self._describe()
        if member != self._told:
            self._journal.update(member)
            self._told = member
        if now >= self._renew_at:
            renewed = self._journal.renew()
            self._trouble = ""
            self._renew_at = now + self._lease_s / _RENEWALS_A_LEASE
            self._stop(renewed.cancelled, forget=False)
            self._stop(renewed.forgotten, forget=True)
        if now >= self._overdue_at:
            self._overdue_at = now + min(_LOOK_FOR_OVERDUE_S, self._lease_s / 4)
            self._take_over()
        if now >= self._others_at:
            self._others_at = now + _OTHERS_EVERY_S
            self._learn()
            self._disown(now)
        self._waiting.check()

    def _learn(self) -> None:
        """What the others serve."""
        here = [seen.member for seen in self._journal.load().members if seen.lease_left_s > 0]
        self._know_models(tuple(sorted({model for member in here for model in member.models})))

    def _disown(self, now: float) -> None:
        """Give back what is this worker's in the database and known to nothing here, as when an answer of the database came after
        nobody waited for it any more: its client would wait until this worker ends."""
        keys = [entry.key for entry in self._journal.unfinished() if self._registry.find(entry.key) is None]
        self._unknown = {key: self._unknown.get(key, now) for key in keys}
        lost = [key for key, since in self._unknown.items() if now - since >= _DISOWN_AFTER_S]
        if lost:
            log.error("pool.disowned", requests=[key.request_id for key in lost][:10], message="others run or end them")
            self._journal.release(lost)

    def _join(self) -> None:
        member = self._describe()
        fence = self._journal.join(member)
        self._told = member
        self._renew_at = time.monotonic() + self._lease_s / _RENEWALS_A_LEASE
        log.info("pool.joined", fence=fence, slots=member.slots, lease_s=self._lease_s)
        self._begin()

    def _begin(self) -> None:
        """Tell the ends that were nobody's when this worker joined: those that a worker without a pool has left. Then claim, and
        not before: ends of its own are on their way already. Raises StoreError."""
        for entry in self._journal.undelivered():
            if entry.terminal is not None:
                self._requests.publish(entry, entry.terminal, again=True)
        self._begun = True
        self._claims.begin()

    def _troubled(self, problem: StoreError) -> None:
        """The lease is renewed when the database is back; each reason is told once."""
        if str(problem) != self._trouble:
            self._trouble = str(problem)
            log.error("pool.not_renewed", problem=self._trouble)

    def _lost(self) -> None:
        """Others may have taken over: whatever runs here is theirs. Without a word, or clients would hear two ends."""
        running = self._registry.all()
        log.error(
            "pool.lease_lost",
            running=len(running),
            message=f"this worker did not renew its lease for {self._lease_s:g} s (it was stopped, cut off from the "
            "database, or far too slow); others run what it had, and it joins again",
        )
        self._told = None
        self._begun = False
        self._claims.pause()
        for job in running:
            job.stop.set("put_back")

    # --- others --------------------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        for gone in self._journal.overdue():
            claimed = self._journal.take_over(gone.fence)
            log.warning(
                "pool.taken_over",
                worker=gone.member.worker_id,
                # A lease that ended by word, as when a worker has joined anew, is over since 1970.
                overdue_s=round(-gone.lease_left_s, 1) if gone.lease_left_s > -_LONGEST_OVERDUE_S else None,
                interrupted=sum(each.why == "interrupted" for each in claimed),
            )
            # First of all: these are this worker's now, and nobody else ends or tells them.
            self._claims.take(claimed)
            self._claims.wake()

    def _on_notice(self, notice: Notice) -> None:
        """The store's thread."""
        match notice.kind:
            case "work":
                self._claims.wake()
            case "cancel" | "forget":
                assert notice.key is not None
                self._stop([notice.key], forget=notice.kind == "forget")
            case "snapshot":
                key = notice.key
                assert key is not None
                self._background.run(("snapshot", key), lambda: self._snapshot(key))

    def _stop(self, keys: Iterable[EntryKey], *, forget: bool) -> None:
        for key in keys:
            job = self._registry.find(key)
            if job is not None:
                job.forgotten = job.forgotten or forget
                self._cancel(job)

    def _snapshot(self, key: EntryKey) -> None:
        job = self._registry.find(key)
        if job is not None and not job.responder.snapshot():
            job.responder.queued(position=job.position, reason=job.wait_reason, share="answer")
