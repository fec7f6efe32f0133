"""Our log inside somebody else's program: handed to the standard library's logging, which that program steers."""

from __future__ import annotations

import structlog


def lend() -> None:
    """Send our events to `logging` unless a log is set up already; structlog's default would print them on stdout, where a
    program that uses us as a library has its own output."""
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.processors.KeyValueRenderer(key_order=["event"])],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
