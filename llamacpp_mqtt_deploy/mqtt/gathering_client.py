"""paho's client for a loop that is not paho's: it gathers packets, reads ahead, and never writes unasked."""

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
from llamacpp_mqtt_deploy.mqtt.buffered_socket import BufferedSocket


class GatheringClient(paho.Client):
    """paho's client with a timeout for unix sockets; it knows its last socket, so that a failed attempt can close it.

    The overridden methods are paho's own business: should they get other names there, the sockets of failed attempts wait for
    the garbage collector, and that is all.
    """

    last_socket: socket.socket | None = None
    buffered: BufferedSocket | None = None
    """The current socket, where packets are gathered; paho's websocket has its own buffers."""

    def _create_socket(self) -> Any:
        self.buffered = None
        sock = super()._create_socket()
        if isinstance(sock, socket.socket):
            self.buffered = sock = BufferedSocket(sock)
        return sock

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
        """Whether bytes are there that the socket no longer shows: TLS and the reading ahead keep some."""
        pending = getattr(self.socket(), "pending", None)
        return pending is not None and pending() > 0

    def holds_unsent(self) -> bool:
        """Whether something waits to be written."""
        return self.want_write() or (self.buffered is not None and self.buffered.has_unsent())

    def read_some(self) -> None:
        """Read what is there; callbacks run in here."""
        if self.buffered is not None:
            self.buffered.readable()
        self.loop_read()

    def write_some(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        self.loop_write()
        if self.buffered is not None and not self.buffered.flush():
            self.buffered.readable()
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


def whole_frames(send: Callable[[bytes], int]) -> Callable[[bytes], int]:
    """Make a websocket say "try again" where paho's says "0 bytes sent".

    After a partly written frame paho's wrapper returns 0 and wants the same data again, but paho's writer takes 0 for the end of
    its turn and drops the packet; the next one is then counted by the old one's length. BlockingIOError keeps the packet.
    """

    def whole(data: bytes) -> int:
        sent = send(data)
        if sent == 0 and data:
            raise BlockingIOError
        return sent

    return whole
