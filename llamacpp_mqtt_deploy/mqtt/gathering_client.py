"""paho's client for a loop that is not paho's: it gathers packets, reads ahead, never writes unasked, and leaves messages to us."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho

from llamacpp_mqtt_deploy.mqtt import paho_fixes  # noqa: F401 - repairs paho
from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.buffered_socket import BufferedSocket
from llamacpp_mqtt_deploy.mqtt.packets import PUBACK, puback, puback_packet
from llamacpp_mqtt_deploy.mqtt.thinning import Thinning
from llamacpp_mqtt_deploy.mqtt.websocket_frames import FrameError, Frames
from llamacpp_mqtt_deploy.mqtt.websocket_upgrade import upgrade
from llamacpp_mqtt_deploy.ports import Delivery


class GatheringClient(paho.Client):
    """paho's client with a timeout for unix sockets; it knows its last socket, so that a failed attempt can close it.

    With `on_puback` set, what it publishes goes out by `send_packet`, in packets that are made elsewhere, and paho does not know of
    them: each PUBACK is told there, and paho's own publishes (`publish`, `on_publish`) are not to be used. Without it they work as ever.
    With `on_delivery` set, common messages come there, and only the rare ones (`incoming.leading_publish`) to `on_message`. Who
    acknowledges the ones and the others, paho's `manual_ack` says.

    The overridden methods and `_in_packet`, `_last_bytes_received`, `_manual_ack`, `_mid_generate`, `_out_packet`, `_send_puback` and
    `_sock` are paho's own business: the tests of this folder run against every new paho.
    """

    version: Version = "5"
    connection = 0
    """The number of the current connection, for the receipts of its messages."""

    on_puback: Callable[[int, int], None] | None = None
    """Called with packet id and reason code."""

    on_delivery: Callable[[Delivery], None] | None = None
    """Called with a message and its receipt (`incoming.receipt_of`)."""

    thinning: Thinning | None = None
    """Set, beside `on_puback`, where floods at QoS 0 are to be thinned out."""

    max_incoming_bytes: Callable[[], int] | None = None
    """Set, beside `on_delivery`, where messages with longer payloads are to be cut (`Delivery.left_out`)."""

    websocket_path: str | None = None
    """Set where packets are to go through a websocket; paho's transport is TCP then, too."""

    new_mid = paho.Client._mid_generate  # noqa: SLF001
    """Gives a packet id, 1 to 65535, from the row that paho takes its own from."""

    last_socket: socket.socket | None = None
    buffered: BufferedSocket | None = None
    """The current socket, where packets are gathered."""

    def _create_socket(self) -> Any:
        self.buffered = None
        sock: Any = super()._create_socket()
        frames = None
        if self.websocket_path is not None:
            where = self.host, self.port
            frames = Frames(upgrade(sock, *where, path=self.websocket_path, timeout_s=self.connect_timeout))
        self.buffered = buffered = self._gathered(sock, frames)
        buffered.thinning = self.thinning
        buffered.max_incoming_bytes = self.max_incoming_bytes
        return buffered

    def _gathered(self, sock: Any, frames: Frames | None) -> BufferedSocket:
        return BufferedSocket(sock, frames)

    def _create_socket_connection(self) -> socket.socket:
        self.last_socket = sock = super()._create_socket_connection()
        return sock

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        self.last_socket = sock = super()._ssl_wrap_socket(tcp_sock)
        return sock

    def _create_unix_socket_connection(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.connect_timeout)
            sock.connect(self.host)
        except BaseException:
            sock.close()
            raise
        return sock

    # What a loop asks.

    def holds_unread(self) -> bool:
        """Whether bytes are there that the socket, which is open, no longer shows: TLS and the reading ahead keep some."""
        buffered = self.buffered
        return buffered is not None and (bool(buffered.ahead) or (buffered.is_tls and buffered.pending() > 0))

    def holds_unsent(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._out_packet) or (self.buffered is not None and bool(self.buffered.unsent))

    def was_unreadable(self) -> bool:
        """Whether the connection has ended because what came was no websocket any more."""
        return self.buffered is not None and isinstance(self.buffered.failure, FrameError)

    def read_some(self) -> None:
        """Read what is there, of messages one; callbacks run in here."""
        buffered = self.buffered
        if buffered is not None:
            buffered.is_dry = False  # ask the socket again: it says that it has more
            if self._read_common(buffered):
                return
        self.loop_read()

    def _read_common(self, buffered: BufferedSocket) -> bool:
        """Read PUBACKs and a message without paho; False when the next bytes are for paho."""
        in_packet, on_puback, on_delivery = self._in_packet, self.on_puback, self.on_delivery
        if in_packet["command"] or in_packet["remaining_count"]:
            return False  # in the middle of a packet
        if buffered.beginning is not None:
            return self._read_beginning(buffered)
        now = paho.time_func()
        if on_puback is not None:
            mids = buffered.take_pubacks()
            if buffered.to_be_thinned:
                buffered.thin_out()
                mids += buffered.take_pubacks()
            if mids:
                self._last_bytes_received = now  # as paho notes of what it reads itself, for its keepalive
                for mid in mids:
                    on_puback(mid, 0)
        elif on_delivery is None:
            return False
        else:
            buffered.read_ahead()
        if not buffered.ahead:
            if buffered.is_skipping():
                self._last_bytes_received = now  # none of it is seen here, however long it takes
            return buffered.is_dry
        delivery = None if on_delivery is None else buffered.take_publish(self.version, now, self.connection)
        if delivery is None or on_delivery is None:
            return buffered.is_cutting()
        self._last_bytes_received = now
        self._tell(delivery, on_delivery)
        if on_puback is not None and buffered.ahead:
            # PUBACKs that came in the same packet of the network cost no further turn.
            for mid in buffered.take_pubacks():
                on_puback(mid, 0)
        return True

    def _read_beginning(self, buffered: BufferedSocket) -> bool:
        """Read what is there of a message that is cut; False when the connection has ended, as paho is to see."""
        now = paho.time_func()
        try:
            delivery = buffered.take_beginning(self.version, now, self.connection)
        except EOFError:
            return False
        self._last_bytes_received = now
        if delivery is not None and self.on_delivery is not None:
            self._tell(delivery, self.on_delivery)
        return True

    def _tell(self, delivery: Delivery, on_delivery: Callable[[Delivery], None]) -> None:
        if not self._manual_ack:
            match delivery.receipt:
                case (_, int() as mid):
                    self.acknowledge(mid)  # first, as paho does it
        on_delivery(delivery)

    def send_packet(self, packet: bytes) -> bool:
        """Queue a whole packet; False when it cannot be taken now."""
        if self._sock is None or self.buffered is None:
            return False
        try:
            self.buffered.send(packet)
        except BlockingIOError:
            return False
        except OSError:
            return False  # as its next read will tell
        return True

    def acknowledge(self, mid: int) -> None:
        """Queue the PUBACK of a message at QoS 1, behind what paho has queued: acknowledgements keep their order."""
        if self._out_packet or not self.send_packet(puback_packet(mid)):
            self._send_puback(mid)

    def _packet_handle(self) -> Any:
        """Every PUBACK that says more than its id."""
        if self._in_packet["command"] == PUBACK and self.on_puback is not None:
            known = puback(self._in_packet["packet"], self.version)
            if known is not None:
                self.on_puback(*known)
                return paho.MQTT_ERR_SUCCESS
        return super()._packet_handle()

    def write_some(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        buffered = self.buffered
        if self._out_packet:
            self.loop_write()
        if buffered is not None and not buffered.flush():
            buffered.is_dry = False
            self.loop_read()  # paho learns the same way that the connection has ended


def tune_socket(fd: int, *, keepalive_s: int) -> None:
    """Send single events without delay, and notice a half-open connection with data on its way after one keepalive."""
    # A duplicate shares the options and has them whatever paho wrapped the socket in.
    with contextlib.closing(socket.socket(fileno=os.dup(fd))) as plain:
        # Nagle's algorithm costs 22-38 ms on single events; paho leaves it on (its issue 874).
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            # Not after TCP's 15 minutes.
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, keepalive_s * 1000)
