"""One completion request over a plain socket: sent here, its answer read here or in the I/O loop."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

from llamacpp_mqtt_deploy.core.response_head import HeadReader, ResponseHead
from llamacpp_mqtt_deploy.core.transfer_coding import BadChunk, ChunkedDecoder, PlainBody
from llamacpp_mqtt_deploy.engines.server.api_key import authorization
from llamacpp_mqtt_deploy.engines.server.failures import Broken, ConnectFailed, NoAnswer, Silent, reason_of
from llamacpp_mqtt_deploy.engines.server.http import CA_BUNDLE, MAX_DOCUMENT_BYTES, READ_BYTES
from llamacpp_mqtt_deploy.engines.server.line import Line, ServerAddress
from llamacpp_mqtt_deploy.engines.server.polling import readable_within, recv_within, send_within
from llamacpp_mqtt_deploy.engines.server.preconnect import Preconnection
from llamacpp_mqtt_deploy.stopping import StopSignal

PROMPT_S = 0.005
"""How quickly a server sends its headers where it has a slot free: llama.cpp's in 1 to 3 ms."""

_NODELAY = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)


@lru_cache(maxsize=8)
def _head(path: str, host: str, api_key: str | None) -> bytes:
    """The lines of a request that are the same for each of them. Raises ValueError."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Accept-Encoding: identity",
        "Connection: close",
        "Content-Type: application/json",
        "User-Agent: llamacpp-mqtt-deploy",
    ]
    if api_key:
        lines.append(f"Authorization: {authorization(api_key)}")
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a line break in the URL of the engine")
    return ("\r\n".join(lines) + "\r\n").encode("latin-1")


class StreamingExchange:
    """A POST and its answer on a connection of its own, cut when one of `stops` is set; a context manager.

    requests and urllib3 take 0.65 ms before they connect and give a chunked body one chunk a call; what is read and written
    here is one request head, and a body whose framing `core.transfer_coding` takes off. A connection is not kept for the next
    request: llama.cpp ends it after each streamed answer, whatever its `Keep-Alive` header says. One that `preconnection` has
    begun is taken where there is one.
    """

    def __init__(
        self,
        address: ServerAddress,
        *,
        api_key: str | None,
        connect_timeout_s: float,
        ca_file: Path | None = None,
        stops: Iterable[StopSignal] = (),
        preconnection: Preconnection | None = None,
    ) -> None:
        self._preconnection = preconnection
        self._address = address
        self._api_key = api_key
        self._connect_timeout_s = connect_timeout_s
        self._ca_file = ca_file
        self._line = Line(address)
        self._socket: socket.socket | None = None
        self._silence_s = connect_timeout_s
        """How long the next read may wait."""
        self._head_reader = HeadReader()
        self._head = ResponseHead(0, {})
        self._ahead = b""
        self.body: ChunkedDecoder | PlainBody = PlainBody(0)
        """Takes the framing off the raw bytes that follow the headers."""
        self._forget = [stop.on_stop(self._line.cut) for stop in stops]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, which frees the server's slot; idempotent."""
        for forget in self._forget:
            forget()
        self._line.release()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()

    # --- the request and the headers -----------------------------------------------------------------------------------

    def send(self, path: str, content: bytes, *, timeout_s: float) -> None:
        """Send the request. Raises `ConnectFailed`, `NoAnswer`, `Silent`."""
        try:
            self._socket = self._connect()
        except (OSError, ValueError) as error:
            raise (NoAnswer if self._line.connected else ConnectFailed)(reason_of(error)) from error
        self._silence_s = timeout_s
        try:
            head = self._request_head(path, len(content))
            send_within(self._socket, head + content, time.monotonic() + timeout_s)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused early: the answer says why
        except TimeoutError as error:
            raise Silent(f"no answer within {timeout_s:g} s") from error
        except (OSError, ValueError) as error:
            raise NoAnswer(reason_of(error)) from error

    def read_head(self, *, timeout_s: float, on_slow: Callable[[], None]) -> None:
        """Wait for the headers, at most so long; `on_slow` is called once when they do not come within some milliseconds.

        Raises `NoAnswer`, `Silent`.
        """
        assert self._socket is not None
        ends_at = time.monotonic() + timeout_s
        try:
            if not readable_within(self._socket, PROMPT_S):
                on_slow()
            while not self.take_head(recv_within(self._socket, READ_BYTES, ends_at)):
                # A server that sends its headers byte by byte is never silent, and never done.
                if time.monotonic() >= ends_at:
                    raise TimeoutError("timed out")
        except TimeoutError as error:
            raise Silent(f"no answer within {timeout_s:g} s") from error
        except OSError as error:
            raise NoAnswer(reason_of(error)) from error

    def take_head(self, raw: bytes) -> bool:
        """More of the answer's beginning, nothing at the end of the connection; whether the headers are whole. Raises `NoAnswer`."""
        if not raw:
            raise NoAnswer("the connection ended before the headers did")
        try:
            found = self._head_reader.feed(raw)
            if found is None:
                return False
            self._head, self._ahead = found
            self.body = self._head.body()
        except ValueError as error:
            raise NoAnswer(reason_of(error)) from error
        return True

    def _connect(self) -> socket.socket:
        address = self._address
        made = self._line.connect(
            address.host,
            address.port,
            self._connect_timeout_s,
            _NODELAY,
            stays_bare=not address.is_https,
            begun=None if self._preconnection is None else self._preconnection.take(),
        )
        if not address.is_https:
            return made
        try:
            context = ssl.create_default_context(cafile=str(self._ca_file or CA_BUNDLE))
            wrapped = context.wrap_socket(made, server_hostname=address.host)
            wrapped.setblocking(False)
            return wrapped
        except BaseException:
            made.close()
            raise

    def _request_head(self, path: str, length: int) -> bytes:
        head = _head(self._address.path + path, self._address.netloc, self._api_key)
        return b"%bContent-Length: %d\r\n\r\n" % (head, length)

    @property
    def status(self) -> int:
        return self._head.status

    @property
    def content_type(self) -> str:
        return self._head.content_type

    # --- the body, read by the caller's thread -------------------------------------------------------------------------

    def read_some(self) -> bytes:
        """What has arrived of the body, waiting for at least one byte; empty at the end. Raises `Broken`, `Silent`."""
        assert self._socket is not None
        try:
            while not self.body.ended:
                raw, self._ahead = self._ahead, b""
                raw = raw or recv_within(self._socket, READ_BYTES, time.monotonic() + self._silence_s)
                if not raw:
                    if self.body.ends_with_connection:
                        return b""
                    raise Broken("the answer ended before it was complete")
                body = self.body.feed(raw)
                if body:
                    return body
        except TimeoutError as error:
            raise Silent("no byte in time") from error
        except (OSError, BadChunk, ValueError) as error:
            raise Broken(reason_of(error)) from error
        return b""

    def read_all(self, *, timeout_s: float) -> bytes:
        """The whole body. Raises `Broken`, `Silent` after `timeout_s` altogether, `ValueError` when it is too long."""
        ends_at = time.monotonic() + timeout_s
        parts: list[bytes] = []
        size = 0
        while True:
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                raise Silent("the answer took too long")
            self.limit_silence(left_s)
            part = self.read_some()
            if not part:
                return b"".join(parts)
            size += len(part)
            if size > MAX_DOCUMENT_BYTES:
                raise ValueError("the answer is too long")
            parts.append(part)

    def limit_silence(self, timeout_s: float) -> None:
        """Let the next reads wait at most this long."""
        self._silence_s = timeout_s

    # --- what the I/O loop reads itself --------------------------------------------------------------------------------

    def unbuffered(self) -> socket.socket:
        """The socket, which does not wait."""
        assert self._socket is not None
        return self._socket

    def take_ahead(self) -> bytes:
        """The raw bytes of the body that came together with the headers, once."""
        ahead, self._ahead = self._ahead, b""
        return ahead
