"""Takes requests out of the common queue whenever this worker has a slot free."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import structlog

from llamacpp_mqtt_deploy.core.errors import Busy, Interrupted, RequestError, TimedOut
from llamacpp_mqtt_deploy.pool_ports import Claimed, LeaseLost, SharedJournal
from llamacpp_mqtt_deploy.ports import EntryKey, StoreError
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.journal_clock import wall
from llamacpp_mqtt_deploy.worker.journaled import JournaledRequests

log = structlog.get_logger(__name__)

PREFER_FOR_S = 0.05
"""How long a request waits for the worker that has its session's prompt in its cache, while another one is idle."""

# A notice may get lost with its connection; then a request waits so long for a free slot.
_LOOK_EVERY_S = 1.0
# After an error of the database, which logs it where it has a reason.
_AGAIN_S = 0.5
# When a request that lost its place in the queue may try again, as on a worker of its own.
_RETRY_EVICTED_S = 10.0


class Claims:
    """A thread of its own. `engine_ready` tells whether a request could begin now, `models` what it may ask for."""

    def __init__(
        self,
        *,
        journal: SharedJournal,
        registry: JobRegistry,
        requests: JournaledRequests,
        completion: Completion,
        engine_ready: Callable[[], bool],
        models: Callable[[], Sequence[str]],
        aging_s: Callable[[], float],
        now: Callable[[], float] = wall,
    ) -> None:
        self._now = now
        self._journal = journal
        self._registry = registry
        self._requests = requests
        self._completion = completion
        self._engine_ready = engine_ready
        self._models = models
        self._aging_s = aging_s
        self._wake = threading.Event()
        self._joined = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="claims", daemon=True)
        self.beat_at = time.monotonic()
        """When the thread last came round, for the watchdog (monotonic seconds)."""

    def start(self) -> None:
        self._thread.start()

    def begin(self) -> None:
        """The worker is a member of the pool: claim."""
        self._joined.set()
        self._wake.set()

    def pause(self) -> None:
        """The membership is over for now."""
        self._joined.clear()

    def wake(self) -> None:
        """Something may be claimed, or a slot is free. Returns at once."""
        self._wake.set()

    def close(self, timeout_s: float) -> None:
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # --- the thread ----------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        wait_s = _LOOK_EVERY_S
        while not self._closed.is_set():
            self.beat_at = time.monotonic()
            woken = self._wake.wait(wait_s)
            self._wake.clear()
            if self._closed.is_set() or not self._joined.is_set():
                wait_s = _LOOK_EVERY_S
                continue
            try:
                wait_s = self._claim(woken=woken)
            except LeaseLost:
                wait_s = _LOOK_EVERY_S  # the membership's thread sees it too, and joins again
            except StoreError as problem:
                log.warning("pool.claim_failed", problem=str(problem))
                wait_s = _AGAIN_S
            except Exception:
                log.exception("pool.claim_failed")
                wait_s = _AGAIN_S

    def _claim(self, *, woken: bool) -> float:
        """Claim as many as there are slots free; gives the seconds until the next look without a notice."""
        free = self._registry.idle_slots() if self._engine_ready() else 0
        if not free and woken:
            return _LOOK_EVERY_S  # a slot that becomes free wakes us
        claimed = self._journal.claim(free, models=self._models(), aging_s=self._aging_s(), prefer_for_s=PREFER_FOR_S)
        self.take(claimed)
        if not free:
            return _LOOK_EVERY_S
        if len(claimed) >= free:
            return 0.0  # those that were only to be ended took no slot
        # What came just now may be kept for another worker, for a moment.
        return PREFER_FOR_S if woken else _LOOK_EVERY_S

    # --- what was claimed ----------------------------------------------------------------------------------------------

    def take(self, claimed: Sequence[Claimed]) -> None:
        """Run these, end them, or tell the end that they have. One that cannot be read or ended costs nobody but itself."""
        for each in claimed:
            try:
                self._take(each)
            except RequestError as error:
                self._requests.end(each.entry, error)
            except Exception:
                log.exception("pool.entry_failed", request_id=each.entry.key.request_id, session=each.entry.key.session)

    def _take(self, claimed: Claimed) -> None:
        match claimed.why:
            case "run":
                if not self._runs_already(claimed.entry.key):
                    self._run(self._job(claimed))
            case "cancelled" | "forgotten":
                job = self._job(claimed)
                job.forgotten = claimed.why == "forgotten"
                job.stop.set("cancelled")
                self._completion.stopped(job)
            case "evicted":
                whose = "a more urgent request of yours" if claimed.by_own_level else "a client that holds fewer places"
                raise Busy(f"the queue is full and {whose} took this place", retry_after_s=_RETRY_EVICTED_S)
            case "expired":
                raise TimedOut("the time limit of this request passed while it waited for a slot")
            case "ended":
                assert claimed.entry.terminal is not None
                self._requests.publish(claimed.entry, claimed.entry.terminal, again=True)
            case "interrupted":
                raise Interrupted("the worker that wrote this answer is gone; send a new request for it")

    def _runs_already(self, key: EntryKey) -> bool:
        """Whether this worker has it as a job that goes on. Claims wait for no disk: a crash of the database may forget one, and then the
        request is claimed once more, perhaps by the same worker."""
        job = self._registry.find(key)
        return job is not None and job.stop.reason != "put_back"

    def _job(self, claimed: Claimed) -> Job:
        entry = claimed.entry
        limit_s = None if entry.expires_at is None else entry.expires_at - entry.accepted_at
        left_s = None if limit_s is None else limit_s - claimed.waited_s
        return self._requests.job(entry, waited_s=claimed.waited_s, left_s=left_s)

    def _run(self, job: Job) -> None:
        if job.entry.starts == 0:
            # Those that came before it, here or at another worker, may have spent what there was.
            self._registry.check_quota(job.address.first_level, self._now())
        try:
            self._registry.enter(job, recovered=True)
            self._registry.commit([job])
        except Exception:
            self._registry.claim_end(job)
            self._registry.leave(job)
            raise
