"""Server-sent events straight from the engine's server: plain sockets, one thread, nothing decoded before the end."""

from __future__ import annotations

import bisect
import itertools
import json
import re
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.samples import SILENCE_S, Load, LoadFailed, Sample, prompt

_TEXT = b'"content":"'
_LAST = b"\r\n0\r\n\r\n"
_USAGE = re.compile(rb'"usage":(\{.*?\})(?:,"timings"|\}\n)', re.DOTALL)


def body(text: str, max_tokens: int, **fields: Any) -> bytes:
    """The JSON of a streamed completion request."""
    wanted = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    return json.dumps(wanted).encode()


def request(content: bytes) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )


@dataclass(slots=True)
class _Stream:
    left: int
    asked: float = 0.0
    first: float = 0.0
    received: list[tuple[float, bytes]] = field(default_factory=list)
    socket: socket.socket | None = None


def run_direct(
    port: int,
    *,
    streams: int,
    requests: int,
    max_tokens: int,
    make_prompt: Callable[[], str] = prompt,
    word: bytes = b"",
) -> Load:
    """So many streams at once, each asking `requests` times, one after another, on a new connection each time.

    With a `word` that each token is, the arrival of every token is noted.
    """
    load = Load()
    with selectors.DefaultSelector() as selector:
        for _ in range(streams):
            _ask(_Stream(requests), selector, port, body(make_prompt(), max_tokens))
        while selector.get_map():
            ready = selector.select(SILENCE_S)
            if not ready:
                raise LoadFailed(f"the engine on port {port} was silent for {SILENCE_S:g} s")
            for key, _ in ready:
                stream: _Stream = key.data
                if _read(stream):
                    load.samples.append(_sample(stream, word))
                    _hang_up(stream, selector)
                    if stream.left:
                        _ask(stream, selector, port, body(make_prompt(), max_tokens))
    return load


def _ask(stream: _Stream, selector: selectors.BaseSelector, port: int, content: bytes) -> None:
    stream.left -= 1
    stream.received, stream.first = [], 0.0
    stream.asked = time.monotonic()
    stream.socket = socket.create_connection(("127.0.0.1", port))
    stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.socket.sendall(request(content))
    selector.register(stream.socket, selectors.EVENT_READ, stream)


def _read(stream: _Stream) -> bool:
    """Take what is there; whether the answer has ended."""
    assert stream.socket is not None
    data = stream.socket.recv(65536)
    at = time.monotonic()
    stream.received.append((at, data))
    if not stream.first and _TEXT in data:
        stream.first = at
    return not data or data.endswith(_LAST)


def _sample(stream: _Stream, word: bytes) -> Sample:
    ended = stream.received[-1][0]
    answer = b"".join(data for _, data in stream.received)
    found = _USAGE.search(answer)
    if found is None:
        raise LoadFailed(f"the engine's answer has no usage: {answer[-500:]!r}")
    usage = json.loads(found[1])
    return Sample(
        asked=stream.asked,
        first=stream.first or ended,
        ended=ended,
        tokens=usage["completion_tokens"],
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        arrivals=_arrivals(stream, answer, word) if word else (),
    )


def _arrivals(stream: _Stream, answer: bytes, word: bytes) -> tuple[float, ...]:
    """The time of the read that brought the end of each token."""
    ends = list(itertools.accumulate(len(data) for _, data in stream.received))
    found = re.finditer(re.escape(_TEXT) + b" ?" + re.escape(word), answer)
    return tuple(stream.received[bisect.bisect_left(ends, match.end())][0] for match in found)


def _hang_up(stream: _Stream, selector: selectors.BaseSelector) -> None:
    assert stream.socket is not None
    selector.unregister(stream.socket)
    stream.socket.close()
