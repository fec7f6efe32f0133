"""Terminal events reach the broker, whatever the outbox and the disk do in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llamacpp_mqtt_deploy.deliveries import Deliveries
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, StoreError
from llamacpp_mqtt_deploy.stores.memory import MemoryStore

KEY = EntryKey("default", "demo", "r1")


class Outbox:
    """Takes publishes while `open`; keeps the callbacks until `acknowledge_all`."""

    def __init__(self) -> None:
        self.open = True
        self.sent: list[bytes] = []
        self._done: list[Callable[[bool], None]] = []

    def publish(self, topic: str, payload: bytes, *, on_done: Callable[[bool], None] | None = None, **_: Any) -> bool:
        if not self.open:
            return False
        self.sent.append(payload)
        if on_done is not None:
            self._done.append(on_done)
        return True

    def acknowledge(self, delivery: Delivery) -> None:
        raise NotImplementedError

    def acknowledge_all(self) -> None:
        for done in self._done:
            done(True)

    def give_up_all(self) -> None:
        for done in self._done:
            done(False)


class FullDisk(MemoryStore):
    full = True

    def finish(self, *args: Any, **kwargs: Any) -> None:
        if self.full:
            raise StoreError("no space left")
        super().finish(*args, **kwargs)


def _store(store: MemoryStore) -> MemoryStore:
    store.open()
    store.accept([Entry(key=KEY, topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/demo")])
    return store


def test_a_terminal_event_is_ticked_off_when_the_broker_took_it() -> None:
    outbox, store = Outbox(), _store(MemoryStore())
    deliveries = Deliveries(outbox=outbox, store=store, has_room=lambda: True)
    store.finish(KEY, b"end", now=1.0)
    deliveries.send(KEY, "llm/reply/demo", b"end", None)
    deliveries.sweep()
    assert [entry.key for entry in store.undelivered()] == [KEY]
    outbox.acknowledge_all()
    deliveries.sweep()
    assert store.undelivered() == []


def test_a_terminal_event_waits_for_a_place_in_a_full_outbox() -> None:
    outbox, store = Outbox(), _store(MemoryStore())
    deliveries = Deliveries(outbox=outbox, store=store, has_room=lambda: outbox.open)
    outbox.open = False
    deliveries.send(KEY, "llm/reply/demo", b"end", None)
    deliveries.sweep()
    assert outbox.sent == []
    outbox.open = True
    deliveries.sweep()
    deliveries.sweep()
    assert outbox.sent == [b"end"]


def test_an_outbox_that_was_full_for_a_moment_only_is_no_reason_to_drop_an_end() -> None:
    outbox, store = Outbox(), _store(MemoryStore())
    store.finish(KEY, b"end", now=1.0)
    looks = iter([False, True])
    deliveries = Deliveries(outbox=outbox, store=store, has_room=lambda: next(looks, True))
    outbox.open = False
    deliveries.send(KEY, "llm/reply/demo", b"end", None)
    deliveries.sweep()
    outbox.open = True
    deliveries.sweep()
    assert outbox.sent == [b"end"]


def test_a_terminal_event_that_can_never_be_taken_does_not_block_the_others() -> None:
    outbox, store = Outbox(), _store(MemoryStore())
    store.finish(KEY, b"end", now=1.0)
    deliveries = Deliveries(outbox=outbox, store=store, has_room=lambda: True)
    outbox.open = False
    deliveries.send(KEY, "llm/reply/demo", b"end", None)
    deliveries.sweep()
    deliveries.sweep()
    assert store.undelivered() == []


def test_what_the_link_gives_up_as_it_closes_is_left_to_the_next_life() -> None:
    for closing in (False, True):
        outbox, store = Outbox(), _store(MemoryStore())
        store.finish(KEY, b"end", now=1.0)
        deliveries = Deliveries(outbox=outbox, store=store, has_room=lambda: True)
        deliveries.send(KEY, "llm/reply/demo", b"end", None)
        if closing:
            deliveries.last_call()
        outbox.give_up_all()
        deliveries.sweep()
        assert bool(store.undelivered()) is closing


def test_an_end_that_the_disk_refused_is_stored_as_soon_as_it_takes_it() -> None:
    store = FullDisk()
    _store(store)
    outbox = Outbox()
    deliveries = Deliveries(outbox=outbox, store=store, has_room=lambda: True)
    deliveries.store_later(KEY, b"end", now=1.0, history=None)
    deliveries.send(KEY, "llm/reply/demo", b"end", None)
    outbox.acknowledge_all()
    deliveries.sweep()
    assert [entry.state for entry in store.unfinished()] == ["accepted"]
    assert deliveries.unstored(KEY) == b"end", "the answer to the same request sent again"
    store.full = False
    deliveries.sweep()
    assert deliveries.unstored(KEY) is None
    assert store.unfinished() == []
    assert store.undelivered() == []
