"""How a worker ends: no new requests, running ones finish, what is left is stopped, and the bus is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from llamacpp_mqtt_deploy.service.assembly import Parts
from llamacpp_mqtt_deploy.service.systemd import Notifier
from llamacpp_mqtt_deploy.stopping import Deadline
from llamacpp_mqtt_deploy.worker.pooled.pool import Pool

log = structlog.get_logger(__name__)

# After the drain: for terminal events to be written, acknowledged by the broker, and threads to end.
_CLOSE_S = 5.0


class Shutdown:
    """Closes the parts, in an order in which nothing is lost.

    `feed` is called while it waits (systemd's watchdog), `interrupted` tells that somebody will not wait for the drain, `filters`
    gives what a worker of a pool has subscribed to.
    """

    def __init__(
        self,
        *,
        parts: Parts,
        notifier: Notifier,
        feed: Callable[[], object],
        interrupted: Callable[[], bool],
        filters: Callable[[], Sequence[str]],
    ) -> None:
        self._parts = parts
        self._notifier = notifier
        self._feed = feed
        self._interrupted = interrupted
        self._filters = filters

    def run(self, *, clean: bool, unreachable: bool, online: bool) -> None:
        """Stop under one deadline: refuse, let finish, stop what is left, flush, publish `offline`. `unreachable`: it could not serve,
        perhaps because another one does."""
        parts = self._parts
        self._notifier.stopping()
        drain_s = self._parts.in_force.settings.limits.drain_timeout_s if clean else 0.0
        load = parts.registry.load()
        log.info("worker.draining", running=load.busy, queued=load.queued, seconds=drain_s)
        self._notifier.extend_timeout(int((drain_s + 2 * _CLOSE_S) * 1e6))
        parts.registry.pause()
        if online:
            parts.presence.become("draining")
        if self._parts.in_force.settings.sessions.store != "memory":
            for job in parts.registry.all():
                if job.phase == "running" and not job.opened:  # it waits for an engine that may be away for long
                    job.stop.set("put_back")
        if parts.pool is not None:
            self._leave_the_group(parts.pool, online=online)
        self._drain(Deadline(drain_s))
        end = Deadline(_CLOSE_S)
        self._stop_jobs(end)
        parts.intake.close(end.remaining_s())
        parts.token_counts.close(end.remaining_s() / 4)
        parts.client_work.close(end.remaining_s() / 2)
        if parts.pool is not None:
            # Told and noted first: what is not noted another worker tells once more as soon as we have left.
            parts.link.flush(Deadline(end.remaining_s() / 4))
            parts.redelivery.sweep()
            parts.pool.leave(end.remaining_s() / 2)
        parts.link.flush(end)
        parts.redelivery.last_call()
        last = parts.presence.offline() if self._may_say_offline(unreachable=unreachable) else None
        parts.link.close(Deadline(max(1.0, end.remaining_s())), last_message=last)
        parts.background.close(max(1.0, end.remaining_s()))
        parts.redelivery.sweep()
        parts.engine_watch.close(1.0)
        parts.engine.close(Deadline(max(1.0, end.remaining_s())))
        parts.threads.close(1.0)
        parts.loop.close()
        parts.store.close()
        self._notifier.status("stopped")

    def _leave_the_group(self, pool: Pool, *, online: bool) -> None:
        """No message of the pool comes to us any more, and what waits is for the others: the broker would go on to deal ours to us,
        and forget it when we go."""
        pool.stop_claiming()
        if online:
            try:
                self._parts.link.unsubscribe(self._filters(), timeout_s=_CLOSE_S)
            except (ConnectionError, TimeoutError) as problem:
                log.warning("pool.unsubscribe_failed", problem=str(problem))

    def _drain(self, deadline: Deadline) -> None:
        """Let running requests finish; the second signal cuts it short."""
        while not deadline.passed() and not self._interrupted():
            if self._parts.registry.wait_until_idle(min(0.2, deadline.remaining_s())):
                return
            self._feed()

    def _stop_jobs(self, end: Deadline) -> None:
        """End what is left, each with its terminal event; queued ones stay in the journal where there is one."""
        registry, completion = self._parts.registry, self._parts.completion
        for job in registry.all():
            if job.phase != "queued" or self._parts.in_force.settings.sessions.store == "memory":
                job.stop.set("shutting_down")
            if job.phase == "queued" and job.stop.is_set():
                completion.stopped(job)
        registry.wait_until_idle(end.remaining_s() / 2)
        for job in registry.all():
            if job.phase not in ("queued", "ended"):  # its engine did not return
                job.stop.set("shutting_down")
                completion.stopped(job)

    def _may_say_offline(self, *, unreachable: bool) -> bool:
        """Not before we said hello, and not when another instance stands in our place under our status topic."""
        presence = self._parts.presence
        return presence.announced and not presence.yielded and (not unreachable or presence.twin() is None)
