"""Judges the ends of server processes: what to tell the operator, and how long to wait before the next start."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

from llamacpp_mqtt_deploy.core.shared_libraries import lacking_library
from llamacpp_mqtt_deploy.engines.managed import lifeline
from llamacpp_mqtt_deploy.ports import EngineState

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""Between two starts of a server that has crashed."""
HEALTHY_AFTER_S = 60.0
"""A server that answered this long was well: the next crash is a first one again."""
FIRST_FAILED_PAUSE_S = 10.0
LONGEST_FAILED_PAUSE_S = 300.0
"""Between two starts of a server that cannot load: it reads a whole model each time, and a person has to do something."""
LACKING_PAUSE_S = 2.0
"""Between two starts for which there is no file descriptor, process or memory."""
FAILED_AFTER_CRASHES = 3
"""So many crashes in a row before the server was ready are no bad luck."""
MOST_DOUBLINGS = 20
STARVED_FOR_S = 600.0
"""How long it is told that a server ended for lack of memory: the next one needs as much."""

_NO_MEMORY = ("out of memory", "bad_alloc", "failed to allocate", "cannot allocate memory")

Wish = Literal["", "restart", "hung", "sleep", "close"]
"""Why we wanted a server to end, if we did."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the engine is after an end, and the pause before the next start in seconds; None is until somebody asks for it."""

    state: EngineState
    detail: str
    pause_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of a server process."""

    code: int
    """Exit code, negative for a signal."""
    wish: Wish = ""
    why: str = ""
    ready_s: float | None = None
    """How long it was ready; None when it never was."""
    last: str = ""
    """What it said last."""
    out_of_memory: bool = False
    """The kernel has killed a process of ours for lack of memory meanwhile."""

    @property
    def starved(self) -> bool:
        """Whether it ended for lack of memory, as far as can be told: the kernel's killer leaves nothing but its signal."""
        if self.wish:
            return False
        return self.code == -signal.SIGKILL or any(sign in self.last for sign in _NO_MEMORY)

    @property
    def how(self) -> str:
        if self.code >= 0:
            hint = " (a library or the program itself is missing)" if self.code == lifeline.CANNOT_EXECUTE else ""
            return f"ended with exit code {self.code}{hint}"
        try:
            name = signal.Signals(-self.code).name
        except ValueError:
            name = f"signal {-self.code}"
        if self.code != -signal.SIGKILL or self.wish:
            return f"was ended by {name}"
        less = "fewer engine.slots or engine.context_tokens, or a smaller model, need less"
        if self.out_of_memory:
            return f"was killed by the kernel for lack of memory ({less})"
        return f"was killed by SIGKILL from outside, perhaps by the kernel for lack of memory (`journalctl -k` tells; {less})"


class Verdicts:
    """Remembers how often it went wrong. Its owner sees to it that one thread at a time calls it."""

    def __init__(self) -> None:
        self._failures = 0
        self._crashes_before_ready = 0
        self._ever_ready = False
        self._starved, self._starved_at, self._starved_how = 0, 0.0, ""

    def ready(self) -> None:
        """A server answers."""
        self._ever_ready = True
        self._crashes_before_ready = 0

    def forgive(self) -> None:
        """A person has asked for a new start: begin with short pauses."""
        self._failures = self._crashes_before_ready = 0

    def problem(self, now: float) -> str:
        """That servers end for lack of memory, also when the next one is ready; empty when that was long ago."""
        if not self._starved or now - self._starved_at > STARVED_FOR_S:
            return ""
        times = "once" if self._starved == 1 else f"{self._starved} times"
        return f"The engine ended {times} for lack of memory, as it seems; the last one {self._starved_how}."

    def remember(self, end: End, now: float) -> None:
        """Keep what `problem` tells."""
        if end.starved:
            self._starved, self._starved_at, self._starved_how = self._starved + 1, now, end.how

    def judge(self, end: End) -> Verdict:
        if end.wish == "close":
            return Verdict("closed", "", 0.0)
        if end.wish == "restart":
            return Verdict("restarting", "The server is started anew, as was asked for.", 0.0)
        if end.wish == "sleep":
            return Verdict("asleep", "", None)
        lacks = lacking_library(end.last) if end.ready_s is None else None
        if lacks:
            return self.cannot(f"The server cannot be started: {lacks}. `restart_engine` tries at once.")
        if end.ready_s is None:
            self._crashes_before_ready += 1
            # An exit code is the server's own decision; one that was ready before may only lack memory for a moment.
            gave_up = end.code > 0 and not self._ever_ready
            if gave_up or self._crashes_before_ready >= FAILED_AFTER_CRASHES:
                return self.cannot(
                    f"The server cannot load the model: it {end.how}. It said: {end.last.rstrip('.') or 'nothing'}. Check "
                    "engine.model_path, the memory, and engine.managed.extra_args; `restart_engine` tries at once."
                )
        elif end.ready_s >= HEALTHY_AFTER_S:
            self._failures = 0
        pause_s = self._pause(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        what = f"hung ({end.why}) and was killed" if end.wish == "hung" else end.how
        said = f" It said last: {end.last.rstrip('.')}." if end.last else ""
        return Verdict("restarting", f"The server {what}; it is started again in {pause_s:g} s.{said}", pause_s)

    def lacks(self, detail: str) -> Verdict:
        """A start for which the machine has too little just now; it has read no model yet, so the next try costs little."""
        return Verdict("restarting" if self._ever_ready else "starting", detail, LACKING_PAUSE_S)

    def cannot(self, detail: str) -> Verdict:
        """A start that is in vain until a person does something."""
        return Verdict("failed", detail, self._pause(FIRST_FAILED_PAUSE_S, LONGEST_FAILED_PAUSE_S))

    def _pause(self, first_s: float, longest_s: float) -> float:
        pause_s = min(longest_s, first_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, MOST_DOUBLINGS)
        return pause_s
