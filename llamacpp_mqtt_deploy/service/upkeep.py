"""What a worker does every few seconds beside serving: its health, that of its pool, and forgetting what is old."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.service.assembly import Parts
from llamacpp_mqtt_deploy.service.pool_report import pool_fields
from llamacpp_mqtt_deploy.service.presence import LIVE_RENEWALS

log = structlog.get_logger(__name__)

# While more is left than one purge may drop, in pieces that no request has to wait for.
_PURGE_AGAIN_S = 0.2


class Upkeep:
    """`online` tells whether the broker hears us."""

    def __init__(self, parts: Parts, *, online: Callable[[], bool]) -> None:
        self._parts = parts
        self._online = online

    def publish_health(self) -> None:
        parts = self._parts
        if self._online() and parts.presence.announced:
            every_s = self._parts.in_force.settings.status.health_every_s
            fields = parts.health.fields(engine=parts.engine.info(), link=parts.link.info(), every_s=every_s)
            topic, expiry_s = parts.topics.health_topic, int(LIVE_RENEWALS * every_s) + 1
            parts.link.publish(topic, encode(fields), retain=True, expiry_s=expiry_s)
            if parts.pool is not None:
                parts.background.run("pool", self._publish_pool)

    def _publish_pool(self) -> None:
        """One of the pool's workers tells how all of them are."""
        pool, name = self._parts.pool, self._parts.in_force.settings.pool.name
        if pool is None or name is None:
            return
        try:
            if not pool.journal.lead():
                return
            load = pool.journal.load()
        except StoreError as problem:
            log.warning("pool.status_failed", problem=str(problem))
            return
        every_s = self._parts.in_force.settings.status.health_every_s
        fields = pool_fields(name, load, told_by=self._parts.in_force.settings.mqtt.worker_id, every_s=every_s)
        expiry_s = int(LIVE_RENEWALS * every_s) + 1
        self._parts.link.publish(self._parts.topics.pool_topic(name), encode(fields), retain=True, expiry_s=expiry_s)

    def purge_soon(self) -> None:
        self._parts.background.run("purge", self.purge)

    def purge(self) -> None:
        if self._parts.registry.limits_tokens:
            self._parts.ledger.reconcile(self._parts.registry)
        sessions, limits = self._parts.in_force.settings.sessions, self._parts.in_force.settings.limits
        try:
            purged = self._parts.store.purge(
                now=self._mind_the_clock(),
                remember_s=limits.remember_s,
                ttl_s=sessions.ttl_s,
                max_sessions=sessions.max_sessions,
                max_bytes=limits.max_journal_mib * 1024 * 1024,
            )
        except StoreError as problem:
            log.error("journal.failed", step="purge", problem=str(problem))
            return
        if purged.more:
            self._parts.loop.after(_PURGE_AGAIN_S, self.purge_soon)

    def _mind_the_clock(self) -> float:
        """The time; one that was set forward must not make everything look forgotten by its clients."""
        clock = self._parts.clock
        now, forward_s = clock.now(), clock.set_forward_s
        if forward_s:
            write = self._parts.store.clock_was_set(forward_s, now=now)
            # Not when it is written: a disk that takes long would be told twice.
            clock.told(forward_s)
            write.on_done(lambda problem: clock.told(-forward_s) if problem is not None else None)
        return now
