"""A link under test with everything it reported, ready to be waited for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from llamacpp_mqtt_deploy.ports import Delivery, Link, LinkInfo, Retained
from llamacpp_mqtt_deploy.stopping import Deadline
from tests.support.waiting import eventually


class LinkCase:
    """Opens the link, subscribes on each connect when asked to, acknowledges at once unless told otherwise."""

    def __init__(
        self, link: Link, *, will_topic: str = "case/status", acknowledges: bool = True, only_below: str = ""
    ) -> None:
        self.link = link
        self.will = Retained(topic=will_topic, payload=b"offline")
        self.acknowledges = acknowledges
        self._only_below = only_below
        self.deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.onlines: queue.SimpleQueue[LinkInfo] = queue.SimpleQueue()
        self.losses: queue.SimpleQueue[LinkInfo] = queue.SimpleQueue()
        self.take: Callable[[Delivery], bool] = self._take

    def open(self, *, wait: bool = True) -> LinkCase:
        self.link.open(
            will=self.will,
            on_delivery=lambda delivery: self.take(delivery),  # noqa: PLW0108 - `take` is exchanged later
            on_online=self.onlines.put,
            on_lost=self.losses.put,
        )
        if wait:
            self.online()
        return self

    def online(self, timeout_s: float = 15.0) -> LinkInfo:
        """Wait for the next connection."""
        return self.onlines.get(timeout=timeout_s)

    def lost(self, timeout_s: float = 15.0) -> LinkInfo:
        return self.losses.get(timeout=timeout_s)

    def receive(self, timeout_s: float = 10.0) -> Delivery:
        return self.deliveries.get(timeout=timeout_s)

    def publish(self, topic: str, payload: bytes, **wishes: Any) -> bool:
        """Publish and wait for the broker; whether it took it."""
        done = threading.Event()
        results: list[bool] = []

        def on_done(well: bool) -> None:
            results.append(well)
            done.set()

        assert self.link.publish(topic, payload, on_done=on_done, **wishes) == "queued"
        assert done.wait(15), "no PUBACK"
        return results[0]

    def stays_online(self) -> bool:
        return self.link.info().state == "online"

    def until(self, state: str, timeout_s: float = 15.0) -> LinkInfo:
        eventually(lambda: self.link.info().state == state, timeout_s)
        return self.link.info()

    def close(self, *, last_message: bool = True, seconds: float = 5.0) -> None:
        last = Retained(topic=self.will.topic, payload=b"bye") if last_message else None
        self.link.close(Deadline(seconds), last_message=last)

    def _take(self, delivery: Delivery) -> bool:
        if delivery.topic.startswith(self._only_below):
            self.deliveries.put(delivery)
        if self.acknowledges:
            self.link.acknowledge(delivery)
        return True
