"""Reads the bodies of streamed answers as strictly as their standards allow, to test who writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llamacpp_mqtt_deploy.core.formats.rendering import Renderer


def rendered(renderer: Renderer, events: Iterable[Mapping[str, Any]], *, pings: bool = True) -> bytes:
    """The whole body of a stream, with a ping after each event; asserts that nothing follows its end."""
    body = b""
    for event in events:
        assert not renderer.ended
        body += renderer.event(event)
        if pings:
            body += renderer.ping()
    assert renderer.ended
    assert renderer.event({"type": "chunk", "request_id": "r1", "seq": 99, "content": "late"}) == b""
    assert renderer.ping() == b""
    return body


def sse(body: bytes) -> list[tuple[str, str]]:
    """Name and data of each event; asserts that each data is one line by every reader's count of lines."""
    text = body.decode("utf-8")
    assert not text or text.endswith("\n\n")
    assert text.splitlines() == text.removesuffix("\n").split("\n") or not text
    events = []
    for block in text.split("\n\n")[:-1]:
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            if line.startswith(":"):
                continue
            name, colon, value = line.partition(": ")
            assert colon, f"no field: {line!r}"
            assert name in ("event", "data"), f"unknown field: {line!r}"
            assert name not in fields, f"{name} stands twice in one event"
            fields[name] = value
        if fields:
            assert "data" in fields
            events.append((fields.get("event", "message"), fields["data"]))
    return events


def sse_objects(body: bytes) -> list[dict[str, Any]]:
    """The data of each event as JSON; a `[DONE]` must have been taken off before."""
    return [json.loads(data) for _, data in sse(body)]


def json_lines(body: bytes) -> list[dict[str, Any]]:
    """Newline-delimited JSON; asserts that every reader's count of lines is the same."""
    text = body.decode("utf-8")
    assert not text or text.endswith("\n")
    lines = text.split("\n")[:-1]
    assert text.splitlines() == lines
    return [json.loads(line) for line in lines]
