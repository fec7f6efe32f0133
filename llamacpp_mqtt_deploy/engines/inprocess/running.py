"""One call of the in-process engine on its way through the owner's thread: what it is to do, and how its deltas come back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamacpp_mqtt_deploy.core.deltas import Delta
from llamacpp_mqtt_deploy.core.errors import IdleTimeout
from llamacpp_mqtt_deploy.core.toolparse import ToolStyle
from llamacpp_mqtt_deploy.engines.inprocess.native import AbortFlag

QUEUED_DELTAS = 256
"""Deltas that wait for a slow caller; then the generation waits too."""


class CallInterrupted(Exception):
    """The run was told to stop; who told it knows why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A call as the loop needs it: tokens and decisions, nothing of the wire."""

    tokens: list[int]
    model_name: str
    sampling: Mapping[str, Any]
    bias: Mapping[int, float]
    stop: tuple[str, ...]
    max_tokens: int | None
    grammar: str | None
    thinking_tags: tuple[str, str] | None
    thinking_inside: bool
    """The prompt ends with the opening tag."""
    thinking_open: int | None
    """The opening tag's token, where the model may think before it is held to the grammar."""
    thinking_end: list[int]
    """The tokens that end the thinking when its budget is spent."""
    thinking_budget: int | None
    tool_style: ToolStyle | None
    tool_names: tuple[str, ...]
    one_call: bool
    new_id: Callable[[], str]
    chunk_timeout_s: float
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class Run:
    """A plan on its way through the owner's thread, with the bounded queue of its deltas."""

    plan: Plan
    flag: AbortFlag = field(default_factory=AbortFlag)
    ended: threading.Event = field(default_factory=threading.Event)
    interrupted_at: float | None = None
    beat: float = field(default_factory=time.monotonic)
    """When the loop last got somewhere: a token or a batch of the prompt."""
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _deltas: deque[Delta] = field(default_factory=deque)
    _error: BaseException | None = None

    def interrupt(self) -> None:
        """Stop soon; from any thread."""
        if self.interrupted_at is None:
            self.interrupted_at = time.monotonic()
        self.flag.set()
        with self._changed:
            self._changed.notify_all()

    def give(self, deltas: Sequence[Delta]) -> None:
        """From the loop: hand deltas on, waiting for a slow caller. Raises CallInterrupted."""
        with self._changed:
            while len(self._deltas) >= QUEUED_DELTAS and self.interrupted_at is None:
                self._changed.wait()
                self.beat = time.monotonic()
            if self.interrupted_at is not None:
                raise CallInterrupted
            self._deltas.extend(deltas)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """From the owner: nothing more will come."""
        with self._changed:
            self._error = error
            self.ended.set()
            self._changed.notify_all()

    def receive(self) -> Iterator[list[Delta]]:
        """For the caller: what came together, until the end; then what the run ended with is raised.

        Raises CallInterrupted as soon as the run was told to stop, and IdleTimeout when it got nowhere for `chunk_timeout_s`,
        whether or not the loop comes back from native code.
        """
        while True:
            with self._changed:
                while not self._deltas and not self.ended.is_set() and self.interrupted_at is None:
                    left_s = self.beat + self.plan.chunk_timeout_s - time.monotonic()
                    if left_s <= 0:
                        raise IdleTimeout(f"The engine gave no token for {self.plan.chunk_timeout_s:g} s.")
                    self._changed.wait(left_s)
                if self.interrupted_at is not None:
                    raise CallInterrupted
                deltas = list(self._deltas)
                self._deltas.clear()
                ended = self.ended.is_set()
                self._changed.notify_all()
            if deltas:
                yield deltas
            if ended:
                if self._error is not None:
                    raise self._error
                return

    def rest(self, pause_s: float) -> None:
        """Let deltas collect for this long; the end of the run ends it at once."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended.is_set() or self.interrupted_at is not None, pause_s)
