"""What a client writes down of everything that it did and saw: one JSON line each, so that SIGKILL costs nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Entry:
    """`what`: begun, sent, event, up, down, ended, gave_up, cancel; of the package's client answer and failed."""

    at: float
    """Monotonic seconds: the same clock in all processes of the machine."""
    what: str
    request_id: str = ""
    number: int = -1
    attempt: int = 0
    text: str = ""
    """An event's payload."""
    topic: str = ""


class Writer:
    """Appends; each line is the kernel's before the call returns."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, what: str, **fields: Any) -> None:
        line = json.dumps({"at": round(time.monotonic(), 4), "what": what} | fields, separators=(",", ":"))
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


class Reader:
    """Reads on where it stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def news(self) -> Iterator[Entry]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # half a line: the writer is at it
                self._at += len(line)
                yield Entry(**json.loads(line))
