"""Notes in the journal: a disk that fails costs the note and a line of the log, never the request."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs
from typing_extensions import override

from llamacpp_mqtt_deploy.ports import Entry, EntryKey, Pending, StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.worker.journal_marks import JournalMarks
from tests.worker.test_acknowledging import HeldWrite

KEY = EntryKey("default", "demo", "r1")


class Timed(HeldWrite):
    """Notes how long it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits_s: list[float] = []

    @override
    def wait(self, timeout_s: float) -> None:
        self.waits_s.append(timeout_s)
        super().wait(timeout_s)


class Broken(SqliteStore):
    """Refuses every note; `write` is what a note that only begins becomes."""

    write: Timed | None = None

    @override
    def mark_started(self, key: EntryKey) -> int:
        raise StoreError("no space left")

    @override
    def mark_streaming(self, key: EntryKey) -> None:
        raise StoreError("no space left")

    @override
    def mark_streaming_soon(self, key: EntryKey) -> Pending:
        if self.write is None:
            raise StoreError("no space left")
        return self.write


def _entry(store: SqliteStore) -> Entry:
    entry = store.find(KEY)
    assert entry is not None
    return entry


def test_starts_and_the_beginning_of_a_stream_are_noted() -> None:
    store = SqliteStore(None)
    store.open()
    store.accept([Entry(key=KEY, topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/demo")])
    marks = JournalMarks(store)
    marks.started(KEY)
    assert (_entry(store).starts, _entry(store).state) == (1, "accepted")
    assert marks.streaming(KEY)
    assert _entry(store).state == "streaming"


@pytest.mark.parametrize(
    "note, step", [("started", "mark_started"), ("streaming", "mark_streaming"), ("streaming_soon", "mark_streaming")]
)
def test_a_note_that_the_disk_refused_is_told_to_the_operator(note: str, step: str) -> None:
    with capture_logs() as lines:
        assert not getattr(JournalMarks(Broken(None)), note)(KEY)
    (line,) = lines
    told: dict[str, Any] = {name: line[name] for name in ("event", "step", "problem", "request_id")}
    assert told == {"event": "journal.failed", "step": step, "problem": "no space left", "request_id": "r1"}


@pytest.mark.parametrize("problem", [None, StoreError("no space left")])
def test_whether_a_note_that_was_begun_is_written_is_known_when_it_is_over(problem: StoreError | None) -> None:
    store = Broken(None)
    store.write = Timed()
    marks = JournalMarks(store)
    with capture_logs() as lines:
        begun = marks.streaming_soon(KEY)
        assert begun is store.write
        assert lines == []
        store.write.end(problem)
        assert marks.written(begun) is (problem is None)
    assert store.write.waits_s == [10.0], "no end waits for a hanging disk for ever"
    assert [line["event"] for line in lines] == ([] if problem is None else ["journal.failed"])
