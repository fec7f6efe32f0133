"""Keeps this process's memory, which holds prompts and passwords, out of core files and from other processes of its user."""

from __future__ import annotations

import contextlib
import ctypes
import resource

PR_SET_DUMPABLE = 4  # prctl(2)


def forbid_core_files() -> None:
    """From here on no crash writes this process's memory anywhere, and nobody but root may attach to it.

    The limit alone is not enough: the kernel hands a core to a handler (`|...` in core(5)) whatever the limit says. The mark
    alone is not enough either: a child loses it with execve(2), and a managed engine has the prompts too.
    """
    # In our systemd unit setting limits is forbidden, and the limit is 0 already (LimitCORE=0).
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
