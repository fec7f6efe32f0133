"""Where the metrics are served: `127.0.0.1:9469`, `[::1]:9469`, `localhost:9469` or `unix:///run/lmd/metrics.sock`."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

LONGEST_SOCKET_PATH = 100
"""sockaddr_un has 108 bytes, unix(7); the socket is made under a longer name and then renamed."""

_EXPECTED = "expected ADDRESS:PORT (127.0.0.1:9469) or unix:///PATH/NAME.sock"


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Either a host and a port, or the path of a socket."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach it."""
        return self.path is not None or ip_address(self.host).is_loopback

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str) -> ListenAddress:
    """Read an address; raises ValueError with what was expected and what was found.

    Addresses are numbers: a name, or none, could open more than whoever wrote it had in mind.
    """
    if text.startswith("unix:"):
        return _socket(text)
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit() and len(port) <= 5) or not 0 <= int(port) <= 65535:
        raise ValueError(f'{_EXPECTED}, found "{text}"')
    host = "127.0.0.1" if host == "localhost" else host
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ip_address(bare)
    except ValueError:
        raise ValueError(
            f'{_EXPECTED}, found "{text}"; a name is not enough, write the address (0.0.0.0 for all of this machine)'
        ) from None
    if (address.version == 6) != (bare != host):
        raise ValueError(f'{_EXPECTED}, found "{text}"; an IPv6 address stands in brackets')
    return ListenAddress(host=str(address), port=int(port))


def _socket(text: str) -> ListenAddress:
    path = text.removeprefix("unix://")
    if not text.startswith("unix:///") or path.endswith("/") or "\0" in path:
        raise ValueError(f'{_EXPECTED}, found "{text}" (three slashes: unix:///run/...)')
    if len(path.encode("utf-8", "surrogateescape")) > LONGEST_SOCKET_PATH:
        raise ValueError(f"expected the path of a socket of at most {LONGEST_SOCKET_PATH} bytes, found {len(path)}")
    return ListenAddress(path=Path(path))
