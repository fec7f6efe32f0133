"""What a client's JSON schema may refer to: references that engines would follow for ever, or nowhere, are found here.

llama.cpp (2026) turns a schema into a grammar by recursion. A `$ref` below `allOf` that leads back to itself overflows its stack and ends
the server for everybody; definitions that double at each step keep it busy. Work here is linear in the size of the schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

MAX_EXPANDED_NODES = 50_000
"""Parts of a schema once each reference is replaced by what it leads to; 16 KiB without references hold some thousand."""

# What applies to the same value as the schema that holds it: a circle of these alone never comes to an end.
_SAME_VALUE_LISTS = frozenset({"allOf", "anyOf", "oneOf"})
_SAME_VALUE = frozenset({"not", "if", "then", "else"})
# Their keys are names that the client gave, not words of JSON Schema.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_DATA = frozenset({"const", "enum", "default", "examples", "example"})


@dataclass(slots=True)
class _Graph:
    """The schemas within a schema by number, and for each the numbers of those that it holds or refers to."""

    number: dict[int, int] = field(default_factory=dict)
    """By `id()`: parts of a schema are told by where they stand, not by what they say."""
    every: list[list[int]] = field(default_factory=list)
    same_value: list[list[int]] = field(default_factory=list)
    references: list[tuple[int, str]] = field(default_factory=list)


def reference_fault(schema: Mapping[str, Any]) -> str | None:
    """What a schema should be that this one is not, in words; None when all its references can be followed.

    The schema must be a tree of bounded depth, as JSON is.
    """
    graph = _Graph()
    if not _add(graph, schema):
        return "a JSON schema whose $ref begins with #"
    for source, reference in graph.references:
        target = graph.number.get(id(_at(schema, reference)))
        if target is None:
            return "a JSON schema in which every $ref leads to a schema"
        graph.every[source].append(target)
        graph.same_value[source].append(target)
    order = _components(graph.same_value)
    if len(set(order)) < len(order) or any(number in targets for number, targets in enumerate(graph.same_value)):
        return "a JSON schema whose $ref never lead back to themselves without a property or an item between"
    if _expanded(graph, order) > MAX_EXPANDED_NODES:
        return f"a JSON schema of at most {MAX_EXPANDED_NODES} parts, what its $ref lead to counted each time"
    return None


# --- from a schema to a graph ------------------------------------------------------------------------------------------


def _add(graph: _Graph, root: Mapping[str, Any]) -> bool:
    """Number all schemas in this one; False when a reference is no text that begins with #."""
    waiting: list[Any] = [root]
    _number(graph, root)
    while waiting:
        schema = waiting.pop()
        source = graph.number[id(schema)]
        reference = schema.get("$ref")
        if reference is not None:
            if not (isinstance(reference, str) and reference.startswith("#")):
                return False
            graph.references.append((source, reference))
        for inner, same_value in _inner(schema):
            if id(inner) not in graph.number:
                _number(graph, inner)
                waiting.append(inner)
            target = graph.number[id(inner)]
            graph.every[source].append(target)
            if same_value:
                graph.same_value[source].append(target)
    return all(_is_harmless(data) for data in _data(root))


def _number(graph: _Graph, schema: Mapping[str, Any]) -> None:
    graph.number[id(schema)] = len(graph.every)
    graph.every.append([])
    graph.same_value.append([])


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """The schemas right below this one, and whether they apply to the same value."""
    for key, value in schema.items():
        if key in _DATA:
            continue
        if key in _NAMED and isinstance(value, dict):
            yield from ((part, False) for part in value.values() if isinstance(part, dict))
        elif isinstance(value, dict):
            yield value, key in _SAME_VALUE
        elif isinstance(value, list):
            yield from ((part, key in _SAME_VALUE_LISTS) for part in _flat(value))


def _flat(items: Sequence[Any]) -> Iterator[dict[str, Any]]:
    waiting = list(items)
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
        elif isinstance(item, list):
            waiting.extend(item)


def _data(root: Mapping[str, Any]) -> Iterator[Any]:
    """The values in a schema that are examples or choices, not schemas; engines search them for references all the same."""
    waiting: list[Any] = [root]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from (value for key, value in part.items() if key in _DATA)
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)


def _is_harmless(data: Any) -> bool:
    waiting = [data]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            reference = part.get("$ref", "#")
            if not (isinstance(reference, str) and reference.startswith("#")):
                return False
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return True


def _at(root: Mapping[str, Any], reference: str) -> Any:
    """What a JSON pointer leads to (RFC 6901, in a fragment); None when it leads nowhere."""
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return None
    part: Any = root
    for step in reference[2:].split("/"):
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(part, dict):
            part = part.get(name)
        elif isinstance(part, list) and name.isascii() and name.isdigit() and len(name) <= 6:
            part = part[int(name)] if int(name) < len(part) else None
        else:
            return None
    return part


# --- circles and sizes -------------------------------------------------------------------------------------------------


def _components(edges: Sequence[Sequence[int]]) -> list[int]:
    """The strongly connected component of each node; edges between components lead to lower numbers (Tarjan, 1972)."""
    component = [-1] * len(edges)
    index = [-1] * len(edges)
    low = list(index)
    stack: list[int] = []
    clock = found = 0
    for start in range(len(edges)):
        if index[start] >= 0:
            continue
        path = [(start, iter(edges[start]))]
        index[start] = low[start] = clock
        clock += 1
        stack.append(start)
        while path:
            node, targets = path[-1]
            target = next(targets, None)
            if target is None:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == index[node]:
                    while component[node] < 0:
                        component[stack.pop()] = found
                    found += 1
            elif index[target] < 0:
                index[target] = low[target] = clock
                clock += 1
                stack.append(target)
                path.append((target, iter(edges[target])))
            elif component[target] < 0:
                low[node] = min(low[node], index[target])
    return component


def _expanded(graph: _Graph, order: Sequence[int]) -> int:
    """The parts of the largest schema in here when references are replaced by their targets, where a recursion counts once."""
    component = _components(graph.every)
    size = [0] * len(order)
    for node in sorted(range(len(order)), key=lambda node: (component[node], order[node])):
        same_value = set(graph.same_value[node])
        inside = (
            size[target] if target in same_value or component[target] != component[node] else 1
            for target in graph.every[node]
        )
        size[node] = min(1 + sum(inside), MAX_EXPANDED_NODES + 1)
    return max(size)
