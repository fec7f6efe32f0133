"""What an operator may do to the worker: cancel_all, drain, resume, reload, restart_engine, log_level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.requests import AdminCommand, parse_admin
from llamacpp_mqtt_deploy.ports import Delivery, Outbox

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Levers:
    """What the daemon lets an operator move; each returns at once. `reload` gives the fields of its ack."""

    cancel_all: Callable[[], int]
    drain: Callable[[], None]
    resume: Callable[[], bool]
    reload: Callable[[], Mapping[str, Any]]
    restart_engine: Callable[[], bool]
    log_level: Callable[[str], None]


class AdminDesk:
    """Answers admin messages, in the intake's thread."""

    def __init__(self, *, outbox: Outbox, topics: TopicMap, levers: Levers) -> None:
        self._outbox = outbox
        self._topics = topics
        self._levers = levers

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
        log.warning("admin.answered", action=ack["action"], status=ack["status"])
        self._outbox.publish(self._topics.admin_reply_topic, encode(ack), correlation=correlation)

    def _do(self, admin: AdminCommand) -> Mapping[str, Any]:
        match admin.action:
            case "cancel_all":
                return {"cancelled": self._levers.cancel_all()}
            case "drain":
                self._levers.drain()
                return {"state": "draining"}
            case "resume":
                if self._levers.resume():
                    return {"state": "online"}
                return {"status": "error", "code": "shutting_down", "message": "the worker is stopping; start it again"}
            case "reload":
                return self._levers.reload()
            case "restart_engine":
                if self._levers.restart_engine():
                    return {}
                return {
                    "status": "error",
                    "code": "unsupported",
                    "message": "this kind of engine is not ours to restart; restart the server itself",
                }
            case "log_level":
                assert admin.level is not None
                self._levers.log_level(admin.level)
                return {"level": admin.level}
