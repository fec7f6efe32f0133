"""What first levels have spent, for the operator (admin action `usage`), and read at the start for today's quotas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.requests import AdminCommand
from llamacpp_mqtt_deploy.core.spending import REST, LedgerRow, LevelLimits, day_of
from llamacpp_mqtt_deploy.ports import Store, StoreError
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry

log = structlog.get_logger(__name__)

_ROOM_BYTES = 512
"""Of an answer, for everything but the rows."""


class LedgerReport:
    """Reads the ledger in the store. `now` is seconds since the epoch."""

    def __init__(
        self,
        *,
        store: Store,
        limits: Callable[[], LevelLimits],
        max_event_bytes: Callable[[], int],
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._limits = limits
        self._max_event_bytes = max_event_bytes
        self._now = now

    def reconcile(self, registry: JobRegistry) -> None:
        """Let the quotas of today know what the ledger has: at the start, and now and then, since the workers of a pool have one."""
        try:
            today = day_of(self._now())
            registry.reconcile(self._store.ledger(since_day=today, until_day=today))
        except StoreError as problem:
            log.warning(
                "ledger.unreadable", problem=str(problem), message="quotas go by what was counted since the start"
            )

    def answer(self, asked: AdminCommand) -> Mapping[str, Any]:
        """The fields of the ack: as many rows as were asked for and fit into one event, and where to go on. A
        day after tomorrow is none that has been: the clock was ahead."""
        today = day_of(self._now())
        found = self._store.ledger(
            since_day=today - asked.days + 1,
            until_day=today + 1,
            first_level=asked.first_level,
            skip=asked.offset,
            most=asked.limit + 1,
        )
        limits = self._limits()
        left = self._max_event_bytes() - _ROOM_BYTES
        rows: list[dict[str, Any]] = []
        for row in found[: asked.limit]:
            fields = _fields(row, limits)
            left -= len(encode(fields)) + 1
            if left < 0 and rows:
                break
            rows.append(fields)
        answer: dict[str, Any] = {"today": day_name(today), "usage": rows}
        if len(rows) < len(found):
            answer["next_offset"] = asked.offset + len(rows)
        return answer


def day_name(day: int) -> str:
    """The day as `2026-11-21`."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)).strftime("%Y-%m-%d")


def _fields(row: LedgerRow, limits: LevelLimits) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "day": day_name(row.day),
        "first_level": row.first_level,
        "requests": row.requests,
        "tokens_in": row.tokens_in,
        "tokens_out": row.tokens_out,
        "engine_s": round(row.engine_s, 3),
    }
    most = 0 if row.first_level == REST else limits.tokens_of(row.first_level)
    return fields | ({"tokens_per_day": most} if most > 0 else {})
