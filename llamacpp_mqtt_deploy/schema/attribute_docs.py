"""The strings under the fields of a pydantic model as their descriptions, read from the source when somebody asks.

pydantic can read them itself (`use_attribute_docstrings`), but does so when a class is made: 50 ms at each start of a daemon that
describes its fields to nobody.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel


@cache
def attribute_docs(model: type[BaseModel]) -> Mapping[str, str]:
    """Field name -> the string under it, in this class or in one that it inherits from."""
    docs: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, BaseModel) and not kind.__module__.startswith("pydantic"):
            docs |= _own_docs(kind)
    return docs


def _own_docs(kind: type) -> dict[str, str]:
    source = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(source, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(source.body, source.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                docs[name] = inspect.cleandoc(text)
    return docs


def described(document: dict[str, Any], models: Iterable[type[BaseModel]]) -> dict[str, Any]:
    """The JSON Schema that pydantic made of these models, with the descriptions of all fields; changes it in place.

    The first of the models may be the document itself (`model_json_schema`); all others stand under `$defs`.
    """
    definitions = document.get("$defs", {})
    for model in _with_those_inside(models):
        for place in (document, definitions.get(model.__name__, {})):
            if place is document and document.get("title") != model.__name__:
                continue
            properties = place.get("properties", {})
            for name, field in model.model_fields.items():
                text, name = attribute_docs(model).get(name), field.alias or name  # noqa: PLW2901
                if text is not None and name in properties:
                    properties[name] = dict(sorted(({"description": text} | properties[name]).items()))
    return document


def _with_those_inside(models: Iterable[type[BaseModel]]) -> list[type[BaseModel]]:
    """These models and all that their fields hold, each once."""
    found: dict[type[BaseModel], None] = {}
    waiting = list(models)
    while waiting:
        model = waiting.pop()
        if model not in found:
            found[model] = None
            for field in model.model_fields.values():
                waiting += _models_in(field.annotation)
    return list(found)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
