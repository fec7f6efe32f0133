"""Terminal events on their way to the broker: published, tried again when the outbox was full, ticked off when taken."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from llamacpp_mqtt_deploy.core.chunk_record import unpacked, written
from llamacpp_mqtt_deploy.core.fitting import fitted, refitted
from llamacpp_mqtt_deploy.core.formats.rendering import JSON
from llamacpp_mqtt_deploy.core.formats.route_rendering import RouteRendering
from llamacpp_mqtt_deploy.core.spending import Spent
from llamacpp_mqtt_deploy.ports import EntryKey, HistoryChange, Outbox, Share, Store, StoreError
from llamacpp_mqtt_deploy.worker.unstored_ends import UnstoredEnds

log = structlog.get_logger(__name__)

# Terminal events that wait for a place in the outbox; the store has every one of them, and the next start delivers it.
_MAX_WAITING = 10_000
_MAX_WAITING_BYTES = 32 * 1024 * 1024
"""Of those that wait: beyond it an event is read from the store when its turn comes."""


@dataclass(slots=True)
class _Sending:
    """A terminal event on its way: alone, or as the chunks that it was cut into and the end behind them."""

    topic: str
    terminal: bytes | None
    """None: it is in the store."""
    correlation: bytes | None
    share: Share
    again: bool = False
    """Chunks of which the end does not tell the text go before it once more."""
    events: list[bytes] = field(default_factory=list)
    chunks: int = 0
    """How many of the events are such chunks."""
    sent: int = 0
    rendering: RouteRendering | None = None
    """What makes messages of the events, on a route with a format; it knows what its client was told already."""
    counted: int = 0
    """The bytes for which it counts among those that wait."""

    def size(self) -> int:
        return len(self.terminal or b"") + sum(map(len, self.events))

    def next_share(self) -> Share:
        """Repeated text must not take the place of what others hear for the first time."""
        return "answer" if self.sent < self.chunks else self.share

    def put_down(self) -> None:
        """Keep no bytes of it; it begins anew, which its client has to bear."""
        self.terminal, self.events, self.chunks, self.sent, self.rendering = None, [], 0, 0, None


class Redelivery:
    """Delivers terminal events at least once. `sweep` has to be called about once a second.

    `max_event_bytes` is the limit of the connection just now; an end that is larger is made to fit (`core/fitting.py`). `tells_unstored`: see `UnstoredEnds`.
    """

    def __init__(
        self,
        *,
        outbox: Outbox,
        store: Store,
        max_event_bytes: Callable[[], int],
        tells_unstored: bool = True,
        new_rendering: Callable[[EntryKey], RouteRendering | None] = lambda _key: None,
    ) -> None:
        self._new_rendering = new_rendering
        self._outbox = outbox
        self._store = store
        self._max_event_bytes = max_event_bytes
        self._lock = threading.Lock()
        self._closing = False
        self._taken: list[EntryKey] = []
        self._given_up: list[tuple[EntryKey, _Sending]] = []
        self._unstored = UnstoredEnds(store, tells_unstored=tells_unstored)
        self._waiting: OrderedDict[EntryKey, _Sending] = OrderedDict()
        self._waiting_bytes = 0

    def store_later(
        self,
        key: EntryKey,
        terminal: bytes,
        *,
        now: float,
        history: HistoryChange | None,
        chunks: bytes | None = None,
        then: Callable[[], object] | None = None,
        taken_over: Callable[[], object] | None = None,
        since: float,
        spent: Spent | None = None,
    ) -> None:
        """An end that the store could not take (a locked database, a full disk): tried again, or a restart would end the
        request once more. `then` runs once: when it is stored, or `TELL_AFTER_S` after `since` (monotonic seconds).
        `taken_over` runs instead when another worker of the pool has the request meanwhile."""
        self._unstored.add(
            key,
            terminal,
            now=now,
            history=history,
            chunks=chunks,
            then=then,
            since=since,
            taken_over=taken_over,
            spent=spent,
        )

    def unstored(self, key: EntryKey) -> bytes | None:
        """The terminal event of a request whose end the store could not take yet."""
        found = self._unstored.find(key)
        return found.terminal if found is not None else None

    def forget(self, session: tuple[str, str]) -> None:
        """A reset: what the store could not take yet of this session's history is not stored later."""
        self._unstored.forget(session)

    def send(
        self,
        key: EntryKey,
        topic: str,
        terminal: bytes,
        correlation: bytes | None,
        *,
        share: Share = "event",
        again: bool = False,
        rendering: RouteRendering | None = None,
    ) -> None:
        """Publish a terminal event; what finds no place, or a defect of the link, is tried again by `sweep`. One that is told
        again to whoever sent his request again is an answer.

        `again`: its client may have lost chunks of which this end does not tell the text; they go before it. `rendering` is that
        of the request in this life: without it a route's format tells the answer anew.
        """
        self._send(key, _Sending(topic, terminal, correlation, share, again, rendering=rendering))

    def _send(self, key: EntryKey, sending: _Sending) -> None:
        with self._lock:
            before = self._waiting.get(key)
            if before is not None:
                if sending.again and not before.again:
                    sending.share = before.share  # nobody has heard of this end yet
                    self._keep_waiting(key, sending)
                return
        try:
            waits = not self._publish(key, sending)
        except Exception:
            log.exception("terminal.failed", topic=sending.topic, request_id=key.request_id)
            waits = True
        if waits:
            with self._lock:
                self._keep_waiting(key, sending)

    def _keep_waiting(self, key: EntryKey, sending: _Sending) -> None:
        if self._waiting_bytes + sending.size() > _MAX_WAITING_BYTES:
            sending.put_down()
        self._count(self._waiting.get(key), 0)
        self._waiting[key] = sending
        self._count(sending, sending.size())
        if len(self._waiting) > _MAX_WAITING:
            _, oldest = self._waiting.popitem(last=False)
            self._count(oldest, 0)

    def _count(self, sending: _Sending | None, size: int) -> None:
        if sending is not None:
            self._waiting_bytes += size - sending.counted
            sending.counted = size

    def _prepare(self, key: EntryKey, sending: _Sending) -> None:
        """Have the events to send; none when the store has forgotten them. Raises StoreError."""
        if sending.events:
            return
        if sending.terminal is None:
            entry = self._store.find(key)
            sending.terminal = self.unstored(key) or (None if entry is None else entry.terminal)
            if sending.terminal is None:
                return
        chunks = self._recorded(key) if sending.again else []
        limit = self._max_event_bytes()
        events = [*chunks, *fitted(sending.terminal, limit)]
        sending.rendering = sending.rendering or self._new_rendering(key)
        if sending.rendering is None:
            sending.chunks, sending.events = len(chunks), events
        else:
            sending.events = sending.rendering.end(events, limit)
            if not sending.events:
                self._taken_as_it_is(key)

    def _recorded(self, key: EntryKey) -> list[bytes]:
        waiting = self._unstored.find(key)
        record = self._store.chunks(key) if waiting is None else waiting.chunks
        if record is None:
            return []
        return written(unpacked(record), request_id=key.request_id, session_id=key.session)

    def _publish(self, key: EntryKey, sending: _Sending) -> bool:
        """Publish what is left of it; False when the outbox is full."""
        self._prepare(key, sending)
        while sending.sent < len(sending.events):
            payload = sending.events[sending.sent]
            is_end = sending.sent == len(sending.events) - 1
            published = self._outbox.publish(
                sending.topic,
                payload,
                correlation=sending.correlation,
                on_done=(lambda ok: self._done(key, sending, taken=ok)) if is_end else None,
                share=sending.next_share(),
                content_type=JSON if sending.rendering is None else sending.rendering.content_type,
            )
            if published == "full":
                return False
            if published == "queued":
                sending.sent += 1
            elif not self._refit(sending):
                log.error("terminal.undeliverable", topic=sending.topic, bytes=len(payload), request_id=key.request_id)
                with self._lock:
                    self._taken.append(key)
                return True
        return True

    def _refit(self, sending: _Sending) -> bool:
        """Make the rest smaller, for a limit that shrank; False when size is not what is wrong, or nothing is left to leave out."""
        limit = self._max_event_bytes()
        rest = sending.events[sending.sent :]
        if all(len(event) <= limit for event in rest):
            return False
        if sending.rendering is not None:
            sending.events[sending.sent :] = sending.rendering.shortened(rest, limit)
            return True
        assert sending.terminal is not None
        if sending.sent < sending.chunks:
            # Chunks keep their borders: without the rest of them, the end alone.
            sending.events[sending.sent :] = fitted(sending.terminal, limit)
            sending.chunks = sending.sent
            return True
        smaller = refitted(rest, sending.sent, limit) if sending.sent else fitted(sending.terminal, limit)
        sending.events[sending.sent :] = smaller
        return max(map(len, smaller)) <= limit

    def _taken_as_it_is(self, key: EntryKey) -> None:
        """This format has nothing to say at the end."""
        with self._lock:
            self._taken.append(key)

    def _done(self, key: EntryKey, sending: _Sending, *, taken: bool) -> None:
        # The link's thread: note it, and leave the work to `sweep`.
        with self._lock:
            if taken:
                self._taken.append(key)
            elif not self._closing:
                self._given_up.append((key, sending))

    def last_call(self) -> None:
        """The link is about to close and gives up what no broker has acknowledged: the next start delivers that."""
        self._unstored.keep_back()
        with self._lock:
            self._closing = True

    def sweep(self) -> None:
        """Tick off in the store what the broker has taken, and try again what found no place or was given up as too large."""
        self._unstored.catch_up()
        self._send_smaller()
        unstored = self._unstored.waiting()
        with self._lock:
            taken = [key for key in self._taken if key not in unstored]
            self._taken = [key for key in self._taken if key in unstored]
            waiting = list(self._waiting.items())
        if taken:
            try:
                self._store.mark_delivered(taken)
            except StoreError as problem:
                # At worst a terminal event is published once more after a restart, which clients have to bear anyway.
                log.warning("journal.failed", step="mark_delivered", problem=str(problem))
        answers_wait = False
        for key, sending in waiting:
            if answers_wait and sending.next_share() == "answer":
                continue  # unread: what waits in the store alone would else be in memory, all of it
            try:
                if not self._publish(key, sending):
                    with self._lock:
                        if self._waiting.get(key) is sending:
                            self._count(sending, sending.size())  # it may have been read from the store
                    if sending.next_share() == "answer":
                        answers_wait = True  # Their part of the outbox is full; there may be room for events.
                        continue
                    return
            except StoreError as problem:
                log.warning("journal.failed", step="find", problem=str(problem), request_id=key.request_id)
                return
            except Exception:
                # Twice a defect: it is left to the next start, and holds up nobody else.
                log.exception("terminal.failed", topic=sending.topic, request_id=key.request_id)
            with self._lock:
                if self._waiting.get(key) is sending:
                    del self._waiting[key]
                    self._count(sending, 0)

    def _send_smaller(self) -> None:
        """Ends that the link gave up: a connection that takes smaller packets gets a smaller one."""
        with self._lock:
            given_up, self._given_up = self._given_up, []
        for key, sending in given_up:
            if len(sending.events[-1]) > self._max_event_bytes():
                log.info("terminal.shrunk", topic=sending.topic, request_id=key.request_id)
                self._send(
                    key, _Sending(sending.topic, sending.terminal, sending.correlation, sending.share, sending.again)
                )
            else:
                # A broker that refuses an event for ever must not get it again at every start.
                with self._lock:
                    self._taken.append(key)
