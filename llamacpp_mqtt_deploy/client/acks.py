"""Control and admin messages that wait for their `ack`."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from llamacpp_mqtt_deploy.client.exceptions import BusError

WAITING_ACKS = 1000


class AwaitedAck(Protocol):
    """A place for one ack; how its owner waits is its own business."""

    transaction: str

    def give(self, event: Mapping[str, Any]) -> None: ...


A = TypeVar("A", bound=AwaitedAck)


def new_transaction() -> str:
    return secrets.token_hex(8)


class PendingAck:
    """A place for the answer to one control or admin message."""

    def __init__(self) -> None:
        self.transaction = new_transaction()
        self._arrived = threading.Event()
        self._event: Mapping[str, Any] = {}
        self._refusal: BusError | None = None

    def give(self, event: Mapping[str, Any]) -> None:
        self._event = event
        self._arrived.set()

    def refuse(self, error: BusError) -> None:
        """The broker does not deliver the message."""
        self._refusal = error
        self._arrived.set()

    def wait(self, timeout_s: float) -> Mapping[str, Any] | None:
        """The ack, None when it does not come in time; raises what `refuse` was told."""
        if not self._arrived.wait(timeout_s):
            return None
        if self._refusal is not None:
            raise self._refusal
        return self._event


class PendingAcks(Generic[A]):
    """Finds the waiting place of an ack by its transaction; `place` makes one."""

    def __init__(self, place: Callable[[], A]) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._waiting: dict[str, A] = {}

    @contextlib.contextmanager
    def awaiting(self) -> Iterator[A]:
        ack = self._place()
        with self._lock:
            if len(self._waiting) >= WAITING_ACKS:
                raise BusError(f"{WAITING_ACKS} control messages wait for their acks already.")
            self._waiting[ack.transaction] = ack
        try:
            yield ack
        finally:
            with self._lock:
                self._waiting.pop(ack.transaction, None)

    def note(self, event: Mapping[str, Any]) -> bool:
        """Take an ack; False when nobody here waits for it."""
        with self._lock:
            ack = self._waiting.get(str(event.get("transaction")))
        if ack is None:
            return False
        ack.give(event)
        return True
