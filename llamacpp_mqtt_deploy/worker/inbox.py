"""Received messages that nobody has read yet, bounded in number and bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from llamacpp_mqtt_deploy.core.largest_holder import LargestHolder
from llamacpp_mqtt_deploy.ports import Delivery

log = structlog.get_logger(__name__)

# What it holds at most, whatever the number of messages: a thousand megabyte requests would fill a small device.
_MAX_BYTES = 32 * 1024 * 1024


@dataclass(slots=True)
class _Waiting:
    """A message in the inbox; one without a delivery gave its place up."""

    delivery: Delivery | None
    level: str
    size: int


class Inbox:
    """`offer` is for the link's thread and never waits: all other traffic passes through that thread. `take` is the reader's.

    Places and bytes are shared between first topic levels: one that is alone may fill it, and when it is full a newcomer takes the
    place of the newest message of whoever holds most, as long as his own then holds no more.
    Only messages at QoS 0 are given up so: every other is the broker's until it is acknowledged, in order of receipt, and the
    broker has few of these under way at a time.
    """

    def __init__(self, *, max_messages: int) -> None:
        self._max_messages = max_messages
        self._waiting: deque[_Waiting] = deque()
        self._qos0: dict[str, deque[_Waiting]] = {}
        """Of each level those at QoS 0, oldest first."""
        self._places: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._places_in_all = self._bytes_in_all = 0
        self._most_places = LargestHolder(lambda: self._qos0, lambda level: self._of_those_at_qos0(self._places, level))
        self._most_bytes = LargestHolder(lambda: self._qos0, lambda level: self._of_those_at_qos0(self._bytes, level))
        self._refused = 0
        self._lost = 0
        self._closed = False
        # Taken alone where nobody waits: a condition's own way to it is two calls longer.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def __len__(self) -> int:
        return self._places_in_all

    def offer(self, delivery: Delivery, level: str) -> bool:
        """Take the message of this first topic level, or say that there is no place for it. One of any size has a place in an empty
        inbox."""
        new = _Waiting(delivery, level, _size(delivery))
        with self._lock:
            if self._closed:
                return True  # unread and unacknowledged: it stays with the broker for the worker's next start
            if not self._make_room(new):
                self._refused += 1
                self._lost += delivery.qos == 0
                return False
            self._enter(new, delivery)
            self._changed.notify()
        return True

    def take(self, most: int, *, timeout_s: float) -> list[Delivery] | None:
        """Wait for messages and take up to `most` of them; an empty list when none came, None when it is closed and read."""
        with self._lock:
            if not self._places and not self._closed:
                self._changed.wait(timeout_s)
                if not self._places and not self._closed:
                    return []
            taken = self._oldest(most)
            refused, lost = self._refused, self._lost
            tell = refused > 0 and not self._places
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
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    # --- under the lock ------------------------------------------------------------------------------------------------

    def _enter(self, new: _Waiting, delivery: Delivery) -> None:
        self._waiting.append(new)
        if delivery.qos == 0:
            self._qos0.setdefault(new.level, deque()).append(new)
        self._places[new.level] = self._places.get(new.level, 0) + 1
        self._bytes[new.level] = self._bytes.get(new.level, 0) + new.size
        self._places_in_all += 1
        self._bytes_in_all += new.size
        self._most_places.grown(new.level)
        self._most_bytes.grown(new.level)

    def _leave(self, gone: _Waiting) -> None:
        """Nothing stays of a level that has no message here: clients can make up as many as they like."""
        self._places[gone.level] -= 1
        self._bytes[gone.level] -= gone.size
        self._places_in_all -= 1
        self._bytes_in_all -= gone.size
        if not self._places[gone.level]:
            del self._places[gone.level], self._bytes[gone.level]
        if not self._qos0.get(gone.level, True):
            del self._qos0[gone.level]

    def _oldest(self, most: int) -> list[Delivery]:
        taken: list[Delivery] = []
        while self._waiting and len(taken) < most:
            first = self._waiting.popleft()
            if first.delivery is None:
                continue
            taken.append(first.delivery)
            if first.delivery.qos == 0:
                self._qos0[first.level].popleft()
            self._leave(first)
        return taken

    def _make_room(self, new: _Waiting) -> bool:
        """Whether there is a place for it, be it one that another level gives up."""
        while self._places and self._places_in_all >= self._max_messages:
            if not self._give_up(new, self._places, self._most_places, lambda _: 1):
                return False
        while self._places and self._bytes_in_all + new.size > _MAX_BYTES:
            if not self._give_up(new, self._bytes, self._most_bytes, lambda each: each.size):
                return False
        return True

    def _of_those_at_qos0(self, held: Mapping[str, int], level: str) -> int | None:
        return held[level] if level in self._qos0 else None

    def _give_up(
        self, new: _Waiting, held: Mapping[str, int], most: LargestHolder, measure: Callable[[_Waiting], int]
    ) -> bool:
        """Drop the newest message at QoS 0 of whoever holds most, if he then still holds no less than the newcomer."""
        largest = most.find(but=new.level)
        if largest is None:
            return False
        last = self._qos0[largest][-1]
        if held[largest] - measure(last) < held.get(new.level, 0) + measure(new):
            return False
        self._qos0[largest].pop()
        last.delivery = None
        self._leave(last)
        self._refused += 1
        self._lost += 1
        return True


def _size(delivery: Delivery) -> int:
    # A broker lets a client put 64 KiB into each of the fields besides the payload.
    extra = len(delivery.response_topic or "") + len(delivery.correlation or b"")
    return len(delivery.payload) + len(delivery.topic) + extra
