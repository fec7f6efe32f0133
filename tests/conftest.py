"""Names the modules of fixtures that the tests share, lets property tests take their time, tidies up after a library."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, Phase, settings

pytest_plugins = [
    "tests.support.broker_fixtures",
    "tests.support.engine_fixtures",
    "tests.support.loop_fixtures",
    "tests.support.postgres_fixtures",
]

# A loaded machine is no reason to fail.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# For tests/support/mutations.py, which asks only whether a test fails: the smallest example is not looked for.
settings.register_profile("unshrunk", settings.get_profile("unhurried"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unhurried"))


@pytest.fixture(autouse=True)
def _uncached_loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever sets up the log within the tests' process (the daemon does, once in its life) sets it up for one test only.

    A logger that keeps what it first found would write past `capture_logs` in every later test of this process.
    """
    configure = structlog.configure

    @wraps(configure)
    def uncached(**fields: Any) -> None:
        configure(**fields | {"cache_logger_on_first_use": False})

    before = structlog.get_config()
    configured = structlog.is_configured()
    monkeypatch.setattr(structlog, "configure", uncached)
    yield
    if structlog.get_config() != before:
        structlog.reset_defaults()
        if configured:
            configure(**before)


def pytest_unconfigure() -> None:
    """Close the two files on /dev/null that llama-cpp-python opens when it is imported and leaves open for ever: with
    warnings as errors each process of the tests would end with a complaint about them."""
    llama_cpp_utils = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        left_open = getattr(llama_cpp_utils, name, None)
        if left_open is not None:
            left_open.close()
