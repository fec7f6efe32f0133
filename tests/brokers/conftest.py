"""A worker as a process, with any broker and the fixtures of tests/service."""

from __future__ import annotations

from tests.service.conftest import start_worker, watch

__all__ = ["start_worker", "watch"]
