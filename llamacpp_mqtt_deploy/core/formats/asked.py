"""What an HTTP body asks for, in the fields of a request on the bus, and how a wrong body is told in its own API's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from llamacpp_mqtt_deploy.core.errors import BadRequest, Unsupported
from llamacpp_mqtt_deploy.core.fields import RequestFields
from llamacpp_mqtt_deploy.core.routes import is_level
from llamacpp_mqtt_deploy.core.validation import expectations, faults

OWN_MODEL = "default"
"""The model name that means the worker's own, in every API."""

MAX_MODEL_CHARS = 256
"""Longest name of a model; as the request's field `model` has it."""

_EXPECTED = expectations(RequestFields)
_MESSAGE = re.compile(r"messages\[(\d+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A body that was understood.

    `request` holds fields of a request as the bus knows them, checked, without `request_id`, `session_id`, `model` and `stream`:
    those are for who sends it. It is empty when there is nothing to generate (Ollama's way of loading a model). `session` is one
    level of a session path, None where the body names none. `model` is None for the worker's own. `echo` is what the renderer
    of the same API wants to know of the body.
    """

    request: Mapping[str, Any]
    streams: bool
    session: str | None = None
    model: str | None = None
    echo: Mapping[str, Any] = field(default_factory=dict)


def bad(path: str, expected: str) -> BadRequest:
    """The error for one field, named as its API names it."""
    return BadRequest(f"{path}: expected {expected}", fields={path: expected})


def unserved(path: str, why: str) -> Unsupported:
    """The error for a field that cannot be served; `why` goes on after "is not supported"."""
    return Unsupported(f"{path} is not supported: {why}", fields={path: f"nothing, since {why}"})


class BodyFields:
    """The fields of an object in a body, read one by one; a null is as good as absent.

    Every reader gives None for a field that is absent and raises BadRequest, with the path from the top, for one of a wrong type.
    """

    def __init__(self, fields: Mapping[str, Any], path: str = "") -> None:
        self.fields = fields
        self.own_path = path

    @classmethod
    def of(cls, value: Any, path: str) -> BodyFields:
        if not isinstance(value, Mapping):
            raise bad(path, "an object")
        return cls(value, path)

    def path(self, name: str) -> str:
        return f"{self.own_path}.{name}" if self.own_path else name

    def get(self, name: str) -> Any:
        return self.fields.get(name)

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is None or isinstance(value, str):
            return value
        raise bad(self.path(name), "a text")

    def needed_text(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise bad(self.path(name), "a text; it is missing")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise bad(self.path(name), "true or false")

    def object(self, name: str) -> BodyFields | None:
        value = self.get(name)
        return None if value is None else BodyFields.of(value, self.path(name))

    def list(self, name: str) -> list[Any] | None:
        value = self.get(name)
        if value is None or isinstance(value, list):
            return value
        raise bad(self.path(name), "a list")

    def objects(self, name: str) -> Iterator[BodyFields]:
        """Each object of a list, none when the list is absent."""
        for number, value in enumerate(self.list(name) or ()):
            yield BodyFields.of(value, f"{self.path(name)}[{number}]")

    def named(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The values of the fields that go to the bus as they are, under the bus's names; `names` maps theirs to ours."""
        return {ours: value for theirs, ours in names.items() if (value := self.get(theirs)) is not None}

    def refuse(self, refused: Mapping[str, str]) -> None:
        """Raise Unsupported for the first of these fields that asks for something; false, 0 and empty ask for nothing."""
        for name, why in refused.items():
            if self.get(name):
                raise unserved(self.path(name), why)


def model_of(body: BodyFields) -> str | None:
    """The model that a body names; None for the worker's own."""
    model = body.text("model")
    if model is not None and len(model) > MAX_MODEL_CHARS:
        raise bad(body.path("model"), f"a name of at most {MAX_MODEL_CHARS} characters")
    return None if model in (None, "", OWN_MODEL) else model


def session_of(body: BodyFields, name: str) -> str | None:
    """The session that a field names, as one level of a session path; a whole number is as good as its digits."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        value = str(value)
    if isinstance(value, str) and is_level(value):
        return value
    raise bad(body.path(name), "1 to 64 letters, digits, _ . or -, or a whole number")


def folded_seed(seed: Any) -> Any:
    """Clients may send 64 bits, engines take 32: the lower ones, so that the same seed stays the same. -1 is a new one each time."""
    return seed % 2**32 if type(seed) is int and seed != -1 else seed


def checked(
    request: Mapping[str, Any], *, names: Mapping[str, str] | None = None, origins: Sequence[str] = ()
) -> dict[str, Any]:
    """The request as it may go to the bus; raises BadRequest as a worker would, under the names of the API.

    `names` maps fields of the bus to theirs. `origins` tells for each of `messages` the path of what it was made of, where the
    API has another shape.
    """
    try:
        RequestFields.model_validate(request)
        return dict(request)
    except ValidationError as error:
        found = faults(error, _EXPECTED)
    # Outside the except clause: pydantic's error holds the client's text, which must not reach a log as a cause.
    told = {_theirs(path, names or {}, origins): words for path, words in found.items()}
    raise BadRequest("; ".join(f"{path}: expected {words}" for path, words in told.items()), fields=told)


def _theirs(path: str, names: Mapping[str, str], origins: Sequence[str]) -> str:
    message = _MESSAGE.match(path)
    if message is not None and int(message[1]) < len(origins):
        return origins[int(message[1])]
    first = re.split(r"[.\[]", path, maxsplit=1)[0]
    return names.get(first, first) + path[len(first) :]
