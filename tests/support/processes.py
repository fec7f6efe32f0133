"""What /proc tells of processes."""

from __future__ import annotations

import contextlib
from pathlib import Path


def children_of(pid: int) -> set[int]:
    """The processes that this one has started and that are there.

    Asked of them, not of its threads: the thread that started one may end between two looks.
    """
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                after_its_name = (process / "stat").read_text().rpartition(")")[2].split()
                if int(after_its_name[1]) == pid:
                    found.add(int(process.name))
    return found
