"""An engine that plays scripts instead of running a model: for tests, demonstrations and first tries without a model."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llamacpp_mqtt_deploy.core.deltas import (
    Delta,
    EngineCall,
    Finished,
    FinishReason,
    Opened,
    PromptProgress,
    Reasoning,
    Text,
    TokenUsage,
    ToolCall,
)
from llamacpp_mqtt_deploy.core.errors import ContextOverflow, EngineUnavailable, IdleTimeout, RequestError, ShuttingDown
from llamacpp_mqtt_deploy.engines.draining import drain
from llamacpp_mqtt_deploy.engines.slots import Slots
from llamacpp_mqtt_deploy.ports import EngineInfo, EngineState, Unloaded
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal

REMEMBERED_CALLS = 1000  # enough for any test, and a demonstration that runs for weeks stays small


class Gate:
    """A step that holds its generation until somebody opens it; `reached` is set when the generation stands there."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._lock = threading.Lock()
        self._opened = False
        self._held: list[threading.Event] = []

    def open(self) -> None:
        with self._lock:
            self._opened = True
            for held in self._held:
                held.set()

    def wait(self, stop: StopSignal, timeout_s: float) -> bool:
        """Stand here; False when the time passed. Raises `Stopped`."""
        wake = threading.Event()
        with self._lock:
            if self._opened:
                wake.set()
            self._held.append(wake)
        forget = stop.on_stop(wake.set)
        self.reached.set()
        try:
            in_time = wake.wait(timeout_s)
            stop.raise_if_set()
            return in_time
        finally:
            forget()
            with self._lock:
                self._held.remove(wake)


@dataclass(frozen=True, slots=True)
class Silence:
    """A step that says nothing until the generation is stopped or its `chunk_timeout_s` has passed."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A step before the first delta that calls `on_wait(reason)`."""

    reason: str = "loading"


Step = Delta | str | RequestError | Gate | Silence | Wait
"""A delta as it is; a string for `Text`; an error to raise; or a place to stand. `Opened` and `Finished` may be left out."""

Script = Iterable[Step]


def echo(call: EngineCall) -> Iterator[Step]:
    """Answer with the last user message, word by word; honours `max_tokens`, forced tools, JSON formats and thinking."""
    prompt_tokens = count_words(call)
    yield PromptProgress(0, prompt_tokens, 0)
    yield PromptProgress(prompt_tokens, prompt_tokens, 0)
    if call.thinking:
        yield Reasoning("The last message comes back as it is.")
    forced = isinstance(call.tool_choice, dict) or call.tool_choice == "required"
    if call.tools and forced:
        yield ToolCall(0, "call-0", str(call.tools[0].get("function", {}).get("name", "tool")), "")
        yield ToolCall(0, None, None, "{}")
        yield Finished("tool_calls", TokenUsage(prompt_tokens=prompt_tokens, completion_tokens=2))
        return
    words = re.findall(r"\s*\S+|\s+$", "{}" if call.response_format else last_user_text(call))
    limit = int(call.sampling.get("max_tokens") or len(words))
    yield from words[:limit]
    reason: FinishReason = "length" if limit < len(words) else "stop"
    yield Finished(reason, TokenUsage(prompt_tokens=prompt_tokens, completion_tokens=min(limit, len(words))))


def text_of(content: Any) -> str:
    """The text of a message's content: the string, or its text parts joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text", "")) for part in content)
    return ""


def last_user_text(call: EngineCall) -> str:
    return next((text_of(m.get("content")) for m in reversed(call.messages) if m.get("role") == "user"), "")


def count_words(call: EngineCall) -> int:
    """The words of all messages; a word is this engine's token."""
    return sum(len(text_of(message.get("content")).split()) for message in call.messages)


class ScriptedEngine:
    """Plays one script for each call: those given to `play` in turn, else what `script` makes of the call.

    It keeps slots, waits while it is not `ready`, honours stop and `chunk_timeout_s` at every step and remembers the calls.
    It never sleeps: time passes only where a script stands at a `Gate` or in `Silence`.
    """

    def __init__(
        self,
        script: Callable[[EngineCall], Script] = echo,
        *,
        slots: int = 2,
        n_ctx: int | None = 4096,
        model: str = "scripted",
        streams: bool = True,
        unavailable_after_s: float = 60.0,
        further_models: tuple[str, ...] = (),
        count: Callable[[EngineCall], int | None] = count_words,
    ) -> None:
        self.calls: deque[EngineCall] = deque(maxlen=REMEMBERED_CALLS)
        self.restarts = 0
        self.expected = 0
        """How often a request was announced (`expect`)."""
        self.wakes = 0
        """How often a call or `keep_awake` has ended its sleep."""
        self.kept_awake: float | None = 0.0
        """Seconds of the last `keep_awake`; None is until told otherwise."""
        self._script = script
        self._played: deque[Script] = deque()
        self._slots = Slots(slots)
        self._n_ctx = n_ctx
        self._model = model
        self._models = (model, *further_models)
        self._streams = streams
        self._unavailable_after_s = unavailable_after_s
        self._count = count
        self._state: EngineState = "starting"
        self._detail = ""
        self._changed = threading.Condition()
        self._closing = StopSignal()

    # --- the hand of a test ------------------------------------------------------------------------------------------

    def play(self, *steps: Step) -> None:
        """Play these steps for the next call that has no script yet."""
        self._played.append(steps)

    def become(self, state: EngineState, detail: str = "") -> None:
        """Change the engine's condition; calls wait while it is not `ready`."""
        with self._changed:
            self._state, self._detail = state, detail
            self._changed.notify_all()

    def serve(self, *models: str) -> None:
        """Serve these models from now on."""
        with self._changed:
            self._model, self._models = models[0], models
            self._changed.notify_all()

    @property
    def busy(self) -> int:
        """Slots in use."""
        return self._slots.busy

    # --- the engine --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        if self._state == "starting":
            self.become("ready")

    def wait_ready(self, stop: StopSignal, timeout_s: float | None) -> bool:
        forget = stop.on_stop(self._wake)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._state in ("ready", "closed") or stop.is_set(), timeout_s)
                return self._state == "ready" and not stop.is_set()
        finally:
            forget()

    def info(self) -> EngineInfo:
        return EngineInfo(
            state=self._state,
            kind="scripted",
            detail=self._detail,
            backend="script",
            models=self._models,
            n_ctx=self._n_ctx,
            slots=self._slots.size,
            tools=True,
            thinking=True,
            json_schema=True,
            streams=self._streams,
            can_restart=True,
            can_unload=True,
            kept_awake=self.kept_awake != 0,
        )

    def probe(self) -> EngineInfo:
        return self.info()

    def stream(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
    ) -> Iterator[Delta]:
        stop.raise_if_set()
        self.calls.append(call)
        either = StopSignal()  # the caller's wish, or the end of the engine
        forget = [
            stop.on_stop(lambda: _pass_on(stop, either)),
            self._closing.on_stop(lambda: _pass_on(self._closing, either)),
        ]
        try:
            self._wait_until_ready(either, on_wait)
            self._slots.acquire(either)
            try:
                script = self._played.popleft() if self._played else self._script(call)
                self._refuse_overflow(call)
                yield from self._perform(script, call, either, on_wait)
            finally:
                self._slots.release()
        except Stopped:
            if stop.is_set():
                raise
            raise ShuttingDown("The worker is shutting its engine down.") from None
        finally:
            for each in forget:
                each()

    def pump(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
        feed: Callable[[Sequence[Delta]], float],
        on_slow: Callable[[], None] = lambda: None,
    ) -> Finished:
        on_slow()
        return drain(self.stream(call, stop=stop, on_wait=on_wait), feed)

    def expect(self) -> None:
        with self._changed:
            self.expected += 1

    def unsupported_fields(self, call: EngineCall) -> tuple[str, ...]:
        return ()

    def count_tokens(self, call: EngineCall, *, stop: StopSignal) -> int | None:
        stop.raise_if_set()
        return self._count(call)

    def restart(self) -> bool:
        self.restarts += 1
        return True

    def unload(self) -> Unloaded:
        with self._changed:
            if self._state not in ("ready", "asleep"):
                return "away"
            if self.busy:
                return "busy"
            self.kept_awake = 0.0
        self.become("asleep")
        return "done"

    def keep_awake(self, seconds: float | None) -> bool:
        self.kept_awake = seconds
        if seconds != 0:
            self._wake_up()
        return True

    def _wake_up(self) -> bool:
        """End the sleep; False when it did not sleep."""
        with self._changed:
            if self._state != "asleep":
                return False
            self.wakes += 1
        self.become("ready")
        return True

    def close(self, deadline: Deadline) -> None:
        self.become("closed")
        self._closing.set("shutting_down")

    def _perform(
        self, script: Script, call: EngineCall, stop: StopSignal, on_wait: Callable[[str], None]
    ) -> Iterator[Delta]:
        opened = False
        completion_tokens = 0
        for step in script:
            stop.raise_if_set()
            if not opened and not isinstance(step, Wait | RequestError | Opened):
                yield Opened(call.model or self._model, self._streams)
                opened = True
                stop.raise_if_set()
            match step:
                case Wait(reason):
                    on_wait(reason)
                case RequestError():
                    raise step
                case Gate():
                    if not step.wait(stop, call.chunk_timeout_s):
                        raise _silent(call)
                case Silence():
                    stop.wait(call.chunk_timeout_s)
                    stop.raise_if_set()
                    raise _silent(call)
                case str():
                    completion_tokens += 1
                    yield Text(step)
                case Finished():
                    yield step
                    return
                case _:
                    opened = opened or isinstance(step, Opened)
                    completion_tokens += isinstance(step, Text | Reasoning | ToolCall)
                    yield step
        stop.raise_if_set()
        if not opened:
            yield Opened(call.model or self._model, self._streams)
        yield Finished("stop", TokenUsage(prompt_tokens=self._count(call) or 0, completion_tokens=completion_tokens))

    def _wait_until_ready(self, stop: StopSignal, on_wait: Callable[[str], None]) -> None:
        stop.raise_if_set()
        if self._state == "ready":
            return
        on_wait("loading" if self._state in ("starting", "loading", "asleep") else "engine_restarting")
        self._wake_up()
        if not self.wait_ready(stop, self._unavailable_after_s):
            stop.raise_if_set()
            raise EngineUnavailable(f"The engine did not become ready within {self._unavailable_after_s:g} s.")

    def _refuse_overflow(self, call: EngineCall) -> None:
        n_prompt_tokens = self._count(call)
        if self._n_ctx is not None and n_prompt_tokens is not None and n_prompt_tokens > self._n_ctx:
            raise ContextOverflow(
                f"The request needs {n_prompt_tokens} tokens and the engine's context holds {self._n_ctx}.",
                n_prompt_tokens=n_prompt_tokens,
                n_ctx=self._n_ctx,
            )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _pass_on(source: StopSignal, target: StopSignal) -> None:
    target.set(source.reason or "cancelled")


def _silent(call: EngineCall) -> IdleTimeout:
    return IdleTimeout(f"The engine gave no token for {call.chunk_timeout_s:g} s.")
