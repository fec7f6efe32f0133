"""Checks the tool calls of an engine like everything else that comes from outside: ids, names and arguments."""

from __future__ import annotations

from llamacpp_mqtt_deploy.core.deltas import ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed

MAX_CALLS = 128
"""Calls in one answer; as many as a request may bring results for."""
MAX_ARGUMENTS_CHARS = 1024 * 1024
"""Arguments of all calls of one answer: they are kept in the journal, in the history and in one event."""
# Both, with their JSON around them, fit into the smallest event that a worker may be set to (1024 bytes).
_MAX_ID_CHARS = 128
_MAX_NAME_CHARS = 64


def checked_call(index: int, call_id: object, name: object, arguments: str) -> ToolCall:
    """A piece of a call as it may be passed on.

    An id that no client could send back (control characters, half a surrogate pair, absurd length) becomes `call_{index}`:
    an id only has to be told apart from the others. A name is what the client acts on, so that one which cannot be a tool's
    raises EngineFailed. Halves of surrogate pairs in the arguments become U+FFFD.
    """
    return ToolCall(index, _checked_id(index, call_id), _checked_name(name), whole(arguments))


def _checked_id(index: int, call_id: object) -> str | None:
    if call_id is None or call_id == "":
        return None
    if isinstance(call_id, int):  # some servers number their calls
        call_id = str(call_id)
    fits = isinstance(call_id, str) and len(call_id) <= _MAX_ID_CHARS and call_id.isascii() and call_id.isprintable()
    return str(call_id) if fits else f"call_{index}"


def _checked_name(name: object) -> str | None:
    if name is None or name == "":
        return None
    if not isinstance(name, str) or len(name) > _MAX_NAME_CHARS or not name.isprintable():
        raise EngineFailed("The engine called a tool by a name that no tool can have.")
    return name


def whole(text: str) -> str:
    """The text with every half of a surrogate pair replaced by U+FFFD: UTF-8 cannot hold one."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
