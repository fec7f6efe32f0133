"""Reads an OpenAI-compatible chat completion, streamed or whole, into deltas; knows what the servers out there do differently."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.counts import count, rate
from llamacpp_mqtt_deploy.core.deltas import (
    Delta,
    Finished,
    FinishReason,
    PromptProgress,
    Reasoning,
    Text,
    TokenUsage,
    ToolCall,
)
from llamacpp_mqtt_deploy.core.errors import (
    BadRequest,
    ContextOverflow,
    EngineFailed,
    EngineUnavailable,
    ModelNotFound,
    PayloadTooLarge,
    RequestError,
    Unsupported,
)
from llamacpp_mqtt_deploy.core.thinking import ThinkingSplitter
from llamacpp_mqtt_deploy.core.toolcalls import MAX_CALLS, checked_call

MAX_MESSAGE_CHARS = 500
"""Longest text of an engine that is passed on to a client."""

_FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
_LONE = "\ufffd"
"""What half of a surrogate pair becomes, of which no other half came."""
_CONTROL = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_ADDRESS = re.compile(r"\b\w+://\S+")
_PATH = re.compile(r"(?<![\w#/.:~])(?:~|\.{1,2}|[A-Za-z]:)?(?:[/\\][\w.@+-]+){2,}")
_CONTEXT_WORDS = re.compile(r"context (?:length|size|window)|maximum context|too many tokens", re.IGNORECASE)


class CompletionReader:
    """Reads the events of one completion. Feed it each event's data; `finished` gives the end once `done`.

    Idempotent on `role`; ignores fields that it does not know. Tokens that the server does not count are counted by deltas.
    `thinking` splits the content of servers that leave a model's thinking in it; one that sends it apart needs no splitting.
    """

    def __init__(self, *, thinking: ThinkingSplitter | None = None) -> None:
        self._thinking = thinking
        self.done = False
        """`[DONE]` came."""
        self.finish_reason: str | None = None
        """Why the model stopped, once the server said so."""
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}
        self._progress: PromptProgress | None = None
        self._stop_sequence: str | None = None
        self._calls: list[_Call] = []
        self._ids: dict[int, str] = {}  # of the calls, as they were told
        self._halves: dict[str, str] = {}
        self._deltas = 0

    def read(self, data: bytes) -> list[Delta]:
        """The deltas of one event, often one, sometimes none. Raises a `RequestError` for an error event."""
        if data.rstrip() == b"[DONE]":
            self.done = True
            return self.rest()
        halves = bool(self._halves)
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            event, halves = _forgiving_loads(data), True
        try:
            return self._read_event(event, halves=halves)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise EngineFailed("The engine sent an event that is no chat completion.") from error

    def _read_event(self, event: Any, *, halves: bool) -> list[Delta]:
        choices = event.get("choices")
        if choices is None or "error" in event:
            self._refuse_error(event)
        deltas: list[Delta] = []
        if progress := event.get("prompt_progress"):
            self._read_progress(progress, deltas)
        if choices:
            choice = choices[0]
            self._read_delta(choice.get("delta") or choice.get("message") or {}, deltas, halves=halves)
            if finish_reason := choice.get("finish_reason"):
                self._read_finish(str(finish_reason), choice)
        self._usage = _section(event, "usage") or self._usage
        self._timings = _section(event, "timings") or self._timings
        return deltas

    @property
    def splits(self) -> bool:
        """Text may be thinking and has to be read here."""
        return self._thinking is not None

    @property
    def holds_half(self) -> bool:
        """Half of a surrogate pair waits for the other one."""
        return bool(self._halves)

    @property
    def is_plain(self) -> bool:
        """Whether text means what it says: no thinking is split off here, and no half of a surrogate pair waits."""
        return self._thinking is None and not self._halves

    def count(self, deltas: int) -> None:
        """Count deltas of text that were read elsewhere."""
        self._deltas += deltas

    def rest(self) -> list[Delta]:
        """What was held back when the stream ended; it could have been the beginning of a tag, or half of a surrogate pair."""
        calls = [
            ToolCall(index, None, None, _LONE)
            for index in range(len(self._calls))
            if self._halves.pop(f"arguments of {index}", "")
        ]
        return [*self._rest_of_reasoning(), *self._rest_of_content(), *calls]

    def finished(self) -> Finished:
        """The end of the stream."""
        reason = _FINISH_REASONS.get(self.finish_reason or "stop", "stop")
        if reason == "stop" and self._calls:
            reason = "tool_calls"  # Ollama and others say `stop` after a tool call
        return Finished(reason, self._counted(), rate(self._timings.get("predicted_per_second")), self._stop_sequence)

    def _read_delta(self, delta: Mapping[str, Any], deltas: list[Delta], *, halves: bool) -> None:
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        content = delta.get("content")
        if content and not isinstance(content, str):
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        if halves:
            reasoning = self._whole("reasoning", reasoning)
        if reasoning and isinstance(reasoning, str):
            deltas.extend(self._rest_of_content())
            self._thinking = None
            deltas.append(Reasoning(reasoning))
            self._deltas += 1
        if halves:
            content = self._whole("content", content)
        if content:
            deltas.extend(self._rest_of_reasoning())
            deltas.extend([Text(content)] if self._thinking is None else self._thinking.feed(content))
            self._deltas += 1
        if calls := delta.get("tool_calls"):
            deltas.extend(self._rest_of_reasoning())
            deltas.extend(self._rest_of_content())
            for call in calls:
                self._read_call(call, deltas, halves=halves)
            self._deltas += 1

    def _read_call(self, call: Mapping[str, Any], deltas: list[Delta], *, halves: bool) -> None:
        """One piece of a tool call.

        llama.cpp sends id, name and the first bytes of the arguments together; llama-cpp-python repeats id and name in each
        piece; some servers leave the index out, or use 0 for all calls.
        """
        function = call.get("function") or {}
        wire_index, call_id, name = call.get("index"), call.get("id") or None, function.get("name") or None
        arguments = function.get("arguments")
        if arguments is None:
            arguments = ""
        elif not isinstance(arguments, str):
            arguments = orjson.dumps(arguments).decode()
        known = self._find_call(wire_index, call_id, name)
        if known is None:
            if len(self._calls) >= MAX_CALLS:  # here too: one event may hold so many that to look for each takes hours
                raise EngineFailed(f"The engine called more than {MAX_CALLS} tools in one answer.")
            self._calls.append(_Call(wire_index, call_id, name))
        index, opened = known or (len(self._calls) - 1, self._calls[-1])
        if halves:
            arguments = self._whole(f"arguments of {index}", arguments)
        if known is None:
            deltas.append(self._told(checked_call(index, call_id, name, arguments)))
            return
        news_id = None if index in self._ids else call_id
        news_name = name if opened.name is None else None
        opened.id, opened.name = opened.id or call_id, opened.name or name
        if news_id or news_name or arguments:
            deltas.append(self._told(checked_call(index, news_id, news_name, arguments)))

    def _told(self, call: ToolCall) -> ToolCall:
        """The piece; the first with an id or a name has an id that no other call of this answer has: by it the client says which
        call a result is for. One that the server tells later is not passed on.
        """
        if call.index in self._ids or not (call.id or call.name):
            return call
        given = set(self._ids.values())
        new_id, number = call.id or f"call_{call.index}", call.index
        while new_id in given:
            new_id, number = f"call_{number}", number + 1
        self._ids[call.index] = new_id
        return replace(call, id=new_id)

    def _find_call(self, wire_index: object, call_id: str | None, name: str | None) -> tuple[int, _Call] | None:
        for index in range(len(self._calls) - 1, -1, -1):
            opened = self._calls[index]
            same_place = wire_index is None or opened.wire_index == wire_index
            if call_id is None:
                # A server that sends neither numbers nor ids names each call once.
                another = wire_index is None and name is not None and opened.name is not None
            else:
                another = name is not None and opened.id is not None and opened.id != call_id
            if same_place and not another:
                return index, opened
            if same_place:
                return None
        return None

    def _read_progress(self, progress: Mapping[str, Any], deltas: list[Delta]) -> None:
        new = PromptProgress(
            processed=count(progress.get("processed")) or 0,
            total=count(progress.get("total")) or 0,
            cached=count(progress.get("cache")) or 0,
        )
        if new != self._progress:
            self._progress = new
            deltas.append(new)

    def _read_finish(self, finish_reason: str, choice: Mapping[str, Any]) -> None:
        if finish_reason in ("error", "abort"):
            raise EngineFailed("The engine broke the generation off without saying why.")
        self.finish_reason = finish_reason
        stop_reason = choice.get("stop_reason")  # vLLM's name for the stop string that matched
        if isinstance(stop_reason, str):
            self._stop_sequence = stop_reason

    def _refuse_error(self, event: Mapping[str, Any]) -> None:
        error = event.get("error")
        if error is None and event.get("message") and ("code" in event or "type" in event):
            error = event  # the `error:` line of older llama.cpp servers carries the error itself
        if error:
            raise error_from(error)

    def _counted(self) -> TokenUsage:
        usage, timings = self._usage, self._timings
        cached = count(_section(usage, "prompt_tokens_details").get("cached_tokens"))
        if cached is None:
            cached = count(timings.get("cache_n")) or 0
        prompt = count(usage.get("prompt_tokens"))
        if prompt is None:
            known = self._progress.total if self._progress else 0
            prompt = (count(timings.get("cache_n")) or 0) + (count(timings.get("prompt_n")) or 0) or known
        completion = count(usage.get("completion_tokens"))
        if completion is None:
            completion = count(timings.get("predicted_n"))
        return TokenUsage(
            prompt_tokens=prompt,
            completion_tokens=self._deltas if completion is None else completion,
            cached_tokens=cached,
            reasoning_tokens=count(_section(usage, "completion_tokens_details").get("reasoning_tokens")),
        )

    def _rest_of_reasoning(self) -> list[Delta]:
        return [Reasoning(_LONE)] if self._halves.pop("reasoning", "") else []

    def _rest_of_content(self) -> list[Delta]:
        lone = _LONE if self._halves.pop("content", "") else ""
        if self._thinking is None:
            return [Text(lone)] if lone else []
        return [*self._thinking.feed(lone), *self._thinking.end()]

    def _whole(self, kind: str, text: object) -> str:
        """Join the halves of a surrogate pair that a server cut into two deltas; a half alone becomes U+FFFD."""
        if not isinstance(text, str) or not text:
            return ""
        text = self._halves.pop(kind, "") + text
        if "\ud800" <= text[-1] <= "\udbff":
            self._halves[kind] = text[-1]
            text = text[:-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class _Call:
    __slots__ = ("id", "name", "wire_index")

    def __init__(self, wire_index: object, call_id: str | None, name: str | None) -> None:
        self.wire_index = wire_index
        self.id = call_id
        self.name = name


def error_from(error: object, status: int | None = None) -> RequestError:
    """The leaf for an engine's error object (or its bare text) and the HTTP status it came with."""
    fields: Mapping[str, Any] = error if isinstance(error, dict) else {"message": error}
    text = clean(fields.get("message") or fields.get("detail") or "")
    made = _leaf(fields, text, status)
    if not isinstance(made, ContextOverflow):  # numbers only, and the operator needs them
        made.quoted = text
    return made


def _leaf(fields: Mapping[str, Any], text: str, status: int | None) -> RequestError:
    kind, code = str(fields.get("type") or ""), fields.get("code")
    number = code if isinstance(code, int) and not isinstance(code, bool) else status
    if kind == "exceed_context_size_error" or code == "context_length_exceeded" or _is_overflow(text, number):
        told = {name: count(fields.get(name)) for name in ("n_prompt_tokens", "n_ctx")}
        numbers = {name: number for name, number in told.items() if number is not None}
        return ContextOverflow(
            f"The request does not fit into the engine's context: {text or 'no numbers given'}", **numbers
        )
    said = f": {text}" if text else "."
    match number:
        case 401 | 403:
            return EngineUnavailable(
                "The engine refused the worker's API key; its operator must set engine.api_key_file."
            )
        case 404 if "model" in text.lower():
            return ModelNotFound(f"The engine does not have this model{said}")
        case 400 if re.search(r"model\b.*\bnot found", text):
            return ModelNotFound(f"The engine does not have this model{said}")
        case 404 | 405:
            return EngineUnavailable(
                "The engine knows no chat completions at its address; its operator must check engine.url."
            )
        case 413:
            return PayloadTooLarge(f"The request is too large for the engine{said}")
        case 501:
            return Unsupported(f"The engine cannot do this{said}")
        case _ if re.search(r"(image|audio|video) input is not supported", text):
            return Unsupported(f"The engine cannot do this{said}")
        case 400 | 422 if kind == "invalid_request_error" and text.startswith("Field "):
            return BadRequest(f"The engine refused the request{said}")
        case int() if 400 <= number < 500:
            return EngineFailed(f"The engine refused the request{said}")
        case _:
            return EngineFailed(f"The engine failed{said}")


def clean(text: object) -> str:
    """An engine's text fit for a client: one line, no paths or addresses, at most `MAX_MESSAGE_CHARS` characters."""
    line = _CONTROL.sub(" ", str(text)).encode("utf-8", "replace").decode().strip()[: 4 * MAX_MESSAGE_CHARS]
    line = _PATH.sub("[path]", _ADDRESS.sub("[address]", line))
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 1] + "…"


def _is_overflow(text: str, status: int | None) -> bool:
    said_so = _CONTEXT_WORDS.search(text) and re.search(r"exceed|maximum|longer|however|too long|too many", text)
    return bool(said_so) and status in (400, 413, 422, 500, None)


def _forgiving_loads(data: bytes) -> Any:
    """JSON with broken UTF-8 or half surrogate pairs, which the fast reader refuses."""
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise EngineFailed("The engine sent an event that is not JSON.") from error


def _section(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, dict) else {}
