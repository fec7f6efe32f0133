"""Answers to requests that were not accepted: one `error` or `rejected` event, and nothing is remembered of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llamacpp_mqtt_deploy.core import events
from llamacpp_mqtt_deploy.core.addresses import Address
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.formats.route_rendering import RouteRendering
from llamacpp_mqtt_deploy.ports import Delivery, EntryKey, Store, StoreError
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.message_log import MessageLog

_Rejected = Literal["duplicate_request", "reply_topic_forbidden"]


@dataclass(frozen=True, slots=True)
class Received:
    """A message with what its topic says (None: no topic of ours) and the Correlation Data that its answers mirror."""

    delivery: Delivery
    address: Address | None
    correlation: bytes | None

    @property
    def first_level(self) -> str:
        """Whose message it is: by its address, else by where a session path would begin."""
        return first_level_of(self.address, self.delivery.topic)

    def shown_topic(self) -> str:
        """The topic for the log; a client may have put anything into it."""
        return self.delivery.topic[:200]


def first_level_of(address: Address | None, topic: str) -> str:
    """Whose message one on this topic is, of which this is the address."""
    return "".join(topic.split("/")[2:3])[:64] if address is None else address.first_level


class Refusals:
    """Publishes refusals. `address` is the one of the message, completed with the session of its payload where it could be."""

    def __init__(
        self,
        *,
        answers: Answers,
        store: Store,
        registry: JobRegistry,
        counters: Counters,
        max_event_bytes: Callable[[], int],
        message_log: MessageLog,
        new_rendering: Callable[[EntryKey], RouteRendering | None] = lambda _key: None,
    ) -> None:
        self._new_rendering = new_rendering
        self._answers = answers
        self._store = store
        self._registry = registry
        self._counters = counters
        self._max_event_bytes = max_event_bytes
        self._log = message_log

    def refuse(self, message: Received, address: Address, request_id: str | None, error: RequestError) -> None:
        """Answer with an `error` event, which ends the stream of this request id."""
        if (
            address.session is not None
            and request_id is not None
            and self._is_known(address.route, address.session, request_id)
        ):
            # A broken copy of a request that is known: an `error` would end the good one for its client.
            self.reject(message, address, request_id, "duplicate_request", because=error.message)
            return
        self._counters.refused(error.code)
        self._log.info(
            "request.refused",
            message.first_level,
            code=error.code,
            topic=message.shown_topic(),
            bytes=message.delivery.payload_bytes,
            message=error.message,
        )
        if address.session is None:
            return  # It stands in the payload and cannot be seen there: there is no topic to answer on.
        assert address.reply_topic is not None
        key = EntryKey(address.route, address.session, request_id or uuid.uuid4().hex)
        writer = EventWriter(request_id=key.request_id, session_id=key.session, max_bytes=self._max_event_bytes())
        payload = writer.error(code=error.code, message=error.message, retryable=error.retryable, details=error.details)
        self._publish(message, address.reply_topic, key, payload)

    def reject(
        self, message: Received, address: Address, request_id: str, code: _Rejected, *, because: str | None = None
    ) -> None:
        """Answer with a `rejected` event, which ends no stream; `because` is for the operator."""
        assert address.reply_topic is not None
        assert address.session is not None
        text = {
            "duplicate_request": "this request_id belongs to another request of this session; use a new random one",
            "reply_topic_forbidden": f"answers go to {address.reply_topic} only; leave the Response Topic out or set it so",
        }[code]
        self._counters.refused(code)
        self._log.info(
            "request.rejected",
            message.first_level,
            code=code,
            topic=message.shown_topic(),
            **({} if because is None else {"message": because}),
        )
        payload = events.rejected(request_id=request_id, session_id=address.session, code=code, message=text)
        key = EntryKey(address.route, address.session, request_id)
        self._publish(message, address.reply_topic, key, payload)

    def _publish(self, message: Received, topic: str, key: EntryKey, event: bytes) -> None:
        rendering = self._new_rendering(key)
        if rendering is None:
            self._answers.publish(topic, event, correlation=message.correlation)
            return
        for part in rendering.shortened(rendering.refusal(event), self._max_event_bytes()):
            self._answers.publish(topic, part, correlation=message.correlation, content_type=rendering.content_type)

    def _is_known(self, route: str, session: str, request_id: str) -> bool:
        key = EntryKey(route, session, request_id)
        try:
            return self._registry.find(key) is not None or self._store.find(key) is not None
        except StoreError:
            return False
