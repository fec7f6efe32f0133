"""The link to a real broker as the daemon sees it: publish, subscribe, acknowledge, flush, close."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

import structlog

from llamacpp_mqtt_deploy.core.topics import filter_fault, topic_fault
from llamacpp_mqtt_deploy.mqtt.linkthread import GOODBYE_S, HEADER_ROOM, OFFLINE_GRACE_S, Closing, LinkThread
from llamacpp_mqtt_deploy.mqtt.packets import MOST_MQTT_PACKET, packet_bytes
from llamacpp_mqtt_deploy.mqtt.receiving import Subscription
from llamacpp_mqtt_deploy.mqtt.session import Publish
from llamacpp_mqtt_deploy.ports import Delivery, LinkInfo, Published, Retained
from llamacpp_mqtt_deploy.stopping import Deadline

log = structlog.get_logger(__name__)


class MqttLink(LinkThread):
    """One connection to an MQTT broker; see `ports.Link` for the contract.

    `password` wins over the one in the settings (the daemon reads files and credentials). `max_payload_bytes` bounds our
    publishes, `max_incoming_bytes` is told to an MQTT 5 broker, which silently drops what is larger. Raises ValueError, from
    the constructor, when a TLS file is missing or unfit.
    """

    def open(
        self,
        *,
        will: Retained,
        on_delivery: Callable[[Delivery], bool],
        on_online: Callable[[LinkInfo], None],
        on_lost: Callable[[LinkInfo], None],
    ) -> None:
        self._will, self._on_online, self._on_lost = will, on_online, on_lost
        self._deliveries.take = on_delivery
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        # Not in close(): another thread may be about to write its byte, and the number could be another file's by then.
        weakref.finalize(self, _close_pipe, self._wake_read, self._wake_write).atexit = False
        with self._changed:
            self._start()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        on_done: Callable[[bool], None] | None = None,
    ) -> Published:
        fault = topic_fault(topic)
        if fault is None and len(payload) + HEADER_ROOM > (self._sending.max_packet_bytes or MOST_MQTT_PACKET):
            fault = self._size_fault(topic, payload, correlation)
        if fault is None and self._max_payload_bytes is not None and len(payload) > self._max_payload_bytes:
            fault = f"its {len(payload)} bytes are more than the configured {self._max_payload_bytes}"
        if fault is not None:
            # A bounded, escaped piece: the topic may be anything.
            log.warning("publish.unfit", topic=ascii(topic[:200]), bytes=len(payload), why=fault)
            return "unfit"
        expires_at = None if expiry_s is None else time.monotonic() + expiry_s
        publish = Publish(topic, payload, qos, retain, correlation, expires_at, on_done)
        with self._changed:
            if len(self._outgoing) >= self._settings.outbox_messages or self._state in ("closed", "taken_over"):
                return "full"
            if self._closing is not None or (qos == 0 and self._state != "online"):
                return "full"
            self._outgoing.waiting.append(publish)
        self._wake()
        return "queued"

    def acknowledge(self, delivery: Delivery) -> None:
        if self._receipts.give(delivery):
            self._wake()

    def subscribe(
        self, filters: Sequence[tuple[str, int]], *, timeout_s: float, retained: bool = False
    ) -> Mapping[str, str]:
        if threading.current_thread() is self._thread:
            raise RuntimeError("subscribe was called from a callback of the link; it would wait for itself")
        refused = {f: fault for f, _ in filters if (fault := filter_fault(f)) is not None}
        fit = [(f, qos) for f, qos in filters if f not in refused]
        if not fit:
            return refused
        subscription = Subscription(fit, retained)
        with self._changed:
            if self._state != "online":
                raise ConnectionError(f"not connected to the broker at {self._where}")
            self._subscriptions.ask(subscription)
        self._wake()
        if not subscription.done.wait(timeout_s):
            raise TimeoutError(f"the broker at {self._where} sent no SUBACK within {timeout_s:g} s")
        if subscription.refused is None:
            raise ConnectionError(f"the connection to {self._where} was lost while waiting for SUBACK")
        return refused | subscription.refused

    def info(self) -> LinkInfo:
        self._revive()
        with self._changed:
            return self._info()

    def flush(self, deadline: Deadline) -> bool:
        with self._changed:
            self._sending.flushers += 1
            try:
                return self._changed.wait_for(lambda: len(self._outgoing) == 0, deadline.remaining_s())
            finally:
                self._sending.flushers -= 1

    def close(self, deadline: Deadline, *, farewell: Retained | None = None) -> None:
        thread = self._thread
        with self._changed:
            if thread is None or self._state == "closed":
                self._state = "closed"
                return
            if self._closing is None:
                last = None
                if farewell is not None and self._state != "taken_over":
                    last = Publish(farewell.topic, farewell.payload, 1, True, None, None, self._farewell_done)
                    self._outgoing.waiting.append(last)
                self._closing = Closing(deadline, Deadline(OFFLINE_GRACE_S), last)
                self._changed.notify_all()
        self._wake()
        if thread is threading.current_thread():
            return
        # The thread may hang in a name look-up, which nothing can cut short; it is a daemon thread and ends by itself.
        thread.join(deadline.remaining_s() + GOODBYE_S + 1.0)
        if thread.is_alive():
            log.warning("link.close_timed_out", broker=self._where)

    def _revive(self) -> None:
        """Start the thread again should it have died; `info()` is called by status and watchdog often enough."""
        with self._changed:
            thread = self._thread
            if thread is None or thread.is_alive() or self._state == "closed":
                return
            self._died_online = self._state == "online"
            self._state, self._detail = "dead", "The link's thread died; it was started again."
            self._start()
        log.error("link.thread_died", broker=self._where)

    def _size_fault(self, topic: str, payload: bytes, correlation: bytes | None) -> str | None:
        limit = self._sending.max_packet_bytes or MOST_MQTT_PACKET
        size = packet_bytes(Publish(topic, payload, 1, False, correlation, 1.0, None), "5")
        return None if size <= limit else f"its {size} bytes are more than the {limit} that the broker takes"


def _close_pipe(*ends: int) -> None:
    for end in ends:
        os.close(end)
