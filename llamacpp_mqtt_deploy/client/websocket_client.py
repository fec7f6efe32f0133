"""paho's client with a websocket that answers pings and keeps whole frames together, for the loop that paho runs in its own thread."""

from __future__ import annotations

from typing import Any

import paho.mqtt.client as paho

from llamacpp_mqtt_deploy.mqtt.buffered_socket import BufferedSocket
from llamacpp_mqtt_deploy.mqtt.websocket_frames import Frames
from llamacpp_mqtt_deploy.mqtt.websocket_upgrade import upgrade


class WebsocketClient(paho.Client):
    """Connects through a websocket under `path`; its transport, as paho knows it, stays TCP."""

    path = "/mqtt"

    def _create_socket(self) -> Any:
        sock: Any = super()._create_socket()
        try:
            return _PromptSocket(
                sock, Frames(upgrade(sock, self.host, self.port, path=self.path, timeout_s=self.connect_timeout))
            )
        except BaseException:
            sock.close()
            raise


class _PromptSocket(BufferedSocket):
    """Written at once, and read whenever paho asks."""

    __slots__ = ("_taken",)

    def __init__(self, sock: Any, frames: Frames) -> None:
        super().__init__(sock, frames)
        self._taken = 0
        """Bytes of the packet that is framed and not wholly written."""

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
            if self.unsent and not self._taken:
                self.flush()  # the answer to a ping

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)
