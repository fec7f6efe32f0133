"""A disk that becomes read-only under open files, as after disk errors: nobody can remount one so while files are open for writing."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.services import require_program

_SOURCE = Path(__file__).with_name("read_only.c")


class ReadOnlyDisk:
    """`folder` takes no writes of processes with this `environment` between `begin` and `end`."""

    def __init__(self, folder: Path) -> None:
        compiler = require_program("cc")
        folder.mkdir()
        self.folder = folder
        self._when = folder.with_name("read-only")
        library = folder.with_name("read_only.so")
        command = [compiler, "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True, timeout=60)
        self.environment = {
            "LD_PRELOAD": str(library),
            "READ_ONLY_BELOW": str(folder),
            "READ_ONLY_WHEN": str(self._when),
        }

    def begin(self) -> None:
        self._when.touch()

    def end(self) -> None:
        self._when.unlink()
