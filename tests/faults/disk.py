"""A disk of a few MiB that can be full: a tmpfs where mounting is allowed, else an ordinary folder that cannot."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

SIZE_MIB = 96  # a journal of ten thousand ended requests


class SmallDisk:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._filler = folder / "filler"
        self.why_not = ""
        """Why it cannot be filled; empty where it can."""

    def mount(self) -> None:
        try:
            command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "none", str(self.folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        except OSError as error:
            self.why_not = f"no disk to fill: {error}"
            return
        if done.returncode:
            self.why_not = f"no disk to fill: {done.stderr.strip() or 'mount failed'}"

    def fill(self) -> None:
        block = bytes(65536)
        with self._filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:  # a short write takes the last page, the next one fails
                file.write(block)

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def unmount(self) -> None:
        if not self.why_not and os.path.ismount(self.folder):
            subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False, timeout=10)
