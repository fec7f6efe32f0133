"""Renders a conversation with the chat template of the model file, in a sandbox, as transformers and llama.cpp's server do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from typing_extensions import override

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.core.errors import BadRequest, Unsupported
from llamacpp_mqtt_deploy.core.thinking import THINKING_TAGS
from llamacpp_mqtt_deploy.core.toolparse import ToolStyle, style_of
from llamacpp_mqtt_deploy.engines.inprocess.modelfile import Unusable

MAX_CHARS = 32 * 1024 * 1024
MAX_SECONDS = 5.0
"""A rendering takes milliseconds; a template that loops for ever must not hold a worker's thread."""
MAX_REPEATED = 1_000_000
MAX_POWER = 64

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NEEDLE = "needle-7f3a"


class ChatTemplate:
    """A model's chat template and what it can do. Safe to use from several threads. Making it raises Unusable."""

    def __init__(self, source: str | None, *, bos: str, eos: str) -> None:
        self.source = source or CHATML
        self._tokens = {"bos_token": bos, "eos_token": eos}
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        self._environment = environment
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", "?")
            raise Unusable(
                f"The chat template in the model file is broken, line {line}: {error}. Use another file."
            ) from error
        except RecursionError as error:
            raise Unusable("The chat template in the model file is nested too deeply. Use another file.") from error
        self.tool_style: ToolStyle | None = style_of(self.source)
        # A template that only cuts the thinking out of the history names no more than the closing tag.
        self.thinking_tags: tuple[str, str] | None = next(
            (tags for tags in THINKING_TAGS if tags[1] in self.source), None
        )
        self._wants_parts = not self._shows(_NEEDLE) and self._shows([{"type": "text", "text": _NEEDLE}])

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> str:
        """The prompt up to where the answer begins; a last message of the assistant is continued. Raises BadRequest."""
        plain = [self._plain(message) for message in messages]
        begun = ""
        if plain and plain[-1].get("role") == "assistant" and not plain[-1].get("tool_calls"):
            begun = _text_of(plain.pop().get("content"))
        given: dict[str, Any] = {"messages": plain, "add_generation_prompt": True, **self._tokens}
        given["tools"] = [_plain_tool(tool) for tool in tools] if tools else None
        if thinking is not None:
            given["enable_thinking"] = thinking
        return self._render(given) + begun

    def _render(self, given: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        ends_at = self._environment.limit()
        try:
            for piece in self._template.generate(given):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARS or time.monotonic() > ends_at:
                    raise _TooMuch
        except _Refused as error:
            raise BadRequest(f"The model's chat template refuses these messages: {str(error)[:300]}") from error
        except (_TooMuch, MemoryError, RecursionError) as error:
            raise BadRequest("The model's chat template does not come to an end with these messages.") from error
        except Exception as error:  # a template is a program: it can fail in any way
            raise BadRequest(
                f"The model's chat template fails with these messages ({type(error).__name__}: {str(error)[:200]})."
            ) from error
        return "".join(pieces)

    def _plain(self, message: Message) -> dict[str, Any]:
        """A message as templates expect it: text as a string, arguments of calls as objects."""
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else None
        if parts is not None and any(part.get("type", "text") != "text" for part in parts if isinstance(part, dict)):
            raise Unsupported("This worker's engine runs the model without images; send text only.")
        text = _text_of(content)
        plain = {**message, "content": [{"type": "text", "text": text}] if self._wants_parts else text}
        if message.get("tool_calls"):
            plain["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
        return plain

    def _shows(self, content: Any) -> bool:
        given = {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True, "tools": None}
        try:
            return _NEEDLE in self._render({**given, **self._tokens})
        except BadRequest:
            return False


class _Refused(Exception):
    """The template called raise_exception."""


class _TooMuch(Exception):
    """The rendering is over its time or size."""


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox with a time limit: each call, attribute and step of a range is a place where a loop can be left."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._ends = threading.local()
        self.globals["range"] = self._range

    def limit(self) -> float:
        """Begin a rendering in this thread; returns when it must have ended."""
        ends_at = self._ends.at = time.monotonic() + MAX_SECONDS
        return ends_at

    def check(self) -> None:
        if time.monotonic() > self._ends.at:
            raise _TooMuch

    def _range(self, *bounds: int) -> Iterator[int]:
        for number in jinja2.sandbox.safe_range(*bounds):
            self.check()
            yield number

    @override
    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, Sized)]
        times = [side for side in (left, right) if isinstance(side, int)]
        if (sizes and times and sizes[0] * times[0] > MAX_REPEATED) or (operator == "**" and right > MAX_POWER):
            raise _TooMuch
        return super().call_binop(context, operator, left, right)

    @override
    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check()
        return super().call(context, obj, *args, **kwargs)

    @override
    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check()
        return super().getattr(obj, attribute)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model is trained on; for a prompt only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own shape

    @override
    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _plain_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """As llama.cpp's server gives it to a template: these three fields, whatever the client sent."""
    function = tool["function"]
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": function.get("parameters") or {"type": "object", "properties": {}},
        },
    }


def _plain_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> NoReturn:
    raise _Refused(message)
