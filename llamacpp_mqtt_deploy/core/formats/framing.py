"""Bytes that a reader cuts where the writer meant it: JSON on one line, events of `text/event-stream`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamacpp_mqtt_deploy.core.events import encode

# Line ends by Unicode's count (a line separator, a paragraph separator, NEL): readers such as httpx's iter_lines cut there.
# JSON holds them in strings only, where an escape means the same.
_OTHER_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))


def json_line(value: Mapping[str, Any]) -> bytes:
    """Compact JSON without any kind of line end in it."""
    line = encode(value)
    for end, escape in _OTHER_LINE_ENDS:
        if end in line:
            line = line.replace(end, escape)
    return line


def ndjson(value: Mapping[str, Any]) -> bytes:
    """One line of newline-delimited JSON."""
    return json_line(value) + b"\n"


def sse_data(value: Mapping[str, Any]) -> bytes:
    """An event without a name (HTML standard, section 9.2)."""
    return b"data: " + json_line(value) + b"\n\n"


def sse_event(name: str, value: Mapping[str, Any]) -> bytes:
    """A named event; the name is a word of ours, never a client's."""
    return b"event: " + name.encode() + b"\ndata: " + json_line(value) + b"\n\n"
