"""Received messages that nobody has read yet, bounded in number and bytes."""

from __future__ import annotations

import threading
from collections import deque

import structlog

from llamacpp_mqtt_deploy.ports import Delivery

log = structlog.get_logger(__name__)

# What it holds at most, whatever the number of messages: a thousand megabyte requests would fill a small device.
_MAX_BYTES = 32 * 1024 * 1024


class Inbox:
    """`offer` is for the link's thread and never waits: all other traffic passes through that thread. `take` is the reader's."""

    def __init__(self, *, max_messages: int) -> None:
        self._max_messages = max_messages
        self._waiting: deque[Delivery] = deque()
        self._bytes = 0
        self._refused = 0
        self._lost = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, delivery: Delivery) -> bool:
        """Take the message, or say that there is no place for it. One message of any size has a place in an empty inbox."""
        size = _size(delivery)
        with self._changed:
            if self._closed:
                return True  # unread and unacknowledged: it stays with the broker for the worker's next start
            if self._waiting and (len(self._waiting) >= self._max_messages or self._bytes + size > _MAX_BYTES):
                self._refused += 1
                self._lost += delivery.qos == 0
                return False
            self._waiting.append(delivery)
            self._bytes += size
            self._changed.notify()
        return True

    def take(self, most: int, *, timeout_s: float) -> list[Delivery] | None:
        """Wait for messages and take up to `most` of them; an empty list when none came, None when it is closed and read."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._closed, timeout_s):
                return []
            taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            self._bytes -= sum(map(_size, taken))
            refused, lost = self._refused, self._lost
            tell = refused > 0 and not self._waiting
            if tell:
                self._refused = self._lost = 0
        if tell:
            # Once for each flood, when it is over: a line for each message would be a flood of its own.
            log.warning("inbox.refused", messages=refused, lost=lost, message="more came at once than may wait here")
        return taken or None

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Take no more messages; what is there can still be read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _size(delivery: Delivery) -> int:
    # A broker lets a client put 64 KiB into each of the fields besides the payload.
    extra = len(delivery.response_topic or "") + len(delivery.correlation or b"")
    return len(delivery.payload) + len(delivery.topic) + extra
