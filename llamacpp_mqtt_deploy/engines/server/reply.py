"""Reads a server's answer to one completion request: events as they come, or one JSON document."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from llamacpp_mqtt_deploy.core.completions import CompletionReader
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Opened
from llamacpp_mqtt_deploy.core.errors import EngineFailed, EngineLost, IdleTimeout
from llamacpp_mqtt_deploy.core.sse import EventTooLong, SseDecoder
from llamacpp_mqtt_deploy.engines.server.dialects import Dialect
from llamacpp_mqtt_deploy.engines.server.http import Broken, HttpExchange, Silent
from llamacpp_mqtt_deploy.stopping import Stopped, StopSignal


class Reply:
    """The answer behind the headers of one exchange, read once: as `events` or as a `document`, after its content type.

    `refuse_when_closed` raises when the engine is being closed, which cuts the connection as a fault of the server would.
    """

    def __init__(
        self,
        exchange: HttpExchange,
        call: EngineCall,
        stop: StopSignal,
        *,
        model: str | None,
        dialect: Dialect | None,
        refuse_when_closed: Callable[[], None],
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._stop = stop
        self._model = model
        self._dialect = dialect
        self._refuse_when_closed = refuse_when_closed

    def events(self, before_read: Callable[[], None] | None) -> Iterator[Delta]:
        """Yield the deltas of a stream; raises `Stopped` or a leaf of `RequestError`."""
        exchange, call, stop = self._exchange, self._call, self._stop
        yield Opened(self._model)
        decoder, reader = SseDecoder(), CompletionReader()
        heard_at = time.monotonic()
        only_pings = False
        while not reader.done:
            if before_read is not None:
                before_read()
            chunk = self._read()
            heard = False
            for data in self._decode(decoder, chunk):
                for delta in reader.read(data):
                    heard = True
                    yield delta
            if stop.is_set():
                raise Stopped(stop.reason)
            if not chunk:
                break
            # The server's pings keep the socket awake; only output counts. The clock stands while our reader is busy.
            now = time.monotonic()
            if heard:
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
        if not reader.done and not (self._dialect == "openai" and reader.finish_reason):
            raise EngineLost("The engine's answer broke off in the middle.")
        yield reader.finished()

    def document(self) -> Iterator[Delta]:
        """Yield the deltas of an answer that comes in one piece; raises as `events` does."""
        yield Opened(self._model, streams=False)
        try:
            document = self._exchange.read_all(timeout_s=self._call.chunk_timeout_s)
        except Silent:
            raise idle(self._call) from None
        except Broken as error:
            self._refuse_when_closed()
            raise EngineLost("The connection to the engine broke in the middle of the answer.") from error
        except ValueError as error:
            raise EngineFailed("The engine's answer is too long.") from error
        self._stop.raise_if_set()
        reader = CompletionReader()
        deltas = reader.read(document)
        if not deltas and not reader.finish_reason:
            raise EngineFailed("The engine answered with JSON that is no completion.")
        yield from deltas
        yield reader.finished()

    def _read(self) -> bytes:
        try:
            return self._exchange.read_some()
        except Silent:
            self._stop.raise_if_set()
            raise idle(self._call) from None
        except Broken as error:
            self._stop.raise_if_set()
            self._refuse_when_closed()
            if self._dialect == "openai":
                return b""  # a finish reason may have come before: then the answer is whole
            raise EngineLost("The connection to the engine broke in the middle of the answer.") from error

    def _decode(self, decoder: SseDecoder, chunk: bytes) -> list[bytes]:
        try:
            if chunk:
                return decoder.feed(chunk)
            # What a broken connection left of an event is no JSON object any more and says nothing.
            return [data for data in decoder.end() if data == b"[DONE]" or (data[:1] == b"{" and data[-1:] == b"}")]
        except EventTooLong as error:
            raise EngineFailed("The engine sent an event without end.") from error


def idle(call: EngineCall) -> IdleTimeout:
    """The error for a server that keeps silent for longer than the call allows."""
    return IdleTimeout(f"The engine gave no token and no progress for {call.chunk_timeout_s:g} s.")
