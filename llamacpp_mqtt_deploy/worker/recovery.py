"""After a restart: run again what had published no chunk, end what had, publish ends that no broker has acknowledged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from llamacpp_mqtt_deploy.core import events
from llamacpp_mqtt_deploy.core.addresses import Address, TopicMap
from llamacpp_mqtt_deploy.core.errors import Internal, Interrupted, RequestError, TimedOut
from llamacpp_mqtt_deploy.core.requests import Generate, RequestPolicy, check_request, read_request
from llamacpp_mqtt_deploy.ports import Entry, Store, StoreError
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.journal_clock import wall
from llamacpp_mqtt_deploy.worker.own_errors import lost_too_often
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
        now: Callable[[], float] = wall,
    ) -> None:
        self._now = now
        self._store = store
        self._registry = registry
        self._maker = maker
        self._topics = topics
        self._policies = policies
        self._redelivery = redelivery

    def run(self) -> Recovered:
        found = Recovered()
        for entry in self._store.undelivered():
            found.delivered_again += self._guarded(self._deliver, entry)
        for entry in self._store.unfinished():
            if self._guarded(self._take_up, entry):
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

    def _guarded(self, step: Callable[[Entry], bool], entry: Entry) -> bool:
        """One entry that cannot be read or ended costs nobody but itself: else the worker would never start again."""
        try:
            return step(entry)
        except Exception:
            log.exception("recovery.entry_failed", request_id=entry.key.request_id, session=entry.key.session)
            self._put_aside(entry)
            return False

    def _put_aside(self, entry: Entry) -> None:
        """End the entry, at the least in the journal, so that it does not come again at each start."""
        error = Internal("the worker failed on this request after a restart; its log says why")
        try:
            if entry.terminal is None:
                self._finish(entry, _terminal(entry, error, metadata=None))
                return
        except Exception:
            log.exception("recovery.end_failed", request_id=entry.key.request_id, session=entry.key.session)
        try:
            self._store.mark_delivered([entry.key])
        except Exception:
            log.exception("recovery.end_failed", request_id=entry.key.request_id, session=entry.key.session)
        else:
            log.error(
                "recovery.entry_put_aside",
                request_id=entry.key.request_id,
                session=entry.key.session,
                message="no end could be sent for this request; it is not tried again",
            )

    def _deliver(self, entry: Entry) -> bool:
        """Publish an end that no broker has acknowledged."""
        if entry.terminal is not None:
            self._publish(entry, entry.terminal, again=True)
        return True

    def _take_up(self, entry: Entry) -> bool:
        """Put an accepted request back into the queue; False when it ended instead."""
        policies = self._policies()
        now, wall_now = time.monotonic(), self._now()
        try:
            if entry.state == "streaming":
                raise Interrupted("the worker died in the middle of this answer; send a new request for it")
            if entry.starts >= policies.settings.limits.max_starts:
                raise lost_too_often(entry.starts)
            left_s = entry.left_s(wall_now)
            if left_s is not None and left_s <= 0:
                raise TimedOut("the time limit of this request passed while the worker was down")
            address, request = self._read(entry, policies)
        except RequestError as error:
            self._end(entry, error)
            return False
        waited_s = entry.waited_s(wall_now)
        if left_s is None:
            left_s = policies.settings.generation.timeout_s
        job = self._maker.make(
            entry=entry, address=address, request=request, received_at=now - waited_s, deadline=now + left_s
        )
        job.starts = entry.starts
        try:
            self._registry.enter(job, recovered=True)
            job.position = self._registry.positions().get(entry.key, 1)
            job.responder.queued(position=job.position, reason=job.wait_reason)
            self._registry.commit([job])
        except Exception:
            self._registry.claim_end(job)
            self._registry.leave(job)
            raise
        return True

    def _read(self, entry: Entry, policies: Policies) -> tuple[Address, Generate]:
        """The request as today's configuration reads it; raises a RequestError when that refuses it."""
        route = policies.routes.get(entry.key.route)
        address = self._topics.address(entry.topic)
        if route is None or address is None:
            raise Interrupted("the worker was configured anew and no longer serves this topic")
        if address.session is None:
            address = self._topics.with_session(address.route, entry.key.session)
        if entry.reply_topic:
            # It may have been made of ids in the payload; whoever waits, waits there.
            address = replace(address, reply_topic=entry.reply_topic)
        raw = read_request(entry.payload, policy=route.parse)
        if raw is None:
            raise Interrupted("the worker lost this request")
        return address, check_request(raw, policy=route.parse)

    def _end(self, entry: Entry, error: RequestError) -> None:
        self._finish(entry, _terminal(entry, error, metadata=self._metadata(entry)))
        log.warning(
            "request.finished",
            route=entry.key.route,
            session=entry.key.session,
            request_id=entry.key.request_id,
            outcome=error.code,
            starts=entry.starts,
            message=error.message,
        )

    def _metadata(self, entry: Entry) -> dict[str, object] | None:
        """The client's own `metadata`, which every terminal event echoes; None when it cannot be read any more."""
        route = self._policies().routes.get(entry.key.route)
        policy = RequestPolicy() if route is None else route.parse
        try:
            raw = read_request(entry.payload, policy=replace(policy, max_request_bytes=len(entry.payload) + 1))
        except RequestError:
            return None
        found = raw.body.get("metadata") if raw is not None else None
        return found if isinstance(found, dict) else None

    def _finish(self, entry: Entry, terminal: bytes) -> None:
        now = self._now()
        try:
            self._store.finish(entry.key, terminal, now=now)
        except StoreError as problem:
            log.error("journal.failed", step="finish", problem=str(problem), request_id=entry.key.request_id)
            self._redelivery.store_later(entry.key, terminal, now=now, history=None, since=time.monotonic())
        self._publish(entry, terminal)

    def _publish(self, entry: Entry, terminal: bytes, *, again: bool = False) -> None:
        self._redelivery.send(entry.key, entry.reply_topic, terminal, entry.correlation, again=again)


def _terminal(entry: Entry, error: RequestError, *, metadata: dict[str, object] | None) -> bytes:
    return events.interrupted(
        request_id=entry.key.request_id,
        session_id=entry.key.session,
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        metadata=metadata,
    )
