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

REPLY_FIELDS: frozenset[str] = frozenset({"client_id", "reply_topic"})
"""Fields of a payload that say where its answer goes, on routes that ask for them."""

Names = Mapping[str, "str | Sequence[str]"]
"""What clients call our fields; several names where some clients use one and some another, the first one that is there counts."""

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

    A name with dots is a path into objects of the payload: `message.text`. `more` are fields that only some routes know.
    """

    fields: Names = field(default_factory=dict)
    more: tuple[str, ...] = field(default=(), repr=False)
    _theirs: Mapping[str, tuple[str, ...]] = field(init=False, repr=False)
    _tree: _Tree = field(init=False, repr=False)

    def __post_init__(self) -> None:
        theirs = _each(self.fields)
        object.__setattr__(self, "_theirs", theirs)
        object.__setattr__(self, "_tree", _tree(theirs, self.more))

    def of(self, name: str) -> str:
        """A field of ours as these clients know it."""
        return self._theirs.get(name, (name,))[0]

    def all_of(self, name: str) -> tuple[str, ...]:
        """All names of a field of ours."""
        return self._theirs.get(name, (name,))

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
        a field lies in is something else. Of several names that the route gives a field, the first one counts.
        """
        body: dict[str, Any] = {}
        origin: dict[str, str] = {}
        unknown = []
        for path, name, value in _found(content, self._tree, ""):
            if name is None:
                unknown.append(path)
            elif value is None:
                continue
            elif name not in origin or self._comes_first(name, path, origin[name]):
                origin[name], body[name] = path, self.id_text(name, value)
        return body, tuple(unknown)

    def read_only(self, content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """These fields alone, under our names; whatever else stands there is none of ours."""
        body: dict[str, Any] = {}
        for name in names:
            for path in (*self.all_of(name), name):
                value = content.get(path, _below(content, path))
                if value is not None:
                    body[name] = self.id_text(name, value)
                    break
        return body

    def _comes_first(self, name: str, path: str, other: str) -> bool:
        """Whether of two names in one payload the first counts."""
        ranks = self._theirs.get(name, ())
        if path in ranks and other in ranks:
            return ranks.index(path) < ranks.index(other)
        words = f"only one of {other} and {path}"
        raise BadRequest(f"{path}: expected {words}, they mean the same field", fields={path: words})

    def id_text(self, name: str, value: Any) -> Any:
        """A whole number that stands for an id as text; every other value as it is.

        Session ids are often keys of a database. A request id must be random, so a number (rather a counter) is taken only
        from clients that have a name of their own for it, and were not written for this protocol.
        """
        is_id = name in ("session_id", "client_id") or (name == "request_id" and name in self.fields)
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


def _each(fields: Names) -> dict[str, tuple[str, ...]]:
    return {ours: (theirs,) if isinstance(theirs, str) else tuple(theirs) for ours, theirs in fields.items()}


def _tree(fields: Mapping[str, tuple[str, ...]], more: Sequence[str]) -> _Tree:
    tree: _Tree = {name: name for name in (*REQUEST_FIELDS, *more)}
    for ours, theirs in ((ours, name) for ours, names in fields.items() for name in names):
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


def _below(content: Mapping[str, Any], path: str) -> Any:
    value: Any = content
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def nearest(name: str) -> str | None:
    """The field that somebody who wrote `name` may have meant."""
    # Compared without case and underscores, so that camelCase finds its way; cut, because difflib takes quadratic time.
    plain = name[:64].lower().replace("_", "").replace("-", "")
    known = _SYNONYMS.get(plain) or _BY_PLAIN_NAME.get(plain)
    if known is None:
        near = get_close_matches(plain, _BY_PLAIN_NAME, n=1, cutoff=0.75)
        known = _BY_PLAIN_NAME[near[0]] if near else None
    return known


def check_fields(fields: Names) -> list[str]:
    """Sentences about what is wrong with a route's `fields`; empty when it can be used."""
    found = []
    known = REQUEST_FIELDS | REPLY_FIELDS
    for name in fields:
        if name not in known:
            near = nearest(name)
            hint = f"; did you mean {shown(near)}?" if near else ""
            found.append(f"{shown(name)} is not a field of a request{hint}")
    pairs = [(ours, name) for ours, names in _each(fields).items() for name in names]
    found += [f"{ours} has an empty list of names" for ours, names in _each(fields).items() if not names]
    found += [f"{ours} is called {shown(theirs)}: {fault}" for ours, theirs in pairs if (fault := _fault(theirs))]
    theirs = [name for _, name in pairs]
    found += [f"two fields are called {shown(name)}" for name in sorted({n for n in theirs if theirs.count(n) > 1})]
    return found or list(_overlaps(pairs))


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


def _overlaps(pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """One field inside another: whatever the payload holds there, one of the two could not be read."""
    renamed, taken = {ours for ours, _ in pairs}, {theirs for _, theirs in pairs}
    paths = [(name, name) for name in REQUEST_FIELDS if name not in renamed and name not in taken] + list(pairs)
    for outer, theirs in paths:
        for name, path in sorted(paths):
            if path.startswith(f"{theirs}."):
                yield f"{outer} ({theirs}) and {name} ({path}) overlap: the first would have to be an object and a value"
