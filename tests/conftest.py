"""Names the modules of fixtures that the tests share, and tidies up after a library at the end."""

from __future__ import annotations

import sys

pytest_plugins = ["tests.support.broker_fixtures", "tests.support.engine_fixtures"]


def pytest_unconfigure() -> None:
    """Close the two files on /dev/null that llama-cpp-python opens when it is imported and leaves open for ever: with
    warnings as errors each process of the tests would end with a complaint about them."""
    llama_cpp_utils = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        left_open = getattr(llama_cpp_utils, name, None)
        if left_open is not None:
            left_open.close()
