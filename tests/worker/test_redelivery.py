"""Terminal events reach the broker, whatever the outbox and the disk do in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    redelivery.store_later(KEY, b"end", now=1.0, history=None)
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
    redelivery.store_later(KEY, b"end", now=1.0, history=history)
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
    redelivery.store_later(KEY, b"end", now=1.0, history=history)
    redelivery.sweep()
    assert store.history(session) == ()
