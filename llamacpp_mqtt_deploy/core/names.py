"""What clients call the fields of a request: a route's own names, and the nearest known name of an unknown one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.fields import RequestFields
from llamacpp_mqtt_deploy.core.payloads import MAX_DEPTH, shown

REQUEST_FIELDS: frozenset[str] = frozenset(RequestFields.model_fields)

MAX_NAMED = 8
"""Unknown fields that are named in the warnings."""

# What other programs call our fields, where spelling alone does not lead there; without case, `_` and `-`.
_SYNONYMS: Mapping[str, str] = {
    "completiontokens": "max_tokens",
    "content": "prompt",
    "enablethinking": "thinking",
    "functions": "tools",
    "grammar": "response_format",
    "history": "messages",
    "id": "request_id",
    "input": "prompt",
    "maxcompletiontokens": "max_tokens",
    "maxnewtokens": "max_tokens",
    "message": "prompt",
    "npredict": "max_tokens",
    "numpredict": "max_tokens",
    "query": "prompt",
    "question": "prompt",
    "reasoning": "thinking",
    "reasoningbudgettokens": "thinking_budget",
    "repetitionpenalty": "repeat_penalty",
    "session": "session_id",
    "system": "system_prompt",
    "text": "prompt",
    "timeout": "timeout_s",
}
_BY_PLAIN_NAME: Mapping[str, str] = {name.replace("_", ""): name for name in sorted(REQUEST_FIELDS)}


_Tree = dict[str, "str | _Tree"]
"""The clients' names: what leads to a field of ours, or to an object with more names."""


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The names that the clients of one route use; `fields` maps ours to theirs, all others are as in the protocol.

    A name with dots is a path into objects of the payload: `message.text`.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    _tree: _Tree = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tree", _tree(self.fields))

    def of(self, name: str) -> str:
        """A field of ours as these clients know it."""
        return self.fields.get(name, name)

    def of_path(self, path: str) -> str:
        """The same for a path such as `messages[2].content`."""
        first = re.split(r"[.\[]", path, maxsplit=1)[0]
        return self.of(first) + path[len(first) :]

    def at(self, path: Sequence[str]) -> str | None:
        """The field of ours that clients write at this path of keys; None when there is none."""
        node: str | _Tree | None = self._tree
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node if isinstance(node, str) else None

    def read(self, content: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The known fields under our names, and the names that are not known. A null is as good as absent.

        Our own name of a renamed field is understood too. Raises BadRequest when both are there, and when the object that
        a field lies in is something else.
        """
        body: dict[str, Any] = {}
        origin: dict[str, str] = {}
        unknown = []
        for path, name, value in _found(content, self._tree, ""):
            if name is None:
                unknown.append(path)
            elif value is None:
                continue
            elif name in origin:
                words = f"only one of {origin[name]} and {path}"
                raise BadRequest(f"{path}: expected {words}, they mean the same field", fields={path: words})
            else:
                origin[name], body[name] = path, self.id_text(name, value)
        return body, tuple(unknown)

    def id_text(self, name: str, value: Any) -> Any:
        """A whole number that stands for an id as text; every other value as it is.

        Session ids are often keys of a database. A request id must be random, so a number (rather a counter) is taken only
        from clients that have a name of their own for it, and were not written for this protocol.
        """
        is_id = name == "session_id" or (name == "request_id" and name in self.fields)
        return str(value) if is_id and type(value) is int and value >= 0 else value

    def warnings(self, unknown: Sequence[str]) -> list[str]:
        """One sentence for each of the first 8 unknown names."""
        said = [
            f"{shown(name)} is not a field of a request and was ignored{self._hint(name)}"
            for name in unknown[:MAX_NAMED]
        ]
        if len(unknown) > MAX_NAMED:
            said[-1] += f"; so were {len(unknown) - MAX_NAMED} others"
        return said

    def _hint(self, name: str) -> str:
        known = nearest(name.rpartition(".")[2])
        return f"; did you mean {shown(self.of(known))}?" if known else ""


def _tree(fields: Mapping[str, str]) -> _Tree:
    tree: _Tree = {name: name for name in REQUEST_FIELDS}
    for ours, theirs in fields.items():
        *above, last = theirs.split(".")
        node = tree
        for key in above:
            below = node.get(key)
            if not isinstance(below, dict):
                below = node[key] = {}
            node = below
        node[last] = ours
        # A flat key that happens to hold a dot is the same field.
        tree[theirs] = ours
    return tree


def _found(content: Mapping[str, Any], tree: _Tree, above: str) -> Iterator[tuple[str, str | None, Any]]:
    """Path in the payload, field of ours (None for an unknown name) and value."""
    for key, value in content.items():
        known = tree.get(key)
        if not isinstance(known, dict):
            yield above + key, known, value
        elif isinstance(value, dict):
            yield from _found(value, known, f"{above}{key}.")
        elif value is not None:
            words = f"an object with {', '.join(known)}"
            raise BadRequest(f"{above}{key}: expected {words}", fields={above + key: words})


def nearest(name: str) -> str | None:
    """The field that somebody who wrote `name` may have meant."""
    # Compared without case and underscores, so that camelCase finds its way; cut, because difflib takes quadratic time.
    plain = name[:64].lower().replace("_", "").replace("-", "")
    known = _SYNONYMS.get(plain) or _BY_PLAIN_NAME.get(plain)
    if known is None:
        near = get_close_matches(plain, _BY_PLAIN_NAME, n=1, cutoff=0.75)
        known = _BY_PLAIN_NAME[near[0]] if near else None
    return known


def check_fields(fields: Mapping[str, str]) -> list[str]:
    """Sentences about what is wrong with a route's `fields`; empty when it can be used."""
    found = []
    for name in fields:
        if name not in REQUEST_FIELDS:
            known = nearest(name)
            hint = f"; did you mean {shown(known)}?" if known else ""
            found.append(f"{shown(name)} is not a field of a request{hint}")
    found += [
        f"{ours} is called {shown(theirs)}: {fault}" for ours, theirs in fields.items() if (fault := _fault(theirs))
    ]
    theirs = list(fields.values())
    found += [f"two fields are called {shown(name)}" for name in sorted({n for n in theirs if theirs.count(n) > 1})]
    return found or list(_overlaps(fields))


def _fault(theirs: str) -> str | None:
    if not theirs:
        return "the name is empty"
    levels = theirs.split(".")
    if "" in levels:
        return "a path needs a name before and after each dot"
    if len(levels) >= MAX_DEPTH:
        return f"a payload is nested at most {MAX_DEPTH} levels deep"
    if "[" in theirs:
        return "a path leads through objects only, it cannot name an item of a list"
    return None


def _overlaps(fields: Mapping[str, str]) -> Iterator[str]:
    """One field inside another: whatever the payload holds there, one of the two could not be read."""
    paths = {name: name for name in REQUEST_FIELDS if name not in fields and name not in fields.values()} | dict(fields)
    for outer, theirs in paths.items():
        inner = sorted(name for name, path in paths.items() if path.startswith(f"{theirs}."))
        for name in inner:
            yield f"{outer} ({theirs}) and {name} ({paths[name]}) overlap: the first would have to be an object and a value"
