"""Writes the metrics into a file for node-exporter's textfile collector, which reads files beside its own metrics."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

EVERY_S = 15.0
"""As often as most Prometheus servers look."""
FILE_MODE = 0o644
"""node-exporter runs as another user; nothing in it is secret."""


class TextFile:
    """One thread from `start` to `close`. A reader sees a whole file always; the file goes when the worker stops, for what is
    gone should not look as if it were well."""

    def __init__(self, path: Path, text: Callable[[], bytes]) -> None:
        self._path = path
        self._text = text
        self._told = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-file", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                self.write()
            except OSError as problem:
                self._tell(problem.strerror or str(problem))
            except Exception:
                log.exception("metrics.failed")
            else:
                self._tell("")
            if self._closing.wait(EVERY_S):
                break
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _tell(self, problem: str) -> None:
        """Once for each problem, not every time."""
        if problem and problem != self._told:
            log.error("metrics.textfile_failed", path=str(self._path), reason=problem, again_s=EVERY_S)
        elif self._told and not problem:
            log.info("metrics.textfile_written_again", path=str(self._path))
        self._told = problem

    def write(self) -> None:
        """Write the file anew and put it into place; raises OSError."""
        # A name that node-exporter does not look at. Never through a link that somebody has put there.
        new = self._path.with_name(f".{self._path.name}.new")
        new.unlink(missing_ok=True)
        text = self._text()
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, FILE_MODE)
                file.write(text)
            new.rename(self._path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
