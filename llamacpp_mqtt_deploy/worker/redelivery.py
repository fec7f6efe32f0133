"""Terminal events on their way to the broker: published, tried again when the outbox was full, ticked off when taken."""

from __future__ import annotations

import threading
from collections import OrderedDict

import structlog

from llamacpp_mqtt_deploy.ports import EntryKey, HistoryChange, Outbox, Published, Store, StoreError

log = structlog.get_logger(__name__)

# Terminal events that wait for a place in the outbox; the store has every one of them, and the next start delivers it.
_MAX_WAITING = 10_000
_MAX_UNSTORED = 1000


class Redelivery:
    """Delivers terminal events at least once. `sweep` has to be called about once a second."""

    def __init__(self, *, outbox: Outbox, store: Store) -> None:
        self._outbox = outbox
        self._store = store
        self._lock = threading.Lock()
        self._closing = False
        self._taken: list[EntryKey] = []
        self._unstored: OrderedDict[EntryKey, tuple[bytes, float, HistoryChange | None]] = OrderedDict()
        self._waiting: OrderedDict[EntryKey, tuple[str, bytes, bytes | None]] = OrderedDict()

    def store_later(self, key: EntryKey, terminal: bytes, *, now: float, history: HistoryChange | None) -> None:
        """An end that the store could not take (a full disk): tried again, or a restart would end the request once more."""
        with self._lock:
            self._unstored[key] = (terminal, now, history)
            if len(self._unstored) > _MAX_UNSTORED:
                self._unstored.popitem(last=False)

    def unstored(self, key: EntryKey) -> bytes | None:
        """The terminal event of a request whose end the store could not take yet."""
        with self._lock:
            found = self._unstored.get(key)
        return found[0] if found is not None else None

    def send(self, key: EntryKey, topic: str, terminal: bytes, correlation: bytes | None) -> None:
        """Publish a terminal event; what finds no place, or a defect of the link, is tried again by `sweep`."""
        try:
            published = self._publish(key, topic, terminal, correlation)
        except Exception:
            log.exception("terminal.failed", topic=topic, request_id=key.request_id)
            published = "full"
        if published == "full":
            with self._lock:
                self._waiting[key] = (topic, terminal, correlation)
                if len(self._waiting) > _MAX_WAITING:
                    self._waiting.popitem(last=False)

    def _publish(self, key: EntryKey, topic: str, terminal: bytes, correlation: bytes | None) -> Published:
        published = self._outbox.publish(
            topic, terminal, correlation=correlation, on_done=lambda ok: self._done(key, taken=ok)
        )
        if published == "unfit":
            log.error("terminal.undeliverable", topic=topic, bytes=len(terminal), request_id=key.request_id)
            self._done(key, taken=False)
        return published

    def _done(self, key: EntryKey, *, taken: bool) -> None:
        # Also when it was given up: a broker that refuses an event for ever must not get it again at every start.
        with self._lock:
            if taken or not self._closing:
                self._taken.append(key)

    def last_call(self) -> None:
        """The link is about to close and gives up what no broker has acknowledged: that is the next life's to deliver."""
        with self._lock:
            self._closing = True

    def sweep(self) -> None:
        """Tick off in the store what the broker has taken, and try again what found no place."""
        self._store_what_waits()
        with self._lock:
            taken = [key for key in self._taken if key not in self._unstored]
            self._taken = [key for key in self._taken if key in self._unstored]
            waiting = list(self._waiting.items())
        if taken:
            try:
                self._store.mark_delivered(taken)
            except StoreError as problem:
                # At worst a terminal event is published once more after a restart, which clients have to bear anyway.
                log.warning("journal.failed", step="mark_delivered", problem=str(problem))
        for key, (topic, terminal, correlation) in waiting:
            if self._publish(key, topic, terminal, correlation) == "full":
                return
            with self._lock:
                self._waiting.pop(key, None)

    def _store_what_waits(self) -> None:
        with self._lock:
            unstored = list(self._unstored.items())
        for key, (terminal, now, history) in unstored:
            try:
                self._store.finish(key, terminal, now=now, history=history)
            except StoreError:
                return
            except Exception:
                log.exception("journal.failed", step="finish", request_id=key.request_id)
            else:
                log.info("journal.caught_up", request_id=key.request_id)
            with self._lock:
                self._unstored.pop(key, None)
