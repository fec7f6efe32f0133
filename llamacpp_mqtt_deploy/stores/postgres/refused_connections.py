"""Asks a server that let no connection come about for the SQLSTATE of its refusal: libpq passes on only the words, in any language.

(libpq's own PQping would tell less, and no other thread runs while psycopg waits for it.)
"""

from __future__ import annotations

import socket
import struct

_PROTOCOL = 3 << 16
_ANSWER_S = 2.0
_MOST_BYTES = 16 * 1024
"""Of a refusal."""


def state_of_refusal(host: str, port: int, *, user: str, database: str) -> str | None:
    """The SQLSTATE; empty when the server would go on, or asks for a password; None when it says nothing at all.

    Neither password nor TLS: a server that takes no connection at all says so before either.
    """
    try:
        with _connected(host, port) as connection:
            asked = b"".join(text.encode() + b"\0" for text in ("user", user, "database", database, ""))
            connection.sendall(struct.pack("!ii", len(asked) + 8, _PROTOCOL) + asked)
            answer = connection.recv(_MOST_BYTES)  # the code comes first
    except OSError:
        return None
    if not answer:
        return None
    # The kind of message, its length in four bytes, and fields that each begin with what they are.
    fields = answer[5:].split(b"\0") if answer[:1] == b"E" else []
    return next((field[1:].decode(errors="replace") for field in fields if field[:1] == b"C"), "")


def _connected(host: str, port: int) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port), _ANSWER_S)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_ANSWER_S)
    try:
        connection.connect(f"{host}/.s.PGSQL.{port}")
    except OSError:
        connection.close()
        raise
    return connection
