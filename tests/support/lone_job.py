"""A job without a worker around it, for the parts that take one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llamacpp_mqtt_deploy.core.addresses import Address
from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.requests import Generate, RequestPolicy, check_request, read_request
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Outbox, Published
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.responder import Responder


class Taker:
    """An outbox that takes every event, or says what `says` says."""

    def __init__(self) -> None:
        self.says: Published = "queued"
        self.events: list[dict[str, Any]] = []
        self.unacknowledged: list[Callable[[bool], None]] = []

    def publish(
        self, topic: str, payload: bytes, *, on_done: Callable[[bool], None] | None = None, **_: Any
    ) -> Published:
        if self.says == "queued":
            self.events.append(json.loads(payload) | {"_topic": topic})
            if on_done is not None:
                self.unacknowledged.append(on_done)
        return self.says

    def acknowledge(self, delivery: Delivery) -> None:
        raise NotImplementedError

    def kinds(self) -> list[str]:
        return [event["type"] for event in self.events]


def request(**fields: Any) -> Generate:
    """A request as the protocol's checks leave it; a prompt unless the fields say something else."""
    policy = RequestPolicy(models=None)
    stands_alone = "messages" in fields or "tool_results" in fields
    body = fields if stands_alone else {"prompt": "hello"} | fields
    raw = read_request(json.dumps(body).encode(), policy=policy)
    assert raw is not None
    return check_request(raw, policy=policy)


def lone_job(
    name: str = "r1",
    *,
    outbox: Outbox | None = None,
    responder: Responder | None = None,
    session: str = "demo",
    received_at: float = 0.0,
    deadline: float = 600.0,
    silent: bool = False,
    **fields: Any,
) -> Job:
    """`fields` are those of its request."""
    key = EntryKey("default", session, name)
    address = Address(
        kind="request",
        route="default",
        session=session,
        reply_topic=f"llm/reply/{session}",
        first_level=session.split("/", maxsplit=1)[0],
    )
    asked = request(**fields)
    return Job(
        key=key,
        entry=Entry(key=key, topic=f"llm/request/{session}", payload=b"{}", digest="d"),
        address=address,
        request=asked,
        responder=responder
        or Responder(
            outbox=outbox or Taker(),
            topic=f"llm/reply/{session}",
            writer=EventWriter(request_id=name, session_id=session, max_bytes=4096),
            correlation=None,
            silent=silent,
            wake=lambda _s, _call: None,
        ),
        session=None if asked.mode == "messages" else ("default", session),
        received_at=received_at,
        deadline=deadline,
    )


def registry(
    *, slots: int = 1, queue_size: int = 9, session_queue: int = 9, max_requests_per_minute: int = 0
) -> JobRegistry:
    return JobRegistry(
        limits=QueueLimits(queue_size=queue_size, session_queue=session_queue),
        aging_s=60.0,
        max_requests_per_minute=max_requests_per_minute,
        slots=slots,
    )
