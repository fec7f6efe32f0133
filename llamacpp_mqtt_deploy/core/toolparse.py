"""Reads the tool calls of the common chat templates out of a model's text while it is still being written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any, Literal

from llamacpp_mqtt_deploy.core.deltas import Text, ToolCall
from llamacpp_mqtt_deploy.core.stopwords import held_back
from llamacpp_mqtt_deploy.core.toolcalls import whole

ToolStyle = Literal["hermes", "llama3", "mistral", "mistral_args"]
"""`<tool_call>{json}</tool_call>` (Hermes, Qwen); `{"name", "parameters"}` as the whole answer (Llama 3);
`[TOOL_CALLS][{json}]` and the newer `[TOOL_CALLS]name[ARGS]{json}` (Mistral)."""

OPENERS: dict[ToolStyle, str] = {
    "hermes": "<tool_call>",
    "llama3": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "mistral_args": "[TOOL_CALLS]",
}
MARKS: dict[ToolStyle, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "mistral_args": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
}
"""Marks that may be control tokens of the vocabulary, whose text must be kept for this reader."""

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)', re.DOTALL)
_NAMED = re.compile(r"\s*([A-Za-z0-9_.-]{1,128})\s*(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?\s*(?=\{)")
_MAYBE_NAMED = re.compile(r"\s*[A-Za-z0-9_.-]{0,128}\s*(\[[A-Z_]*\]?[^\[\]{}]*){0,2}\s*$")
_MISTRAL: frozenset[ToolStyle] = frozenset({"mistral", "mistral_args"})
# Characters up to the arguments; what is longer is read when the object is whole. Each piece has all of them looked at again.
_LONGEST_HEAD = 1024
_LONGEST_NAMED = 512  # characters of a name with its marks; what is longer is no call
_LONGEST_TAIL = 4096  # characters of keys behind the arguments; nobody writes them


def style_of(template: str) -> ToolStyle | None:
    """How a chat template wants tool calls written; None when it takes no tools or wants a form that is not known here."""
    if "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral"
    if "<tool_call>" in template:
        # Qwen3-Coder and GLM use the same mark around a form of their own.
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return "llama3"
    return None


class JsonExtent:
    """Finds the end of one JSON value that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._begun = False

    def feed(self, text: str, start: int = 0) -> int | None:
        """The index behind the value's last character, or None when it goes on after this text.

        A bare word or number ends before the comma, brace, bracket or blank that follows it.
        """
        for index in range(start, len(text)):
            char = text[index]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
                    if self._depth == 0:
                        return index + 1
            elif char == '"':
                self._in_string = self._begun = True
            elif char in "{[":
                self._depth += 1
                self._begun = True
            elif char in "}]":
                if self._depth == 0:
                    return index
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
            elif self._depth == 0 and (char == "," or (char.isspace() and self._begun)):
                return index
            elif not char.isspace():
                self._begun = True
        return None


class ToolCallReader:
    """Takes text, gives `Text` outside of calls and `ToolCall` pieces inside.

    The name comes with the first piece, as soon as it is known to be one of `names`; what looks like a call and is none is
    given as text, so that nothing is lost.
    """

    _extent: JsonExtent
    _seen: int
    """How much of the held text the extent has seen."""

    def __init__(self, style: ToolStyle, *, names: Collection[str], new_id: Callable[[], str]) -> None:
        self._style = style
        self._names = frozenset(names)
        self._new_id = new_id
        self._held = ""
        self._step: Callable[[list[Text | ToolCall]], bool] = self._start if style == "llama3" else self._text
        self._look_anew()
        self._whole_only = False
        self._opened = ""  # what stood before the held text and belongs to it if it turns out to be no call
        self._in_list = False
        self._after_call = False
        self.begun = 0
        """Calls whose name was given."""
        self.complete = 0

    def feed(self, text: str) -> list[Text | ToolCall]:
        self._held += text
        out: list[Text | ToolCall] = []
        while self._held and self._step(out):
            pass
        return out

    def end(self) -> list[Text | ToolCall]:
        """What was held back when the text ended."""
        out: list[Text | ToolCall] = []
        if self._step in (self._tail, self._close, self._arguments):
            return out
        self._give(out, self._opened + self._held)
        self._held = self._opened = ""
        return out

    # Each step looks at what is held and gives True when another step should look at the rest.

    def _start(self, out: list[Text | ToolCall]) -> bool:
        """Llama 3: an answer that begins with a brace, or with the mark, is a call."""
        start = self._held.lstrip()
        mark = OPENERS["llama3"]
        if start.startswith(mark):
            self._open(len(self._held) - len(start) + len(mark))
        elif not start or mark.startswith(start):
            return False
        elif not start.startswith("{"):
            self._step = self._text
            return True
        self._look_anew()
        self._step = self._head
        return True

    def _text(self, out: list[Text | ToolCall]) -> bool:
        """Outside of calls: give everything up to the mark; blanks before the mark and between calls are dropped."""
        mark = OPENERS[self._style]
        if self._after_call:
            self._held = self._held.lstrip(" \t\r\n,;" if self._style == "llama3" else None)
        if self._style == "llama3" and self._after_call and self._held.startswith("{"):
            self._look_anew()
            self._step = self._head
            return True
        place = self._held.find(mark)
        if place >= 0:
            said = self._held[:place].rstrip()
            self._give(out, said)
            self._held = self._held[len(said) :]
            self._open(place - len(said) + len(mark))
            self._look_anew()
            self._step = self._form if self._style in _MISTRAL else self._head
            return True
        keep = held_back(self._held, (mark,))
        safe = self._held[: len(self._held) - keep].rstrip()
        if self._style == "llama3":
            safe = self._held[: len(self._held) - keep]
        self._give(out, safe)
        self._held = self._held[len(safe) :]
        return False

    def _form(self, out: list[Text | ToolCall]) -> bool:
        """Mistral: a list of objects, or a name with its arguments."""
        start = self._held.lstrip()
        if not start:
            return False
        if start.startswith("["):
            self._open(len(self._held) - len(start) + 1)
            self._in_list = True
            self._look_anew()
            self._step = self._head
            return True
        named = _NAMED.match(self._held)
        if named and named[1] in self._names:
            self._begin(out, named[1], self._held[named.end() :])
            return True
        if named or len(self._held) > _LONGEST_NAMED or not _MAYBE_NAMED.match(self._held):
            return self._no_call(out)
        return False

    def _head(self, out: list[Text | ToolCall]) -> bool:
        """The beginning of a call's object, up to its arguments."""
        start = self._held.lstrip()
        blanks = len(self._held) - len(start)
        self._open(blanks)
        self._seen = max(0, self._seen - blanks)
        head = _HEAD.match(start, 0, _LONGEST_HEAD) if self._seen < _LONGEST_HEAD else None
        if head:
            name = _loads(head[1])
            if name in self._names:
                self._begin(out, str(name), start[head.end() :])
                return True
            return self._no_call(out)
        if start and not start.startswith("{"):
            return self._no_call(out)
        end = self._extent.feed(start, self._seen)
        self._seen = len(start)
        return self._whole(out, start[:end], start[end:]) if end is not None else False

    def _whole(self, out: list[Text | ToolCall], document: str, rest: str) -> bool:
        """A complete object whose keys stand in another order, or without arguments."""
        call = _loads(document)
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(name, str) or name not in self._names:
            return self._no_call(out)
        arguments = call.get("arguments", call.get("parameters"))
        given = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        out.append(ToolCall(self.begun, self._new_id(), name, whole(given)))
        self.begun += 1
        self._finish(rest)
        return True

    def _begin(self, out: list[Text | ToolCall], name: str, rest: str) -> None:
        out.append(ToolCall(self.begun, self._new_id(), name, ""))
        self.begun += 1
        self._held = rest
        self._opened = ""
        self._look_anew()
        self._whole_only = not rest.startswith("{")  # some models write the arguments as a string that holds JSON
        self._step = self._arguments

    def _arguments(self, out: list[Text | ToolCall]) -> bool:
        end = self._extent.feed(self._held, self._seen)
        if self._whole_only:
            if end is None:
                self._seen = len(self._held)
                return False
            value = _loads(self._held[:end])
            given = value if isinstance(value, str) else "{}" if value is None else self._held[:end]
        else:
            given = self._held if end is None else self._held[:end]
        if given:
            out.append(ToolCall(self.begun - 1, None, None, whole(given)))
        self._held = "" if end is None else self._held[end:]
        if end is None:
            return False
        if self._style in _MISTRAL and not self._in_list:
            self._finish(self._held)
        else:
            self._step = self._tail
        return True

    def _tail(self, out: list[Text | ToolCall]) -> bool:
        """The end of the call's object: its brace, perhaps after keys that nobody reads."""
        while True:
            self._held = rest = self._held.lstrip(" \t\r\n,")
            if rest.startswith("}") or len(rest) > _LONGEST_TAIL:
                self._finish(rest.removeprefix("}"))
                return True
            if not rest.startswith('"'):
                if rest:
                    self._finish(rest)
                return bool(rest)
            key = JsonExtent().feed(rest)
            if key is None:
                return False
            value = rest[key:].lstrip()
            if not value.startswith(":"):
                if value:
                    self._finish(value)
                return bool(value)
            value = value[1:].lstrip()
            end = JsonExtent().feed(value) if value else None
            if end is None:
                return False
            self._held = value[end:]

    def _finish(self, rest: str) -> None:
        self.complete += 1
        self._held = rest
        self._opened = ""
        self._step = self._close

    def _close(self, out: list[Text | ToolCall]) -> bool:
        """Behind a call: its closing mark, the next of a list, or text."""
        start = self._held.lstrip()
        self._after_call = True
        if self._in_list:
            if start.startswith(","):
                self._held = start[1:]
                self._look_anew()
                self._step = self._head
                return True
            if start:
                self._held = start.removeprefix("]")
                self._in_list = False
                self._step = self._text
            else:
                self._held = ""
            return bool(start)
        if self._style == "hermes":
            mark = "</tool_call>"
            if start.startswith(mark):
                self._held = start[len(mark) :]
            elif mark.startswith(start):
                self._held = start
                return False
        self._step = self._text
        return True

    def _open(self, chars: int) -> None:
        """These characters of the held text are text after all if no call follows them."""
        self._opened, self._held = self._opened + self._held[:chars], self._held[chars:]

    def _look_anew(self) -> None:
        self._extent = JsonExtent()
        self._seen = 0

    def _no_call(self, out: list[Text | ToolCall]) -> bool:
        """What was held is text after all."""
        self._give(out, self._opened)
        self._opened = ""
        self._in_list = self._after_call = False
        self._step = self._plain if self._style == "llama3" else self._text
        return True

    def _plain(self, out: list[Text | ToolCall]) -> bool:
        self._give(out, self._held)
        self._held = ""
        return False

    def _give(self, out: list[Text | ToolCall], text: str) -> None:
        if text:
            out.append(Text(text))
            self._after_call = False


def _loads(document: str) -> Any:
    try:
        return json.loads(document, strict=False)
    except (ValueError, RecursionError):
        return None
