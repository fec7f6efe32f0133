"""Tells systemd how the service is: ready, draining, alive; sd_notify(3) without its library. Without systemd it does nothing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

# One datagram; systemd reads at most 4096 bytes, and a status longer than a line helps nobody.
_MAX_STATUS_CHARS = 500


class Notifier:
    """Sends notifications to `$NOTIFY_SOCKET`. No method raises or waits: a service never fails because its manager is busy.

    May be used from any thread: each notification is one datagram.
    """

    def __init__(self, *, environ: Mapping[str, str] = os.environ) -> None:
        self._socket: socket.socket | None = None
        self._address: str | None = None
        address = environ.get("NOTIFY_SOCKET", "")
        if address.startswith(("/", "@")):
            # A leading @ stands for the zero byte of Linux' abstract sockets, which live in no directory.
            self._address = f"\0{address[1:]}" if address.startswith("@") else address
            try:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            except OSError:
                self.close()

    def ready(self) -> None:
        """The start, or a reload, is complete."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={_line(text)}")

    def stopping(self) -> None:
        """The service began to close."""
        self._send("STOPPING=1")

    def reloading(self) -> None:
        """The service reads its configuration again; `ready()` ends it."""
        # The time is what Type=notify-reload (systemd 253) matches the later READY=1 with.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def watchdog(self) -> None:
        """The service is alive; call it every `watchdog_interval_s()`, and only after a look at what must be alive."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, microseconds: int) -> None:
        """Start or stop needs this much longer, counted from now; repeat it before it passes."""
        self._send(f"EXTEND_TIMEOUT_USEC={max(0, int(microseconds))}")

    def close(self) -> None:
        """Stop sending; idempotent."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def _send(self, message: str) -> None:
        sock = self._socket
        if sock is None or self._address is None:
            return
        try:
            sock.sendto(message.encode("utf-8", "replace"), self._address)
        except OSError:
            # The manager is gone, restarts, or its queue is full. The next notification may get through.
            return


def watchdog_interval_s(*, environ: Mapping[str, str] = os.environ) -> float | None:
    """How often to call `Notifier.watchdog()` in seconds, half of WatchdogSec=; None when the unit asks for no watchdog."""
    pid = environ.get("WATCHDOG_PID")
    if pid and pid != str(os.getpid()):
        return None  # meant for the parent that left its environment to us
    try:
        microseconds = int(environ.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return microseconds / 2_000_000 if microseconds > 0 else None


def _line(text: str) -> str:
    """A line break would begin another assignment: a status must not be able to say READY=1."""
    return "".join(c if c.isprintable() else " " for c in text)[:_MAX_STATUS_CHARS]
