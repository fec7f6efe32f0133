"""Notes in the journal how far a request has come; a disk that fails costs the note, never the request."""

from __future__ import annotations

import structlog

from llamacpp_mqtt_deploy.ports import EntryKey, Pending, Store, StoreError

log = structlog.get_logger(__name__)

_MARK_TIMEOUT_S = 10.0


class JournalMarks:
    """`streaming` before the first chunk: from then on the request is never started again, also after a crash."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def started(self, key: EntryKey) -> None:
        """Count one more start; waits for the disk."""
        try:
            self._store.mark_started(key)
        except StoreError as problem:
            _failed("mark_started", key, problem)

    def streaming(self, key: EntryKey) -> bool:
        """Waits for the disk; False when it failed."""
        try:
            self._store.mark_streaming(key)
        except StoreError as problem:
            _failed("mark_streaming", key, problem)
            return False
        return True

    def written(self, mark: Pending) -> bool:
        """Waits for the disk, if it has not answered yet; False when it failed, which is logged already."""
        try:
            mark.wait(_MARK_TIMEOUT_S)
        except StoreError:
            return False
        return True

    def streaming_soon(self, key: EntryKey) -> Pending | None:
        """Only begins to write; None when that failed already."""
        try:
            pending = self._store.mark_streaming_soon(key)
        except StoreError as problem:
            _failed("mark_streaming", key, problem)
            return None
        pending.on_done(lambda problem: _failed("mark_streaming", key, problem) if problem is not None else None)
        return pending


def _failed(step: str, key: EntryKey, problem: StoreError) -> None:
    log.error("journal.failed", step=step, problem=str(problem), request_id=key.request_id)
