"""A clock that can be set, for one process and without privileges: `time.time` of the worker reads an offset from a file."""

from __future__ import annotations

import struct
from pathlib import Path

# Python imports a module of this name at its start. The rest of the process, sqlite and the kernel included, keep the true time.
_HOOK = """
import mmap, os, struct, time
_file = open(os.environ["RIG_CLOCK"], "rb")
_offset = mmap.mmap(_file.fileno(), 8, access=mmap.ACCESS_READ)
_true, _true_ns = time.time, time.time_ns
time.time = lambda: _true() + struct.unpack("d", _offset[:8])[0]
time.time_ns = lambda: _true_ns() + int(struct.unpack("d", _offset[:8])[0] * 1e9)
"""


class SetClock:
    """The environment makes a Python process read this clock; `jump` sets it, also while the process runs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(_HOOK)
        self._path = folder / "offset"
        self._path.write_bytes(struct.pack("d", 0.0))
        self.environment = {"PYTHONPATH": str(folder), "RIG_CLOCK": str(self._path)}

    def jump(self, offset_s: float) -> None:
        """So far from the true time, from now on."""
        with self._path.open("r+b") as file:  # in place: the process has it mapped
            file.write(struct.pack("d", offset_s))
