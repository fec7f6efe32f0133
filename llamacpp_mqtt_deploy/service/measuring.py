"""Reads what the metrics tell from the parts of the worker, which count for themselves."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.metrics.readings import Readings
from llamacpp_mqtt_deploy.ports import EngineInfo, LinkInfo, Store
from llamacpp_mqtt_deploy.service.enginewatch import EngineWatch
from llamacpp_mqtt_deploy.service.presence import Presence
from llamacpp_mqtt_deploy.service.reporting import rss_bytes
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry


class Measuring:
    """`read` may be called from any thread; it waits for no disk but the one of the state, whose free room it asks for."""

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        registry: JobRegistry,
        counters: Counters,
        engine: Callable[[], EngineInfo],
        engine_watch: EngineWatch,
        link: Callable[[], LinkInfo],
        store: Store,
        presence: Presence,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._counters = counters
        self._engine = engine
        self._engine_watch = engine_watch
        self._link = link
        self._store = store
        self._presence = presence
        self._started = time.monotonic()
        self.hanging = ""
        """What the watchdog says of a thread that hangs; empty when all turn."""

    def read(self) -> Readings:
        settings, presence, link = self._settings(), self._presence, self._link()
        sessions = settings.sessions
        most_fds, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return Readings(
            worker=settings.mqtt.worker_id,
            state=presence.state if link.state == "online" and presence.announced else "offline",
            problems={
                "subscription": bool(presence.unreadable),
                "store": bool(presence.unwritable),
                "machine": bool(presence.short),
                "thread": bool(self.hanging),
            },
            started_at=time.time() - (time.monotonic() - self._started),
            tally=self._counters.tally(),
            load=self._registry.load(),
            queue_size=settings.limits.queue_size,
            engine=self._engine(),
            engine_returns=self._engine_watch.returns,
            link=link,
            commits=self._store.commit_times.read(),
            disk_free_bytes=free_bytes(sessions.path) if sessions.store == "sqlite" else None,
            rss_bytes=rss_bytes(),
            cpu_s=time.process_time(),
            open_fds=open_descriptors(),
            max_fds=None if most_fds == resource.RLIM_INFINITY else most_fds,
        )


def free_bytes(file: Path) -> int | None:
    """What is left for this user where the file lies, or would lie."""
    for folder in file.absolute().parents:
        try:
            room = os.statvfs(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return room.f_bavail * room.f_frsize
    return None


def open_descriptors() -> int | None:
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1  # the one of this look
    except OSError:
        return None
