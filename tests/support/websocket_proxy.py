"""MQTT through a websocket, before a broker that has plain TCP: what a cloud broker or a reverse proxy does to the bytes.

The frames are cut anywhere, some are sent in fragments, and pings go out between them; who does not answer a ping is hung up on.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from tests.support.ports import free_port


class WebsocketProxy:
    """Takes websockets for MQTT at `port` under the path /mqtt, answers 404 elsewhere."""

    def __init__(
        self,
        broker_port: int,
        *,
        certificate: tuple[Path, Path] | None = None,
        ping_every_s: float = 0.05,
        largest_frame: int = 1000,
        seed: int = 1,
    ) -> None:
        self.port = free_port()
        self.pongs = 0
        self.ends: list[str] = []
        """Why connections ended, as this end says it."""
        self.serving = 0
        """Connections that the broker, as far as is known here, has not ended."""
        self._broker_port, self._largest_frame, self._random = broker_port, largest_frame, random.Random(seed)
        self._ping_every_s = ping_every_s
        self._counting = threading.Lock()
        context = None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
        self._server: Server = serve(
            self._serve,
            "127.0.0.1",
            self.port,
            subprotocols=["mqtt"],  # type: ignore[list-item]
            compression=None,
            ssl=context,
            max_size=None,
            ping_interval=None,
            close_timeout=1.0,
            process_request=lambda connection, request: (
                None if request.path == "/mqtt" else connection.respond(404, "no such path\n")
            ),
        )
        self._thread = threading.Thread(target=self._server.serve_forever, name="websocket-proxy")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(10)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self, websocket: ServerConnection) -> None:
        with socket.create_connection(("127.0.0.1", self._broker_port)) as broker:
            back = threading.Thread(target=self._bring_back, args=(broker, websocket), name="websocket-proxy-back")
            back.start()
            threading.Thread(target=self._ping, args=(websocket,), name="websocket-proxy-ping").start()
            with self._counting:
                self.serving += 1
            try:
                for message in websocket:
                    assert isinstance(message, bytes)
                    broker.sendall(message)
            except (ConnectionClosed, OSError):
                pass
            finally:
                self.ends.append(f"{websocket.close_code} {websocket.close_reason}")
                # The broker is to read all that was said: it hangs up when it has.
                with contextlib.suppress(OSError):
                    broker.shutdown(socket.SHUT_WR)
                back.join(10)
                with self._counting:
                    self.serving -= 1

    def _bring_back(self, broker: socket.socket, websocket: ServerConnection) -> None:
        with contextlib.suppress(OSError):
            while data := broker.recv(65_536):
                with contextlib.suppress(ConnectionClosed):
                    self._send_cut(data, websocket)
        websocket.close()

    def _send_cut(self, data: bytes, websocket: ServerConnection) -> None:
        while data:
            size = self._random.randint(1, self._largest_frame)
            frame, data = data[:size], data[size:]
            if self._random.random() < 0.3:
                cut = self._random.randint(0, len(frame))
                websocket.send([frame[:cut], frame[cut:]])
            else:
                websocket.send(frame)

    def _ping(self, websocket: ServerConnection) -> None:
        try:
            while websocket.ping().wait(5.0):
                self.pongs += 1
                time.sleep(self._ping_every_s)
            websocket.close(1011, "no pong")
        except ConnectionClosed:
            pass
