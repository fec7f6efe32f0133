"""A script that turns into another program, tied to the life of the process that started it: when that dies, so does it."""

# Run as `python -I -S lifeline.py PARENT_PID PROGRAM ARGUMENT...`. It sets up what must be set between fork and exec, where
# Python code of a process with threads must not run (`preexec_fn` can deadlock), and imports nothing but the standard library.

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2), kept over exec; fires when the THREAD that forked ends
OOM_SCORE = "500"
"""Under memory pressure the kernel takes the model first: it comes back by itself, the worker's requests would not."""
CANNOT_EXECUTE = 127


def tie_to(parent: int) -> None:
    """Be killed when the parent ends. Ends at once when it has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.stderr.write(f"W lifeline: no death signal: {os.strerror(ctypes.get_errno())}\n")
    if os.getppid() != parent:  # it ended before the line above
        os._exit(CANNOT_EXECUTE)


def main(parent: str, program: str, *arguments: str) -> None:
    tie_to(int(parent))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a mask is inherited; the server must hear SIGTERM
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="ascii")
    try:
        os.execv(program, [program, *arguments])  # noqa: S606 - no shell is wanted
    except OSError as error:
        sys.stderr.write(f"E lifeline: {program} cannot be started: {error.strerror}\n")
        sys.stderr.flush()
        os._exit(CANNOT_EXECUTE)


if __name__ == "__main__":
    main(*sys.argv[1:])
