"""The pool's side of a worker, put together: what comes in, what is claimed, what is asked by others, and the lease."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.pool_ports import Member, SharedJournal
from llamacpp_mqtt_deploy.ports import Outbox
from llamacpp_mqtt_deploy.worker.acknowledging import Acknowledger
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.journaled import JournaledRequests
from llamacpp_mqtt_deploy.worker.pooled.arrivals import PooledAdmission
from llamacpp_mqtt_deploy.worker.pooled.claiming import Claims
from llamacpp_mqtt_deploy.worker.pooled.membership import Membership
from llamacpp_mqtt_deploy.worker.pooled.pooled_sessions import PooledSessions
from llamacpp_mqtt_deploy.worker.pooled.queue_watch import WaitingRequests
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from llamacpp_mqtt_deploy.worker.refusals import Refusals


class Pool:
    """`admission` is the intake's, `sessions` the controls'; the rest runs in threads of its own between `start` and `close`.

    `cancel` stops a job wherever it is; `describe` gives this worker as the others are to see it, `engine_ready` whether a
    request could begin here now. `models` are those of this worker, `know_models` is told those of all.
    """

    def __init__(
        self,
        *,
        journal: SharedJournal,
        outbox: Outbox,
        registry: JobRegistry,
        requests: JournaledRequests,
        completion: Completion,
        counters: Counters,
        redelivery: Redelivery,
        background: Background,
        acknowledger: Acknowledger,
        refusals: Refusals,
        cancel: Callable[[Job], object],
        describe: Callable[[], Member],
        engine_ready: Callable[[], bool],
        models: Callable[[], Sequence[str]],
        know_models: Callable[[tuple[str, ...]], object],
        limits: Callable[[], QueueLimits],
        aging_s: Callable[[], float],
        heartbeat_s: Callable[[], float],
        silent: Callable[[str], bool],
        lease_s: float,
        now: Callable[[], float],
    ) -> None:
        self.journal = journal
        self.claims = Claims(
            journal=journal,
            registry=registry,
            requests=requests,
            completion=completion,
            engine_ready=engine_ready,
            models=models,
            aging_s=aging_s,
            now=now,
        )
        registry.slot_freed = self.claims.wake
        waiting = WaitingRequests(journal=journal, outbox=outbox, heartbeat_s=heartbeat_s)
        self.membership = Membership(
            journal=journal,
            registry=registry,
            claims=self.claims,
            requests=requests,
            waiting=waiting,
            background=background,
            cancel=cancel,
            describe=describe,
            know_models=know_models,
            lease_s=lease_s,
        )
        self.admission = PooledAdmission(
            journal=journal,
            acknowledger=acknowledger,
            refusals=refusals,
            registry=registry,
            counters=counters,
            redelivery=redelivery,
            background=background,
            claims=self.claims,
            waiting=waiting,
            limits=limits,
            aging_s=aging_s,
            silent=silent,
            now=now,
        )
        self.sessions = PooledSessions(journal=journal, registry=registry, claims=self.claims, stop=cancel)

    def start(self) -> None:
        self.claims.start()
        self.membership.start()

    def join(self) -> None:
        """The worker has its place on the bus: become a member, now or as soon as the database is there."""
        self.membership.join()

    def stop_claiming(self) -> None:
        """The worker stops: what waits is for others from now on."""
        self.claims.close(1.0)
        self.admission.close()

    def leave(self, timeout_s: float) -> None:
        """The end of the membership; what was claimed and not ended goes to others."""
        self.membership.close(timeout_s)
