"""Makes a prompt of the fields of a payload: a text with `{field.sub}` in it, and limits for what comes from outside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.errors import BadRequest

# `{{` and `}}` are braces; then a placeholder; then a brace that is neither.
_PARTS = re.compile(r"(?P<brace>\{\{|\}\})|\{(?P<path>[^{}\s.]+(?:\.[^{}\s.]+)*)\}|(?P<lone>[{}])")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """A template that was read. It is read once: what a payload puts into it is never looked at for placeholders.

    `defaults` by the path of a field that may be missing. A value has at most `field_chars` characters, the prompt `chars`.
    """

    text: str
    defaults: Mapping[str, str] = field(default_factory=dict)
    field_chars: int = 2000
    chars: int = 16000
    _parts: tuple[tuple[str, str], ...] = field(init=False, repr=False)
    """What stands before each field, and its path; the path of the last one is empty."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", tuple(_parts(self.text)))

    @property
    def fields(self) -> tuple[str, ...]:
        """The paths of the fields, each once, in their order."""
        return tuple(dict.fromkeys(path for _, path in self._parts if path))

    def fill(self, content: Mapping[str, Any]) -> str:
        """The prompt. Raises BadRequest with every field that is missing or too long."""
        values: dict[str, str] = {}
        wrong: dict[str, str] = {}
        for path in self.fields:
            value = _value(content, path)
            if value is None:
                value = self.defaults.get(path)
            if value is None:
                wrong[path] = "a value; it is missing"
            elif len(value) > self.field_chars:
                wrong[path] = f"at most {self.field_chars} characters, found {len(value)}"
            else:
                values[path] = value
        if wrong:
            raise BadRequest("; ".join(f"{path}: expected {words}" for path, words in wrong.items()), fields=wrong)
        prompt = "".join(before + values.get(path, "") for before, path in self._parts)
        if len(prompt) > self.chars:
            words = f"fields that make a prompt of at most {self.chars} characters, found {len(prompt)}"
            raise BadRequest(f"payload: expected {words}", fields={"payload": words})
        if not prompt.strip():
            words = "fields that make a prompt; it is empty"
            raise BadRequest(f"payload: expected {words}", fields={"payload": words})
        return prompt


def template_faults(text: str, defaults: Mapping[str, str]) -> list[str]:
    """Sentences about what is wrong with a template; empty when it can be used."""
    found = []
    for part in _PARTS.finditer(text):
        if part["lone"]:
            shown = text[part.start() : part.start() + 20]
            found.append(
                f'"{shown}" begins with a brace that belongs to no field: write {{name}} or {{name.sub}} for a field, and '
                "two braces for one"
            )
    known = {part["path"] for part in _PARTS.finditer(text)}
    found += [f"it has no field {path}, for which there is a default" for path in defaults if path not in known]
    return found if text.strip() else ["is empty", *found]


def _parts(text: str) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    before, at = "", 0
    for part in _PARTS.finditer(text):
        before, at = before + text[at : part.start()], part.end()
        if part["path"]:
            parts.append((before, part["path"]))
            before = ""
        else:
            before += part["brace"][0] if part["brace"] else part["lone"]
    return [*parts, (before + text[at:], "")]


def _value(content: Mapping[str, Any], path: str) -> str | None:
    """The value at this path as text: a text as it is, all else as JSON; None when it is missing or null."""
    value: Any = content
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value).decode()
