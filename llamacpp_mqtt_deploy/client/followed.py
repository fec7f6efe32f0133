"""What every answer knows, whichever way its consumer waits: its events so far, its retry rules and its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from llamacpp_mqtt_deploy.client.exceptions import AnswerError, AnswerLost, BusError, RequestRejected
from llamacpp_mqtt_deploy.client.retry import RetryRules, Step
from llamacpp_mqtt_deploy.core.events import EventReader, Reading

# A consumer that falls this many events behind gets neighbouring chunks merged into one: no text is lost, memory stays
# bounded by the length of the answer.
BUFFERED_EVENTS = 4096
MOST_EVENTS = 16 * BUFFERED_EVENTS
"""Events that cannot be merged (tool calls) and that nobody takes: beyond this the answer is given up."""
MAX_ANSWER_CHARS = 64 * 1024 * 1024
"""An answer longer than this comes from no worker of ours (`limits.max_answer_bytes` is 4 MiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A finished answer. `usage` and `timings` are the protocol's; `event` is the terminal event itself.

    `message` is an assistant message that can be put into `messages` unchanged. `complete` is always true: an answer whose text
    cannot be had raises `AnswerLost` instead.
    """

    request_id: str
    session: str
    content: str
    finish_reason: str
    message: Mapping[str, Any]
    reasoning: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    warnings: tuple[str, ...] = ()
    complete: bool = True
    event: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cancelled(self) -> bool:
        return self.finish_reason == "cancelled"

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        """The tool calls of `message`; empty when there are none."""
        calls = self.message.get("tool_calls")
        return tuple(call for call in calls if isinstance(call, Mapping)) if isinstance(calls, list) else ()


class FollowedAnswer:
    """The side of an answer that the bus client works on; the consumer's side is the subclass's.

    `lock` is held over every change; `_notify` is called under it after each.
    """

    def __init__(
        self,
        *,
        session: str,
        request_id: str,
        payload: bytes,
        rules: RetryRules,
        lock: AbstractContextManager[Any],
        expects_text: bool = True,
        max_chars: int = MAX_ANSWER_CHARS,
    ) -> None:
        self.session = session
        self.request_id = request_id
        self.payload = payload
        self._rules = rules
        self._lock = lock
        self._max_chars = max_chars
        self._reader = EventReader(request_id, expects_text)
        self._pending: deque[Reading] = deque()
        self._merge_at = BUFFERED_EVENTS
        self._argument_chars = 0
        self._outcome: Done | BusError | None = None
        self._model: str | None = None
        # The worker's snapshot was too large to be told again: only the terminal event can fill the hole now.
        self._beyond_repair = False

    def _notify(self) -> None:
        """Wake the consumer: something is pending, or the end is here."""
        raise NotImplementedError

    @property
    def ended(self) -> bool:
        """The terminal event is here, or waiting was given up."""
        return self._outcome is not None

    @property
    def has_more(self) -> bool:
        """Something waits to be taken."""
        return bool(self._pending)

    @property
    def outcome(self) -> Done | BusError | None:
        """The end: what the worker made, or why there is none; None while it is awaited."""
        return self._outcome

    @property
    def content(self) -> str:
        """The text so far."""
        return self._reader.content

    @property
    def reasoning(self) -> str:
        """The model's thinking so far."""
        return self._reader.reasoning

    @property
    def sends(self) -> int:
        """How often the request was published; more than once after losses on the way."""
        return self._rules.sends

    @property
    def timeout_s(self) -> float | None:
        """The overall limit of the request, None when it names none."""
        return self._rules.timeout_s

    # --- the bus client ----------------------------------------------------------------------------------------------

    def deliver(self, event: Mapping[str, Any]) -> None:
        """Take an event of this request in order of arrival."""
        with self._lock:
            if self._outcome is not None:
                return
            accepted = self._rules.heard_anything
            known = self._reader.next_seq
            reading = self._reader.feed(event)
            if event.get("type") == "rejected":
                # Once our own request is known to the worker, a rejection is about somebody's other delivery.
                if not accepted:
                    self._end(RequestRejected(*_code_and_message(event), details=event))
                return
            if event.get("type") == "snapshot" and event.get("content_omitted"):
                self._beyond_repair = True
            self._rules.heard(time.monotonic(), progress=not self._lacks_a_chunk or self._reader.next_seq > known)
            if reading is None:
                return
            if event.get("type") == "start" and isinstance(event.get("model"), str):
                self._model = event["model"]
            self._keep(reading)
            if self._reader.terminal is not None:
                self._end(self._conclude(self._reader.terminal))
            self._notify()

    def fail(self, error: BusError) -> None:
        """End without a terminal event."""
        with self._lock:
            self._end(error)

    def decide(self, now: float, *, heartbeat_s: float, worker_online: bool) -> Step:
        """What to do about this answer now."""
        with self._lock:
            self._rules.heartbeat_s = heartbeat_s
            return self._rules.decide(
                now, hole=self._lacks_a_chunk, worker_online=worker_online, cut_short=self._reader.cut_short
            )

    def note(self, change: Callable[[RetryRules], None]) -> None:
        """Tell the rules something, under the answer's lock."""
        with self._lock:
            change(self._rules)

    @property
    def lacks_a_chunk(self) -> bool:
        """A chunk is missing that another delivery of the request may bring."""
        return self._lacks_a_chunk and not self.ended

    @property
    def cut_short(self) -> bool:
        """The worker has ended the answer, and a part of its text is still missing here."""
        return self._reader.cut_short

    @property
    def _lacks_a_chunk(self) -> bool:
        return self._reader.hole and (self._reader.cut_short or not self._beyond_repair)

    def _keep(self, reading: Reading) -> None:
        """Put it before the consumer, within the bounds."""
        self._pending.append(reading)
        if len(self._pending) >= self._merge_at:
            self._pending = _merged(self._pending)
            self._merge_at = max(BUFFERED_EVENTS, 2 * len(self._pending))
        for delta in reading.tool_calls:
            arguments = delta.get("arguments")
            self._argument_chars += len(arguments) if isinstance(arguments, str) else 0
        chars = len(self._reader.content) + len(self._reader.reasoning) + self._argument_chars
        if chars > self._max_chars or len(self._pending) > MOST_EVENTS:
            self._pending.clear()
            self._end(
                AnswerLost(
                    f"The answer was given up: it has more than {self._max_chars} characters, or nobody reads it."
                )
            )

    def _end(self, outcome: Done | BusError) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._notify()

    def _conclude(self, event: Mapping[str, Any]) -> Done | BusError:
        if event.get("type") == "error":
            known = {"type", "request_id", "session_id", "seq", "final", "code", "message", "retryable"}
            code, text = _code_and_message(event)
            details = {name: value for name, value in event.items() if name not in known}
            return AnswerError(code, text, retryable=event.get("retryable") is True, details=details)
        full = event.get("full_content")
        content = full if isinstance(full, str) else self._reader.content
        told = event.get("warnings")
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if isinstance(event.get("message"), Mapping):
            message = dict(event["message"])
        elif self._reader.tool_calls:
            message["tool_calls"] = self._reader.tool_calls
        return Done(
            request_id=self.request_id,
            session=self.session,
            content=content,
            finish_reason=str(event.get("finish_reason") or "stop"),
            message=message,
            reasoning=self._reader.reasoning,
            usage=_mapping(event.get("usage")),
            timings=_mapping(event.get("timings")),
            model=self._model,
            warnings=tuple(map(str, told)) if isinstance(told, list) else (),
            event=event,
        )


def _code_and_message(event: Mapping[str, Any]) -> tuple[str, str]:
    return str(event.get("code") or "internal"), str(event.get("message") or "The worker gave no reason.")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _merged(readings: deque[Reading]) -> deque[Reading]:
    """Neighbouring chunks of text as one; signs of life between them are left out."""
    merged: deque[Reading] = deque()
    run: list[Reading] = []
    kind = ""

    def close_run() -> None:
        if len(run) > 1:
            text = "".join(getattr(reading, kind) for reading in run)
            event = {**run[-1].event, kind: text}
            merged.append(
                Reading(event, content=text if kind == "content" else "", reasoning=text if kind != "content" else "")
            )
        else:
            merged.extend(run)
        run.clear()

    for reading in readings:
        if reading.event.get("type") in ("queued", "progress", "ping"):
            continue
        this = (
            ""
            if reading.event.get("type") != "chunk" or reading.tool_calls
            else "content"
            if reading.content
            else "reasoning"
        )
        if this != kind or not this:
            close_run()
            kind = this
        run.append(reading)
        if not this:
            close_run()
    close_run()
    return merged
