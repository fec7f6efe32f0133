"""What can become of an exchange with a server, before anybody knows what it means for the request."""

from __future__ import annotations


class ConnectFailed(Exception):
    """No connection: nothing listens, no route, no such name or socket, or it took too long."""


class NoAnswer(Exception):
    """The connection was made and ended before the answer began."""


class Broken(Exception):
    """The connection ended in the middle of the answer."""


class Silent(Exception):
    """Nothing came within the read timeout."""


def reason_of(error: BaseException) -> str:
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
