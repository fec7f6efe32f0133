"""Programs and modules that some tests need: a skip with its reason on a laptop, a failure in CI."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

# Debian keeps daemons out of a user's PATH.
_SYSTEM_PATHS = ("/usr/sbin", "/usr/local/sbin", "/sbin", "/usr/lib/systemd")


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def require_program(name: str) -> str:
    """The path of a program, or the end of the test."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM_PATHS]))
    if path is None:
        missing(f"the program {name} is not installed")
    return path


def missing(reason: str) -> NoReturn:
    """End the test for want of a service."""
    if in_ci():
        pytest.fail(f"{reason}, and in CI that is a failure")
    pytest.skip(reason)
