"""Everything that the metrics tell, at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llamacpp_mqtt_deploy.core.histogram import HistogramReading
from llamacpp_mqtt_deploy.ports import EngineInfo, LinkInfo
from llamacpp_mqtt_deploy.worker.counters import Tally
from llamacpp_mqtt_deploy.worker.jobs import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Taken when somebody asks; the parts of the worker count for themselves meanwhile."""

    worker: str
    state: str
    """As the retained status says it, or would say it."""
    problems: Mapping[str, bool]
    """Kind of problem -> whether the worker has it now."""
    started_at: float
    """Seconds since the epoch."""
    tally: Tally
    load: Load
    queue_size: int
    """Places of the queue."""
    engine: EngineInfo
    engine_returns: int
    link: LinkInfo
    commits: HistogramReading
    disk_free_bytes: int | None
    """Where the state lies; None when it is kept in memory, or nobody can tell."""
    rss_bytes: int | None
    cpu_s: float
    open_fds: int | None
    max_fds: int | None
    """None when there is no limit."""
