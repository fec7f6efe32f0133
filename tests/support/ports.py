"""Ports for what the tests start."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 10_240
_TAKEN: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that no outgoing connection gets: these come from the ports above. A server
    that is started again later, or a moment from now, finds it free."""
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(_LOWEST, lowest_outgoing)
        if port in _TAKEN:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that only waits for late packets is free
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _TAKEN.add(port)
        return port
