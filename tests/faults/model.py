"""The contract as a reference model: what a history of events may be, request by request (pure).

It shares no code with the package's own client. `Story` follows one request id over everything that was ever delivered for it,
repeats included, and collects what breaks a promise of docs/protocol.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

COMMON = ("type", "request_id", "session_id")
TYPES = ("queued", "start", "progress", "chunk", "ping", "snapshot", "done", "error", "rejected")

# Ends that some fault explains; all others (bad_request, busy, timeout ...) would be the worker's fault.
EXPLAINED = frozenset({"engine_lost", "interrupted", "engine_unavailable", "idle_timeout", "shutting_down"})


@dataclass(frozen=True, slots=True)
class Broken:
    """A promise that was not kept."""

    promise: Literal["lost", "twice", "torn", "hole", "form", "code", "history", "slot", "process", "stuck", "takeover"]
    request_id: str
    what: str


@dataclass(slots=True)
class Text:
    """The client's rules for one text: chunks in order of `seq`, a snapshot fills a hole, the end has the last word."""

    content: str = ""
    next_seq: int = 0
    hole: bool = False
    ended: bool = False
    torn: str = ""
    """Why the texts do not belong together."""

    def chunk(self, seq: int, content: str) -> None:
        if self.ended or seq < self.next_seq:
            return
        if seq > self.next_seq:
            self.hole = True
            return
        self.content += content
        self.next_seq += 1

    def snapshot(self, next_seq: int, content: str | None) -> None:
        if self.ended or next_seq < self.next_seq or content is None:
            return
        self._take(content, "the snapshot")
        self.next_seq = next_seq
        self.hole = False

    def end(self, seq: int | None, content: str | None) -> bool:
        """Whether nothing is missing any more."""
        if self.ended:
            return True
        if content is not None:
            self._take(content, "the end")
        elif seq is not None and seq > self.next_seq:
            self.hole = True
            return False
        self.ended, self.hole = True, False
        return True

    def _take(self, content: str, whose: str) -> None:
        if not content.startswith(self.content) and not self.torn:
            self.torn = f"{whose} says {_short(content)}, the chunks said {_short(self.content)}"
        self.content = content


@dataclass(slots=True)
class Story:
    """All events of one request id, in order of delivery."""

    request_id: str
    session_id: str
    expected: str | None = None
    """The right answer, where it depends on the prompt alone."""
    cancelled: bool = False
    explained: frozenset[str] = EXPLAINED
    text: Text = field(default_factory=Text)
    terminal: dict[str, Any] | None = None
    accepted: bool = False
    broken: list[Broken] = field(default_factory=list)
    _terminal_payload: str = ""
    _chunks: dict[int, tuple[str, Any]] = field(default_factory=dict)
    _snapshots: list[tuple[int, str]] = field(default_factory=list)

    def feed(self, topic: str, payload: str) -> dict[str, Any] | None:
        """Take one event; returns it when it has the form of one."""
        event = self._formed(topic, payload)
        if event is None:
            return None
        match event["type"]:
            case "chunk":
                self._chunk(event)
            case "snapshot":
                content = None if event.get("content_omitted") else str(event["content"])
                if content is not None:
                    self._snapshots.append((event["next_seq"], content))
                self.text.snapshot(event["next_seq"], content)
            case "done" | "error":
                self._end(event, payload)
            case "rejected":
                self._break("form", f"rejected though the same bytes were sent: {event.get('code')}")
        if event["type"] != "rejected":
            self.accepted = True
        return event

    def close(self, *, wait_over: bool = True) -> list[Broken]:
        """What is broken now that nothing more will come."""
        if self.terminal is None and wait_over:
            self._break("lost", f"no terminal event, {len(self._chunks)} chunks; accepted: {self.accepted}")
        if self.text.torn:
            self._break("torn", self.text.torn)
        if self.terminal is not None:
            self._check_end(self.terminal)
        return self.broken

    # --- events --------------------------------------------------------------------------------------------------------

    def _formed(self, topic: str, payload: str) -> dict[str, Any] | None:
        try:
            event = json.loads(payload)
        except ValueError:
            self._break("form", f"no JSON: {_short(payload)}")
            return None
        if not isinstance(event, dict) or any(name not in event for name in COMMON) or event["type"] not in TYPES:
            self._break("form", f"no event: {_short(payload)}")
            return None
        if event["session_id"] != self.session_id or not topic.endswith(f"/{self.session_id}"):
            self._break("form", f"of session {event['session_id']} on {topic}, asked in {self.session_id}")
        if "\n" in payload:
            self._break("form", "more than one line")
        return event

    def _chunk(self, event: dict[str, Any]) -> None:
        seq = event.get("seq")
        kinds = [name for name in ("content", "reasoning", "tool_calls") if event.get(name)]
        if not isinstance(seq, int) or len(kinds) != 1:
            self._break("form", f"a chunk with seq {seq} and {kinds}")
            return
        said = (kinds[0], event[kinds[0]])
        if self._chunks.setdefault(seq, said) != said:
            self._break("twice", f"chunk {seq} was {self._chunks[seq]!r} and is {said!r}")
        self.text.chunk(seq, said[1] if said[0] == "content" else "")

    def _end(self, event: dict[str, Any], payload: str) -> None:
        if event.get("final") is not True:
            self._break("form", "a terminal event without final")
        if self.terminal is None:
            self.terminal, self._terminal_payload = event, payload
        elif payload != self._terminal_payload:
            self._break("twice", f"ended with {_short(self._terminal_payload)} and with {_short(payload)}")
        self.text.end(event.get("seq"), _text_of(event))

    def _check_end(self, end: dict[str, Any]) -> None:
        full = _text_of(end)
        count = end.get("seq")
        if isinstance(count, int) and self._chunks and max(self._chunks) >= count:
            self._break("torn", f"the end counts {count} chunks, number {max(self._chunks)} came")
        if not self.text.ended:
            self._break("hole", f"chunks up to {self.text.next_seq} of {count}, and the end brings no text")
        text = self.text.content if full is None else full
        # `interrupted` has neither seq nor text: what came may be less than what was sent, so it is a beginning.
        whole = end["type"] == "done" and self.text.ended
        self._check_pieces(text, whole=whole, count=count if isinstance(count, int) else None)
        if end["type"] == "error" and end.get("code") not in self.explained:
            self._break("code", f"{end.get('code')}: {end.get('message')}")
        if end["type"] == "done" and end.get("finish_reason") == "cancelled" and not self.cancelled:
            self._break("code", "cancelled, and nobody asked for it")
        if self.expected is not None:
            complete = end["type"] == "done" and end.get("finish_reason") != "cancelled" and self.text.ended
            right = text == self.expected if complete else self.expected.startswith(text)
            if not right:
                self._break("torn", f"{_short(text)} where {_short(self.expected)} is right")

    def _check_pieces(self, text: str, *, whole: bool, count: int | None) -> None:
        """Every chunk and snapshot that was ever seen is a piece of the one text."""
        known = "".join(str(self._chunks[seq][1]) for seq in range(len(self._chunks)) if seq in self._chunks)
        complete = len(self._chunks) == (max(self._chunks) + 1 if self._chunks else 0)
        contents = all(kind == "content" for kind, _ in self._chunks.values())
        if whole and complete and contents and count == len(self._chunks) and count and known != text:
            self._break("torn", f"the chunks joined are {_short(known)}, the end says {_short(text)}")
        for next_seq, content in self._snapshots:
            if not text.startswith(content) and not content.startswith(text):
                self._break("torn", f"a snapshot at {next_seq} says {_short(content)}, the text is {_short(text)}")
        if contents and not all(str(value) in (text or str(value)) for _, value in self._chunks.values()) and whole:
            self._break("torn", f"a chunk is not in {_short(text)}")

    def _break(self, promise: Any, what: str) -> None:
        broken = Broken(promise, self.request_id, what)
        if broken not in self.broken:
            self.broken.append(broken)


def history_of(turns: Sequence[tuple[str, dict[str, Any] | None]]) -> list[dict[str, str]]:
    """What a session remembers after these prompts with their terminal events, in order: only `done`, cancelled ones if there
    was text."""
    messages = []
    for prompt, end in turns:
        if end is None or end["type"] != "done":
            continue
        answer = _text_of(end) or ""
        if end["finish_reason"] == "cancelled" and not answer:
            continue
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return messages


def _text_of(end: dict[str, Any]) -> str | None:
    found = end.get("full_content", end.get("partial_content"))
    return found if isinstance(found, str) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:90]}...{text[-60:]}")
