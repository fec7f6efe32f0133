"""A client's connection to the broker: clean start, fast and clear refusals, MQTT 5 with a fall back, reconnects by itself."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from llamacpp_mqtt_deploy.client.address import BrokerAddress, explain_failure, not_permitted
from llamacpp_mqtt_deploy.client.exceptions import BrokerUnreachable, BusError, NotPermitted
from llamacpp_mqtt_deploy.client.paho_client import (
    IN_FLIGHT,
    LONGEST_PAUSE_S,
    OUTGOING_MESSAGES,
    REFUSED,
    Acknowledgements,
    Spoken,
    TryOlder,
    check_connack,
    check_size,
    client_options,
    configure,
    connect_arguments,
    guarded,
    publish_properties,
    versions,
)
from llamacpp_mqtt_deploy.client.threaded_client import ThreadedClient
from llamacpp_mqtt_deploy.mqtt.gathering_client import tune_socket

log = logging.getLogger(__name__)  # the host program's log: this part is a library


class Connection:
    """One paho client. The callbacks run in its network thread and must return at once.

    `on_message(topic, payload, retain)`; `on_ready()` after every (re)connect when all filters are granted again;
    `on_lost()`; `on_refused(filter, reason)` when a filter that was granted is refused after a reconnect.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        on_message: Callable[[str, bytes, bool], None],
        on_ready: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
        on_refused: Callable[[str, str], None] = lambda _filter, _reason: None,
    ) -> None:
        self.address = address
        self.protocol: Spoken | None = None
        self.max_packet_bytes: int | None = None
        self._on_message = on_message
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._client_id = address.client_id or f"lmd-client-{secrets.token_hex(6)}"
        self._paho: paho.Client | None = None
        self._connack: ReasonCode | None = None
        self._lock = threading.Lock()
        self._filters: dict[str, threading.Event] = {}
        self._refusals: dict[str, str] = {}
        self._acknowledgements = Acknowledgements()
        self._ready = threading.Event()
        self._gone = threading.Event()
        self._first_word = threading.Event()
        """The broker's CONNACK, or the end of the connection."""
        self._opened = False
        self._closing = False

    # --- open and close ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect within `connect_timeout_s`; raises `BrokerUnreachable` or `BrokerRefused`."""
        first_refusal: BusError | None = None
        self._opened = self._closing = False  # after an attempt that was given up
        for version in versions(self.address):
            try:
                self._paho = self._handshake(version)
            except TryOlder as error:
                first_refusal = first_refusal or error.reason
                continue
            self.protocol = version
            self._opened = True
            self._ready.set()
            return
        assert first_refusal is not None
        raise first_refusal

    def close(self, *, timeout_s: float = 2.0) -> None:
        """Disconnect; returns within about `timeout_s` and idempotent."""
        client, self._closing = self._paho, True
        self._ready.clear()
        self._paho = None
        if client is not None:
            self._stop(client, timeout_s=timeout_s)

    def _stop(self, client: paho.Client, *, timeout_s: float) -> None:
        ends_at = time.monotonic() + timeout_s
        client.disconnect()
        self._gone.wait(timeout_s / 2)
        # A network that swallows everything would keep paho's thread until its keepalive; a shut socket ends it now.
        sock: Any = client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        # loop_stop() joins without a limit, and a thread inside connect() may take its time.
        stopper = threading.Thread(target=client.loop_stop, name="lmd-client-stop", daemon=True)
        stopper.start()
        stopper.join(max(0.1, ends_at - time.monotonic()))

    def _handshake(self, version: Spoken) -> paho.Client:
        """Connect in the calling thread, so that every failure arrives here as an exception, and wait for the CONNACK."""
        client = self._build(version)
        try:
            client.connect(**connect_arguments(self.address, version))
        except (OSError, ValueError) as error:
            raise BrokerUnreachable(explain_failure(error, self.address)) from error
        client.loop_start()
        try:
            in_time = self._first_word.wait(self.address.connect_timeout_s)
        except BaseException:  # Ctrl-C: nobody else knows of its thread
            self._stop(client, timeout_s=1.0)
            raise
        connack = self._connack
        if connack is None or connack.value >= REFUSED:
            self._stop(client, timeout_s=1.0)
        check_connack(connack, self.address, in_time=in_time)
        return client

    def _build(self, version: Spoken) -> paho.Client:
        self._connack = None
        self._first_word.clear()
        self._gone.clear()
        client = ThreadedClient(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            transport="unix" if self.address.transport == "unix" else "tcp",
            **client_options(version),
        )
        configure(client, self.address, version, on_message=self._on_message)
        client.max_inflight_messages_set(IN_FLIGHT)
        client.reconnect_delay_set(1, LONGEST_PAUSE_S)
        client.on_socket_open = self._socket_opened
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_publish = lambda _c, _u, mid, reason, _p: self._acknowledgements.came(mid, [reason])
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: self._acknowledgements.came(mid, reasons)
        return client

    def _socket_opened(self, _client: paho.Client, _data: Any, sock: Any) -> None:
        if self.address.transport != "unix":
            tune_socket(sock.fileno(), keepalive_s=self.address.keepalive_s)

    # --- subscribe and publish ---------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Connected, and every filter is granted."""
        return self._ready.is_set()

    def subscribe(self, topic_filter: str, *, timeout_s: float = 10.0) -> None:
        """Subscribe at QoS 1 and wait for SUBACK; kept over reconnects. Raises `NotPermitted`, `BrokerUnreachable`.

        While the connection is lost it only remembers the filter: `on_ready` tells when it is granted.
        """
        with self._lock:
            granted = self._filters.get(topic_filter)
            mine = granted is None
            if granted is None:
                granted = self._filters[topic_filter] = threading.Event()
        if mine:
            self._subscribe(topic_filter, granted)
        if not granted.wait(timeout_s if self._ready.is_set() else 0.0) and self._ready.is_set():
            self._forget(topic_filter)
            raise BrokerUnreachable(f"The broker at {self.address} left a subscription unanswered for {timeout_s:g} s.")
        reason = self._refusals.get(topic_filter)
        if reason is not None:
            raise NotPermitted(not_permitted("subscribe to", topic_filter, self.address, reason))

    def _subscribe(self, topic_filter: str, granted: threading.Event) -> None:
        def answered(reasons: list[ReasonCode]) -> None:
            self._judge(topic_filter, reasons[0])
            granted.set()

        if self._paho is not None and self._ready.is_set():
            code, mid = self._paho.subscribe(topic_filter, 1)
            if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
                self._acknowledgements.expect(mid, answered)

    def _judge(self, topic_filter: str, reason: ReasonCode) -> bool:
        """Remember whether the broker granted this filter; true when it did."""
        with self._lock:
            if reason.value < REFUSED:
                self._refusals.pop(topic_filter, None)
                return True
            self._refusals[topic_filter] = str(reason)
            self._filters.pop(topic_filter, None)
            return False

    def unsubscribe(self, topic_filter: str) -> None:
        self._forget(topic_filter)
        if self._paho is not None and self.ready:
            self._paho.unsubscribe(topic_filter)

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        expiry_s: int | None = None,
        on_ack: Callable[[int, str], None] = lambda _value, _reason: None,
    ) -> bool:
        """Publish at QoS 1; False while the connection is lost (nothing is kept). `on_ack` gets the PUBACK's reason, which on
        3.1.1 is always success; it is not called when the connection is lost first. Raises `BusError` for what no broker takes.
        """
        if not self.ready or self._paho is None:
            return False
        check_size(topic, payload, self.max_packet_bytes)
        properties = publish_properties(self.protocol, expiry_s)
        info = self._paho.publish(topic, payload, qos=1, retain=retain, properties=properties)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise BusError(f"More than {OUTGOING_MESSAGES} messages wait for the broker's acknowledgement.")
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        self._acknowledgements.expect(info.mid, lambda reasons: on_ack(reasons[0].value, str(reasons[0])))
        return True

    def thread_lives(self) -> bool:
        return any(thread.name == self._thread_name() for thread in threading.enumerate())

    def _thread_name(self) -> str:
        return f"paho-mqtt-client-{self._client_id}"

    def _forget(self, topic_filter: str) -> None:
        with self._lock:
            self._filters.pop(topic_filter, None)
            self._refusals.pop(topic_filter, None)

    # --- paho's thread -----------------------------------------------------------------------------------------------

    def _connected(self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        if not self._opened:
            self._connack = reason
            self._first_word.set()
            if reason.value >= REFUSED:
                client.disconnect()  # else paho's thread would try again
            return
        if reason.value >= REFUSED:
            log.warning("bus.refused broker=%s reason=%s", self.address, reason)
            return
        with self._lock:
            filters = dict(self._filters)
        if not filters:
            self._ready_again()
            return
        code, mid = client.subscribe([(name, 1) for name in filters])
        if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
            self._acknowledgements.expect(mid, lambda reasons: self._resubscribed(filters, reasons))

    def _resubscribed(self, filters: Mapping[str, threading.Event], reasons: Sequence[ReasonCode]) -> None:
        for (name, granted), reason in zip(filters.items(), reasons, strict=False):
            if not self._judge(name, reason):
                self._on_refused(name, str(reason))
            granted.set()
        self._ready.set()  # first: from here on whoever comes asks by himself
        with self._lock:
            late = {name: granted for name, granted in self._filters.items() if name not in filters}
        for name, granted in late.items():  # asked for while this answer was on its way
            self._subscribe(name, granted)
        self._ready_again()

    def _ready_again(self) -> None:
        self._ready.set()
        log.info("bus.connected broker=%s protocol=%s", self.address, self.protocol)
        guarded(self._on_ready)

    def _disconnected(self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self._ready.clear()
        if not self._opened:
            client.disconnect()
            self._first_word.set()
        # A publish that the broker refuses by closing the connection would be sent again after every reconnect, for ever.
        # The requests are sent again by their own rules, which have a limit.
        client.drop_out_messages()
        self._acknowledgements.clear()
        self._gone.set()
        if not self._closing:
            log.info("bus.lost broker=%s reason=%s", self.address, reason)
            guarded(self._on_lost)
