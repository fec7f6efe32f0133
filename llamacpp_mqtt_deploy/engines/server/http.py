"""Short questions over HTTP, on a connection that another thread can cut at any moment."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import urllib3
from typing_extensions import override
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from llamacpp_mqtt_deploy.engines.server.api_key import authorization
from llamacpp_mqtt_deploy.engines.server.failures import Broken, ConnectFailed, NoAnswer, Silent, reason_of
from llamacpp_mqtt_deploy.engines.server.line import Line, ServerAddress
from llamacpp_mqtt_deploy.leaving_out import leaving_out
from llamacpp_mqtt_deploy.stopping import StopSignal

with leaving_out("charset_normalizer", "chardet"):  # 3 MiB for guesses at the character set of pages
    import requests
    from requests.adapters import HTTPAdapter
    from requests.utils import DEFAULT_CA_BUNDLE_PATH

CA_BUNDLE = DEFAULT_CA_BUNDLE_PATH
"""Certificates of the authorities that are trusted where none are named."""

MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
"""Longest answer that is read whole: a model list, an error, or a completion that was not streamed."""
READ_BYTES = 65536


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

    Raises ValueError for an `api_key` that no header can carry, without quoting it.

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
        self._headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "llamacpp-mqtt-deploy"}
        if api_key:
            self._headers["Authorization"] = authorization(api_key)
        self._address = address
        self._line = Line(address)
        self._connect_timeout_s = connect_timeout_s
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy, no .netrc: the prompt goes to the configured server or nowhere
        self._session.headers.clear()
        self._session.verify = True if ca_file is None else str(ca_file)
        self._session.mount(f"{address.base.partition(':')[0]}://", _LineAdapter(self._line))
        self._response: requests.Response | None = None
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
        """Send the request and wait for the headers, at most `timeout_s` altogether once connected.

        Raises `ConnectFailed`, `NoAnswer`, `Silent`.
        """
        headers = dict(self._headers)
        if content is not None:
            headers["Content-Type"] = "application/json"
        # The timeout of the socket is one of silence, and whoever sends headers byte by byte is never silent.
        late = threading.Event()
        alarm = threading.Timer(self._connect_timeout_s + timeout_s, self._cut_late, [late])
        alarm.daemon = True
        alarm.start()
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
        except requests.exceptions.ReadTimeout as error:
            raise Silent(f"no answer within {timeout_s:g} s") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            # AttributeError: urllib3 looks for the socket of a connection that was reset during its handshake.
            if late.is_set():
                raise Silent(f"no answer within {timeout_s:g} s") from error
            failure = NoAnswer if self._line.connected else ConnectFailed
            raise failure(reason_of(error)) from error
        finally:
            alarm.cancel()
        if late.is_set():  # cut in the middle of the headers, which http.client takes for their end
            raise Silent(f"no answer within {timeout_s:g} s")

    def _cut_late(self, late: threading.Event) -> None:
        late.set()
        self._line.cut()

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
            return cast("bytes", self._response.raw.read1(READ_BYTES, decode_content=True) or b"")
        except (urllib3.exceptions.ReadTimeoutError, TimeoutError) as error:
            raise Silent("no byte in time") from error
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            raise Broken(reason_of(error)) from error

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
