"""The model without the bus: a client of llama.cpp's server (or an OpenAI-compatible one) in a few lines of Python."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from pydantic import SecretStr

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished, Message, Opened, Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.errors import TimedOut
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal

if TYPE_CHECKING:
    from collections.abc import Generator

    from llamacpp_mqtt_deploy.ports import Engine


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """Where the server is and what a generation uses that says nothing else.

    `server_url` is `http://host:port`, `https://...` or `unix:///path.sock`. Without `temperature` and `top_p` the server's
    own defaults hold; `max_tokens` None leaves the length to the model. Limits are seconds: `timeout_s` for a whole
    generation, `chunk_timeout_s` for the silence between two pieces, `wait_for_server_s` for a server that is not up.
    """

    server_url: str = "http://localhost:8080"
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = 1024
    timeout_s: float = 300.0
    chunk_timeout_s: float = 60.0
    connect_timeout_s: float = 5.0
    wait_for_server_s: float = 5.0


class LlamaCppClient:
    """Streams answers of one server; any number of threads may share it. Errors are `core.errors.RequestError`s
    (`EngineUnavailable`, `ContextOverflow`, `TimedOut`, ...), never text that looks like an answer."""

    def __init__(self, config: DeploymentConfig | None = None, *, engine: Engine | None = None) -> None:
        self.config = config or DeploymentConfig()
        logs.use_host_logging()
        self._engine = engine or _server_engine(self.config)
        self._engine.open()

    def generate_stream(
        self,
        messages: Sequence[Message],
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        debug_info: MutableMapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """Yield the answer to these OpenAI messages as the server generates it.

        `debug_info`, when given, is filled on the way: `model`, `reasoning`, `tool_calls`, `finish_reason`, `usage` (tokens)
        `timings` (milliseconds, tokens per second) and, if there are any, `warnings`. Leaving the iteration early stops the generation on the server.
        """
        sampling = {
            "temperature": self.config.temperature if temperature is None else temperature,
            "top_p": self.config.top_p if top_p is None else top_p,
            "max_tokens": self.config.max_tokens if max_tokens is None else max_tokens,
        }
        call = EngineCall(
            messages=list(messages),
            model=self.config.model,
            sampling={name: value for name, value in sampling.items() if value is not None},
            tools=tools or None,
            tool_choice=tool_choice if tools else None,
            chunk_timeout_s=self.config.chunk_timeout_s,
        )
        notes = _Notes(debug_info if debug_info is not None else {})
        for delta in self._deltas(call):
            notes.take(delta)
            if isinstance(delta, Text):
                yield delta.text

    def generate(
        self,
        messages: Sequence[Message],
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        debug_info: MutableMapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
    ) -> str:
        """The whole answer as one text; empty when the model only calls tools (see `debug_info["tool_calls"]`)."""
        return "".join(self.generate_stream(messages, temperature, top_p, max_tokens, debug_info, tools, tool_choice))

    def close(self) -> None:
        """Stop what runs; idempotent."""
        self._engine.close(Deadline(5.0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deltas(self, call: EngineCall) -> Iterator[Delta]:
        stop = StopSignal()
        limit = threading.Timer(self.config.timeout_s, stop.set, ["timeout"])
        limit.name, limit.daemon = "lmd-direct-limit", True
        with ExitStack() as stack:
            stack.callback(limit.cancel)
            limit.start()
            # Closed at once when the caller leaves early: the slot is free then, not when the garbage is collected.
            stream = cast("Generator[Delta]", self._engine.stream(call, stop=stop, on_wait=lambda _reason: None))
            stack.enter_context(closing(stream))
            try:
                yield from stream
            except Stopped as error:
                raise TimedOut(f"The answer was not complete after {self.config.timeout_s:g} s.") from error


def _server_engine(config: DeploymentConfig) -> Engine:
    from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine  # noqa: PLC0415 - an engine of the caller's needs no HTTP

    return ServerEngine(
        EngineSettings(
            url=config.server_url,
            api_key=None if config.api_key is None else SecretStr(config.api_key),
            model=config.model,
            connect_timeout_s=config.connect_timeout_s,
            chunk_timeout_s=config.chunk_timeout_s,
            unavailable_after_s=config.wait_for_server_s,
        )
    )


class _Notes:
    """Fills a `debug_info` while the deltas pass."""

    def __init__(self, info: MutableMapping[str, Any]) -> None:
        self._info = info
        self._began_at = time.monotonic()
        self._first_at: float | None = None
        self._calls: dict[int, dict[str, Any]] = {}

    def take(self, delta: Delta) -> None:
        if self._first_at is None and isinstance(delta, Text | Reasoning | ToolCall):
            self._first_at = time.monotonic()
        match delta:
            case Opened(model, streams, warnings):
                self._info.update(model=model, streams=streams)
                if warnings:
                    self._info["warnings"] = list(warnings)
            case Reasoning(text):
                self._info["reasoning"] = self._info.get("reasoning", "") + text
            case ToolCall():
                self._call(delta)
            case Finished():
                self._finish(delta)
            case _:
                pass

    def _call(self, delta: ToolCall) -> None:
        call = self._calls.setdefault(
            delta.index, {"id": None, "type": "function", "function": {"name": None, "arguments": ""}}
        )
        call["id"] = call["id"] or delta.id
        call["function"]["name"] = call["function"]["name"] or delta.name
        call["function"]["arguments"] += delta.arguments
        self._info["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]

    def _finish(self, finished: Finished) -> None:
        usage = finished.usage
        self._info["finish_reason"] = finished.finish_reason
        self._info["usage"] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        }
        timings: dict[str, float] = {"total_ms": round((time.monotonic() - self._began_at) * 1000, 1)}
        if self._first_at is not None:
            timings["first_token_ms"] = round((self._first_at - self._began_at) * 1000, 1)
        if finished.tokens_per_second is not None:
            timings["tokens_per_second"] = finished.tokens_per_second
        self._info["timings"] = timings
