"""What an operator does to a running worker: cancel everything, drain, resume, read the configuration again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.config.loading import ConfigurationError, Loaded, load
from llamacpp_mqtt_deploy.config.reloading import reload
from llamacpp_mqtt_deploy.ports import Engine
from llamacpp_mqtt_deploy.service.presence import Presence
from llamacpp_mqtt_deploy.worker.control import Controls
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.policies import InForce

log = structlog.get_logger(__name__)


class Operations:
    """The levers behind the admin topic and SIGHUP; each returns at once."""

    def __init__(
        self,
        *,
        loaded: Loaded,
        in_force: InForce,
        registry: JobRegistry,
        controls: Controls,
        presence: Presence,
        engine: Engine,
    ) -> None:
        self._loaded = loaded
        self._in_force = in_force
        self._registry = registry
        self._controls = controls
        self._presence = presence
        self._engine = engine

    def cancel_all(self) -> int:
        """Cancel every request; returns how many were told to stop."""
        return sum(map(self._controls.cancel, self._registry.all()))

    def drain(self) -> None:
        """Refuse new requests from now on, until `resume`; what is inside goes on."""
        self._registry.drain()
        self._presence.become("draining")

    def resume(self) -> bool:
        """Take requests again; False when the worker is stopping."""
        if not self._registry.resume():
            return False
        self._presence.become("online")
        return True

    def reload(self) -> Mapping[str, Any]:
        """Read the configuration again; returns the fields of the ack. A wrong one changes nothing."""
        try:
            loaded = load(self._loaded.file, self._loaded.overrides)
        except ConfigurationError as problem:
            log.error("configuration.refused", problems=list(problem.problems))
            return {"status": "error", "code": "bad_request", "message": "; ".join(problem.problems)[:2000]}
        found = reload(self._in_force.settings, loaded.settings)
        self._in_force.change(settings=found.settings, engine_models=self._engine.info().models)
        limits = found.settings.limits
        self._registry.set_limits(
            queue_size=limits.queue_size,
            session_queue=limits.session_queue,
            aging_s=limits.aging_s,
            max_requests_per_minute=limits.max_requests_per_minute,
        )
        if "logging.level" in found.changed:
            logs.set_level(found.settings.logging.level)
        log.warning("configuration.reloaded", changed=list(found.changed), needs_restart=list(found.needs_restart))
        self._presence.renew()
        return {"changed": list(found.changed), "needs_restart": list(found.needs_restart)}
