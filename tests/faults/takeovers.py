"""How long it takes until others have what a dead worker had, as the clients hear of it (pure)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection
from dataclasses import dataclass, field

from tests.faults.history import Entry
from tests.faults.model import Broken

SETTLED_S = 4.0
"""So long after its end a fault may still hold up a takeover: workers come back to the database, and clients to the broker."""


@dataclass(slots=True, eq=False)
class Absence:
    """A worker that was killed or stopped, with the requests that it had."""

    worker: str
    fault: str
    began_at: float
    owned: set[str]
    ends_at: float | None = None
    """When it was there again; None as long as it is away."""
    seen: dict[str, float] = field(default_factory=dict)
    """Of those that another worker ended or began: when the client heard of it."""
    own: set[str] = field(default_factory=set)
    """Those that it ended itself, since it was not away for long enough."""


class Takeovers:
    """`within_s` holds where no other fault was under way at the time; what they delayed is only counted."""

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._absences: list[Absence] = []
        self._others: list[tuple[float, float | None, str]] = []

    def begin(self, worker: str, fault: str, owned: Collection[str], now: float) -> None:
        self._absences.append(Absence(worker, fault, now, set(owned)))

    def end(self, worker: str, now: float) -> None:
        for absence in self._absences:
            if absence.worker == worker and absence.ends_at is None:
                absence.ends_at = now

    def disturbed(self, fault: str, now: float, *, over: bool = False) -> None:
        """Any fault, of a worker or not, begins or ends."""
        if over:
            self._others = [
                (began, now if name == fault and ended is None else ended, name) for began, ended, name in self._others
            ]
        else:
            self._others.append((now, None, fault))

    def saw(self, entry: Entry) -> None:
        """What a client wrote down: an end, or the beginning at another worker, is what is waited for."""
        if entry.what != "event":
            return
        for absence in self._absences:
            waits = entry.request_id in absence.owned and entry.request_id not in absence.seen
            if not waits or entry.request_id in absence.own or entry.at < absence.began_at:
                continue
            event = json.loads(entry.text)
            if (event.get("type") == "start" and event.get("worker") != absence.worker) or (
                event.get("final") and event.get("code") == "interrupted"
            ):
                absence.seen[entry.request_id] = entry.at
            elif event.get("final"):
                absence.own.add(entry.request_id)

    def times(self, *, undisturbed: bool) -> list[float]:
        """Seconds from the beginning of the fault."""
        return [
            at - absence.began_at
            for absence in self._absences
            for at in absence.seen.values()
            if not undisturbed or not self._disturbance(absence)
        ]

    def close(self) -> list[Broken]:
        """What took too long, or never happened."""
        broken = []
        for absence in self._absences:
            if self._disturbance(absence):
                continue
            for request_id in sorted(absence.owned - absence.own):
                at = absence.seen.get(request_id)
                took_s = None if at is None else at - absence.began_at
                if took_s is not None and took_s > self._within_s:
                    what = f"taken over {took_s:.2f} s after {absence.fault} of {absence.worker}, not within {self._within_s:g} s"
                    broken.append(Broken("takeover", request_id, what))
                elif took_s is None:
                    what = f"{absence.worker} had it at {absence.fault}, and nobody ended or began it"
                    broken.append(Broken("takeover", request_id, what))
        return broken

    def notes(self) -> list[str]:
        """Rows of the table."""
        alone, every = self.times(undisturbed=True), self.times(undisturbed=False)
        return [
            f"requests of dead workers that others ended or ran | {len(every)}",
            f"takeover, median and worst, {len(alone)} without another fault | {_seconds(alone)}",
            f"takeover, median and worst, all | {_seconds(every)}",
        ]

    def _disturbance(self, absence: Absence) -> str:
        """A fault beside this one that was under way in the time in which its requests were to be taken over."""
        until = absence.began_at + self._within_s
        for began, ended, fault in self._others:
            there = began < until and (ended is None or ended + SETTLED_S > absence.began_at)
            if there and fault != absence.fault:
                return fault
        return ""


def _seconds(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} s, {max(times):.2f} s" if times else "none"
