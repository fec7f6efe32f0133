"""Draws docs/top.svg: `lmd top` beside four workers that are played. `make top-picture` runs it.

The picture is textual's own export, of the application as it is; a test looks whether its text is still that of docs/top.svg.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamacpp_mqtt_deploy.commands.fleet import Fleet
from llamacpp_mqtt_deploy.commands.top_app import Look, TopApp

PICTURE = Path(__file__).resolve().parent / "top.svg"
_NOW = 1_795_276_902.0
_SIZE = (118, 22)
_CORE: dict[str, Any] = {"ts": _NOW, "every_s": 10, "version": "0.1.0", "n_ctx": 8192}
_PROBLEMS = [
    {
        "ts": "2026-11-21T15:58:03Z",
        "level": "warning",
        "event": "link.lost",
        "text": "reason=the broker closed the connection",
    },
    {
        "ts": "2026-11-21T16:01:12Z",
        "level": "error",
        "event": "store.troubled",
        "text": "problem=The disk is full: free some space.",
    },
]
_SPEEDS: Mapping[str, tuple[float, ...]] = {
    "attic": (4, 5, 3, 5, 6, 5, 4, 6, 5, 5, 6, 5.4),
    "cellar": (0, 12, 30, 22, 8, 0, 0, 3, 18, 31, 28, 24),
    "kitchen": (60, 75, 88, 96, 84, 90, 118, 110, 96, 121, 125, 118.2),
}


def _health(
    number: int, worker: str, busy: int, total: int, lanes: tuple[int, int, int], first_token_ms: float
) -> dict[str, Any]:
    return {
        "ts": _NOW + number,
        "slots": {"busy": busy, "total": total},
        "queue": sum(lanes),
        "lanes": dict(zip(("interactive", "normal", "batch"), lanes, strict=True)),
        "tokens_per_second": _SPEEDS[worker][number],
        "first_token_ms": first_token_ms,
        "requests": {"done": 100 * total + number, "failed": total},
        "errors": {"busy": 3, "rate_limited": 2},
        "tokens": {"prompt": 812_000, "cached": 640_000, "completion": 233_000},
        "rss_bytes": 71 * 2**20,
        "uptime_s": 3.2 * 86400,
    }


class _Played:
    """Four workers, one look for each sample of their speeds."""

    place = "llm at broker.lan:8883"

    def __init__(self) -> None:
        self.number = 0
        self._fleet = Fleet()

    def look(self) -> Look:
        engine = {"state": "ready", "backend": "cuda"}
        status: dict[str, dict[str, Any]] = {
            "attic": _CORE
            | {"state": "draining", "engine": {"state": "ready", "backend": "cpu"}, "models": ["qwen3-0.6b"]},
            "cellar": _CORE | {"state": "online", "engine": engine, "models": ["qwen3-8b"]},
            "garage": {"state": "offline", "reason": "lost", "ts": _NOW},
            "kitchen": _CORE
            | {"state": "online", "engine": engine, "models": ["qwen3-8b", "gemma3-12b"], "host": "kitchen.lan"}
            | {"problem": "The disk is full: free some space."},
        }
        health = {
            "attic": _health(self.number, "attic", 1, 1, (0, 0, 0), 2100.0),
            "cellar": _health(self.number, "cellar", 2, 4, (0, 0, 0), 190.0),
            "kitchen": _health(self.number, "kitchen", 8, 8, (1, 5, 3), 240.0),
        }
        return Look(workers=self._fleet.look(status, health, now=_NOW, steady=0.0), connected=True)

    def admin(self, worker: str, action: str, **fields: Any) -> Mapping[str, Any]:
        return {"status": "ok", "problems": _PROBLEMS}


def picture() -> str:
    """The application after a dozen looks, with the problems of one worker, as SVG."""
    played = _Played()
    app = TopApp(played, every_s=3600)

    async def run() -> str:
        async with app.run_test(size=_SIZE) as pilot:
            for played.number in range(len(_SPEEDS["kitchen"])):
                app.refresh_picture()
            await pilot.press("down", "down", "down", "l")
            while not app.logs_of("kitchen"):
                await pilot.pause(0.02)
            await pilot.pause()
            # Without the fonts of a server that nobody asked for: every system has some of one width.
            return re.sub(r"\s*@font-face \{.*?\}", "", app.export_screenshot(title="lmd top"), flags=re.DOTALL)

    return asyncio.run(run())


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
