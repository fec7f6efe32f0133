"""Terminal events reach the broker, whatever the outbox and the disk do in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.chunk_record import packed
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, HistoryChange, Published, StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery

KEY = EntryKey("default", "demo", "r1")


class Outbox:
    """Answers `says` to each publish; keeps the callbacks of those it took until `acknowledge_all`."""

    def __init__(self) -> None:
        self.says: Published = "queued"
        self.sent: list[bytes] = []
        self._done: list[Callable[[bool], None]] = []

    def publish(
        self, topic: str, payload: bytes, *, on_done: Callable[[bool], None] | None = None, **_: Any
    ) -> Published:
        if self.says != "queued":
            return self.says
        self.sent.append(payload)
        if on_done is not None:
            self._done.append(on_done)
        return "queued"

    def acknowledge(self, delivery: Delivery) -> None:
        raise NotImplementedError

    def acknowledge_all(self) -> None:
        for done in self._done:
            done(True)

    def give_up_all(self) -> None:
        for done in self._done:
            done(False)


class FullDisk(SqliteStore):
    full = True

    def finish(self, *args: Any, **kwargs: Any) -> None:
        if self.full:
            raise StoreError("no space left")
        super().finish(*args, **kwargs)


def _store(store: SqliteStore) -> SqliteStore:
    store.open()
    store.accept([Entry(key=KEY, topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/demo")])
    return store


def test_a_terminal_event_is_ticked_off_when_the_broker_took_it() -> None:
    outbox, store = Outbox(), _store(SqliteStore(None))
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: 1024)
    store.finish(KEY, b"end", now=1.0)
    redelivery.send(KEY, "llm/reply/demo", b"end", None)
    redelivery.sweep()
    assert [entry.key for entry in store.undelivered()] == [KEY]
    outbox.acknowledge_all()
    redelivery.sweep()
    assert store.undelivered() == []


def test_a_terminal_event_waits_for_a_place_in_a_full_outbox() -> None:
    outbox, store = Outbox(), _store(SqliteStore(None))
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: 1024)
    outbox.says = "full"
    redelivery.send(KEY, "llm/reply/demo", b"end", None)
    redelivery.sweep()
    assert outbox.sent == []
    outbox.says = "queued"
    redelivery.sweep()
    redelivery.sweep()
    assert outbox.sent == [b"end"]


def test_a_full_outbox_is_no_reason_to_drop_an_end() -> None:
    outbox, store = Outbox(), _store(SqliteStore(None))
    store.finish(KEY, b"end", now=1.0)
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: 1024)
    outbox.says = "full"
    redelivery.send(KEY, "llm/reply/demo", b"end", None)
    for _ in range(10):
        redelivery.sweep()
    assert [entry.key for entry in store.undelivered()] == [KEY]
    outbox.says = "queued"
    redelivery.sweep()
    assert outbox.sent == [b"end"]


def test_a_terminal_event_that_can_never_be_taken_does_not_block_the_others() -> None:
    outbox, store = Outbox(), _store(SqliteStore(None))
    store.finish(KEY, b"end", now=1.0)
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: 1024)
    outbox.says = "unfit"
    redelivery.send(KEY, "llm/reply/demo", b"end", None)
    redelivery.sweep()
    assert store.undelivered() == []


def test_what_the_link_gives_up_as_it_closes_is_left_to_the_next_life() -> None:
    for closing in (False, True):
        outbox, store = Outbox(), _store(SqliteStore(None))
        store.finish(KEY, b"end", now=1.0)
        redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: 1024)
        redelivery.send(KEY, "llm/reply/demo", b"end", None)
        if closing:
            redelivery.last_call()
        outbox.give_up_all()
        redelivery.sweep()
        assert bool(store.undelivered()) is closing


def test_an_end_that_the_disk_refused_is_stored_as_soon_as_it_takes_it() -> None:
    store = FullDisk(None)
    _store(store)
    outbox = Outbox()
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: 1024)
    redelivery.store_later(KEY, b"end", now=1.0, history=None, since=0.0)
    redelivery.send(KEY, "llm/reply/demo", b"end", None)
    outbox.acknowledge_all()
    redelivery.sweep()
    assert [entry.state for entry in store.unfinished()] == ["accepted"]
    assert redelivery.unstored(KEY) == b"end", "the answer to the same request sent again"
    store.full = False
    redelivery.sweep()
    assert redelivery.unstored(KEY) is None
    assert store.unfinished() == []
    assert store.undelivered() == []


def test_a_history_that_the_disk_refused_does_not_come_back_after_a_reset() -> None:
    store = FullDisk(None)
    _store(store)
    session = ("default", "demo")
    redelivery = Redelivery(outbox=Outbox(), store=store, max_event_bytes=lambda: 1024)
    history = HistoryChange(session=session, append=({"role": "user", "content": "secret"},))
    redelivery.store_later(KEY, b"end", now=1.0, history=history, since=0.0)
    redelivery.forget(("default", "another"))
    redelivery.forget(session)
    store.full = False
    redelivery.sweep()
    assert store.unfinished() == []
    assert store.history(session) == ()


def test_a_reset_while_the_history_is_being_stored_wins() -> None:
    session = ("default", "demo")

    class Slow(SqliteStore):
        def finish(self, *args: Any, **kwargs: Any) -> None:
            super().finish(*args, **kwargs)
            redelivery.forget(session)

    store = Slow(None)
    _store(store)
    redelivery = Redelivery(outbox=Outbox(), store=store, max_event_bytes=lambda: 1024)
    history = HistoryChange(session=session, append=({"role": "user", "content": "secret"},))
    redelivery.store_later(KEY, b"end", now=1.0, history=history, since=0.0)
    redelivery.sweep()
    assert store.history(session) == ()


# --- many of them ------------------------------------------------------------------------------------------------------


class _Places(Outbox):
    """Has so many places for answers and for events; notes whose part was taken, and where to."""

    def __init__(self, *, answers: int = 0, events: int = 0) -> None:
        super().__init__()
        self.left = {"answer": answers, "event": events}
        self.taken: list[tuple[str, str, bytes | None]] = []

    def publish(
        self, topic: str, payload: bytes, *, share: str = "event", correlation: bytes | None = None, **more: Any
    ) -> Published:
        if self.left[share] == 0:
            return "full"
        self.left[share] -= 1
        self.taken.append((share, topic, correlation))
        return super().publish(topic, payload, **more)


def _key(number: int) -> EntryKey:
    return EntryKey("default", "demo", f"r{number}")


def _redelivery(outbox: Outbox, store: SqliteStore | None = None) -> Redelivery:
    return Redelivery(outbox=outbox, store=store or _store(SqliteStore(None)), max_event_bytes=lambda: 1024)


def test_an_end_goes_to_its_topic_with_its_correlation_data_also_after_a_wait() -> None:
    outbox = _Places()
    redelivery = _redelivery(outbox)
    redelivery.send(KEY, "llm/reply/demo", b"end", b"c", share="answer")
    outbox.left = {"answer": 1, "event": 0}
    redelivery.sweep()
    assert outbox.taken == [("answer", "llm/reply/demo", b"c")]


def test_answers_that_find_no_room_do_not_hold_up_ends_and_ends_without_room_hold_up_the_rest() -> None:
    outbox = _Places()
    redelivery = _redelivery(outbox)
    for number, share in enumerate(("answer", "event", "answer", "event", "event")):
        redelivery.send(_key(number), "llm/reply/demo", b"%d" % number, None, share=share)  # type: ignore[arg-type]
    assert outbox.sent == []
    outbox.left = {"answer": 0, "event": 1}
    redelivery.sweep()
    assert outbox.sent == [b"1"]
    outbox.left = {"answer": 1, "event": 9}
    redelivery.sweep()
    assert outbox.sent == [b"1", b"0", b"3", b"4"]
    outbox.left = {"answer": 9, "event": 9}
    redelivery.sweep()
    redelivery.sweep()
    assert outbox.sent == [b"1", b"0", b"3", b"4", b"2"]


def test_the_oldest_waiting_end_is_left_to_the_next_start_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.redelivery._MAX_WAITING", 2)
    outbox = _Places()
    redelivery = _redelivery(outbox)
    for number in range(3):
        redelivery.send(_key(number), "llm/reply/demo", b"%d" % number, None)
    outbox.left["event"] = 9
    redelivery.sweep()
    assert outbox.sent == [b"1", b"2"]


def test_bytes_of_waiting_ends_are_kept_up_to_the_bound_and_read_from_the_store_beyond_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.redelivery._MAX_WAITING_BYTES", 12)
    outbox, store = _Places(), _store(SqliteStore(None))
    redelivery = _redelivery(outbox, store)
    for number, terminal in enumerate((b"abc", b"def", b"g")):
        redelivery.send(_key(number), "llm/reply/demo", terminal, None)  # each counts twice: as it is, and as an event
    store.accept([Entry(key=_key(2), topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/demo")])
    store.finish(_key(2), b"from the store", now=1.0)
    outbox.left["event"] = 9
    redelivery.sweep()
    assert outbox.sent == [b"abc", b"def", b"from the store"]


def test_of_many_answers_that_wait_in_the_store_none_comes_into_memory_before_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.redelivery._MAX_WAITING_BYTES", 0)
    outbox, store = _Places(), _store(SqliteStore(None))
    redelivery = _redelivery(outbox, store)
    for number in range(20):
        store.accept([Entry(key=_key(number), topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/demo")])
        store.finish(_key(number), b"%d" % number, now=1.0)
        redelivery.send(_key(number), "llm/reply/demo", b"%d" % number, None, share="answer")
    read: list[EntryKey] = []
    find = store.find

    def noted_find(key: EntryKey) -> Entry | None:
        read.append(key)
        return find(key)

    monkeypatch.setattr(store, "find", noted_find)
    outbox.left["event"] = 9
    redelivery.sweep()
    redelivery.sweep()
    assert read == [_key(0)], "the one whose turn it is"
    redelivery.send(_key(20), "llm/reply/demo", b"event", None)
    outbox.left["answer"] = 20
    redelivery.sweep()
    assert sorted(outbox.sent) == sorted([b"event", *(b"%d" % number for number in range(20))])


def test_bytes_are_counted_until_they_wait_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.redelivery._MAX_WAITING_BYTES", 14)  # each counts twice
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.redelivery._MAX_WAITING", 2)
    outbox = _Places()
    redelivery = _redelivery(outbox)
    for life in range(3):  # each time the first is left to the next start, and there is room for the others as it was
        for number in (b"abc", b"def", b"g"):
            redelivery.send(_key(number[0]), "llm/reply/demo", number, None)
        redelivery.send(_key(ord("d")), "llm/reply/demo", b"h", None, share="answer", again=True)
        outbox.left["event"] = 2
        redelivery.sweep()
        assert len(outbox.sent) == 2 * (life + 1)
        assert outbox.sent[-2:] == [b"h", b"g"]


def test_an_end_that_the_store_has_forgotten_is_dropped_and_one_that_it_has_not_taken_yet_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.redelivery._MAX_WAITING_BYTES", 0)
    outbox = _Places()
    redelivery = _redelivery(outbox, _store(FullDisk(None)))
    for number in range(3):
        redelivery.send(_key(number), "llm/reply/demo", b"%d" % number, None)
    redelivery.store_later(_key(1), b"not stored", now=1.0, history=None, since=0.0)
    outbox.left["event"] = 9
    redelivery.sweep()
    assert outbox.sent == [b"not stored"]
    redelivery.sweep()
    assert outbox.sent == [b"not stored"]


def test_whoever_asks_again_for_an_end_that_waits_gets_its_chunks_too_and_waits_no_longer() -> None:
    """Nobody has heard of this end yet, so that it keeps its place among what is told for the first time."""
    outbox, store = _Places(), _store(SqliteStore(None))
    store.finish(KEY, b"end", now=1.0, chunks=packed([("content", "text")]))
    redelivery = _redelivery(outbox, store)
    redelivery.send(KEY, "llm/reply/demo", b"end", None)
    for _ in range(2):
        redelivery.send(KEY, "llm/reply/demo", b"end", None, share="answer", again=True)
    outbox.left = {"answer": 1, "event": 1}
    redelivery.sweep()
    assert [share for share, *_ in outbox.taken] == ["answer", "event"]
    assert b'"text"' in outbox.sent[0]
    assert outbox.sent[1:] == [b"end"]


def test_a_journal_that_cannot_be_read_keeps_what_waits_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.redelivery._MAX_WAITING_BYTES", 0)
    outbox, store = _Places(), _store(SqliteStore(None))
    store.finish(KEY, b"end", now=1.0)
    redelivery = _redelivery(outbox, store)
    redelivery.send(KEY, "llm/reply/demo", b"end", None)
    outbox.left["event"] = 9

    def broken(*_: object) -> Any:
        raise StoreError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "find", broken)
        patch.setattr(store, "mark_delivered", broken)
        redelivery.sweep()
    assert outbox.sent == []
    redelivery.sweep()
    assert outbox.sent == [b"end"]


def test_a_defect_of_the_link_is_tried_once_more_and_then_left_to_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outbox, store = _Places(events=9), _store(SqliteStore(None))
    store.finish(KEY, b"end", now=1.0)
    redelivery = _redelivery(outbox, store)
    tried: list[bytes] = []

    def broken(_: str, payload: bytes, **more: Any) -> Published:
        tried.append(payload)
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "publish", broken)
        redelivery.send(KEY, "llm/reply/demo", b"end", None)
        redelivery.send(_key(2), "llm/reply/demo", b"other", None)
        redelivery.sweep()
        redelivery.sweep()
    assert tried == [b"end", b"other"] * 2
    redelivery.sweep()
    assert outbox.sent == []
    assert [entry.key for entry in store.undelivered()] == [KEY], "nobody has it"


def test_an_end_that_fits_and_is_refused_is_given_up_while_one_that_can_shrink_is_not() -> None:
    outbox, store = _Limited(), _store(SqliteStore(None))
    end = encode({"type": "done", "request_id": "r1", "session_id": "demo", "seq": 3, "full_content": "x" * 900})
    store.finish(KEY, end, now=1.0)
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: outbox.limit)
    outbox.takes = 500  # the limit that the link knows is not yet the one of the broker
    redelivery.send(KEY, "llm/reply/demo", end, None)
    assert outbox.sent == []
    redelivery.sweep()
    assert store.undelivered() == [], "it fits into what is the limit, so that size is not what is wrong"


class _Limited(Outbox):
    """An outbox over a connection of which the limit is told, and may be smaller in truth."""

    limit = 1024
    takes = 1024

    def publish(self, topic: str, payload: bytes, **more: Any) -> Published:
        return "unfit" if len(payload) > self.takes else super().publish(topic, payload, **more)


def test_an_end_is_made_smaller_while_it_is_on_its_way_where_the_limit_shrinks() -> None:
    outbox, store = _Limited(), _store(SqliteStore(None))
    text = "word " * 600
    end = encode({"type": "done", "request_id": "r1", "session_id": "demo", "seq": 0, "full_content": text})
    store.finish(KEY, end, now=1.0)
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: outbox.limit)
    publish, count = outbox.publish, [0]

    def shrinking(topic: str, payload: bytes, **more: Any) -> Published:
        count[0] += 1
        if count[0] == 3:
            outbox.limit = outbox.takes = 600
        return publish(topic, payload, **more)

    outbox.publish = shrinking  # type: ignore[method-assign]
    redelivery.send(KEY, "llm/reply/demo", end, None)
    told = [json.loads(payload) for payload in outbox.sent]
    assert "".join(event.get("content", "") for event in told) == text
    assert [event["seq"] for event in told] == list(range(len(told)))
    assert told[-1]["content_omitted"] is True
    assert all(len(payload) <= 600 for payload in outbox.sent[2:])
    outbox.acknowledge_all()
    redelivery.sweep()
    assert store.undelivered() == []


@pytest.mark.parametrize("how", ["refused", "given up"])
def test_an_end_as_large_as_the_limit_is_not_tried_for_ever_where_it_is_not_taken(how: str) -> None:
    outbox, store = _Limited(), _store(SqliteStore(None))
    end = encode({"type": "done", "request_id": "r1", "session_id": "demo", "seq": 3, "full_content": "x" * 900})
    store.finish(KEY, end, now=1.0)
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: len(end))
    outbox.takes = 1 if how == "refused" else len(end)
    redelivery.send(KEY, "llm/reply/demo", end, None)
    outbox.give_up_all()
    redelivery.sweep()
    assert len(outbox.sent) == (how == "given up")
    assert store.undelivered() == []


def test_an_end_that_cannot_be_made_small_enough_is_given_up() -> None:
    outbox, store = _Limited(), _store(SqliteStore(None))
    outbox.limit = outbox.takes = 10
    end = encode({"type": "done", "request_id": "r1", "session_id": "demo", "seq": 0, "full_content": "x" * 900})
    store.finish(KEY, end, now=1.0)
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: outbox.limit)
    redelivery.send(KEY, "llm/reply/demo", end, None)
    redelivery.sweep()
    assert outbox.sent == []
    assert store.undelivered() == []


def test_32_mib_of_ends_wait_in_memory() -> None:
    mib = 1024 * 1024
    outbox = _Places()
    redelivery = Redelivery(outbox=outbox, store=_store(SqliteStore(None)), max_event_bytes=lambda: 64 * mib)
    sizes = (8 * mib, 8 * mib, 1)
    for number, size in enumerate(sizes):
        redelivery.send(_key(number), "llm/reply/demo", b"x" * size, None)  # counts twice: as it is, and as an event
    outbox.left["event"] = 9
    redelivery.sweep()
    assert [len(payload) for payload in outbox.sent] == [8 * mib, 8 * mib], "the store knows nothing of the third"
