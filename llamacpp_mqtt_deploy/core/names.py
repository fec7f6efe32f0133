"""What clients call the fields of a request: a route's own names, and the nearest known name of an unknown one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.fields import RequestFields
from llamacpp_mqtt_deploy.core.payloads import shown

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


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The names that the clients of one route use; `fields` maps ours to theirs, all others are as in the protocol."""

    fields: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str) -> str:
        """A field of ours as these clients know it."""
        return self.fields.get(name, name)

    def of_path(self, path: str) -> str:
        """The same for a path such as `messages[2].content`."""
        first = re.split(r"[.\[]", path, maxsplit=1)[0]
        return self.of(first) + path[len(first) :]

    def read(self, content: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The known fields under our names, and the names that are not known. A null is as good as absent.

        Our own name of a renamed field is understood too. Raises BadRequest when both are there.
        """
        ours = {theirs: name for name, theirs in self.fields.items()}
        body: dict[str, Any] = {}
        origin: dict[str, str] = {}
        unknown = []
        for key, value in content.items():
            name = ours.get(key, key)
            if name not in REQUEST_FIELDS:
                unknown.append(key)
            elif value is None:
                continue
            elif name in origin:
                words = f"only one of {origin[name]} and {key}"
                raise BadRequest(f"{key}: expected {words}, they mean the same field", fields={key: words})
            else:
                origin[name], body[name] = key, value
        return body, tuple(unknown)

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
        known = nearest(name)
        return f"; did you mean {shown(self.of(known))}?" if known else ""


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
    found += [f"the name for {ours} is empty" for ours, theirs in fields.items() if not theirs]
    theirs = list(fields.values())
    found += [f"two fields are called {shown(name)}" for name in sorted({n for n in theirs if theirs.count(n) > 1})]
    return found
