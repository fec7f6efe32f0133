"""Finds the ids of a request in a payload that cannot be read as a whole, so that its refusal reaches its client."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from llamacpp_mqtt_deploy.core.names import FieldNames
from llamacpp_mqtt_deploy.core.payloads import MAX_DEPTH
from llamacpp_mqtt_deploy.core.routes import is_level, is_session

MAX_GUESS_BYTES = 65536
"""Clients write their ids among the first fields; what comes later is not worth the time of other clients."""

_MAX_CHARS = 160
"""Longest text that is looked at; a session path has at most 129 characters."""

_MAX_DIGITS = 20
"""Of a 64-bit number; a payload with a longer one is refused as a whole."""

# Possessive, so that no payload makes it backtrack. A quote that is not closed matches nothing, and the search ends there.
_TOKEN = re.compile(
    rb'(?P<text>"[^"\\]*+(?:\\.[^"\\]*+)*+")|(?P<mark>[{}\[\]:,])|(?P<word>[A-Za-z0-9+.-]++)|(?P<gap>[ \t\r\n]++)',
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class GuessedIds:
    """What was found; each is well-formed, and None where nothing was, or where two places disagree."""

    session_id: str | None
    request_id: str | None
    client_id: str | None = None
    names_session: bool = True
    """Something stands where a session would."""

    def ids(self) -> dict[str, str | None]:
        """As those of a request that could be read: without a session where none is named."""
        found = {"request_id": self.request_id, "client_id": self.client_id}
        return found | {"session_id": self.session_id} if self.names_session else found


def guess_ids(payload: bytes, names: FieldNames) -> GuessedIds:
    """The ids that stand where the clients of this route write them, as far as the payload can be followed.

    Only a value at the very path of its field counts: the same key in another object, or inside a text, may belong to
    somebody else. All ids are checked, so that nothing from the wire reaches a topic as it stands.
    """
    found: dict[str, set[str | int]] = {"session_id": set(), "request_id": set(), "client_id": set()}
    for path, value in _values(payload[:MAX_GUESS_BYTES]):
        name = names.at(path)
        if name in found:
            found[name].add(value)
    session = names.id_text("session_id", _only(found["session_id"]))
    request = names.id_text("request_id", _only(found["request_id"]))
    client = names.id_text("client_id", _only(found["client_id"]))
    return GuessedIds(
        session_id=session if isinstance(session, str) and is_session(session) else None,
        request_id=request if isinstance(request, str) and is_level(request) else None,
        client_id=client if isinstance(client, str) and is_level(client) else None,
        names_session=bool(found["session_id"]),
    )


def guess_words(payload: bytes, names: Collection[str], *, max_chars: int) -> dict[str, str]:
    """The short texts that stand under these names in the outermost object, as far as it can be followed."""
    found: dict[str, set[str | int]] = {name: set() for name in names}
    for path, value in _values(payload[:MAX_GUESS_BYTES]):
        if len(path) == 1 and path[0] in found:
            found[path[0]].add(value)
    words = {name: _only(values) for name, values in found.items()}
    return {name: word for name, word in words.items() if isinstance(word, str) and len(word) <= max_chars}


def _only(values: set[str | int]) -> str | int | None:
    return next(iter(values)) if len(values) == 1 else None


def _values(payload: bytes) -> Iterator[tuple[tuple[str, ...], str | int]]:
    """The texts and whole numbers of the objects in a JSON text with the keys that lead to them; ends where it breaks off.

    What lies inside a list has no path and is passed over.
    """
    keys: list[str | None] = []
    """The key of each open object whose value is being read; None for a list, and between a value and the next key."""
    lists: list[bool] = []
    last: str | None = None
    at = 0
    while found := _TOKEN.match(payload, at):
        at = found.end()
        match found.lastgroup, found[0]:
            case "mark", b"{" | b"[" as bracket:
                if len(keys) == MAX_DEPTH:
                    return
                keys.append(None)
                lists.append(bracket == b"[")
            case "mark", b"}" | b"]":
                if not keys:
                    return
                keys.pop()
                lists.pop()
            case "mark", b":" if keys:
                keys[-1] = last
            case "mark", b"," if keys:
                keys[-1] = None
            case ("text" | "word") as kind, token if keys:
                value = _value(kind, token)
                path = tuple(key for key in keys if key is not None)
                if keys[-1] is None:
                    last = value if isinstance(value, str) else None
                elif len(path) == len(keys) and not any(lists) and value is not None:
                    yield path, value
            case _:
                pass


def _value(kind: str, token: bytes) -> str | int | None:
    if kind == "word":
        return int(token) if token.isdigit() and len(token) <= _MAX_DIGITS else None
    # An escape would have to be read as JSON does; no id needs one.
    plain = len(token) <= _MAX_CHARS + 2 and b"\\" not in token
    return token[1:-1].decode("utf-8", "replace") if plain else None
