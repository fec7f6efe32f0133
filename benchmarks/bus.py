"""The same load over the bus, by a client that only notes bytes and time while it runs and decodes them afterwards."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from benchmarks.lean_mqtt import LeanClient, Received
from benchmarks.samples import SILENCE_S, Load, LoadFailed, Sample, prompt

# `type` is the first field of every event.
_CHUNK, _DONE, _ERROR = b'{"type":"chunk"', b'{"type":"done"', b'{"type":"error"'
_STEP_S = 0.5

_Reply = tuple[float, dict[str, Any], bytes]


class Bus:
    """A connection that hears every reply, status and health. Sessions are `s0`, `s1` ... one for each stream."""

    def __init__(self, port: int, *, root: str, protocol: str = "5", qos: int = 1) -> None:
        self._port, self._root, self._protocol, self._qos = port, root, protocol, qos
        self._reply = f"{root}/reply/".encode()
        self._numbers = itertools.count()
        self._made: LeanClient | None = None

    def __enter__(self) -> Self:
        self._made = LeanClient(self._port, protocol=self._protocol, client_id=f"bench-{time.monotonic_ns()}")
        self._made.subscribe(f"{self._root}/reply/#", f"{self._root}/status/#", f"{self._root}/health/#", qos=self._qos)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    @property
    def received(self) -> list[Received]:
        return self._client.received

    @property
    def _client(self) -> LeanClient:
        assert self._made is not None, "not entered"
        return self._made

    # --- by hand -------------------------------------------------------------------------------------------------------

    def until(self, held: Callable[[], object], timeout_s: float) -> None:
        ends_at = time.monotonic() + timeout_s
        while not held():
            if time.monotonic() > ends_at:
                raise LoadFailed(f"not within {timeout_s:g} s; last heard: {self.received[-3:]}")
            self._client.step(0.005)

    def listen(self, for_s: float) -> None:
        """Take in what comes in this time."""
        ends_at = time.monotonic() + for_s
        while (left_s := ends_at - time.monotonic()) > 0:
            self._client.step(left_s)

    def events(self, request_id: str) -> list[tuple[float, dict[str, Any]]]:
        """The events of this request so far, with their times; not the answers to what was asked about it."""
        replies = [(at, event) for at, event, _ in self._replies() if event.get("request_id") == request_id]
        return [(at, event) for at, event in replies if event["type"] != "ack"]

    def _replies(self) -> Iterator[_Reply]:
        for at, topic, payload in self.received:
            if topic.startswith(self._reply):
                yield at, json.loads(payload), payload

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The `status` or `health` messages so far."""
        head = f"{self._root}/{kind}/".encode()
        return [json.loads(payload) for _, topic, payload in self.received if topic.startswith(head) and payload]

    def ask(self, session: str, text: str, **fields: Any) -> tuple[str, float]:
        """Publish a request; its id and when that was."""
        request_id = f"r{next(self._numbers)}-{time.monotonic_ns()}"
        payload = json.dumps({"request_id": request_id, "prompt": text, **fields}).encode()
        at = time.monotonic()
        self._client.publish(f"{self._root}/request/{session}", payload, qos=self._qos)
        return request_id, at

    def tell(self, session: str, **fields: Any) -> float:
        """Publish a control message; when that was."""
        at = time.monotonic()
        self._client.publish(f"{self._root}/control/{session}", json.dumps(fields).encode(), qos=1)
        return at

    # --- a load --------------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        streams: int,
        requests: int,
        max_tokens: int,
        make_prompt: Callable[[], str] = prompt,
        session: Callable[[int, int], str] = lambda stream, _: f"s{stream}",
        new: bool = True,
        word: bytes = b"",
    ) -> Load:
        """So many streams at once, each asking `requests` times, one after another; `session` is made of both numbers.

        With a `word` that each token is, the arrival of every token is noted.
        """
        self.received.clear()
        asked: dict[str, float] = {}
        left = dict.fromkeys(range(streams), requests)
        stream_of: dict[bytes, int] = {}

        def ask(stream: int) -> None:
            left[stream] -= 1
            name = session(stream, left[stream])
            stream_of[self._reply + name.encode()] = stream
            fields = {"new": True} if new else {}
            request_id, at = self.ask(name, make_prompt(), max_tokens=max_tokens, **fields)
            asked[request_id] = at

        for stream in range(streams):
            ask(stream)
        seen, ended, heard_at = 0, 0, time.monotonic()
        while ended < streams * requests:
            self._client.step(_STEP_S)
            now = time.monotonic()
            if seen < len(self.received):
                heard_at = now
            elif now - heard_at > SILENCE_S:
                raise LoadFailed(f"the bus was silent for {SILENCE_S:g} s; {ended} of {streams * requests} ended")
            while seen < len(self.received):
                _, topic, payload = self.received[seen]
                seen += 1
                if payload.startswith((_DONE, _ERROR)):
                    ended += 1
                    if left[stream := stream_of[topic]]:
                        ask(stream)
        return Load(_samples(self._replies(), asked, word))


def _samples(replies: Iterable[_Reply], asked: dict[str, float], word: bytes) -> list[Sample]:
    chunks: dict[str, list[tuple[float, bytes]]] = {request_id: [] for request_id in asked}
    samples = []
    for at, event, payload in replies:
        request_id, kind = event.get("request_id"), event["type"]
        if request_id not in asked:
            continue
        if kind == "error":
            raise LoadFailed(f"the worker said {event['code']}: {event['message']}")
        if kind == "chunk":
            chunks[request_id].append((at, payload))
        if kind == "done":
            usage, parts = event["usage"], chunks.pop(request_id)
            samples.append(
                Sample(
                    asked=asked[request_id],
                    first=parts[0][0] if parts else at,
                    ended=at,
                    tokens=usage["completion_tokens"],
                    prompt_tokens=usage["prompt_tokens"],
                    cached_tokens=usage.get("cached_tokens", 0),
                    chunks=len(parts),
                    arrivals=tuple(when for when, part in parts for _ in range(part.count(word))) if word else (),
                )
            )
    return samples
