"""What clients want of a session on topics of its own: forget the history or the session, or take a new system prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamacpp_mqtt_deploy.core.addresses import SessionChange
from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.names import FieldNames
from llamacpp_mqtt_deploy.core.payloads import decode_payload
from llamacpp_mqtt_deploy.core.routes import is_session

MAX_SYSTEM_PROMPT_BYTES = 16 * 1024
"""Longest system prompt that a session keeps: 4000 tokens. Each kept session may have one."""

MAX_CHANGE_BYTES = 8 * MAX_SYSTEM_PROMPT_BYTES
"""Such a prompt as JSON, in which a character may take six bytes."""

ALL_SESSIONS = "all"
"""In the place of a session: every session of the route."""

_SESSION_NAMES = ("session_id", "sessionId", "session", "target")
_PROMPT_NAMES = ("template", "system_prompt", "systemPrompt", "prompt_template")


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedChange:
    """A change that was understood. `session` is None for every session of the route.

    `system_prompt` is None for the route's own; `reset` says whether the history goes, too.
    """

    kind: SessionChange
    session: str | None
    system_prompt: str | None = None
    reset: bool = True


def read_change(
    kind: SessionChange, payload: bytes, *, session: str | None, names: FieldNames, left_out: int = 0
) -> WantedChange:
    """A change from its bytes, but for those `left_out`. `session` is that of the topic, which goes before one in the payload; `names`
    are the route's.

    Raises BadRequest and PayloadTooLarge.
    """
    content = decode_payload(payload, max_bytes=MAX_CHANGE_BYTES, left_out=left_out)
    if isinstance(content, str) and kind == "system_prompt":
        content = {"system_prompt": content}
    elif isinstance(content, str):
        # Whatever else it says, the topic has said what to do.
        content = {} if session is not None else {"target": content.strip()}
    body = content or {}
    wanted = session if session is not None else _session(body, names)
    if kind != "system_prompt":
        return WantedChange(kind=kind, session=wanted)
    reset = body.get("reset")
    if not (reset is None or isinstance(reset, bool)):
        raise _bad("reset", "true or false")
    prompt = _prompt(body, names)
    return WantedChange(kind=kind, session=wanted, system_prompt=prompt or None, reset=reset is not False)


def _session(body: Mapping[str, Any], names: FieldNames) -> str | None:
    """The session that the payload names; None for all of them, which is what naming none means."""
    for name, value in _found(body, (*names.all_of("session_id"), *_SESSION_NAMES)):
        session = str(value) if type(value) is int and value >= 0 else value
        if session == ALL_SESSIONS:
            return None
        if isinstance(session, str) and is_session(session):
            return session
        raise _bad(name, f'a session: one or two levels of 1 to 64 letters, digits, _ . or -, or "{ALL_SESSIONS}"')
    return None


def _prompt(body: Mapping[str, Any], names: FieldNames) -> str:
    expected = "a text, or an object with a text in content"
    for name, value in _found(body, (*_PROMPT_NAMES, *names.all_of("system_prompt"))):
        prompt = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(prompt, str):
            raise _bad(name, expected)
        if len(prompt.encode()) > MAX_SYSTEM_PROMPT_BYTES:
            raise _bad(name, f"a text of at most {MAX_SYSTEM_PROMPT_BYTES} bytes")
        return prompt
    raise _bad(_PROMPT_NAMES[0], f"{expected}; it is missing")


def _found(body: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What stands under these names; a name with dots is a path."""
    for name in names:
        value: Any = body
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            yield name, value


def _bad(name: str, expected: str) -> BadRequest:
    return BadRequest(f"{name}: expected {expected}", fields={name: expected})
