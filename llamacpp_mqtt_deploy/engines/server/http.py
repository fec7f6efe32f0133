"""One HTTP request whose socket another thread can cut at any moment: while it connects, waits for headers or reads."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from typing_extensions import override
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from llamacpp_mqtt_deploy.core.transfer_coding import ChunkedDecoder
from llamacpp_mqtt_deploy.stopping import StopSignal

MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
"""Longest answer that is read whole: a model list, an error, or a completion that was not streamed."""
READ_BYTES = 65536


class ConnectFailed(Exception):
    """No connection: nothing listens, no route, no such name or socket, or it took too long."""


class NoAnswer(Exception):
    """The connection was made and ended before the answer began."""


class Broken(Exception):
    """The connection ended in the middle of the answer."""


class Silent(Exception):
    """Nothing came within the read timeout."""


class ServerAddress:
    """Where the server is: `http://host:port[/prefix]`, `https://...` or `unix:///path/to.sock`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            self.unix_path: str | None = (parts.netloc + parts.path) or None
            self.base = "http://localhost"
            if self.unix_path is None:
                raise ValueError("engine.url: unix:// needs the path of a socket, as in unix:///run/llama/llama.sock")
        elif parts.scheme in ("http", "https") and parts.hostname:
            self.unix_path = None
            prefix = parts.path.rstrip("/").removesuffix("/v1")
            self.base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{prefix}"
        else:
            raise ValueError("engine.url must be http://host:port, https://host or unix:///path/to/the.sock")
        self.shown = self.unix_path or self.base
        """The address for logs and operators."""


class Line:
    """The socket of one request. `cut` may be called from any thread and returns at once."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._cut = False
        # A duplicate of the descriptor: it stays valid while TLS wraps the socket and while the pool puts it away, and
        # shutting it down ends the connection itself.
        self._duplicate: socket.socket | None = None
        self.connected = False
        self.socket: socket.socket | None = None
        """What the answer is read from, once connected; inside TLS where there is one."""

    def cut(self) -> None:
        with self._lock:
            self._cut = True
            if self._duplicate is not None:
                with contextlib.suppress(OSError):
                    self._duplicate.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        with self._lock:
            if self._duplicate is not None:
                self._duplicate.close()
                self._duplicate = None

    def connect(self, host: str, port: int | None, timeout_s: float, options: Any) -> socket.socket:
        """A connected socket. Raises OSError."""
        ends_at = time.monotonic() + timeout_s
        if self._address.unix_path is not None:
            return self._try(socket.AF_UNIX, 0, self._address.unix_path, timeout_s, ())
        failure: OSError = OSError("the name has no address")
        for family, _, protocol, _, target in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
            try:
                return self._try(family, protocol, target, max(0.001, ends_at - time.monotonic()), options or ())
            except OSError as error:
                failure = error
        raise failure

    def _try(self, family: int, protocol: int, target: Any, timeout_s: float, options: Any) -> socket.socket:
        made = socket.socket(family, socket.SOCK_STREAM, protocol)
        try:
            self._hold(made)
            made.settimeout(timeout_s)
            for option in options:  # urllib3's own: TCP_NODELAY
                made.setsockopt(*option)
            made.connect(target)
            with self._lock:
                if self._cut:  # cut just before connect(), which the shutdown did not reach
                    raise ConnectionAbortedError("cut")
        except BaseException:
            made.close()
            self.release()
            raise
        self.connected = True
        return made

    def _hold(self, made: socket.socket) -> None:
        with self._lock:
            if self._cut:
                raise ConnectionAbortedError("cut")
            self._duplicate = made.dup()


def _connect(connection: HTTPConnection, line: Line) -> socket.socket:
    timeout_s = connection.timeout if isinstance(connection.timeout, int | float) else 60.0
    try:
        return line.connect(connection.host, connection.port, timeout_s, connection.socket_options)
    except OSError as error:
        # A bare ECONNRESET from here would pass for one while sending, which urllib3 swallows.
        raise urllib3.exceptions.NewConnectionError(connection, str(error)) from error


class _LineConnection(HTTPConnection):
    line: Line

    @override
    def _new_conn(self) -> socket.socket:
        return _connect(self, self.line)

    @override
    def connect(self) -> None:
        super().connect()
        self.line.socket = self.sock


class _LineTlsConnection(HTTPSConnection):
    line: Line

    @override
    def _new_conn(self) -> socket.socket:
        return _connect(self, self.line)

    @override
    def connect(self) -> None:
        super().connect()
        self.line.socket = self.sock


class _LinePool(HTTPConnectionPool):
    ConnectionCls = _LineConnection
    line: Line

    def _new_conn(self) -> Any:
        connection = super()._new_conn()
        cast("_LineConnection", connection).line = self.line
        return connection


class _LineTlsPool(HTTPSConnectionPool):
    ConnectionCls = _LineTlsConnection
    line: Line

    def _new_conn(self) -> Any:
        connection = super()._new_conn()
        cast("_LineTlsConnection", connection).line = self.line
        return connection


class _LineAdapter(HTTPAdapter):
    def __init__(self, line: Line) -> None:
        self._line = line
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)

    @override
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _LinePool, "https": _LineTlsPool}

    @override
    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        cast("_LinePool", pool).line = self._line
        return pool


class HttpExchange:
    """One request and its answer on a connection of its own, which is cut when one of `stops` is set; a context manager.

    A connection is not kept for the next request: llama.cpp closes idle ones after 5 s and busy ones after 100 requests, a
    cancel ends it anyway, and a new one costs 0.2 ms on the machine itself.
    """

    def __init__(
        self,
        address: ServerAddress,
        *,
        api_key: str | None,
        connect_timeout_s: float,
        ca_file: Path | None = None,
        stops: Iterable[StopSignal] = (),
    ) -> None:
        self._address = address
        self._line = Line(address)
        self._connect_timeout_s = connect_timeout_s
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy, no .netrc: the prompt goes to the configured server or nowhere
        self._session.headers.clear()
        self._session.verify = True if ca_file is None else str(ca_file)
        self._session.mount(f"{address.base.partition(':')[0]}://", _LineAdapter(self._line))
        self._headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "llamacpp-mqtt-deploy"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._response: requests.Response | None = None
        self._unframed: tuple[BufferedReader, ChunkedDecoder] | None = None
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
        self._line.cut()
        if self._response is not None:
            self._response.close()
        self._session.close()
        self._line.release()

    def send(self, method: str, path: str, content: bytes | None = None, *, timeout_s: float) -> None:
        """Send the request and wait for the headers, at most `timeout_s` in silence.

        Raises `ConnectFailed`, `NoAnswer`, `Silent`.
        """
        headers = dict(self._headers)
        if content is not None:
            headers["Content-Type"] = "application/json"
        try:
            self._response = self._session.request(
                method,
                self._address.base + path,
                data=content,
                headers=headers,
                timeout=(self._connect_timeout_s, timeout_s),
                allow_redirects=False,
                stream=True,
            )
            self._unframed = _unframed(self._response)
        except requests.exceptions.ReadTimeout as error:
            raise Silent(f"no answer within {timeout_s:g} s") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            # AttributeError: urllib3 looks for the socket of a connection that was reset while it shook hands.
            failure = NoAnswer if self._line.connected else ConnectFailed
            raise failure(_reason(error)) from error

    @property
    def status(self) -> int:
        assert self._response is not None
        return self._response.status_code

    @property
    def content_type(self) -> str:
        assert self._response is not None
        return str(self._response.headers.get("Content-Type", "")).partition(";")[0].strip().lower()

    def read_some(self) -> bytes:
        """What has arrived, waiting for at least one byte; empty at the end. Raises `Broken`, `Silent`."""
        assert self._response is not None
        try:
            if self._unframed is not None:
                return self._read_chunks(*self._unframed)
            return cast("bytes", self._response.raw.read1(READ_BYTES, decode_content=True) or b"")
        except (urllib3.exceptions.ReadTimeoutError, TimeoutError) as error:
            raise Silent("no byte in time") from error
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            raise Broken(_reason(error)) from error

    def _read_chunks(self, raw: BufferedReader, decoder: ChunkedDecoder) -> bytes:
        while not decoder.ended:
            arrived = raw.read1(READ_BYTES)
            if not arrived:
                raise Broken("the answer ended in the middle of a chunk")
            body = decoder.feed(arrived)
            if body:
                return body
        return b""

    def read_all(self, *, timeout_s: float) -> bytes:
        """The whole answer. Raises `Broken`, `Silent` after `timeout_s` altogether, `ValueError` when it is too long."""
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
        if self._line.socket is not None:
            with contextlib.suppress(OSError):  # the answer has ended already
                self._line.socket.settimeout(max(0.001, timeout_s))


def _unframed(response: requests.Response) -> tuple[BufferedReader, ChunkedDecoder] | None:
    """The bytes below the chunked framing, to take everything that has arrived with one read.

    urllib3 and http.client give at most one chunk a call, with some ten Python calls around it, and llama.cpp sends each token
    as a chunk: at thousands of tokens a second that was half of the worker's work. None for any other framing.
    """
    if response.headers.get("Transfer-Encoding", "").lower() != "chunked" or "Content-Encoding" in response.headers:
        return None
    below = getattr(response.raw, "_original_response", None)
    raw = getattr(below, "fp", None)
    return (raw, ChunkedDecoder()) if isinstance(raw, BufferedReader) else None


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words, without addresses: `Connection refused`."""
    seen: BaseException = error
    for _ in range(10):
        inner = seen.__cause__ or seen.__context__ or getattr(seen, "reason", None)
        if not isinstance(inner, BaseException):
            break
        seen = inner
    if isinstance(seen, TimeoutError):
        return "timed out"
    text = (seen.strerror if isinstance(seen, OSError) else None) or str(seen) or type(seen).__name__
    return text[:200]
