"""A client's connection to the broker: clean start, fast and clear refusals, MQTT 5 with a fall back, reconnects by itself."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from llamacpp_mqtt_deploy.client.address import BrokerAddress, explain_failure, explain_refusal, not_permitted
from llamacpp_mqtt_deploy.client.exceptions import BrokerRefused, BrokerUnreachable, BusError, NotPermitted

log = logging.getLogger(__name__)  # the host program's log: this part is a library

UNSUPPORTED_PROTOCOL_VERSION = 0x84
REFUSED = 0x80
NOT_AUTHORIZED = 0x87
NO_MATCHING_SUBSCRIBERS = 0x10
PACKET_TOO_LARGE = 0x95
OUTGOING_MESSAGES = 1000  # requests and controls without PUBACK; a person has one, a busy program some dozens
IN_FLIGHT = 10  # what the strictest public brokers allow; paho does not read Receive Maximum
LONGEST_PAUSE_S = 10


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
        self.protocol: Literal["5", "3.1.1"] | None = None
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
        self._waiting: dict[int, Callable[[list[ReasonCode]], None]] = {}
        self._early: dict[int, list[ReasonCode]] = {}
        self._ready = threading.Event()
        self._gone = threading.Event()
        self._first_word = threading.Event()
        """The broker's CONNACK, or the end of the connection."""
        self._opened = False
        self._closing = False

    # --- open and close ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect within `connect_timeout_s`; raises `BrokerUnreachable` or `BrokerRefused`."""
        wanted = self.address.protocol
        versions: tuple[Literal["5", "3.1.1"], ...] = ("5", "3.1.1") if wanted == "auto" else (wanted,)
        first_refusal: BusError | None = None
        for version in versions:
            try:
                self._paho = self._handshake(version)
            except _TryOlder as error:
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
        sock = client.socket()
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        # loop_stop() joins without a limit, and a thread inside connect() may take its time.
        stopper = threading.Thread(target=client.loop_stop, name="lmd-client-stop", daemon=True)
        stopper.start()
        stopper.join(max(0.1, ends_at - time.monotonic()))

    def _handshake(self, version: str) -> paho.Client:
        """Connect in the calling thread, so that every failure arrives here as an exception, and wait for the CONNACK."""
        client = self._build(version)
        where = str(self.address)
        try:
            client.connect(
                self.address.host,
                self.address.effective_port,
                keepalive=self.address.keepalive_s,
                clean_start=True if version == "5" else paho.MQTT_CLEAN_START_FIRST_ONLY,
            )
        except (OSError, ValueError) as error:
            raise BrokerUnreachable(explain_failure(error, self.address)) from error
        client.loop_start()
        in_time = self._first_word.wait(self.address.connect_timeout_s)
        connack = self._connack
        if connack is not None and connack.value < REFUSED:
            return client
        self._stop(client, timeout_s=1.0)
        if connack is not None:
            refused = BrokerRefused(explain_refusal(connack, self.address))
            if connack.value == UNSUPPORTED_PROTOCOL_VERSION:
                raise _TryOlder(refused)
            raise refused
        hint = "" if self.address.tls else " If its port expects TLS, switch TLS on."
        reason = "closed the connection before answering" if in_time else "did not answer in time"
        unreachable = BrokerUnreachable(f"The broker at {where} {reason}.{hint}")
        if in_time:
            raise _TryOlder(unreachable)  # RabbitMQ before 3.13 closes on MQTT 5 without a word
        raise unreachable

    def _build(self, version: str) -> paho.Client:
        self._connack = None
        self._first_word.clear()
        self._gone.clear()
        five = version == "5"
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if five else True,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            transport=self.address.transport,
        )
        if self.address.username is not None:
            client.username_pw_set(self.address.username, self.address.password)
        if self.address.tls is not None:
            client.tls_set_context(self.address.tls)
        if self.address.transport == "websockets":
            client.ws_set_options(path=self.address.websocket_path)
        client.connect_timeout = max(0.1, self.address.connect_timeout_s)
        client.max_inflight_messages_set(IN_FLIGHT)
        client.max_queued_messages_set(OUTGOING_MESSAGES)
        client.reconnect_delay_set(1, LONGEST_PAUSE_S)
        client.on_socket_open = _no_delay
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        client.on_publish = lambda _c, _u, mid, reason, _p: self._acknowledged(mid, [reason])
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: self._acknowledged(mid, reasons)
        return client

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
                self._expect(mid, answered)

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
        if self.max_packet_bytes is not None and len(payload) + len(topic) + 64 > self.max_packet_bytes:
            raise BusError(f"The request has {len(payload)} bytes; the broker takes at most {self.max_packet_bytes}.")
        properties = None
        if self.protocol == "5":
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.ContentType = "application/json"
            if expiry_s is not None:
                properties.MessageExpiryInterval = expiry_s
        info = self._paho.publish(topic, payload, qos=1, retain=retain, properties=properties)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise BusError(f"More than {OUTGOING_MESSAGES} messages wait for the broker's acknowledgement.")
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        self._expect(info.mid, lambda reasons: on_ack(reasons[0].value, str(reasons[0])))
        return True

    def thread_lives(self) -> bool:
        return any(thread.name == self._thread_name() for thread in threading.enumerate())

    def _thread_name(self) -> str:
        return f"paho-mqtt-client-{self._client_id}"

    def _forget(self, topic_filter: str) -> None:
        with self._lock:
            self._filters.pop(topic_filter, None)
            self._refusals.pop(topic_filter, None)

    def _expect(self, mid: int, answered: Callable[[list[ReasonCode]], None]) -> None:
        """The acknowledgement may be here before publish() has returned its number. No lock of ours is held over a call
        into paho: it calls back under its own."""
        with self._lock:
            early = self._early.pop(mid, None)
            if early is None:
                self._waiting[mid] = answered
        if early is not None:
            answered(early)

    # --- paho's thread -----------------------------------------------------------------------------------------------

    def _acknowledged(self, mid: int, reasons: list[ReasonCode]) -> None:
        with self._lock:
            answered = self._waiting.pop(mid, None)
            if answered is None:
                self._early[mid] = reasons
                return
        _guarded(answered, reasons)

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
            self._expect(mid, lambda reasons: self._resubscribed(filters, reasons))

    def _resubscribed(self, filters: Mapping[str, threading.Event], reasons: Sequence[ReasonCode]) -> None:
        for (name, granted), reason in zip(filters.items(), reasons, strict=False):
            if not self._judge(name, reason):
                self._on_refused(name, str(reason))
            granted.set()
        with self._lock:
            late = {name: granted for name, granted in self._filters.items() if name not in filters}
        self._ready.set()
        for name, granted in late.items():  # asked for while this answer was on its way
            self._subscribe(name, granted)
        self._ready_again()

    def _ready_again(self) -> None:
        self._ready.set()
        log.info("bus.connected broker=%s protocol=%s", self.address, self.protocol)
        _guarded(self._on_ready)

    def _disconnected(self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self._ready.clear()
        if not self._opened:
            client.disconnect()
            self._first_word.set()
        # A publish that the broker refuses by closing the connection would be sent again after every reconnect, for ever.
        # The requests are sent again by their own rules, which have a limit.
        client.drop_out_messages()
        with self._lock:
            self._waiting.clear()
            self._early.clear()
        self._gone.set()
        if not self._closing:
            log.info("bus.lost broker=%s reason=%s", self.address, reason)
            _guarded(self._on_lost)

    def _received(self, client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        _acknowledge_now(client.socket())
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        _guarded(self._on_message, topic, message.payload, message.retain)


class _TryOlder(Exception):
    def __init__(self, reason: BusError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _guarded(call: Callable[..., None], *arguments: Any) -> None:
    """An exception would end paho's thread while `is_connected()` stays true: it stops here."""
    try:
        call(*arguments)
    except Exception:
        log.exception("bus.callback_failed")


def _acknowledge_now(sock: Any) -> None:
    """Let TCP acknowledge a message at once: a broker with Nagle's algorithm on holds back the next one until then, for 40 ms."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a unix socket, the wrapper of a websocket
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _no_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    with contextlib.suppress(OSError, AttributeError):  # a unix socket has no Nagle
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
