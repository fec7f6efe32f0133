"""What a store is, in plain Python: the model that any sequence of steps on the real one is compared with."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import orjson

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.core.spending import LedgerRow, Spent, day_of
from llamacpp_mqtt_deploy.core.wallclock import PURGE_NOTED_EVERY_S, away_s, mended
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, HistoryChange, Purged, StoreError, ToldEnd
from llamacpp_mqtt_deploy.stores.bounds import (
    MAX_HISTORY_BYTES,
    PURGE_ROWS,
    UNDELIVERED_S,
    first_level_of,
    messages_to_forget,
)

SessionKey = tuple[str, str]


@dataclass(slots=True)
class _Record:
    """An entry with its place in the order of ending."""

    entry: Entry
    ended_order: int
    chunks: bytes | None = None


@dataclass(slots=True)
class _Session:
    last_used: float
    messages: list[tuple[str, bytes]] = field(default_factory=list)
    """Role and JSON of each message: what is kept cannot be changed through what was given or returned."""


class ModelStore:
    """Journal and sessions as dictionaries."""

    def __init__(self, *, max_history_bytes: int = MAX_HISTORY_BYTES) -> None:
        self._max_history_bytes = max_history_bytes
        self._lock = threading.Lock()
        self._open = False
        self._order = 0
        self._purged_at: float | None = None
        self._records: dict[EntryKey, _Record] = {}
        self._sessions: dict[SessionKey, _Session] = {}
        self._ledger: dict[tuple[int, str], LedgerRow] = {}

    def open(self) -> None:
        with self._lock:
            self._open = True

    def close(self) -> None:
        with self._lock:
            self._open = False

    def set_aside(self, ends: Sequence[ToldEnd]) -> bool:
        """Nothing of it outlives the process."""
        return True

    def clear_aside(self) -> None:
        """Nothing was kept."""

    # --- journal -----------------------------------------------------------------------------------------------------

    def accept(self, entries: Sequence[Entry]) -> None:
        with self._lock:
            self._check_open()
            for entry in entries:
                known = self._records.get(entry.key)
                if known is not None and known.entry.state != "ended":
                    continue
                self._records.pop(entry.key, None)
                ended_order = self._next() if entry.state == "ended" else 0
                self._records[entry.key] = _Record(entry, ended_order)
                session = self._sessions.get((entry.key.route, entry.key.session))
                if session is not None:
                    session.last_used = max(session.last_used, entry.accepted_at)

    def find(self, key: EntryKey) -> Entry | None:
        with self._lock:
            self._check_open()
            record = self._records.get(key)
            return None if record is None else record.entry

    def mark_started(self, key: EntryKey) -> int:
        with self._lock:
            self._check_open()
            record = self._records.get(key)
            if record is None:
                return 0
            if record.entry.state != "ended":
                record.entry = replace(record.entry, starts=record.entry.starts + 1)
            return record.entry.starts

    def mark_streaming(self, key: EntryKey) -> None:
        with self._lock:
            self._check_open()
            record = self._records.get(key)
            if record is not None and record.entry.state == "accepted":
                record.entry = replace(record.entry, state="streaming")

    def finish(
        self,
        key: EntryKey,
        terminal: bytes,
        *,
        now: float,
        history: HistoryChange | None = None,
        chunks: bytes | None = None,
        spent: Spent | None = None,
    ) -> None:
        # Encoded first: what JSON cannot hold must not leave half of the change behind.
        appended = [] if history is None else [(_role(m), orjson.dumps(m)) for m in history.append]
        with self._lock:
            self._check_open()
            record = self._records.get(key)
            if record is not None:
                if record.entry.state == "ended":
                    return
                record.entry = replace(
                    record.entry, state="ended", terminal=terminal, payload=b"", delivered=False, ended_at=now
                )
                record.ended_order = self._next()
                record.chunks = chunks
                if spent is not None:
                    self._spend(spent, now)
            if history is not None:
                self._change(history, appended, now)

    def chunks(self, key: EntryKey) -> bytes | None:
        with self._lock:
            self._check_open()
            record = self._records.get(key)
            return None if record is None else record.chunks

    def ledger(
        self,
        *,
        since_day: int,
        until_day: int | None = None,
        first_level: str | None = None,
        skip: int = 0,
        most: int = 1000,
    ) -> list[LedgerRow]:
        with self._lock:
            self._check_open()
            rows = [r for r in self._ledger.values() if r.day >= since_day and first_level in (None, r.first_level)]
            rows = [r for r in rows if until_day is None or r.day <= until_day]
        return sorted(rows, key=lambda r: (-r.day, -r.tokens, r.first_level))[skip : skip + most]

    def mark_delivered(self, keys: Sequence[EntryKey]) -> None:
        with self._lock:
            self._check_open()
            for key in keys:
                record = self._records.get(key)
                if record is not None and record.entry.state == "ended":
                    record.entry = replace(record.entry, delivered=True)

    def unfinished(self) -> list[Entry]:
        with self._lock:
            self._check_open()
            # Insertion order is the order of acceptance: a replaced entry is taken out and put in anew.
            return [r.entry for r in self._records.values() if r.entry.state != "ended"]

    def undelivered(self) -> list[Entry]:
        with self._lock:
            self._check_open()
            ended = [r for r in self._records.values() if r.entry.state == "ended" and not r.entry.delivered]
            return [r.entry for r in sorted(ended, key=attrgetter("ended_order"))]

    # --- sessions ----------------------------------------------------------------------------------------------------

    def history(self, session: SessionKey) -> tuple[Message, ...]:
        with self._lock:
            self._check_open()
            known = self._sessions.get(session)
            kept = [] if known is None else list(known.messages)
        return tuple(orjson.loads(message) for _, message in kept)

    def reset(self, session: SessionKey) -> None:
        with self._lock:
            self._check_open()
            known = self._sessions.get(session)
            if known is not None:
                known.messages = []

    def delete(self, session: SessionKey) -> None:
        with self._lock:
            self._check_open()
            self._sessions.pop(session, None)

    def purge(self, *, now: float, remember_s: float, ttl_s: float, max_sessions: int) -> Purged:
        with self._lock:
            self._check_open()
            self._note_purge(now)
            self._mend_times(now)
            return Purged(
                entries=self._purge_entries(now, remember_s),
                sessions=self._purge_sessions(now, ttl_s, max_sessions),
                more=False,
            )

    def clock_was_set(self, forward_s: float, *, now: float) -> None:
        with self._lock:
            self._check_open()
            for record in self._records.values():
                if record.entry.state != "ended" and (waits_s := now - record.entry.accepted_at) > 0:
                    by_s, expires_at = min(waits_s, forward_s), record.entry.expires_at
                    record.entry = replace(
                        record.entry,
                        accepted_at=record.entry.accepted_at + by_s,
                        expires_at=None if expires_at is None else expires_at + by_s,
                    )
            self._move_times(forward_s, now)
            self._purged_at = now

    # --- under the lock ----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._open:
            raise StoreError("The store is closed.")

    def _next(self) -> int:
        self._order += 1
        return self._order

    def _change(self, history: HistoryChange, appended: list[tuple[str, bytes]], now: float) -> None:
        session = self._sessions.setdefault(history.session, _Session(last_used=now))
        session.last_used = max(session.last_used, now)
        kept = [] if history.forget_before else session.messages
        kept = [*kept, *appended]
        cut = messages_to_forget([(role, len(text)) for role, text in kept], self._max_history_bytes)
        session.messages = kept[cut:]

    def _spend(self, spent: Spent, now: float) -> None:
        place = (day_of(now), spent.first_level)
        nothing = LedgerRow(day=place[0], first_level=place[1], requests=0, tokens_in=0, tokens_out=0, engine_s=0.0)
        so_far = self._ledger.get(place, nothing)
        self._ledger[place] = replace(
            so_far,
            requests=so_far.requests + 1,
            tokens_in=so_far.tokens_in + spent.tokens_in,
            tokens_out=so_far.tokens_out + spent.tokens_out,
            engine_s=so_far.engine_s + spent.engine_s,
        )

    def _note_purge(self, now: float) -> None:
        last = self._purged_at
        if last is None or abs(now - last) >= PURGE_NOTED_EVERY_S:
            if last is not None and (forward_s := away_s(last, now)):
                self._move_times(forward_s, now)
            self._purged_at = now

    def _move_times(self, forward_s: float, now: float) -> None:
        for record in self._records.values():
            if (ended_at := record.entry.ended_at) is not None and ended_at < now:
                record.entry = replace(record.entry, ended_at=min(now, ended_at + forward_s))
        for session in self._sessions.values():
            session.last_used = max(session.last_used, min(now, session.last_used + forward_s))

    def _mend_times(self, now: float) -> None:
        for record in self._records.values():
            if record.entry.ended_at is not None and mended(record.entry.ended_at, now) != record.entry.ended_at:
                record.entry = replace(record.entry, ended_at=now)
        for session in self._sessions.values():
            session.last_used = mended(session.last_used, now)

    def _purge_entries(self, now: float, remember_s: float) -> int:
        old = [
            record
            for record in self._records.values()
            if record.entry.ended_at is not None
            and record.entry.ended_at < now - remember_s
            and (record.entry.delivered or record.entry.ended_at < now - UNDELIVERED_S)
        ]
        old.sort(key=attrgetter("ended_order"))
        for record in old[:PURGE_ROWS]:
            del self._records[record.entry.key]
        return len(old[:PURGE_ROWS])

    def _purge_sessions(self, now: float, ttl_s: float, max_sessions: int) -> int:
        busy = {(r.entry.key.route, r.entry.key.session) for r in self._records.values() if r.entry.state != "ended"}
        by_age = sorted(self._sessions, key=lambda s: (self._sessions[s].last_used, s))
        old = [s for s in by_age if s not in busy and self._sessions[s].last_used < now - ttl_s][:PURGE_ROWS]
        for session in old:
            del self._sessions[session]
        return len(old) + self._evict(busy, len(self._sessions) - max_sessions, PURGE_ROWS - len(old))

    def _evict(self, busy: set[SessionKey], excess: int, room: int) -> int:
        if excess <= 0:
            return 0
        # A session's depth is its place in its first level, newest first: taking the deepest, one after the other, always
        # takes the least recently used session of whoever holds most.
        newest_first = sorted(self._sessions, key=lambda s: (self._sessions[s].last_used, s), reverse=True)
        held: dict[str, int] = {}
        depth: dict[SessionKey, int] = {}
        for session in newest_first:
            first_level = first_level_of(session[1])
            depth[session] = held[first_level] = held.get(first_level, 0) + 1
        idle = [s for s in self._sessions if s not in busy]
        idle.sort(key=lambda s: (-depth[s], self._sessions[s].last_used, s))
        victims = idle[: min(excess, room)]
        for session in victims:
            del self._sessions[session]
        return len(victims)


def _role(message: Message) -> str:
    return str(message.get("role", ""))
