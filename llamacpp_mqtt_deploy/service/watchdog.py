"""Whether all threads of the worker still run: what must be so before systemd's watchdog is fed."""

from __future__ import annotations

import time

from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.ports import Link
from llamacpp_mqtt_deploy.service.presence import LIVE_RENEWALS
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.client_work import ClientWork
from llamacpp_mqtt_deploy.worker.intake import Intake
from llamacpp_mqtt_deploy.worker.policies import InForce
from llamacpp_mqtt_deploy.worker.pooled.pool import Pool
from llamacpp_mqtt_deploy.worker.threads import GenerationThreads
from llamacpp_mqtt_deploy.worker.token_counts import TokenCounts

# A thread that has not come round for this long is dead or hung.
_SILENT_THREAD_S = 20.0
# One of a pool waits for its database, up to 30 s for each of the few writes of a round: a database that hangs is no reason to be
# killed, with the answers under way.
_SILENT_POOL_THREAD_S = 120.0
_WAIT_FOR_THE_POOL = ("intake", "background", "client-work", "claims", "membership")


class Watchdog:
    """Looks at the network thread, its acknowledgements, our own threads and the engine's calls."""

    def __init__(
        self,
        *,
        link: Link,
        loop: IoLoop,
        background: Background,
        client_work: ClientWork,
        token_counts: TokenCounts,
        intake: Intake,
        threads: GenerationThreads,
        in_force: InForce,
        pool: Pool | None = None,
    ) -> None:
        self._link = link
        self._loop = loop
        self._background = background
        self._client_work = client_work
        self._token_counts = token_counts
        self._intake = intake
        self._threads = threads
        self._in_force = in_force
        self._pool = pool

    def trouble(self) -> str | None:
        """What does not move any more, in words; None when all is well. Looks only, and returns at once."""
        now = time.monotonic()
        link, settings = self._link.info(), self._in_force.settings
        if link.state == "dead":
            return "the network thread died"
        silent_s = LIVE_RENEWALS * settings.status.every_s + settings.mqtt.keepalive_s
        if (
            link.state == "online"
            and link.unacknowledged
            and link.last_puback_at is not None
            and now - link.last_puback_at > silent_s
        ):
            return f"the broker has acknowledged nothing for {silent_s:g} s"
        beats = {
            "io": self._loop.beat_at,
            "background": self._background.beat_at,
            "client-work": self._client_work.beat_at,
            "token-counts": self._token_counts.beat_at,
            "intake": self._intake.beat_at,
        }
        if self._pool is not None:
            beats |= {"claims": self._pool.claims.beat_at, "membership": self._pool.membership.beat_at}
        for name, beat_at in beats.items():
            waits = self._pool is not None and name in _WAIT_FOR_THE_POOL
            if now - beat_at > (_SILENT_POOL_THREAD_S if waits else _SILENT_THREAD_S):
                return f"the {name} thread hangs"
        stuck = self._threads.stuck()
        if stuck:
            return f"the engine does not end request {stuck[0].key.request_id}"
        return None
