"""A script that removes the demo's directory when the demo and everything that it started has ended, in whatever way."""

# Run as `python -I -S cleanup.py DIRECTORY`; imports nothing but the standard library. Its standard input is a pipe whose
# other end the demo and its children hold: the kernel closes it with the last of them, also after SIGKILL.

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path


def main(directory: str) -> None:
    # Whoever ends the whole group or cgroup must not end this one first: it is over soon after the others.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    for _ in range(50):  # the worker's own child dies with the worker, a moment later, and may still write
        shutil.rmtree(directory, ignore_errors=True)
        if not Path(directory).exists():
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
