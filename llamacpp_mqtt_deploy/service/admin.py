"""What an operator does to a running worker (cancel everything, drain, resume, reload ...), and the acks of the admin topic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.config.loading import ConfigurationError, Loaded, load
from llamacpp_mqtt_deploy.config.reloading import reload
from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.aliases import resolve
from llamacpp_mqtt_deploy.core.errors import Busy, EngineUnavailable, ModelNotFound, RequestError, Unsupported
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.payloads import shown
from llamacpp_mqtt_deploy.core.requests import AdminCommand, parse_admin
from llamacpp_mqtt_deploy.core.routes import DEFAULT_ROUTE
from llamacpp_mqtt_deploy.ports import Delivery, Engine, StoreError
from llamacpp_mqtt_deploy.service.ledger_report import LedgerReport
from llamacpp_mqtt_deploy.service.presence import Presence
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.control import Controls
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.policies import InForce, level_limits, queue_limits

log = structlog.get_logger(__name__)

_READING = frozenset({"usage", "problems"})
"""What changes nothing is nothing to be warned of."""
_ROOM_BYTES = 512
"""Of an answer, for everything but what was asked for."""


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
        on_reload: Callable[[], object],
    ) -> None:
        self._loaded = loaded
        self._in_force = in_force
        self._registry = registry
        self._controls = controls
        self._presence = presence
        self._engine = engine
        self._on_reload = on_reload

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

    def unload(self) -> None:
        """Let the engine's model go until the next request. Raises Busy, EngineUnavailable, Unsupported."""
        match self._engine.unload():
            case "busy":
                raise Busy("requests are running; wait until they are done, or cancel them first")
            case "away":
                raise EngineUnavailable(f"the engine has no model to let go: it is {self._engine.info().state}")
            case "unsupported":
                raise Unsupported("this kind of engine keeps its model; engine.kind managed can let it go")
            case "done":
                pass

    def keep_awake(self, seconds: float | None) -> Mapping[str, Any]:
        """Hold the engine awake for so long; None is until told otherwise, 0 ends it. Raises Unsupported."""
        if not self._engine.keep_awake(seconds):
            raise Unsupported("this kind of engine never falls asleep; only engine.kind managed does")
        return {"keep_awake": seconds != 0} | ({"seconds": seconds} if seconds else {})

    def choose_model(self, name: str) -> str:
        """Answer requests that name no model with this one, until the next start or reload. Raises ModelNotFound, Unsupported."""
        settings, routes = self._in_force.settings, self._in_force.policies().routes
        engine, known = settings.engine, self._engine.info().models
        names = routes[DEFAULT_ROUTE].parse.models or known
        model = resolve(name, engine.aliases) or engine.model
        if model is None or model not in names:
            raise ModelNotFound(
                f"{shown(name)} is not served by this worker",
                fields={"model": f"one of {', '.join(names[:8]) or 'none: the engine names no model'}"},
            )
        route = settings.routes.get(DEFAULT_ROUTE)
        if route is not None and route.model:
            raise Unsupported("routes.default.model names the model of these requests, and goes before this")
        # What was the model until now may still be named.
        models = tuple(dict.fromkeys((*([engine.model] if engine.model else []), *engine.models)))
        chosen = engine.model_copy(update={"model": model, "models": models})
        self._in_force.change(settings=settings.model_copy(update={"engine": chosen}), engine_models=known)
        self._presence.renew()
        return model

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
        self._on_reload()
        return {"changed": list(found.changed), "needs_restart": list(found.needs_restart)}


class AdminReplies:
    """Answers admin messages, in the intake's thread."""

    def __init__(
        self,
        *,
        answers: Answers,
        topics: TopicMap,
        operations: Operations,
        ledger: LedgerReport,
        max_event_bytes: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._max_event_bytes = max_event_bytes
        self._answers = answers
        self._topics = topics
        self._operations = operations

    def handle(self, delivery: Delivery, correlation: bytes | None) -> None:
        """Do what the message asks and publish its `ack`, with the Correlation Data that it may have."""
        ack: dict[str, Any] = {"type": "ack", "worker": self._topics.worker_id, "action": None, "status": "ok"}
        try:
            admin = parse_admin(delivery.payload, left_out=delivery.left_out)
            ack["action"] = admin.action
            if admin.transaction is not None:
                ack["transaction"] = admin.transaction
            ack |= self._do(admin)
        except RequestError as error:
            ack |= {"status": "error", "code": error.code, "message": error.message, **error.details}
        except StoreError as problem:
            log.error("journal.failed", step="admin", problem=str(problem))
            ack |= {"status": "error", "code": "internal", "message": "the worker's state cannot be read"}
        note = log.info if ack["action"] in _READING else log.warning
        note("admin.answered", action=ack["action"], status=ack["status"])
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
            case "unload":
                self._operations.unload()
                return {}
            case "keep_awake":
                return self._operations.keep_awake(admin.seconds)
            case "model":
                assert admin.model is not None
                return {"model": self._operations.choose_model(admin.model)}
            case "log_level":
                assert admin.level is not None
                self._operations.log_level(admin.level)
                return {"level": admin.level}
            case "usage":
                return self._ledger.answer(admin)
            case "problems":
                return self._problems(admin.limit)

    def _problems(self, limit: int) -> Mapping[str, Any]:
        """The newest of them, as many as fit into an event."""
        found: list[Mapping[str, str]] = []
        left = self._max_event_bytes() - _ROOM_BYTES
        for problem in reversed(logs.problems(limit)):
            left -= len(encode(problem)) + 1
            if left < 0:
                break
            found.insert(0, problem)
        return {"problems": found}
