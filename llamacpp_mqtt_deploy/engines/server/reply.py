"""Reads a server's answer to one completion request: events as they come, or one JSON document."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from llamacpp_mqtt_deploy.core.completion_stream import CompletionStream
from llamacpp_mqtt_deploy.core.completions import CompletionReader
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished, Opened
from llamacpp_mqtt_deploy.core.errors import EngineFailed, EngineLost, IdleTimeout
from llamacpp_mqtt_deploy.core.sse import EventTooLong
from llamacpp_mqtt_deploy.core.thinking import THINKING_TAGS, ThinkingSplitter
from llamacpp_mqtt_deploy.engines.server.dialects import Dialect
from llamacpp_mqtt_deploy.engines.server.failures import Broken, Silent
from llamacpp_mqtt_deploy.engines.server.pump import Feed, Pump
from llamacpp_mqtt_deploy.engines.server.streaming import StreamingExchange
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.stopping import Stopped, StopSignal


class Reply:
    """The answer to one request that was sent, read once: `pump`ed by the I/O loop, or by the caller's thread, `open`ed first, as
    `deltas`; as a stream or as one document, as its content type says.

    All raise `Stopped` or a leaf of `RequestError`. Before the body they raise `NoAnswer`, or what `refusal` makes of an answer
    other than 200; `welcomed` is called for a 200. `refuse_when_closed` raises when the engine is being closed, which cuts the
    connection as a fault of the server would.
    """

    def __init__(
        self,
        exchange: StreamingExchange,
        call: EngineCall,
        stop: StopSignal,
        *,
        model: str | None,
        dialect: Dialect | None,
        warnings: tuple[str, ...],
        welcomed: Callable[[], None],
        refusal: Callable[[StreamingExchange], Exception],
        refuse_when_closed: Callable[[], None],
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._stop = stop
        self._model = model
        self._dialect = dialect
        self._warnings = warnings
        self._welcomed = welcomed
        self._refusal = refusal
        self._refuse_when_closed = refuse_when_closed
        self._stream = CompletionStream(thinking=self._splitter())

    def pump(self, loop: IoLoop, feed: Feed, on_slow: Callable[[], None]) -> Finished:
        """Have the loop read the answer and give it to `feed`; returns when it is complete. `on_slow` as in
        `StreamingExchange.read_head`."""

        def opened() -> bool:
            if self._exchange.status != 200:
                return False
            self._welcomed()
            if not self._streams():
                return False
            feed([Opened(self._model, warnings=self._warnings)])
            return True

        try:
            pump = Pump(loop, self._exchange, self._stream, opened=opened, feed=feed, on_slow=on_slow)
            pump.run(self._call.chunk_timeout_s)
        except (Silent, Broken, EventTooLong) as error:
            self._ended_badly(error)
        self._check_status()
        if not self._streams():
            return self._feed_document(feed)
        self._stop.raise_if_set()
        rest = self._stream.end()
        if rest:
            feed(rest)
        return self._finished()

    def open(self, on_slow: Callable[[], None]) -> None:
        """Wait for the headers here."""
        self._exchange.read_head(timeout_s=self._call.chunk_timeout_s, on_slow=on_slow)
        self._check_status()
        self._welcomed()

    def _check_status(self) -> None:
        if self._exchange.status != 200:
            raise self._refusal(self._exchange)

    def deltas(self) -> Iterator[Delta]:
        """Read the body here, delta by delta."""
        if not self._streams():
            yield from self._document()
            return
        yield Opened(self._model, warnings=self._warnings)
        exchange, call, stream = self._exchange, self._call, self._stream
        heard_at = time.monotonic()
        only_pings = False
        while not stream.reader.done:
            chunk, deltas = self._read()
            yield from deltas
            self._stop.raise_if_set()
            if not chunk:
                break
            # The server's pings keep the socket readable; only output counts. The clock stands while our reader is busy.
            now = time.monotonic()
            if deltas:
                heard_at = now
                if only_pings:
                    exchange.limit_silence(call.chunk_timeout_s)
                    only_pings = False
            else:
                left_s = heard_at + call.chunk_timeout_s - now
                if left_s <= 0:
                    raise idle(call)
                exchange.limit_silence(left_s)
                only_pings = True
        yield self._finished()

    def _splitter(self) -> ThinkingSplitter | None:
        # llama.cpp's server splits by the model's template when it is asked to; of others many leave the tags in the text.
        if self._dialect != "openai":
            return None
        first, *others = THINKING_TAGS
        return ThinkingSplitter(*first, others=others)

    def _streams(self) -> bool:
        content_type = self._exchange.content_type
        if content_type not in ("text/event-stream", "application/json", ""):
            raise EngineFailed("The engine's address answers, but not with a completion; check engine.url.")
        return content_type != "application/json"

    def _read(self) -> tuple[bytes, list[Delta]]:
        """What arrived of the body, and its deltas."""
        chunk = b""
        try:
            chunk = self._exchange.read_some()
            return chunk, self._stream.feed(chunk) if chunk else self._stream.end()
        except (Silent, Broken, EventTooLong) as error:
            self._ended_badly(error)
            return b"", self._stream.end()

    def _finished(self) -> Finished:
        reader = self._stream.reader
        if not reader.done and not (self._dialect == "openai" and reader.finish_reason):
            raise EngineLost("The engine's answer broke off in the middle.")
        return reader.finished()

    def _ended_badly(self, error: Silent | Broken | EventTooLong) -> None:
        """Raise what this end means; return where a finish reason may have come before, so that the answer is whole."""
        self._stop.raise_if_set()
        match error:
            case Silent():
                raise idle(self._call) from None
            case EventTooLong():
                raise EngineFailed("The engine sent an event without end.") from error
        self._refuse_when_closed()
        if self._dialect != "openai":
            raise EngineLost("The connection to the engine broke in the middle of the answer.") from error

    # --- an answer in one piece ----------------------------------------------------------------------------------------

    def _feed_document(self, feed: Feed) -> Finished:
        for delta in self._document():
            if isinstance(delta, Finished):
                return delta
            feed([delta])
        raise Stopped(self._stop.reason)

    def _document(self) -> Iterator[Delta]:
        yield Opened(self._model, streams=False, warnings=self._warnings)
        try:
            document = self._exchange.read_all(timeout_s=self._call.chunk_timeout_s)
        except Silent:
            self._stop.raise_if_set()
            raise idle(self._call) from None
        except Broken as error:
            self._stop.raise_if_set()
            self._refuse_when_closed()
            raise EngineLost("The connection to the engine broke in the middle of the answer.") from error
        except ValueError as error:
            raise EngineFailed("The engine's answer is too long.") from error
        self._stop.raise_if_set()
        reader = CompletionReader(thinking=self._splitter())
        deltas = reader.read(document)
        if not deltas and not reader.finish_reason:
            raise EngineFailed("The engine answered with JSON that is no completion.")
        yield from deltas
        yield from reader.rest()
        yield reader.finished()


def idle(call: EngineCall) -> IdleTimeout:
    """The error for a server that keeps silent for longer than the call allows."""
    return IdleTimeout(f"The engine gave no token and no progress for {call.chunk_timeout_s:g} s.")
