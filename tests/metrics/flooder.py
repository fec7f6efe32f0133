"""A process that does to the metrics' port whatever comes to mind, for some seconds: `python flooder.py PORT SEED SECONDS`."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
import time

THREADS = 8
LINGER_NONE = b"\1\0\0\0\0\0\0\0"
"""SO_LINGER with no time: closing resets the connection."""


def one(port: int, chance: random.Random, held: list[socket.socket]) -> None:
    """One connection with a random misdeed, or a good request."""
    sock = socket.create_connection(("127.0.0.1", port), 2)
    match chance.randrange(9):
        case 0:
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            while sock.recv(65536):
                pass
        case 1:
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" * 200)
        case 2:
            sock.sendall(chance.randbytes(chance.randrange(1, 20_000)))
        case 3:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 1_000_000)
        case 4:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            held.append(sock)  # and reads nothing
            return
        case 5:
            sock.sendall(b"GET /metrics HT")
            held.append(sock)
            return
        case 6:
            held.append(sock)
            return
        case 7:
            sock.sendall(b"POST /metrics HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 100_000)
        case 8:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    sock.close()


def flood(port: int, seed: int, seconds: float) -> int:
    """How many connections were tried."""
    tried = 0
    ends_at = time.monotonic() + seconds

    def work(number: int) -> None:
        nonlocal tried
        chance = random.Random(seed * 100 + number)
        held: list[socket.socket] = []
        while time.monotonic() < ends_at:
            tried += 1
            with contextlib.suppress(OSError):
                one(port, chance, held)
            while len(held) > 50:
                held.pop(0).close()
        for sock in held:
            sock.close()

    threads = [threading.Thread(target=work, args=[number]) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tried


if __name__ == "__main__":
    print(flood(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
