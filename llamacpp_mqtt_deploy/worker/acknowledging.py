"""Acknowledges messages in the order of their receipt, each when what it brought is in the journal."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from llamacpp_mqtt_deploy.ports import Delivery, Outbox


@dataclass(slots=True, eq=False)
class Receipt:
    """Some messages that are acknowledged together."""

    deliveries: Sequence[Delivery]
    ready: bool = False


class Acknowledger:
    """`take` in order of receipt, `ready` in any order and from any thread; MQTT-4.6.0-2 wants the PUBACKs in order of receipt."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._lock = threading.Lock()
        self._receipts: deque[Receipt] = deque()

    def take(self, deliveries: Sequence[Delivery]) -> Receipt:
        """A place in the order for these messages."""
        receipt = Receipt(deliveries)
        with self._lock:
            self._receipts.append(receipt)
        return receipt

    def ready(self, receipt: Receipt) -> None:
        """What these messages brought is safe: acknowledge them as soon as all before them are."""
        with self._lock:
            receipt.ready = True
            while self._receipts and self._receipts[0].ready:
                # Under the lock, or two threads could swap what they took out. It only queues.
                for delivery in self._receipts.popleft().deliveries:
                    self._outbox.acknowledge(delivery)
