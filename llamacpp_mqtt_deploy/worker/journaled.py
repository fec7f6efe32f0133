"""A request as the journal has it: made into a job again, or ended without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import structlog

from llamacpp_mqtt_deploy.core import events
from llamacpp_mqtt_deploy.core.addresses import Address, TopicMap
from llamacpp_mqtt_deploy.core.errors import Interrupted, RequestError
from llamacpp_mqtt_deploy.core.requests import Generate, RequestPolicy, check_request, read_request
from llamacpp_mqtt_deploy.core.spending import Spent
from llamacpp_mqtt_deploy.pool_ports import LeaseLost
from llamacpp_mqtt_deploy.ports import Entry, Store, StoreError
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.jobs import Job
from llamacpp_mqtt_deploy.worker.journal_clock import wall
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery

log = structlog.get_logger(__name__)


class JournaledRequests:
    """Makes jobs of entries, and ends entries for which there is no job."""

    def __init__(
        self,
        *,
        store: Store,
        maker: JobMaker,
        topics: TopicMap,
        policies: Callable[[], Policies],
        redelivery: Redelivery,
        now: Callable[[], float] = wall,
    ) -> None:
        self._now = now
        self._store = store
        self._maker = maker
        self._topics = topics
        self._policies = policies
        self._redelivery = redelivery

    def job(self, entry: Entry, *, waited_s: float, left_s: float | None) -> Job:
        """The job of an entry that has waited so long and has so much of its time left (None: as much as any has).

        Raises a RequestError when today's configuration refuses the request.
        """
        policies, now = self._policies(), time.monotonic()
        address, request = self._read(entry, policies)
        if left_s is None:
            left_s = policies.settings.generation.timeout_s
        job = self._maker.make(
            entry=entry, address=address, request=request, received_at=now - waited_s, deadline=now + left_s
        )
        job.starts = entry.starts
        return job

    def _read(self, entry: Entry, policies: Policies) -> tuple[Address, Generate]:
        route = policies.routes.get(entry.key.route)
        address = self._topics.address(entry.topic)
        if route is None or address is None:
            raise Interrupted("the worker was configured anew and no longer serves this topic")
        templated = address.templated
        if address.session is None:
            address = self._topics.with_session(address.route, entry.key.session)
        if entry.reply_topic:
            # It may have been made of ids in the payload; whoever waits, waits there.
            address = replace(address, reply_topic=entry.reply_topic)
        raw = read_request(entry.payload, policy=route.parse, templated=templated)
        if raw is None:
            raise Interrupted("the worker lost this request")
        return address, check_request(raw, policy=policies.parse_for(entry.key.route, address.first_level))

    def end(self, entry: Entry, error: RequestError) -> None:
        """End the entry with this error: journal, then tell."""
        self.finish(entry, terminal_of(entry, error, metadata=self._metadata(entry)))
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

    def finish(self, entry: Entry, terminal: bytes) -> None:
        """Journal this end and publish it; nothing of both when another worker has the entry meanwhile."""
        now, spent = self._now(), Spent(first_level=self._first_level(entry))
        try:
            self._store.finish(entry.key, terminal, now=now, spent=spent)
        except LeaseLost:
            log.info("request.taken_over", session=entry.key.session, request_id=entry.key.request_id)
            return
        except StoreError as problem:
            log.error("journal.failed", step="finish", problem=str(problem), request_id=entry.key.request_id)
            self._redelivery.store_later(
                entry.key, terminal, now=now, history=None, since=time.monotonic(), spent=spent
            )
        self.publish(entry, terminal)

    def _first_level(self, entry: Entry) -> str:
        """Whose request it was; what it cost died with the worker that ran it."""
        address = self._topics.address(entry.topic)
        return entry.key.session.partition("/")[0] if address is None else address.first_level

    def publish(self, entry: Entry, terminal: bytes, *, again: bool = False) -> None:
        self._redelivery.send(entry.key, entry.reply_topic, terminal, entry.correlation, again=again)


def terminal_of(entry: Entry, error: RequestError, *, metadata: dict[str, object] | None) -> bytes:
    """The end of an entry of which nobody knows more than the journal."""
    return events.interrupted(
        request_id=entry.key.request_id,
        session_id=entry.key.session,
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        metadata=metadata,
    )
