"""What an operator does to a running worker (cancel everything, drain, resume, reload ...), and the acks of the admin topic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.config.loading import ConfigurationError, Loaded, load
from llamacpp_mqtt_deploy.config.reloading import reload
from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.requests import AdminCommand, parse_admin
from llamacpp_mqtt_deploy.ports import Delivery, Engine, StoreError
from llamacpp_mqtt_deploy.service.ledger_report import LedgerReport
from llamacpp_mqtt_deploy.service.presence import Presence
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.control import Controls
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.policies import InForce, level_limits, queue_limits

log = structlog.get_logger(__name__)


class Operations:
    """What the admin topic and SIGHUP do; each returns at once."""

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
        return self._controls.cancel(*self._registry.all())

    def drain(self) -> None:
        """Refuse new requests from now on, until `resume`; accepted requests go on."""
        self._registry.drain()
        self._presence.become("draining")

    def resume(self) -> bool:
        """Take requests again; False when the worker is stopping."""
        if not self._registry.resume():
            return False
        self._presence.become("online")
        return True

    def restart_engine(self) -> bool:
        """Restart the engine; False when this kind of engine is not ours."""
        return self._engine.restart()

    def log_level(self, level: str) -> None:
        logs.set_level(level)

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
            limits=queue_limits(found.settings),
            aging_s=limits.aging_s,
            max_requests_per_minute=limits.max_requests_per_minute,
            levels=level_limits(found.settings),
        )
        if "logging.level" in found.changed:
            logs.set_level(found.settings.logging.level)
        log.warning("configuration.reloaded", changed=list(found.changed), needs_restart=list(found.needs_restart))
        self._presence.renew()
        return {"changed": list(found.changed), "needs_restart": list(found.needs_restart)}


class AdminReplies:
    """Answers admin messages, in the intake's thread."""

    def __init__(self, *, answers: Answers, topics: TopicMap, operations: Operations, ledger: LedgerReport) -> None:
        self._ledger = ledger
        self._answers = answers
        self._topics = topics
        self._operations = operations

    def handle(self, delivery: Delivery, correlation: bytes | None) -> None:
        """Do what the message asks and publish its `ack`, with the Correlation Data that it may have."""
        ack: dict[str, Any] = {"type": "ack", "worker": self._topics.worker_id, "action": None, "status": "ok"}
        try:
            admin = parse_admin(delivery.payload)
            ack["action"] = admin.action
            if admin.transaction is not None:
                ack["transaction"] = admin.transaction
            ack |= self._do(admin)
        except RequestError as error:
            ack |= {"status": "error", "code": error.code, "message": error.message, **error.details}
        except StoreError as problem:
            log.error("journal.failed", step="admin", problem=str(problem))
            ack |= {"status": "error", "code": "internal", "message": "the worker's state cannot be read"}
        log.warning("admin.answered", action=ack["action"], status=ack["status"])
        self._answers.publish(self._topics.admin_reply_topic, encode(ack), correlation=correlation)

    def _do(self, admin: AdminCommand) -> Mapping[str, Any]:
        match admin.action:
            case "cancel_all":
                return {"cancelled": self._operations.cancel_all()}
            case "drain":
                self._operations.drain()
                return {"state": "draining"}
            case "resume":
                if self._operations.resume():
                    return {"state": "online"}
                return {"status": "error", "code": "shutting_down", "message": "the worker is stopping; start it again"}
            case "reload":
                return self._operations.reload()
            case "restart_engine":
                if self._operations.restart_engine():
                    return {}
                return {
                    "status": "error",
                    "code": "unsupported",
                    "message": "this kind of engine is not ours to restart; restart the server itself",
                }
            case "log_level":
                assert admin.level is not None
                self._operations.log_level(admin.level)
                return {"level": admin.level}
            case "usage":
                return self._ledger.answer(admin)
