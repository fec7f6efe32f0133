"""Keeps a client's text from being read as a model's control tokens, with which it could forge turns of a conversation.

`<|im_end|>` in a prompt is text to whoever wrote it and the end of a turn to the tokenizer of a model that marks turns so. Such
a control string is broken up by a space after its first character, `< |im_end|>`: it stays readable for people and for the
model, a program can undo it, and no tokenizer takes it for the token.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.deltas import EngineCall

WELL_KNOWN: frozenset[str] = frozenset(
    (
        # ChatML (Qwen, Yi, Hermes, SmolLM), Phi, Granite, Zephyr, Falcon
        "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
        "<|end|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|endofprompt|>",
        # Llama 3 and 4, gpt-oss
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>",
        "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>",
        "<|call|>", "<|constrain|>",
        # Llama 2, Mistral
        "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[ARGS]", "[CALL_ID]",
        # Gemma, Command R, DeepSeek, GLM, EXAONE, MiniMax, Kimi, Seed
        "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<|turn>", "<turn|>", "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<BOS_TOKEN>", "<EOS_TOKEN>",
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "[gMASK]", "<sop>", "<eop>",
        "<|observation|>", "[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]", "]~!b[", "]~b]", "[e~[",
        "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "[EOS]", "[BOS]", "<seed:bos>", "<seed:eos>",
    )
)  # fmt: skip
"""How the models in use mark turns; enough where nobody can be asked."""

WARNING = (
    "the request held control strings of the model (such as the marks of a turn); they were broken up by a space "
    "and are plain text to the model"
)

# Longer texts between brackets are no token of any model known to us.
_BARRED = re.compile(r"<[|｜][^<>\s]{1,60}>|<[^<>\s]{1,60}[|｜]>")
_SPECIAL_LOOKING = re.compile(r"<[^<>\s]{1,62}>|\[[^\[\]\s]{1,62}\]")
_SPECIAL_LOOKING_AT_EACH = re.compile(rf"(?=({_SPECIAL_LOOKING.pattern}))")


def special_looking(text: str) -> set[str]:
    """What stands in angle or square brackets without blanks, as nearly every control token does."""
    return set(_SPECIAL_LOOKING.findall(text)) if "<" in text or "[" in text else set()


def surely_special(text: str) -> set[str]:
    """What has bars inside of its angle brackets, which nobody writes but to mark turns."""
    return set(_BARRED.findall(text)) if "<" in text else set()


class ControlStrings:
    """The control strings of one model. Only strings of two characters and more, without blanks, can be broken up."""

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = frozenset(each for each in strings if len(each) > 1 and not re.search(r"\s", each))
        odd = sorted(each for each in self.strings if not _SPECIAL_LOOKING.fullmatch(each))
        # A lookahead, because two of them may overlap: `]~b]~b]`.
        self._odd = re.compile(f"(?={'|'.join(map(re.escape, odd))})") if odd else None

    def places(self, text: str) -> list[int]:
        """Where to put a blank so that no control string is left, in rising order."""
        found: set[int] = set()
        if "<" in text or "[" in text:
            for match in _SPECIAL_LOOKING_AT_EACH.finditer(text):
                if match[1] in self.strings:
                    found.add(match.start() + 1)
        if self._odd is not None:
            found.update(match.start() + 1 for match in self._odd.finditer(text))
        return sorted(found)


def clean_call(call: EngineCall, controls: ControlStrings) -> tuple[EngineCall, bool]:
    """The call with every control string in it broken up, wherever it reaches the prompt, and whether there was one.

    The call that was given comes back when there was none: a prompt that the engine knows stays the same to the byte.
    """
    if not controls.strings:
        return call, False
    cleaning = _Cleaning(controls)
    messages = [_message(message, cleaning) for message in call.messages]
    tools = None if call.tools is None else cleaning.value(list(call.tools))
    tool_choice = cleaning.value(call.tool_choice)
    response_format = cleaning.value(call.response_format)
    if not cleaning.found:
        return call, False
    changed = replace(call, messages=messages, tools=tools, tool_choice=tool_choice, response_format=response_format)
    return changed, True


def texts_of(call: EngineCall) -> str:
    """All text of the call that reaches the prompt, to look for special-looking strings in it."""
    gathering = _Gathering()
    for message in call.messages:
        if len(message) == 2 and message.get("role") in _SPEAKERS and isinstance(message.get("content"), str):
            gathering.texts.append(message["content"])  # as nearly all are
        else:
            _message(message, gathering)
    for part in (call.tools, call.tool_choice, call.response_format):
        if part is not None:
            gathering.value(part)
    return "\n".join(gathering.texts)


_SPEAKERS = ("user", "assistant", "system")
"""Roles whose content is text and nothing else."""


class _Cleaning:
    """Rebuilds JSON values with their strings, and the names in their objects, broken up."""

    def __init__(self, controls: ControlStrings) -> None:
        self._controls = controls
        self.found = False

    def text(self, text: str) -> str:
        return self.joined([text])[0]

    def joined(self, texts: Sequence[str]) -> list[str]:
        """Texts that a template may write one right after the other: a control string could be cut into two of them."""
        places = self._controls.places("".join(texts))
        if not places:
            return list(texts)
        self.found = True
        cleaned: list[str] = []
        start = 0
        for text in texts:
            end = start + len(text)
            cleaned.append(_spaced(text, [place - start for place in places if start < place <= end]))
            start = end
        return cleaned

    def value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(name): self.value(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(inner) for inner in value]
        return value

    def json_text(self, text: str) -> str:
        """JSON in a string, which the engine may read and write anew: an escaped `<` in it is a plain one by then."""
        if "\\" in text:
            try:
                document = orjson.loads(text)
            except orjson.JSONDecodeError:
                return self.text(text)
            inner = _Cleaning(self._controls)
            cleaned = inner.value(document)
            if inner.found:
                self.found = True
                text = orjson.dumps(cleaned).decode()
        return self.text(text)


_NO_STRINGS = ControlStrings(())


class _Gathering(_Cleaning):
    """Walks like `_Cleaning` and keeps every text that it meets."""

    def __init__(self) -> None:
        super().__init__(_NO_STRINGS)
        self.texts: list[str] = []

    def joined(self, texts: Sequence[str]) -> list[str]:
        self.texts.append("".join(texts))
        return list(texts)

    def json_text(self, text: str) -> str:
        if "\\" in text:
            with contextlib.suppress(orjson.JSONDecodeError):
                self.value(orjson.loads(text))
        return self.text(text)


def _message(message: Mapping[str, Any], cleaning: _Cleaning) -> dict[str, Any]:
    """One message; its parts of text count as one text, its calls' arguments and a tool's result as JSON where they are."""
    cleaned: dict[str, Any] = {}
    for name, value in message.items():
        match name, value:
            case "content", str() if message.get("role") == "tool":
                cleaned[name] = cleaning.json_text(value)
            case "content", list() | tuple():
                cleaned[name] = _parts(value, cleaning)
            case "tool_calls", list() | tuple():
                cleaned[name] = [_tool_call(call, cleaning) for call in value]
            case _:
                cleaned[name] = cleaning.value(value)
    return cleaned


def _parts(parts: Sequence[Any], cleaning: _Cleaning) -> list[Any]:
    texts = cleaning.joined([_text_of(part) for part in parts])
    return [{**part, "text": text} if _text_of(part) else part for part, text in zip(parts, texts, strict=True)]


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else ""


def _tool_call(call: Any, cleaning: _Cleaning) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return cleaning.value(call)
    arguments = cleaning.json_text(function["arguments"])
    rest = {name: value for name, value in call.items() if name != "function"}
    named = {name: value for name, value in function.items() if name != "arguments"}
    return {**cleaning.value(rest), "function": {**cleaning.value(named), "arguments": arguments}}


def _spaced(text: str, places: Sequence[int]) -> str:
    if not places:
        return text
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    return " ".join(pieces)
