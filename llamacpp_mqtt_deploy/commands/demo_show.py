"""How `lmd demo` shows a conversation: the answer with its raw events beside it, as plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import orjson
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llamacpp_mqtt_deploy.commands.terminal import harmless, number

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import Done
    from llamacpp_mqtt_deploy.core.events import Reading

WIDE_COLUMNS = 100
REDRAW_S = 0.05  # a terminal far away (ssh) has enough to do with twenty pictures a second
SHORT_TEXT = 40
FIRST_CHUNKS = 3
INDENT = 9
"""The width of the time before an event."""

_COLOURS: Mapping[str, str] = {"chunk": "cyan", "done": "green", "error": "red", "rejected": "red"}


# --- events as text ----------------------------------------------------------------------------------------------------


def event_text(event: Mapping[str, Any], *, without_ids: bool = False) -> str:
    """The event as its line of JSON; long texts in it are cut, and the ids that every event carries may be left out."""
    shown = {key: _shortened(value) for key, value in event.items()}
    if without_ids:
        shown = {key: value for key, value in shown.items() if key not in ("request_id", "session_id")}
    return harmless(orjson.dumps(shown).decode())


def _shortened(value: Any) -> Any:
    match value:
        case str() if len(value) > SHORT_TEXT:
            return value[:SHORT_TEXT] + "…"
        case dict():
            return {key: _shortened(inner) for key, inner in value.items()}
        case list():
            return [_shortened(inner) for inner in value]
        case _:
            return value


def summary(done: Done) -> str:
    """`41 tokens in 36 chunks, the first after 12 ms, complete after 1.4 s`."""
    parts = []
    chunks = done.event.get("seq")
    tokens = number(done.usage, "completion_tokens")
    parts.append(f"{tokens:g} tokens in {chunks} chunks" if tokens is not None else f"{chunks} chunks")
    if (first := number(done.timings, "first_token_ms")) is not None:
        parts.append(f"the first after {first:.0f} ms")
    if (total := number(done.timings, "total_ms")) is not None:
        parts.append(f"complete after {total / 1000:.1f} s")
    if done.finish_reason != "stop":
        parts.append(f"ended by {done.finish_reason}")
    return ", ".join(parts)


class Turn(Protocol):
    """One question on its way to its answer."""

    def feed(self, reading: Reading) -> None:
        """Show what one event brought."""

    def end(self, done: Done | None) -> None:
        """The answer is complete, or None: something went wrong and is told elsewhere."""


# --- plain lines -------------------------------------------------------------------------------------------------------


class PlainTurn:
    """Lines in the order of their arrival, for pipes, files and terminals that cannot move the cursor.

    Of many chunks the first ones and the last are printed, with the number of those between.
    """

    def __init__(self, out: TextIO, *, prompt: str, request: tuple[str, bytes], reply_topic: str) -> None:
        self._out = out
        self._began_at = time.monotonic()
        self._answer: list[str] = []
        self._chunks = 0
        self._last_chunk = ""
        topic, payload = request
        self._line(f"> {prompt}")
        self._line(f"  publish {topic}  {payload.decode('utf-8', 'replace')}")
        self._line(f"  receive {reply_topic}")

    def feed(self, reading: Reading) -> None:
        line = f"  {time.monotonic() - self._began_at:6.3f} s  {event_text(reading.event)}"
        self._answer.append(reading.content)
        if reading.event.get("type") == "chunk":
            self._chunks += 1
            self._last_chunk = line
            if self._chunks > FIRST_CHUNKS:
                return
        else:
            self._tell_of_the_rest()
        self._line(line)

    def end(self, done: Done | None) -> None:
        self._tell_of_the_rest()
        if "".join(self._answer).strip():
            first, *rest = "".join(self._answer).strip().splitlines()
            self._line(f"< {first}")
            for line in rest:
                self._line(f"  {line}")
        if done is not None:
            self._line(f"  ({summary(done)})")
        self._line("")

    def _tell_of_the_rest(self) -> None:
        if self._chunks > FIRST_CHUNKS:
            between = self._chunks - FIRST_CHUNKS - 1
            if between:
                self._line(f"            … {between} more {'chunk' if between == 1 else 'chunks'}")
            self._line(self._last_chunk)
        self._chunks = 0

    def _line(self, text: str) -> None:
        self._out.write(harmless(text) + "\n")
        self._out.flush()


# --- a terminal --------------------------------------------------------------------------------------------------------


class LiveTurn:
    """The answer grows on the left, its events on the right; one above the other where the terminal is narrow.

    While it grows only the ends of both are shown, so that the picture stays within the screen.
    """

    def __init__(self, console: Console, *, prompt: str, request: tuple[str, bytes], reply_topic: str) -> None:
        self._console = console
        self._began_at = time.monotonic()
        self._drawn_at = 0.0
        self._prompt = harmless(prompt)
        self._answer = ""
        self._summary = ""
        topic, payload = request
        self._head = Text.assemble(
            ("publish ", "dim"), topic, " ", (harmless(payload.decode("utf-8", "replace")), "dim")
        ).append_text(Text.assemble("\n", ("receive ", "dim"), reply_topic))
        self._events: list[tuple[bool, Text]] = []
        """Each with whether it is a chunk."""
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=False)
        self._live.start()
        console.show_cursor()  # whoever kills us must not be left without one
        self._draw()

    def feed(self, reading: Reading) -> None:
        kind = str(reading.event.get("type"))
        elapsed = f"{time.monotonic() - self._began_at:6.3f} s "
        text = Text.assemble((elapsed, "dim"), (event_text(reading.event, without_ids=True), _COLOURS.get(kind, "")))
        self._events.append((kind == "chunk", text))
        self._answer += harmless(reading.content)
        now = time.monotonic()
        if now - self._drawn_at >= REDRAW_S:
            self._drawn_at = now
            self._draw()

    def end(self, done: Done | None) -> None:
        if self._live.is_started:
            self._live.stop()
            self._summary = "" if done is None else f"({summary(done)})"
            self._console.print(self._picture(None), soft_wrap=False)
            self._console.print()

    def _draw(self) -> None:
        self._live.update(self._picture(max(6, self._console.size.height - 4)), refresh=True)

    def _picture(self, height: int | None) -> RenderableType:
        """Everything in its final form when `height` is None, else the ends that fit."""
        width = self._console.size.width
        if width >= WIDE_COLUMNS:
            left, gap = (width - 3) * 2 // 5, 3
            right = width - gap - left
            grid = Table.grid(padding=(0, gap, 0, 0), pad_edge=False)
            grid.add_column(width=left, overflow="fold")
            grid.add_column(width=right, overflow="fold")
            grid.add_row(
                self._end_of(self._conversation(), left, height),
                self._end_of(self._received(right, all_of_them=height is not None), right, height),
            )
            return grid
        above = None if height is None else height // 2
        return Group(
            self._end_of(self._conversation(), width, above),
            Text(),
            self._end_of(self._received(width, all_of_them=height is not None), width, above),
        )

    def _conversation(self) -> Text:
        parts: list[Any] = [(f"> {self._prompt}\n", "bold"), self._answer.strip()]
        if self._summary:
            parts.append((f"\n{self._summary}", "dim"))
        return Text.assemble(*parts)

    def _received(self, width: int, *, all_of_them: bool) -> Text:
        lines = [self._head]
        chunks = sum(is_chunk for is_chunk, _ in self._events)
        between = 0 if all_of_them else chunks - FIRST_CHUNKS - 1
        seen = 0
        for is_chunk, text in self._events:
            seen += is_chunk
            if not is_chunk or between <= 0 or seen <= FIRST_CHUNKS or seen == chunks:
                lines += _folded(text, width)
            elif seen == FIRST_CHUNKS + 1:
                words = f"{' ' * INDENT}… {between} more {'chunk' if between == 1 else 'chunks'}"
                lines.append(Text(words, "dim"))
        return Text("\n").join(lines)

    def _end_of(self, text: Text, width: int, height: int | None) -> Text:
        if height is None:
            return text
        lines = text.wrap(self._console, width)
        return Text("\n").join(lines[-height:])


def _folded(text: Text, width: int) -> list[Text]:
    """Cut where the line is full: JSON has few blanks, and a break at one of them would look like an end."""
    step = max(10, width - INDENT)
    return [text[:width], *(Text(" " * INDENT) + text[at : at + step] for at in range(width, len(text), step))]
