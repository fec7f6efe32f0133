"""What an earlier life of the worker left behind: run again what had no chunk, end what had one, deliver what has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from llamacpp_mqtt_deploy.core import events
from llamacpp_mqtt_deploy.core.addresses import Address, TopicMap
from llamacpp_mqtt_deploy.core.errors import Interrupted, RequestError, TimedOut
from llamacpp_mqtt_deploy.core.requests import Generate, RequestPolicy, check_request, read_request
from llamacpp_mqtt_deploy.ports import Entry, Store
from llamacpp_mqtt_deploy.worker.completion import often_lost
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Recovered:
    """What `Recovery.run` did, for the log."""

    run_again: int = 0
    ended: int = 0
    delivered_again: int = 0


class Recovery:
    """Runs once, after the first connection and before new requests are subscribed."""

    def __init__(
        self,
        *,
        store: Store,
        registry: JobRegistry,
        maker: JobMaker,
        topics: TopicMap,
        policies: Callable[[], Policies],
        redelivery: Redelivery,
    ) -> None:
        self._store = store
        self._registry = registry
        self._maker = maker
        self._topics = topics
        self._policies = policies
        self._redelivery = redelivery

    def run(self) -> Recovered:
        found = Recovered()
        for entry in self._store.undelivered():
            found.delivered_again += 1
            if entry.terminal is not None:
                self._publish(entry, entry.terminal)
        for entry in self._store.unfinished():
            if entry.state == "streaming":
                self._end(entry, Interrupted("the worker died in the middle of this answer; send a new request for it"))
                found.ended += 1
            elif self._take_up(entry):
                found.run_again += 1
            else:
                found.ended += 1
        if found.run_again or found.ended or found.delivered_again:
            log.info(
                "journal.recovered",
                run_again=found.run_again,
                ended=found.ended,
                delivered_again=found.delivered_again,
            )
        return found

    def _take_up(self, entry: Entry) -> bool:
        """Put an accepted request back into the line; False when it ended instead."""
        policies = self._policies()
        now, wall = time.monotonic(), time.time()
        try:
            if entry.starts >= policies.settings.limits.max_starts:
                raise often_lost(entry.starts)
            if entry.expires_at is not None and entry.expires_at <= wall:
                raise TimedOut("the time limit of this request passed while the worker was down")
            address, request = self._read(entry, policies)
        except RequestError as error:
            self._end(entry, error)
            return False
        waited_s = max(0.0, wall - entry.accepted_at)
        left_s = entry.expires_at - wall if entry.expires_at is not None else policies.settings.generation.timeout_s
        job = self._maker.make(
            entry=entry, address=address, request=request, received_at=now - waited_s, deadline=now + left_s
        )
        job.starts = entry.starts
        self._registry.enter(job, recovered=True)
        job.position = self._registry.positions().get(entry.key, 1)
        job.responder.queued(position=job.position, reason=job.wait_reason)
        self._registry.commit([job])
        return True

    def _read(self, entry: Entry, policies: Policies) -> tuple[Address, Generate]:
        """The request as today's configuration reads it; raises a RequestError when that refuses it."""
        route = policies.routes.get(entry.key.route)
        address = self._topics.address(entry.topic)
        if route is None or address is None:
            raise Interrupted("the worker was configured anew and no longer serves this topic")
        if address.session is None:
            address = self._topics.with_session(address.route, entry.key.session)
        raw = read_request(entry.payload, policy=route.parse)
        if raw is None:
            raise Interrupted("the worker lost this request")
        return address, check_request(raw, policy=route.parse)

    def _end(self, entry: Entry, error: RequestError) -> None:
        terminal = events.interrupted(
            request_id=entry.key.request_id,
            session_id=entry.key.session,
            code=error.code,
            message=error.message,
            retryable=error.retryable,
            metadata=_metadata(entry),
        )
        self._store.finish(entry.key, terminal, now=time.time())
        self._publish(entry, terminal)
        log.warning(
            "request.finished",
            route=entry.key.route,
            session=entry.key.session,
            request_id=entry.key.request_id,
            outcome=error.code,
            starts=entry.starts,
            message=error.message,
        )

    def _publish(self, entry: Entry, terminal: bytes) -> None:
        self._redelivery.send(entry.key, entry.reply_topic, terminal, entry.correlation)


def _metadata(entry: Entry) -> dict[str, object] | None:
    """The client's own `metadata`, which every terminal event echoes; None when it cannot be read any more."""
    try:
        raw = read_request(entry.payload, policy=RequestPolicy(max_request_bytes=len(entry.payload) + 1))
    except RequestError:
        return None
    found = raw.body.get("metadata") if raw is not None else None
    return found if isinstance(found, dict) else None
