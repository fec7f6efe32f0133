"""One paho client, driven by the thread that owns it: connect, read, write, and call back with plain values.

This file and its helpers (`gathering_client`, `packets`, `paho_fixes`) are the only ones that know paho. It never waits for the network: its owner's loop
does (`wire_loop`), or any other that watches `fileno`. It uses no thread of paho's: every call into a client comes from the link's thread,
so that paho's own locks never meet ours (its issues 346, 354 and 531 are deadlocks between them), nothing of it can die
unseen, and how to reconnect is ours to decide.
"""

from __future__ import annotations

import select
import ssl
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import paho.mqtt.client as paho
import structlog
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.core.reminding import Reminder
from llamacpp_mqtt_deploy.core.topics import owner_levels
from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.gathering_client import GatheringClient, tune_socket
from llamacpp_mqtt_deploy.mqtt.incoming import receipt_of
from llamacpp_mqtt_deploy.mqtt.packets import publish_packet, publish_properties
from llamacpp_mqtt_deploy.mqtt.session import Publish
from llamacpp_mqtt_deploy.mqtt.thinning import Thinning
from llamacpp_mqtt_deploy.ports import Delivery, Retained

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 5.0
MISC_EVERY_S = 0.5
"""How often paho looks at its keepalive."""

RECEIVE_MAXIMUM = 100
"""Unacknowledged requests that a broker may send us at once on MQTT 5; the journal takes them in batches."""

WINDOW = 100
"""Most publishes in flight. mosquitto and HiveMQ announce 20 and 10; without an announcement this is what other brokers' fixed
limits allow (AWS IoT: 100), and enough for 1000 events a second over a round trip of 100 ms."""

DISCONNECT_WITH_WILL = "Disconnect with will message"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connack:
    """The broker's answer to CONNECT. `code` is an MQTT 5 reason code on both versions."""

    code: int
    name: str
    session_present: bool = False
    window: int = WINDOW
    max_packet_bytes: int | None = None
    retain_available: bool = True
    qos_1_available: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Why a connection ended: `from_broker` says that the broker sent a DISCONNECT with this code."""

    code: int = 0x80
    name: str = "Unspecified error"
    from_broker: bool = False
    unreadable: bool = False
    error: str = ""


class WireEvents(Protocol):
    """What a wire tells its owner, in the owner's thread."""

    def connack(self, answer: Connack) -> None: ...
    def puback(self, mid: int, code: int) -> None: ...
    def suback(self, mid: int, codes: Sequence[tuple[int, str]]) -> None: ...
    def message(self, delivery: Delivery) -> None:
        """Its receipt has the packet id for `PahoWire.acknowledge` (`incoming.receipt_of`)."""


class PahoWire:
    """A paho client for one MQTT version; `connect` again after it closed keeps what paho has not seen acknowledged."""

    def __init__(
        self,
        settings: MqttSettings,
        *,
        version: Version,
        client_id: str,
        password: str | None,
        will: Retained,
        tls: ssl.SSLContext | None,
        events: WireEvents,
        max_incoming_bytes: Callable[[], int] | None,
    ) -> None:
        self.version = version
        self.closed: Closed | None = Closed()
        """Why the connection ended; None while it lives. To be read only."""
        self._settings = settings
        self._events = events
        self.fd = -1
        """The socket, -1 without one. To be read only."""
        self._misc_at = 0.0
        self._last_log = ""
        five = version == "5"
        self._client = client = GatheringClient(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=paho.MQTTv5 if five else paho.MQTTv311,
            # Asked for explicitly: paho's default would drop what the broker kept for us (60 of 60 requests were lost so).
            clean_session=None if five else settings.session_expiry_s == 0,
            transport="unix" if settings.transport == "unix" else "tcp",
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.version = version
        client.max_incoming_bytes = max_incoming_bytes
        client.username_pw_set(settings.username, password)
        client.will_set(will.topic, will.payload, qos=1, retain=True)
        if settings.transport == "websockets":
            client.websocket_path = settings.websocket_path
        if tls is not None:
            client.tls_set_context(tls)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_puback = events.puback
        client.thinning = self._thinning = Thinning(owner_levels(settings.root))
        self._flood = Reminder()
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = lambda _client, _userdata, mid, *_: self._events.suback(mid, [])
        client.on_delivery = events.message
        client.on_message = self._on_message
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        # With this set paho never writes by itself: packets are queued and `on_writable` writes them.
        client.on_socket_register_write = lambda *_: None

    # --- the owner's side ---

    def connect(self, port: int, number: int) -> None:
        """Connect, for the `number`th time, and queue the CONNECT packet. Raises OSError and its kin (ssl.SSLError, socket.gaierror, TimeoutError)."""
        settings = self._settings
        self.closed = None
        self._client.connection = number
        self._last_log = ""
        # Only until CONNACK: it is the one place where paho tells what a socket error was, and it costs a line per packet.
        self._client.on_log = self._on_log
        arguments: dict[str, Any] = {}
        if self.version == "5":
            properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = settings.session_expiry_s
            properties.ReceiveMaximum = RECEIVE_MAXIMUM
            arguments = {"clean_start": False, "properties": properties}
        try:
            self._client.connect(settings.host, port, settings.keepalive_s, **arguments)
        except BaseException:
            self.closed = Closed()
            if self._client.last_socket is not None:
                self._client.last_socket.close()
            raise
        self.on_writable()

    # What a loop needs (`wire_loop.Wire`).

    def wants_read(self) -> bool:
        return self.closed is None and self._client.holds_unread()

    def wants_write(self) -> bool:
        return self.closed is None and self._client.holds_unsent()

    def on_readable(self) -> None:
        """Read what is there; callbacks run in here."""
        if self.closed is None:
            self._client.read_some()
            if self.fd < 0:
                self._notice_end()

    def on_writable(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        if self.closed is None:
            self._client.write_some()
            if self.fd < 0:
                self._notice_end()

    def on_time(self, now: float) -> None:
        """Let paho look at its keepalive when that is due."""
        if self.closed is None and now >= self._misc_at:
            self._misc_at = now + MISC_EVERY_S
            self._client.loop_misc()
            self._notice_end()
            self._tell_of_a_flood(now)

    def _tell_of_a_flood(self, now: float) -> None:
        if not self._thinning.dropped:
            if not self._thinning.is_on:
                self._flood.clear()
        elif self._flood.due("flood", now):
            lost, topic = self._thinning.told()
            log.warning(
                "link.flood",
                lost=lost,
                topic=ascii(topic[:200].decode(errors="replace")),
                message="more came at QoS 0 than can be read; most of it is dropped, here is one topic of it. Look in the broker's log "
                "for who publishes there, and stop that program or take the permission from it",
            )

    def _notice_end(self) -> None:
        # paho closes its socket with each end, also where it tells nobody.
        if self.fd < 0 and self.closed is None:
            self.closed = Closed(error=self._last_log)

    def publish(
        self, publish: Publish, *, retain: bool, expiry_s: int | None, flying: Container[int], mid: int | None = None
    ) -> int | None:
        """Queue a PUBLISH; its packet id (0 at QoS 0), None when it cannot be taken now. `flying` are the ids that are in use; `mid` is
        the one under which it went out on an earlier connection of this session: then it is sent again (DUP).

        Raises ValueError when no packet can hold it.
        """
        qos = 1 if publish.qos else 0
        again = mid is not None
        if mid is None:
            mid = self._client.new_mid() if qos else 0
            while mid in flying:
                mid = self._client.new_mid()
        packet = publish_packet(
            publish.topic.encode(),
            publish.payload,
            qos=qos,
            retain=retain,
            dup=again,
            mid=mid,
            properties=publish_properties(publish.correlation, expiry_s, publish.content_type)
            if self.version == "5"
            else b"",
        )
        return mid if self._client.send_packet(packet) else None

    def acknowledge(self, mid: int) -> None:
        self._client.acknowledge(mid)

    def subscribe(self, filters: Sequence[tuple[str, int]], *, retained: bool) -> int | None:
        """Queue a SUBSCRIBE; its packet id."""
        topics: list[Any]
        if self.version == "5":
            handling = SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if retained else SubscribeOptions.RETAIN_DO_NOT_SEND
            topics = [(f, SubscribeOptions(qos=min(qos, 1), retainHandling=handling)) for f, qos in filters]
        else:
            topics = [(f, min(qos, 1)) for f, qos in filters]
        code, mid = self._client.subscribe(topics)
        return mid if code == paho.MQTT_ERR_SUCCESS else None

    def unsubscribe(self, filters: Sequence[str]) -> int | None:
        """Queue an UNSUBSCRIBE; its packet id."""
        code, mid = self._client.unsubscribe(list(filters))
        return mid if code == paho.MQTT_ERR_SUCCESS else None

    def disconnect(self, *, with_will: bool, timeout_s: float) -> None:
        """Say goodbye and close; the one call that waits, until the last bytes are written. `with_will` has the broker publish the will: on 3.1.1 by hanging up without DISCONNECT."""
        if self.closed is not None:
            return
        deadline = time.monotonic() + timeout_s
        if not with_will or self.version == "5":
            reason = ReasonCode(PacketTypes.DISCONNECT, DISCONNECT_WITH_WILL) if with_will else None
            poll = select.poll()
            while self.wants_write() and self.fd >= 0 and (left_s := deadline - time.monotonic()) > 0:
                poll.register(self.fd, select.POLLOUT)
                poll.poll(left_s * 1000.0)
                self.on_writable()
            # Last, since paho closes the socket together with it.
            self._client.disconnect(reason)
            self.on_writable()
        self.abort()

    def abort(self) -> None:
        """Close the socket at once."""
        if self.fd >= 0:
            # connect_async closes the socket and only stores the address: paho's one public way to hang up without DISCONNECT.
            self._client.connect_async(self._settings.host, 1)
        if self.closed is None:
            self.closed = Closed()

    # --- paho's side ---

    def _on_socket_open(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self.fd = sock.fileno()
        if self._settings.transport != "unix":
            tune_socket(self.fd, keepalive_s=self._settings.keepalive_s)

    def _on_socket_close(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self.fd = -1

    def _on_log(self, client: paho.Client, userdata: Any, level: int, text: str) -> None:
        if level == paho.MQTT_LOG_ERR or "malformed" in text:
            self._last_log = text

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        client.on_log = None
        get = ({} if properties is None else properties.__dict__).get
        # 0 is forbidden (section 3.2.2.3.3); absent means 65535.
        window = min(get("ReceiveMaximum") or WINDOW, WINDOW)
        self._events.connack(
            Connack(
                code=reason.value,
                name=str(reason),
                session_present=flags.session_present,
                window=window,
                max_packet_bytes=get("MaximumPacketSize"),
                retain_available=get("RetainAvailable") != 0,
                qos_1_available=get("MaximumQoS") != 0,
            )
        )

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.DisconnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        from_broker = flags.is_disconnect_packet_from_server
        if self.closed is None:
            self.closed = Closed(
                code=reason.value,
                name=str(reason),
                from_broker=from_broker,
                # What was read was no MQTT, or nothing that paho can decode; or no frame of a websocket.
                unreadable=not from_broker and (reason.value == 0x82 or self._client.was_unreadable()),
                error=self._last_log,
            )

    def _on_subscribe(
        self, client: paho.Client, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        self._events.suback(mid, [(reason.value, str(reason)) for reason in reasons])

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        """A rare one: common ones go to `WireEvents.message` without paho."""
        try:
            topic = message.topic
        except UnicodeDecodeError:
            # No broker that we know forwards it; no topic of ours matches it.
            if message.qos:
                self.acknowledge(message.mid)
            return
        properties = {} if message.properties is None else message.properties.__dict__
        expiry = properties.get("MessageExpiryInterval")
        correlation = properties.get("CorrelationData")
        self._events.message(
            Delivery(
                topic=topic,
                payload=bytes(message.payload),
                qos=message.qos,
                retain=message.retain,
                received_at=time.monotonic(),
                response_topic=properties.get("ResponseTopic"),
                correlation=None if correlation is None else bytes(correlation),
                expiry_s=None if expiry is None else float(expiry),
                receipt=receipt_of(self._client.connection, message.qos, message.mid),
            ),
        )
