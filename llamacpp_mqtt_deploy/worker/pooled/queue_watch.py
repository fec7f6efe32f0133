"""Requests that this worker received and that wait in the common queue: their clients hear of them from here."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.pool_ports import SharedJournal
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, Outbox

# Protocol, section 3: the first event comes within 1 s, and a change of position is told at most once a second. A request that
# a worker takes sooner begins with that worker's `start`.
_FIRST_EVENT_S = 0.4
_POSITIONS_EVERY_S = 1.0

# As many as are looked up in one statement.
_LOOK_AT = 1000
# Beyond it the oldest are told of no more: their clients send them again after three heartbeats of silence.
_MAX_WATCHED = 20_000


@dataclass(slots=True, eq=False)
class _Waiting:
    topic: str
    correlation: bytes | None
    received_at: float
    position: int | None = None
    """As it was told; None before the first event."""
    told_at: float = 0.0
    looked_at: float = 0.0
    """When its position was looked up last."""


class WaitingRequests:
    """Publishes `queued` and `ping` for requests that no worker has taken yet. `check` has to be called a few times a second.

    Requests that want their end alone are not for here. Nothing of it has to survive: when this worker dies, the clients' own rule (a request sent again after silence) finds another.
    """

    def __init__(
        self,
        *,
        journal: SharedJournal,
        outbox: Outbox,
        heartbeat_s: Callable[[], float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._journal = journal
        self._outbox = outbox
        self._heartbeat_s = heartbeat_s
        self._lock = threading.Lock()
        self._waiting: OrderedDict[EntryKey, _Waiting] = OrderedDict()

    def add(self, entry: Entry, *, received_at: float, position: int) -> None:
        """Watch over this one from now on; `received_at` is monotonic seconds. One that has to wait for certain (a position) is
        told so at once."""
        waiting = _Waiting(entry.reply_topic, entry.correlation, received_at)
        with self._lock:
            self._waiting[entry.key] = waiting
            if len(self._waiting) > _MAX_WATCHED:
                self._waiting.popitem(last=False)
        if position:
            self._tell(entry.key, waiting, position, self._now())

    def again(self, entry: Entry) -> None:
        """The client sent it again: it is told its position at the next look."""
        with self._lock:
            known = self._waiting.get(entry.key)
        if known is None:
            self.add(entry, received_at=self._now() - _FIRST_EVENT_S, position=0)
        else:
            known.position = None

    def check(self) -> None:
        """Tell those that still wait. Raises StoreError."""
        now = self._now()
        with self._lock:
            due = [(key, each) for key, each in self._waiting.items() if self._is_due(each, now)]
            # Those who know nothing yet first, then whose look was longest ago: with thousands none is passed over for ever.
            due.sort(key=lambda found: (found[1].position is not None, found[1].looked_at))
            del due[_LOOK_AT:]
            for _, each in due:
                each.looked_at = now
        if not due:
            return
        positions = self._journal.watched([key for key, _ in due])
        for key, each in due:
            position = positions.get(key)
            if position is None:
                with self._lock:
                    if self._waiting.get(key) is each:
                        del self._waiting[key]
            else:
                self._tell(key, each, position, now)

    def _is_due(self, each: _Waiting, now: float) -> bool:
        if each.position is None:
            return now - each.received_at >= _FIRST_EVENT_S
        return now - max(each.told_at, each.looked_at) >= _POSITIONS_EVERY_S

    def _tell(self, key: EntryKey, each: _Waiting, position: int, now: float) -> None:
        writer = EventWriter(request_id=key.request_id, session_id=key.session, max_bytes=4096)
        if position != each.position:
            payload = writer.queued(position=position, reason="waiting")
        elif now - each.told_at >= self._heartbeat_s():
            writer.queued(position=position, reason="waiting")  # a ping follows something
            payload = writer.ping(state="queued")
        else:
            return
        if self._outbox.publish(each.topic, payload, correlation=each.correlation) == "queued":
            each.position, each.told_at = position, now

    def __len__(self) -> int:
        with self._lock:
            return len(self._waiting)
