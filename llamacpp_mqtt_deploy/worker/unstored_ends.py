"""Ends that the journal could not take yet: a database that another program locks, a full disk."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.spending import Spent
from llamacpp_mqtt_deploy.pool_ports import LeaseLost
from llamacpp_mqtt_deploy.ports import EntryKey, HistoryChange, Store, StoreError, ToldEnd

log = structlog.get_logger(__name__)

TELL_AFTER_S = 20.0
"""How long an end that cannot be stored is kept back. Told before it is stored, a crash would end its request a second time,
with another end; kept back longer than three heartbeats (45 s), its client would believe that nobody is there."""

_MAX_UNSTORED = 1000
_MAX_UNSTORED_BYTES = 64 * 1024 * 1024

# A disk that hangs takes its time for each: the others' ends are told in time all the same.
_ROUND_S = 2.0


_KEPT = "It is kept beside the database: also if the worker is killed, the request gets no other end."
_NOT_KEPT = "If the worker is killed before the journal takes it, the request gets a second end."


@dataclass(slots=True, eq=False)
class UnstoredEnd:
    """An end that the store could not take yet. `then` runs once: when it is stored, or was kept back for long enough;
    `taken_over` instead, when another worker has the request meanwhile."""

    terminal: bytes
    now: float
    history: HistoryChange | None
    chunks: bytes | None
    then: Callable[[], object] | None
    since: float
    spent: Spent | None = None
    taken_over: Callable[[], object] | None = None

    def size(self) -> int:
        history = 0 if self.history is None else len(encode({"": self.history.append}))
        return len(self.terminal) + len(self.chunks or b"") + history


class UnstoredEnds:
    """Tries them again in `catch_up`, which has to be called about once a second. May be used from any thread.

    `tells_unstored`: whether an end may be told that the store does not take for long. Not in a pool: there another worker may
    end the request meanwhile, for everybody to see.
    """

    def __init__(self, store: Store, *, tells_unstored: bool = True) -> None:
        self._store = store
        self._tells_unstored = tells_unstored
        self._lock = threading.Lock()
        self._ends: OrderedDict[EntryKey, UnstoredEnd] = OrderedDict()
        self._sizes: dict[EntryKey, int] = {}
        self._bytes = 0
        self._closing = False
        self._aside = False
        """Whether any are kept outside of the journal."""
        self._kept_for_good = False
        """Whether the journal will never get one of them in this life."""

    def add(
        self,
        key: EntryKey,
        terminal: bytes,
        *,
        now: float,
        history: HistoryChange | None,
        chunks: bytes | None,
        then: Callable[[], object] | None,
        since: float,
        spent: Spent | None = None,
        taken_over: Callable[[], object] | None = None,
    ) -> None:
        """Keep one more, of a request that ended at `since` (monotonic seconds); the oldest ones beyond the bounds are told, and lost to the journal."""
        end = UnstoredEnd(terminal, now, history, chunks, then, since, spent, taken_over)
        size = end.size()
        lost: list[tuple[EntryKey, UnstoredEnd]] = []
        with self._lock:
            self._bytes += size - self._sizes.get(key, 0)
            self._ends[key], self._sizes[key] = end, size
            while len(self._ends) > _MAX_UNSTORED or (self._bytes > _MAX_UNSTORED_BYTES and len(self._ends) > 1):
                lost_key, lost_end = self._ends.popitem(last=False)
                self._bytes -= self._sizes.pop(lost_key)
                lost.append((lost_key, lost_end))
                log.error(
                    "journal.end_lost", request_id=lost_key.request_id, reason="the disk takes nothing for too long"
                )
        if then is None:  # it is told already
            self._set_aside([(key, end)])
        if lost:
            self._kept_for_good = True
            self._set_aside(lost)
        for _, each in lost:
            self._tell(each)

    def find(self, key: EntryKey) -> UnstoredEnd | None:
        with self._lock:
            return self._ends.get(key)

    def waiting(self) -> set[EntryKey]:
        with self._lock:
            return set(self._ends)

    def forget(self, session: tuple[str, str]) -> None:
        """A reset: what the store could not take yet of this session's history is not stored later."""
        with self._lock:
            for end in self._ends.values():
                if end.history is not None and end.history.session == session:
                    end.history = None

    def keep_back(self) -> None:
        """The worker stops: an end that was not told by now is told by the next life, or the request is ended or run by it."""
        with self._lock:
            self._closing = True

    def catch_up(self) -> None:
        """Store what the store takes by now, and tell what has been kept back for long enough."""
        with self._lock:
            waiting = list(self._ends.items())
        began = time.monotonic()
        for key, end in waiting:
            if time.monotonic() - began > _ROUND_S:
                break
            try:
                if not self._stored(key, end):
                    continue
            except LeaseLost:
                end.then = end.taken_over
            with self._lock:
                if self._ends.get(key) is end:
                    del self._ends[key]
                    self._bytes -= self._sizes.pop(key)
            self._tell(end)
        self._tell_overdue()
        with self._lock:
            all_stored = not self._ends
        if all_stored and self._aside and not self._kept_for_good:
            self._aside = False
            self._store.clear_aside()

    def _stored(self, key: EntryKey, end: UnstoredEnd) -> bool:
        """Whether it need not be tried again. Raises LeaseLost."""
        history = end.history
        try:
            self._store.finish(key, end.terminal, now=end.now, history=history, chunks=end.chunks, spent=end.spent)
            if history is not None and end.history is None:
                self._store.reset(history.session)  # a reset came while we wrote
        except LeaseLost:
            raise
        except StoreError:
            return False
        except Exception:
            log.exception("journal.failed", step="finish", request_id=key.request_id)
        else:
            log.info("journal.caught_up", request_id=key.request_id)
        return True

    def _tell_overdue(self) -> None:
        """Its client has waited long enough: better that the request is perhaps ended twice than not at all. And only perhaps:
        what is told is kept beside the database, where that is possible."""
        with self._lock:
            if self._closing or not self._tells_unstored:
                return
            overdue = [
                (key, end)
                for key, end in self._ends.items()
                if end.then is not None and time.monotonic() - end.since >= TELL_AFTER_S
            ]
        if not overdue:
            return
        kept = self._set_aside(overdue)
        for key, end in overdue:
            log.error(
                "journal.end_told_unstored",
                request_id=key.request_id,
                message=f"the journal has not taken this end for {TELL_AFTER_S:g} s; its client gets it now. {_KEPT if kept else _NOT_KEPT} "
                "Look for a program that holds the database (fuser) and for a full disk (df).",
            )
            self._tell(end)

    def _set_aside(self, ends: Sequence[tuple[EntryKey, UnstoredEnd]]) -> bool:
        kept = self._store.set_aside(
            [
                ToldEnd(
                    key=key,
                    terminal=end.terminal,
                    now=end.now,
                    history=end.history,
                    chunks=end.chunks,
                    spent=end.spent,
                )
                for key, end in ends
            ]
        )
        self._aside = self._aside or kept
        return kept

    def _tell(self, end: UnstoredEnd) -> None:
        with self._lock:
            then, end.then = end.then, None
        if then is not None:
            try:
                then()
            except Exception:
                # One end's defect must not cost the others theirs.
                log.exception("ending.failed")
