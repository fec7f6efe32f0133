"""What comes in: subscriptions that wait for their SUBACK, deliveries, and the receipts that go back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from llamacpp_mqtt_deploy.mqtt import explain
from llamacpp_mqtt_deploy.ports import Delivery

log = structlog.get_logger(__name__)

STALL_S = 1.0
"""How long a full inbox gets to drain before the broker is asked, by a new connection, to deliver again."""

CALLBACK_FAULTS = 3
"""A delivery that makes the callback raise is tried this often, then acknowledged and dropped."""


@dataclass(slots=True)
class Subscription:
    """One SUBSCRIBE, or one UNSUBSCRIBE; `refused` stays None when the connection ended before its answer."""

    filters: Sequence[tuple[str, int]]
    retained: bool
    ends: bool = False
    """These subscriptions end."""
    done: threading.Event = field(default_factory=threading.Event)
    refused: dict[str, str] | None = None


class Subscriptions:
    """`ask` is for any thread; the rest belongs to the link's."""

    def __init__(self) -> None:
        self.asked: deque[Subscription] = deque()
        """What is still to be sent."""
        self._sent: dict[int, Subscription] = {}

    def ask(self, subscription: Subscription) -> None:
        self.asked.append(subscription)

    def send(self, write: Callable[[Subscription], int | None]) -> None:
        """Send those that were asked for; `write` gives the packet id."""
        while self.asked:
            subscription = self.asked.popleft()
            mid = write(subscription)
            if mid is None:
                subscription.done.set()
            else:
                self._sent[mid] = subscription

    def answered(self, mid: int, codes: Sequence[tuple[int, str]]) -> None:
        """The SUBACK came, or the UNSUBACK, of which the codes are left out."""
        subscription = self._sent.pop(mid, None)
        if subscription is None:
            return
        refused: dict[str, str] = {}
        for (topic_filter, qos), (code, name) in zip(subscription.filters, codes, strict=False):
            if code >= 0x80:
                refused[topic_filter] = explain.of_suback(code, name)
            elif code < min(qos, 1):
                refused[topic_filter] = f"the broker grants only QoS {code}"
        for topic_filter, why in refused.items():
            log.error("subscription.refused", filter=topic_filter, why=why)
        subscription.refused = refused
        subscription.done.set()

    def fail(self) -> None:
        """The connection is gone: whoever waits learns it now."""
        left = [*self._sent.values()]
        self._sent.clear()
        while self.asked:
            left.append(self.asked.popleft())
        for subscription in left:
            subscription.done.set()


class Receipts:
    """Acknowledgements on their way back, each tagged with its connection."""

    def __init__(self) -> None:
        self.given: deque[tuple[int, int]] = deque()
        """What is still to be sent: numbers of connections with packet ids."""

    def give(self, delivery: Delivery) -> bool:
        """Queue the acknowledgement of a delivery, from any thread; False when there is nothing to acknowledge."""
        match delivery.receipt:
            case (int() as generation, int() as mid):
                self.given.append((generation, mid))
                return True
        return False

    def send(self, generation: int, write: Callable[[int], None]) -> None:
        """Send those of this connection, in order, and forget those of earlier ones.

        After a restart of the broker packet ids begin at 1 again: an old receipt would acknowledge a new message.
        """
        while self.given:
            of_generation, mid = self.given.popleft()
            if of_generation == generation:
                write(mid)


def _take_none(_: Delivery) -> bool:
    return False


class Deliveries:
    """Hands messages over to the daemon, and stops when it does not take them; the link's thread alone."""

    def __init__(self, receipts: Receipts) -> None:
        self._receipts = receipts
        self._faults = 0
        self.take: Callable[[Delivery], bool] = _take_none
        self.stalled_until: float | None = None
        """When to connect again because the inbox was full; None while all is well."""
        self.taken = False
        """Whether the daemon has taken any on this connection."""

    def connected(self) -> None:
        """A new connection: all is well, and nothing was taken."""
        self.stalled_until, self.taken = None, False

    def arrived(self, delivery: Delivery) -> None:
        """A message came; its receipt is what `Receipts.give` takes."""
        if delivery.qos == 0:
            self._hand_over(delivery)
            return
        if self.stalled_until is not None:
            # Once one was refused the following ones wait too: PUBACKs and requests keep their order (MQTT-4.6.0-2).
            return
        if not self._hand_over(delivery):
            self.stalled_until = time.monotonic() + STALL_S

    def _hand_over(self, delivery: Delivery) -> bool:
        try:
            taken = self.take(delivery)
        except Exception:
            self._faults += 1
            log.exception("link.callback_failed", callback="on_delivery", topic=ascii(delivery.topic[:200]))
            if self._faults < CALLBACK_FAULTS:
                return False
            self._faults = 0
            self._receipts.give(delivery)
            return True
        self._faults = 0
        self.taken = self.taken or taken
        return taken
