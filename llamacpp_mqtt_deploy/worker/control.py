"""What a client may do to its own session: cancel, reset, delete, history, ping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from llamacpp_mqtt_deploy.core.addresses import Address
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.requests import ControlCommand, parse_control
from llamacpp_mqtt_deploy.ports import EntryKey, Store, StoreError
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry

log = structlog.get_logger(__name__)


class Controls:
    """Answers control messages in the intake's thread; nothing here waits for an engine."""

    def __init__(
        self,
        *,
        answers: Answers,
        store: Store,
        registry: JobRegistry,
        completion: Completion,
        state: Callable[[], Mapping[str, Any]],
        expose_history: Callable[[], bool],
        max_event_bytes: Callable[[], int],
    ) -> None:
        self._answers = answers
        self._store = store
        self._registry = registry
        self._completion = completion
        self._state = state
        self._expose_history = expose_history
        self._max_event_bytes = max_event_bytes

    def handle(self, address: Address, payload: bytes, correlation: bytes | None) -> None:
        """Do what the message asks and publish its `ack` on the session's reply topic."""
        assert address.session is not None
        assert address.reply_topic is not None
        session = (address.route, address.session)
        ack: dict[str, Any] = {"type": "ack", "action": None, "status": "ok"}
        try:
            control = parse_control(payload)
            ack |= {"action": control.action}
            if control.request_id:
                ack["request_id"] = control.request_id
            if control.transaction is not None:
                ack["transaction"] = control.transaction
            ack |= self._do(address, session, control)
        except RequestError as error:
            ack |= {"status": "error", "code": error.code, "message": error.message, **error.details}
        except StoreError as problem:
            log.error("journal.failed", step="control", problem=str(problem))
            ack |= {"status": "error", "code": "internal", "message": "the worker's state cannot be read or written"}
        ack["session_id"] = address.session
        log.info("control.answered", action=ack["action"], session=address.session, status=ack["status"])
        self._answers.publish(address.reply_topic, self._fitted(ack), correlation=correlation)

    def _do(self, address: Address, session: tuple[str, str], control: ControlCommand) -> Mapping[str, Any]:
        match control.action:
            case "cancel":
                return self._cancel(address, session, control.request_id)
            case "reset":
                cancelled = self._forget(session)
                self._store.reset(session)
                return {"cancelled": cancelled}
            case "delete":
                cancelled = self._forget(session)
                self._store.delete(session)
                return {"cancelled": cancelled}
            case "history":
                if not self._expose_history():
                    return {"status": "error", "code": "unsupported", "message": "this worker does not show histories"}
                return {"messages": list(self._store.history(session))}
            case "ping":
                return dict(self._state())

    def _cancel(self, address: Address, session: tuple[str, str], request_id: str | None) -> Mapping[str, Any]:
        if request_id is None:
            return {"cancelled": sum(map(self.cancel, self._registry.of_session(session)))}
        key = EntryKey(*session, request_id)
        job = self._registry.find(key)
        if job is not None:
            state = "queued" if job.phase == "queued" else "running"
            self.cancel(job)
            return {"state": state, "cancelled": 1}
        entry = self._store.find(key)
        if entry is not None and entry.state == "ended":
            return {"state": "ended"}
        self._registry.remember_cancel(address.first_level, key)
        return {"state": "unknown"}

    def cancel(self, job: Job) -> bool:
        """Stop a job wherever it is; a queued one ends here, a running one in its own thread."""
        first = job.stop.set("cancelled")
        if job.phase == "queued":
            self._completion.stopped(job)
        return first

    def _forget(self, session: tuple[str, str]) -> int:
        """Cancel all of a session, and let none of it write history any more."""
        jobs = self._registry.of_session(session)
        for job in jobs:
            job.forgotten = True
        return sum(map(self.cancel, jobs))

    def _fitted(self, ack: dict[str, Any]) -> bytes:
        """The ack as bytes; a long history loses its oldest messages, and says so."""
        payload = encode(ack)
        limit = self._max_event_bytes()
        while len(payload) > limit and ack.get("messages"):
            messages = ack["messages"]
            ack["messages"] = messages[max(1, len(messages) // 4) :]
            ack["message"] = "the oldest messages are left out: the history is larger than an event"
            payload = encode(ack)
        return payload
