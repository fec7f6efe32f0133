"""Ends that clients were told although the database did not take them: a small file beside it, which the next start reads."""

from __future__ import annotations

import base64
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import structlog

from llamacpp_mqtt_deploy.core.spending import Spent
from llamacpp_mqtt_deploy.ports import EntryKey, HistoryChange, ToldEnd

MAX_BYTES = 64 * 1024 * 1024
"""As many as the worker holds in memory until the database takes them."""

WRITE_S = 2.0
"""How long a disk is waited for: whoever calls has others' ends to tell."""

log = structlog.get_logger(__name__)


class ToldEnds:
    """One line for each, on the disk when `add` says so. Every method may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._writing: threading.Thread | None = None

    def add(self, ends: Sequence[ToldEnd]) -> bool:
        """Keep these too; False when they are not on the disk (full, read-only, hanging)."""
        lines = b"".join(map(_written, ends))
        kept: list[bool] = []
        with self._lock:
            if self._writing is not None and self._writing.is_alive():
                return False  # the disk still has not answered
            self._writing = threading.Thread(
                target=lambda: kept.append(self._append(lines)), name="told-ends", daemon=True
            )
            self._writing.start()
            self._writing.join(WRITE_S)
            return kept == [True]

    def _append(self, lines: bytes) -> bool:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                before = os.fstat(fd).st_size
                if before + len(lines) > MAX_BYTES:
                    return False
                try:
                    written = os.write(fd, lines)
                    os.fsync(fd)
                except OSError:
                    written = 0
                if written < len(lines):
                    os.ftruncate(fd, before)  # half a line would spoil the next one
                    return False
            finally:
                os.close(fd)
        except OSError:
            return False
        return True

    def read(self) -> list[ToldEnd]:
        """All of them, in the order in which they were told; what cannot be read is left out."""
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            # Its requests run once more, or end as interrupted: better than a worker that does not start.
            log.error("store.told_ends_unreadable", path=str(self._path), why=error.strerror or str(error))
            return []
        return list(_readable(lines))

    def clear(self) -> None:
        """The database has them all. One that stays nevertheless does no harm: a request ends once."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _written(end: ToldEnd) -> bytes:
    history, spent = end.history, end.spent
    line = {
        "key": [end.key.route, end.key.session, end.key.request_id],
        "now": end.now,
        "terminal": _text(end.terminal),
        "chunks": None if end.chunks is None else _text(end.chunks),
        "history": None if history is None else [history.session, history.append, history.forget_before],
        "spent": None if spent is None else [spent.first_level, spent.tokens_in, spent.tokens_out, spent.engine_s],
    }
    return orjson.dumps(line) + b"\n"


def _readable(lines: Sequence[bytes]) -> Iterator[ToldEnd]:
    for line in lines:
        try:
            yield _read(orjson.loads(line))
        except (ValueError, TypeError, KeyError):
            # The worker died while it wrote this one: nobody was told of it.
            log.warning("store.told_end_unreadable", bytes=len(line))


def _read(line: dict[str, Any]) -> ToldEnd:
    route, session, request_id = line["key"]
    history = None
    if line["history"] is not None:
        (of_route, of_session), append, forget_before = line["history"]
        if not all(isinstance(message, dict) for message in append):
            raise TypeError(append)
        history = HistoryChange(session=(of_route, of_session), append=tuple(append), forget_before=forget_before)
    return ToldEnd(
        key=EntryKey(route, session, request_id),
        terminal=base64.b64decode(line["terminal"]),
        now=float(line["now"]),
        history=history,
        chunks=None if line["chunks"] is None else base64.b64decode(line["chunks"]),
        spent=_spent(line.get("spent")),
    )


def _spent(told: Any) -> Spent | None:
    """Older workers told nothing of it."""
    if told is None:
        return None
    first_level, tokens_in, tokens_out, engine_s = told
    return Spent(
        first_level=str(first_level), tokens_in=int(tokens_in), tokens_out=int(tokens_out), engine_s=float(engine_s)
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
