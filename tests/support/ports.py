"""Ports for what the tests start."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

_LOWEST, _HIGHEST = 10_240, 32_768
_PARTS = 8
_TAKEN: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that no outgoing connection gets: these come from the ports above. A server
    that is started again later, or a moment from now, finds it free. Where the system gives outgoing connections nearly all ports, it may not."""
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    beyond = lowest_outgoing if lowest_outgoing >= 2 * _LOWEST else _HIGHEST
    # Processes of one test run take theirs from different parts: a server may need seconds until it listens on the port.
    width, part = (beyond - _LOWEST) // _PARTS, int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % _PARTS
    while True:
        port = _LOWEST + part * width + random.SystemRandom().randrange(width)
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
