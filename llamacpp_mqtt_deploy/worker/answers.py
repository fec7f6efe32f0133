"""Answers to what was not accepted (refusals, acks): in their part of the outbox, and none is lost when that is full."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from llamacpp_mqtt_deploy.ports import Link


class Answers:
    """The intake's alone: its thread asks `room` how many messages it may read, each of which may bring one answer.

    So a message whose answer would find no place stays unread, and unacknowledged at the broker, while the events of accepted
    requests have the rest of the outbox to themselves.
    """

    def __init__(self, link: Link, *, max_event_bytes: Callable[[], int]) -> None:
        self._link = link
        self._max_event_bytes = max_event_bytes
        # At most one burst of the intake: `room` gives nothing while one waits here.
        self._waiting: deque[tuple[str, bytes, bytes | None, str]] = deque()

    def room(self, *, timeout_s: float) -> int:
        """How many messages may be read; 0 when there was no room for an answer all this time."""
        room = self._link.room_for_answers(self._max_event_bytes(), timeout_s=timeout_s)
        if not room or not self._waiting:
            return room
        while self._waiting:
            if not self._publish(*self._waiting[0]):
                return 0
            self._waiting.popleft()
        return self._link.room_for_answers(self._max_event_bytes())

    def publish(
        self, topic: str, payload: bytes, *, correlation: bytes | None, content_type: str = "application/json"
    ) -> None:
        """Publish an answer, or keep it for the next `room`: events may have taken the place that was promised."""
        if self._waiting or not self._publish(topic, payload, correlation, content_type):
            self._waiting.append((topic, payload, correlation, content_type))

    def _publish(self, topic: str, payload: bytes, correlation: bytes | None, content_type: str) -> bool:
        published = self._link.publish(
            topic, payload, correlation=correlation, share="answer", content_type=content_type
        )
        return published != "full"
