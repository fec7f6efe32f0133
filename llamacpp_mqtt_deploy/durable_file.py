"""Small files that are written as a whole and outlive a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


def replace_file(file: Path, text: str, *, prepare: Callable[[Path], None] | None = None) -> None:
    """Put a new file in the place of this one, which only its owner may read, or whoever `prepare` allows; raises OSError.

    Whatever interrupts it, there is the old file or the new one; when it returns there is the new one, also after a power cut.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)  # of a process that was killed: in a container all have the same number
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        if prepare is not None:
            prepare(draft)
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync_directory(file.parent)


def _sync_directory(directory: Path) -> None:
    """Have the names in it on the disk, where the file system can do that by itself."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
