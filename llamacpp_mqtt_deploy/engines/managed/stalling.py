"""Tells a server that works on something long from one that hangs, by what its slots say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llamacpp_mqtt_deploy.engines.server.questions import SlotProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class Vigilance:
    """How closely a server is watched. Each look at the slots puts off what the server does about clients that have gone, so
    looks are rare."""

    busy_every_s: float = 3.0
    idle_every_s: float = 10.0
    loading_every_s: float = 0.1
    answer_within_s: float = 5.0
    deaf_after_s: float = 10.0
    """Not even the page that needs no model is answered: the process is stopped, or all its threads wait for one lock."""
    deaf_loading_after_s: float = 120.0
    stuck_after_s: float
    """A slot works and does not move, or the decoding thread answers no question. A slow machine needs a while for one step
    of a prompt, so this is the silence that the operator allows a generation, and a little more."""


class StallWatch:
    """Fed with looks at one server process; says in words when it hangs. Times are monotonic seconds."""

    def __init__(self, vigilance: Vigilance) -> None:
        self._vigilance = vigilance
        self._moved: dict[int, tuple[tuple[int | None, int, int], float]] = {}
        self._deaf_since: float | None = None
        self._silent_since: float | None = None

    @property
    def doubtful(self) -> bool:
        """At the last look a slot worked or nothing was answered: look again, even when nothing of ours is in flight. A
        request that gave up in front of a hanging server leaves the slot behind that shows it."""
        return bool(self._moved) or self._silent_since is not None

    def reached(self, answered: bool, asked_at: float, now: float) -> str | None:
        """The server was asked for a page that needs no model."""
        return self._deaf(answered, asked_at, now, self._vigilance.deaf_after_s)

    def loading(self, answered: bool, asked_at: float, now: float) -> str | None:
        """The same while it loads, when it may leave the machine little time for anything else."""
        return self._deaf(answered, asked_at, now, self._vigilance.deaf_loading_after_s)

    def _deaf(self, answered: bool, asked_at: float, now: float, limit_s: float) -> str | None:
        if answered:
            self._deaf_since = None
            return None
        self._deaf_since = asked_at if self._deaf_since is None else self._deaf_since
        waited_s = now - self._deaf_since
        return f"it answers nothing for {waited_s:.0f} s" if waited_s >= limit_s else None

    def saw(self, slots: Iterable[SlotProgress] | None, asked_at: float, now: float) -> str | None:
        """A look at the slots; None when the question was not answered."""
        limit_s = self._vigilance.stuck_after_s
        if slots is None:
            self._silent_since = asked_at if self._silent_since is None else self._silent_since
            waited_s = now - self._silent_since
            return f"its decoding thread answers nothing for {waited_s:.0f} s" if waited_s >= limit_s else None
        self._silent_since = None
        for slot in slots:
            if not slot.working:
                self._moved.pop(slot.id, None)
                continue
            place = (slot.task, slot.prompt_tokens_processed, slot.tokens_decoded)
            before = self._moved.get(slot.id)
            if before is None or before[0] != place:
                self._moved[slot.id] = (place, now)
            elif now - before[1] >= limit_s:
                return f"its slot {slot.id} works and does not move for {now - before[1]:.0f} s"
        return None
