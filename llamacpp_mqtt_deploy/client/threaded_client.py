"""The client for the loop that paho runs in its own thread: it reads messages without paho, and writes at once."""

from __future__ import annotations

import contextlib
import select
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode

from llamacpp_mqtt_deploy.mqtt.buffered_socket import BufferedSocket
from llamacpp_mqtt_deploy.mqtt.gathering_client import GatheringClient
from llamacpp_mqtt_deploy.mqtt.websocket_frames import Frames


class ThreadedClient(GatheringClient):
    """What paho's thread reads comes to `on_delivery`, where that is set. Its socket belongs to that thread alone, and so does what
    it calls."""

    def _create_socket(self) -> Any:
        try:
            return super()._create_socket()
        except BaseException:
            if self.last_socket is not None:
                self.last_socket.close()
            raise

    def _gathered(self, sock: Any, frames: Frames | None) -> BufferedSocket:
        return _PromptSocket(sock, frames)

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """What paho calls when the socket has something, or `pending` says so: all that one read of it brings."""
        prompt = self.buffered
        if isinstance(prompt, _PromptSocket):
            prompt.is_dry = False
            while self._read_common(prompt):
                if self._sock is None:
                    return paho.MQTT_ERR_CONN_LOST  # by a callback
                if not prompt.ahead:
                    prompt.answer_pings()
                    return paho.MQTT_ERR_SUCCESS
        return super().loop_read(max_packets)

    def _loop(self, timeout: float = 1.0) -> MQTTErrorCode:
        """What paho's thread does once: wait for the socket, read, write. As paho's, but by poll: select takes no descriptor from
        1024 on, and a program that has so many open could not connect."""
        sock, wake = self._sock, self._sockpairR
        if sock is None or not hasattr(select, "poll"):
            return super()._loop(timeout)
        waiting = select.poll()
        try:
            waiting.register(sock, select.POLLIN | (select.POLLOUT if self.want_write() else 0))
        except (TypeError, ValueError):  # closed meanwhile
            return super()._loop(timeout)
        if wake is not None:
            waiting.register(wake, select.POLLIN)
        unread = self.buffered is not None and self.buffered.pending() > 0
        ready = dict(waiting.poll(0.0 if unread else 1000.0 * timeout))
        woken = wake is not None and wake.fileno() in ready
        if wake is not None and woken:
            with contextlib.suppress(BlockingIOError):
                wake.recv(10_000)
        about = ready.get(sock.fileno(), 0)
        if unread or about & ~select.POLLOUT:
            read = self.loop_read()
            if read or self._sock is None:
                return read
        if woken or about & select.POLLOUT:
            written = self.loop_write()
            if written or self._sock is None:
                return written
        return self.loop_misc()

    def acknowledge(self, mid: int) -> None:
        """Queue the PUBACK of a message behind what paho has queued, from which it is sent."""
        self._send_puback(mid)


class _PromptSocket(BufferedSocket):
    """Written at once, and read whenever paho asks."""

    __slots__ = ("_taken",)

    def __init__(self, sock: Any, frames: Frames | None) -> None:
        super().__init__(sock, frames)
        self._taken = 0
        """Bytes of the packet that is not wholly written."""

    def send(self, data: bytes | bytearray) -> int:
        """Write a packet. Raises BlockingIOError until all of it is written, since paho waits for the socket only while it has more:
        the same data is to be given again then."""
        if not self._taken:
            self._taken = super().send(data)
        if not self.flush():
            assert self.failure is not None
            raise self.failure
        if self.unsent:
            raise BlockingIOError
        taken, self._taken = self._taken, 0
        return taken

    def recv(self, size: int) -> bytes:
        self.is_dry = False
        try:
            return super().recv(size)
        finally:
            self.answer_pings()

    def answer_pings(self) -> None:
        """Write the answers to a websocket's pings that were read, unless a packet goes before them."""
        if self.unsent and not self._taken:
            self.flush()

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)
