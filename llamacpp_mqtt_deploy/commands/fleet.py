"""What `lmd top` shows of each worker, from its status and health as they come in; whatever they hold, it can be shown."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llamacpp_mqtt_deploy.commands.status import describe
from llamacpp_mqtt_deploy.commands.terminal import one_line

LANES = ("interactive", "normal", "batch")
LIVE_STATES = ("online", "draining")

_SAMPLES = 30
"""Speeds of a worker that are remembered: a quarter of an hour with the usual health every 30 s."""
_LARGEST = 1e15
"""Beyond it a number is no count and no speed, and would only fill the screen."""
_LONGEST_TEXT = 300
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPicture:
    """One worker at one moment. Texts are harmless lines, empty where nothing is known; None is a number that was not told.

    `worker` is its id as it stands in the topics, `name` the same for a terminal.
    """

    worker: str
    name: str
    state: str
    engine: str
    models: str
    problem: str
    busy: float | None
    slots: float | None
    queue: float | None
    lanes: tuple[float | None, ...]
    """Waiting requests by lane, in the order of `LANES`."""
    speed: float | None
    """Tokens per second of all answers."""
    speeds: tuple[float, ...]
    """The same in the past, the newest last."""
    first_token_ms: float | None
    done: float | None
    failed: float | None
    details: tuple[tuple[str, str], ...]
    """What is worth a line of its own when one looks at this worker alone."""

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES


@dataclass(slots=True)
class _Seen:
    """What is remembered of a worker between two looks."""

    status: Mapping[str, Any]
    seen_at: float
    age_s: float
    health_ts: object = None
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))


class Fleet:
    """The workers of a root. `now` is seconds since the epoch, `steady` monotonic seconds.

    How old a status is, is told by its own time only when it is first seen, since it may have been kept by the broker for days.
    From then on it is as old as its last renewal: the clocks of workers are not ours.
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def look(
        self,
        status: Mapping[str, Mapping[str, Any]],
        health: Mapping[str, Mapping[str, Any]],
        *,
        now: float,
        steady: float,
    ) -> list[WorkerPicture]:
        """All workers in the order of their names."""
        self._seen = {worker: seen for worker, seen in self._seen.items() if worker in status}
        return [self._picture(worker, status[worker], health.get(worker, {}), now, steady) for worker in sorted(status)]

    def _picture(
        self, worker: str, status: Mapping[str, Any], health: Mapping[str, Any], now: float, steady: float
    ) -> WorkerPicture:
        seen = self._note(worker, status, now, steady)
        made_at = _finite(status.get("ts"))
        age_s = seen.age_s + steady - seen.seen_at
        row = describe(worker, status, health, now=now if made_at is None else made_at + age_s)
        if row.state not in LIVE_STATES:
            health = {}  # of the time before
        speed = number(health.get("tokens_per_second"))
        if health.get("ts") != seen.health_ts:
            seen.health_ts = health.get("ts")
            if speed is not None:
                seen.speeds.append(speed)
        slots, lanes, requests = (_mapping(health.get(name)) for name in ("slots", "lanes", "requests"))
        total = number(slots.get("total"))
        problems = [_short(text) for text in (row.problem, one_line(status.get("problem") or "")) if text]
        return WorkerPicture(
            worker=worker,
            name=_short(row.worker, 64),
            state=_short(row.state, 16),
            engine=_short(row.engine, 40),
            models=_short(row.models),
            problem="; ".join(problems),
            busy=number(slots.get("busy")),
            slots=number(status.get("slots")) if total is None else total,
            queue=number(health.get("queue")),
            lanes=tuple(number(lanes.get(lane)) for lane in LANES),
            speed=speed,
            speeds=tuple(seen.speeds),
            first_token_ms=number(health.get("first_token_ms")),
            done=number(requests.get("done")),
            failed=number(requests.get("failed")),
            details=tuple(_details(status, health)),
        )

    def _note(self, worker: str, status: Mapping[str, Any], now: float, steady: float) -> _Seen:
        seen, made_at = self._seen.get(worker), _finite(status.get("ts"))
        if seen is None:
            age_s = 0.0 if made_at is None else max(0.0, now - made_at)
            seen = self._seen[worker] = _Seen(status, steady, age_s)
        elif seen.status is not status:
            if seen.status != status:
                seen.seen_at, seen.age_s = steady, 0.0
            seen.status = status
        return seen


def number(value: object) -> float | None:
    """The value where it can be a count or a speed; a whole number stays one."""
    found = _finite(value)
    if found is None or not 0 <= found <= _LARGEST:
        return None
    return int(found) if isinstance(value, int) else found


def figure(value: float | None) -> str:
    """A count or a speed for a person, short; empty where nothing is known."""
    if value is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}" if value >= 100 or float(value).is_integer() else f"{value:.1f}"


def span(milliseconds: float | None) -> str:
    """A time for a person; empty where nothing is known."""
    if milliseconds is None:
        return ""
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def share(busy: float | None, slots: float | None) -> str:
    """`1/2`; empty where nothing is known."""
    return "" if slots is None else f"{'?' if busy is None else figure(busy)}/{figure(slots)}"


def sparkline(speeds: tuple[float, ...], width: int) -> str:
    """The newest speeds as bars, the largest one the highest; none is lower than the lowest bar."""
    shown = speeds[-width:]
    top = max(shown, default=0.0)
    if top <= 0:
        return _BARS[0] * len(shown)
    return "".join(_BARS[min(len(_BARS) - 1, round(speed / top * (len(_BARS) - 1)))] for speed in shown)


def _details(status: Mapping[str, Any], health: Mapping[str, Any]) -> list[tuple[str, str]]:
    errors = {
        one_line(code)[:40]: count
        for code, told in list(_mapping(health.get("errors")).items())[:20]
        if (count := number(told))
    }
    tokens = _mapping(health.get("tokens"))
    memory = number(health.get("rss_bytes"))
    uptime = number(health.get("uptime_s"))
    found = [
        ("version", one_line(status.get("version") or "")),
        ("pool", one_line(status.get("pool") or "")),
        ("host", one_line(status.get("host") or "")),
        ("context", figure(number(status.get("n_ctx")))),
        ("up", "" if uptime is None else _uptime(uptime)),
        ("memory", "" if memory is None else f"{memory / 2**20:.0f} MiB"),
        ("tokens in", figure(number(tokens.get("prompt")))),
        ("cached", figure(number(tokens.get("cached")))),
        ("out", figure(number(tokens.get("completion")))),
        ("reconnects", figure(number(health.get("reconnects")))),
        ("errors", ", ".join(f"{code or '?'} {figure(count)}" for code, count in errors.items())),
    ]
    return [(name, _short(text)) for name, text in found if text]


def _uptime(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _short(text: str, most: int = _LONGEST_TEXT) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer that no float holds
        return None
    return found if math.isfinite(found) else None
