"""What the worker says of itself: the fields of the retained status and health messages, and systemd's line."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamacpp_mqtt_deploy import __version__, logs
from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.ports import EngineInfo, LinkInfo
from llamacpp_mqtt_deploy.service.idle_gpu import idle_gpu
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.policies import Policies


def status_fields(
    *, policies: Policies, topics: TopicMap, engine: EngineInfo, slots: int, max_event_bytes: int
) -> dict[str, Any]:
    """Everything of the status but its core (state, instance, time)."""
    settings = policies.settings
    limits = settings.limits
    routes = {}
    for route in topics.routes:
        routes[route.name] = {
            "request": route.request,
            "reply": route.reply,
            "mode": policies.routes[route.name].mode,
            "format": policies.routes[route.name].format,
            "trust_payload_session": route.trust_payload_session,
        } | ({"control": route.control} if route.control else {})
    told: dict[str, Any] = {"state": engine.state, "kind": engine.kind, "backend": engine.backend}
    if engine.gpu_layers is not None:
        told["gpu_layers"] = engine.gpu_layers
    detail = engine.detail or idle_gpu(settings.engine, engine)
    if detail:
        told["detail"] = logs.without_secrets(detail)  # kept by the broker, for every client to read
    if engine.can_unload:
        told["keep_awake"] = engine.kept_awake
    models = policies.routes["default"].parse.models or engine.models
    names = tuple(dict.fromkeys((*models, *settings.engine.aliases)))
    model = policies.routes["default"].model or next(iter(engine.models), None)
    return {
        "version": __version__,
        "routes": routes,
        "models": list(names),
        **({} if model is None else {"model": model}),
        "n_ctx": engine.n_ctx,
        "slots": slots,
        "capabilities": {
            "tools": engine.tools,
            "vision": engine.vision,
            "thinking": engine.thinking,
            "json_schema": engine.json_schema,
            "streams": engine.streams,
        },
        "limits": {
            "max_request_bytes": limits.max_request_bytes,
            "max_event_bytes": max_event_bytes,
            "max_tokens": limits.max_tokens,
            "max_timeout_s": limits.max_timeout_s,
            "queue_size": limits.queue_size,
            "session_queue": limits.session_queue,
            "max_requests_per_minute": limits.max_requests_per_minute,
            "tokens_per_day": limits.tokens_per_day,
            "remember_s": limits.remember_s,
        },
        "heartbeat_s": settings.streaming.heartbeat_s,
        "engine": told,
    }


class HealthReport:
    """Makes the health message; keeps the time of the last one for the speed in between."""

    def __init__(self, *, worker_id: str, registry: JobRegistry, counters: Counters) -> None:
        self._worker_id = worker_id
        self._registry = registry
        self._counters = counters
        self._started_at = self._told_at = time.monotonic()

    def fields(self, *, engine: EngineInfo, link: LinkInfo, every_s: float) -> Mapping[str, Any]:
        now = time.monotonic()
        period_s, self._told_at = now - self._told_at, now
        load = self._registry.load()
        return {
            "worker": self._worker_id,
            "ts": round(time.time(), 3),
            "every_s": every_s,
            "uptime_s": round(now - self._started_at, 1),
            "slots": {"busy": load.busy, "total": load.slots},
            "queue": load.queued,
            "lanes": dict(load.lanes),
            **self._counters.snapshot(period_s=period_s),
            "rss_bytes": rss_bytes(),
            "reconnects": link.reconnects,
            "unacknowledged": link.unacknowledged,
            "engine": engine.state,
        }


def rss_bytes() -> int | None:
    """Memory of this process; from statm, which is left visible by ProcSubset=pid (meminfo is not)."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def status_line(*, state: str, problem: str, engine: EngineInfo, link: LinkInfo, registry: JobRegistry) -> str:
    """One line for `systemctl status`."""
    load = registry.load()
    broker = f"broker {link.state}" + (f" (MQTT {link.protocol})" if link.protocol else "")
    line = f"{state}; {broker}; engine {engine.state}; {load.busy}/{load.slots} slots, {load.queued} waiting"
    trouble = (link.detail if link.state != "online" else problem) or (engine.detail if engine.state != "ready" else "")
    return f"{line}; {logs.without_secrets(trouble)}" if trouble else line
