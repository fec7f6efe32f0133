"""How messages from outside are validated: strict, and with every fault told in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError

# More would make the answer longer, not clearer.
_MAX_FAULTS = 8

# Their parts are so small that the words for the whole say it better.
_WHOLE = frozenset({"stop", "stream", "logit_bias"})


@dataclass(frozen=True, slots=True)
class Expect:
    """What a field should have been, in words for the person who sent it; also its description in the schema."""

    words: str


class WireModel(BaseModel):
    """Strict: a bool is no number and "0.5" is no number. Unknown fields are left out."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class FirstFault(FailFast):
    """Stop at the first bad item of a list; hashable, as a member of a union must be."""

    __hash__ = object.__hash__


def fault(expected: str) -> PydanticCustomError:
    # The text goes through a template engine of pydantic's; a context keeps braces in it harmless.
    return PydanticCustomError("expected", "{words}", {"words": expected})


def _integral(value: Any) -> Any:
    # JavaScript, Lua and Node-RED know one type of number and may write 5 as 5.0.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def expectations(model: type[WireModel]) -> Mapping[str, str]:
    """What each field of a message expects, in words."""
    return {
        name: note.words
        for name, field in model.model_fields.items()
        for note in field.metadata
        if isinstance(note, Expect)
    }


def faults(error: ValidationError, expected: Mapping[str, str]) -> dict[str, str]:
    """The fields at fault (`messages[2].content`), at most 8, each with what was expected."""
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False):
        path = [step for step in detail["loc"] if not _is_tag(step)]
        if path and path[0] in _WHOLE:
            del path[1:]
        name = _joined(path)
        if detail["type"] == "expected":
            words = detail["msg"]
        elif len(path) == 1 and path[0] in expected:
            words = expected[str(path[0])]
        else:
            words = _words(detail["type"], detail["msg"], detail.get("ctx", {}))
        found.setdefault(name, words)
        if len(found) == _MAX_FAULTS:
            break
    return found


def _is_tag(step: int | str) -> bool:
    # The path names the member of a union that was tried; our tags begin with @ to be told from the client's fields.
    return isinstance(step, str) and step.startswith("@")


def _joined(path: list[int | str]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:64]}" for step in path)
    return text.removeprefix(".")


def _words(kind: str, message: str, context: Mapping[str, Any]) -> str:
    match kind:
        case "missing":
            return "a value; it is missing"
        case "string_type":
            return "a string"
        case "string_too_short" | "too_short":
            return f"at least {context['min_length']} long"
        case "string_too_long" | "too_long":
            return f"at most {context['max_length']} long"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "an object"
        case "literal_error":
            return str(context["expected"]).replace("'", "")
        case "string_pattern_mismatch":
            return "1 to 64 letters, digits, _ . or -"
        case _:
            return message.removeprefix("Input should be ")
