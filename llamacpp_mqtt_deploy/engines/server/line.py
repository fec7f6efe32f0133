"""Where a server is, and the socket of one request to it, which another thread can cut at any moment."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from llamacpp_mqtt_deploy.engines.server.polling import NON_BLOCKING, connect_within

_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


class ServerAddress:
    """Where the server is: `http://host:port[/prefix]`, `https://...` or `unix:///path/to.sock`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            self.unix_path: str | None = (parts.netloc + parts.path) or None
            base = "http://localhost"
            if self.unix_path is None:
                raise ValueError("engine.url: unix:// needs the path of a socket, as in unix:///run/llama/llama.sock")
        elif parts.scheme in ("http", "https") and parts.hostname and _has_port_or_none(parts):
            self.unix_path = None
            # The request line is written as it is: what requests would quote by itself has to be quoted here.
            path = _STRAY_PERCENT.sub("%25", parts.path.rstrip("/").removesuffix("/v1"))
            prefix = quote(path, safe="/%:@!$&'()*+,;=~")
            base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{prefix}"
        else:
            raise ValueError("engine.url must be http://host:port, https://host or unix:///path/to/the.sock")
        self.base = base
        self.shown = self.unix_path or base
        """The address for logs and operators."""
        # Taken apart once: it takes longer than the request's first bytes.
        split = urlsplit(base)
        self.is_https = split.scheme == "https"
        self.host = split.hostname or ""
        self.port = split.port or (443 if self.is_https else 80)
        self.netloc = split.netloc
        self.path = split.path
        self.target = self._target()
        """Family and address of the socket, where no name has to be looked up, which costs as much as connecting."""

    def _target(self) -> tuple[int, Any] | None:
        if self.unix_path is not None:
            return socket.AF_UNIX, self.unix_path
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError, ValueError):
                socket.inet_pton(family, self.host)
                return family, (self.host, self.port)
        return None


def _has_port_or_none(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


class Line:
    """The socket of one request. `cut` may be called from any thread and returns at once."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._cut = False
        self._held: socket.socket | None = None
        """What a cut shuts down."""
        self._is_duplicate = False
        self.connected = False
        self.socket: socket.socket | None = None
        """What the answer is read from, once connected; inside TLS where there is one."""

    def cut(self) -> None:
        with self._lock:
            self._cut = True
            if self._held is not None:
                with contextlib.suppress(OSError):
                    self._held.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """No cut reaches the socket any more; to be called before it is closed, since its number may be another one's then."""
        with self._lock:
            held, self._held = self._held, None
        if held is not None and self._is_duplicate:
            held.close()

    def connect(
        self,
        host: str,
        port: int | None,
        timeout_s: float,
        options: Any,
        *,
        stays_bare: bool = False,
        begun: socket.socket | None = None,
    ) -> socket.socket:
        """A connected socket, with this timeout for each of its calls; `stays_bare` when nothing wraps it and nobody else keeps it:
        then its calls do not wait (`polling`), and it may be one that was `begun` before. Raises OSError."""
        # A duplicate of the descriptor stays valid while TLS wraps the socket and while the pool puts it away, and shutting it down
        # ends the connection itself.
        self._is_duplicate = not stays_bare
        ends_at = time.monotonic() + timeout_s
        if self._address.target is not None:
            family, target = self._address.target
            if family == socket.AF_UNIX:
                options = ()
            return self._try(family, 0, target, timeout_s, options or (), begun)
        failure: OSError = OSError("the name has no address")
        for family, _, protocol, _, target in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
            try:
                return self._try(family, protocol, target, max(0.001, ends_at - time.monotonic()), options or ())
            except OSError as error:
                failure = error
        raise failure

    def _try(
        self,
        family: int,
        protocol: int,
        target: Any,
        timeout_s: float,
        options: Any,
        begun: socket.socket | None = None,
    ) -> socket.socket:
        bare = not self._is_duplicate
        made = begun or socket.socket(family, socket.SOCK_STREAM | (NON_BLOCKING if bare else 0), protocol)
        try:
            self._hold(made)
            if not bare:
                made.settimeout(timeout_s)
            if begun is None:
                for option in options:  # urllib3's own: TCP_NODELAY
                    made.setsockopt(*option)
            if bare:
                connect_within(made, target, timeout_s)
            else:
                made.connect(target)
            with self._lock:
                if self._cut:  # cut just before connect(), which the shutdown did not reach
                    raise ConnectionAbortedError("cut")
        except BaseException:
            self.release()
            made.close()
            raise
        self.connected = True
        return made

    def _hold(self, made: socket.socket) -> None:
        with self._lock:
            if self._cut:
                raise ConnectionAbortedError("cut")
            self._held = made.dup() if self._is_duplicate else made
