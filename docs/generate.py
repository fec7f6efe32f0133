"""Writes the tables and the diagram of the documentation that the code knows best, between their marks; `make docs` runs it.

A mark is `<!-- generated: NAME -->`, its end `<!-- end of NAME -->`. With `--check` nothing is written, and the exit code is 1 when
a page differs. A test does the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llamacpp_mqtt_deploy.commands.config import _DEFAULTS_IN_WORDS
from llamacpp_mqtt_deploy.config import keys
from llamacpp_mqtt_deploy.config.reloading import is_live
from llamacpp_mqtt_deploy.core.errors import LEAVES
from llamacpp_mqtt_deploy.core.events import ORDER
from llamacpp_mqtt_deploy.core.fields import AdminFields, ControlFields, RequestFields
from llamacpp_mqtt_deploy.core.validation import Expect
from llamacpp_mqtt_deploy.schema import event_models, messages
from llamacpp_mqtt_deploy.schema.document import schema, schema_text

FOLDER = Path(__file__).resolve().parent
_BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)

_COMMON = {"type", "request_id", "session_id"}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


# --- the protocol ------------------------------------------------------------------------------------------------------


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Name, what is expected, meaning; for messages that clients send."""
    for name, field in model.model_fields.items():
        expected = next((str(found.words) for found in field.metadata if isinstance(found, Expect)), "")
        yield f"`{name}`", expected, field.description or ""


def _received(model: type[BaseModel], *, leave_out: set[str] = _COMMON) -> Iterator[tuple[str, ...]]:
    """Name, type, meaning; for messages that the worker publishes. `?` marks what may be absent."""
    document = schema()
    properties = document["$defs"][model.__name__]["properties"]
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        absent = "?" if not field.is_required() and field.default is None else ""
        yield f"`{name}{absent}`", _type(properties[name]), field.description or ""


def _type(node: Mapping[str, Any]) -> str:
    if "$ref" in node:
        return f"object ({str(node['$ref']).rsplit('/', 1)[1]})"
    if "anyOf" in node:
        return " or ".join(_type(branch) for branch in node["anyOf"] if branch.get("type") != "null")
    if "const" in node:
        return f"`{str(node['const']).lower()}`" if isinstance(node["const"], bool) else f"`{node['const']}`"
    if "enum" in node:
        return "a code" if len(node["enum"]) > 8 else ", ".join(f"`{choice}`" for choice in node["enum"])
    if node.get("type") == "array":
        return f"list of {_type(node.get('items', {}))}"
    return str(node.get("type", "anything"))


def _events() -> str:
    parts = []
    for model in (
        event_models.Queued,
        event_models.Start,
        event_models.Progress,
        event_models.Chunk,
        event_models.Ping,
        event_models.Snapshot,
        event_models.Done,
        event_models.Error,
        event_models.Rejected,
    ):
        kind = model.__name__.lower()
        head = f"#### `{kind}`\n\n{model.__doc__}\n\n"
        parts.append(head + _table(("field", "type", "meaning"), _received(model)))
    for part in (
        event_models.Usage,
        event_models.Timings,
        event_models.ToolCallDelta,
        event_models.AssistantMessageOut,
    ):
        head = f"#### The object `{part.__name__}`\n\n{part.__doc__}\n\n"
        parts.append(head + _table(("field", "type", "meaning"), _received(part)))
    return "\n\n".join(parts)


def _model(model: type[BaseModel], leave_out: set[str]) -> str:
    return _table(("field", "type", "meaning"), _received(model, leave_out=leave_out))


def _with_parts(whole: type[BaseModel], *parts: type[BaseModel]) -> str:
    told = [f"`{part.__name__}`: {part.__doc__}\n\n{_model(part, set())}" for part in parts]
    return "\n\n".join([_model(whole, set()), *told])


def _status() -> str:
    return _with_parts(
        messages.Status, messages.RouteStatus, messages.Capabilities, messages.LimitsStatus, messages.EngineStatus
    )


def _health() -> str:
    return _with_parts(messages.Health, messages.SlotsHealth, messages.RequestsHealth, messages.TokensHealth)


def _order() -> str:
    """The table of legal order as a state diagram."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> new"]
    for phase, following in ORDER.items():
        grouped: dict[str, list[str]] = {}
        for event, then in following.items():
            grouped.setdefault(then, []).append(event)
        lines += [f"    {phase} --> {then}: {', '.join(events)}" for then, events in grouped.items()]
    return "\n".join([*lines, "    ended --> [*]", "```"])


def _errors() -> str:
    rows = ((f"`{leaf.code}`", "yes" if leaf.retryable else "no", leaf.__doc__ or "") for leaf in LEAVES)
    return _table(("code", "retryable", "what happened"), rows)


# --- the configuration -------------------------------------------------------------------------------------------------


def _settings() -> str:
    parts = []
    for table in keys.tables():
        if not table.keys:
            continue
        name = ".".join(table.path)
        text = f"{table.description}\n\n" if table.description else ""
        if name == f"routes.{keys.ANY_NAME}":
            text = (
                "A table for each route, under a name of yours. `default` can be set too, but its topics are fixed.\n\n"
            )
        parts.append(
            f"### `[{name}]`\n\n{text}" + _table(("key", "expects", "default", "meaning", "reload"), _keys(table))
        )
    return "\n\n".join(parts)


def _keys(table: keys.Table) -> Iterator[tuple[str, ...]]:
    for key in table.keys:
        default = _DEFAULTS_IN_WORDS.get(key.dotted)
        if default is None:
            default = "absent" if key.default is None else f"`{keys.toml_value(key.default)}`"
        yield f"`{key.path[-1]}`", key.expected, default, key.description, "yes" if is_live(key.path) else "restart"


BLOCKS: Mapping[str, Callable[[], str]] = {
    "request-fields": lambda: _table(("field", "expects", "meaning"), _fields(RequestFields)),
    "control-fields": lambda: _table(("field", "expects", "meaning"), _fields(ControlFields)),
    "admin-fields": lambda: _table(("field", "expects", "meaning"), _fields(AdminFields)),
    "events": _events,
    "acks": lambda: _model(event_models.Ack, {"session_id"}),
    "admin-acks": lambda: _model(messages.AdminAck, set()),
    "status": _status,
    "health": _health,
    "order": _order,
    "errors": _errors,
    "settings": _settings,
}


def filled(text: str) -> str:
    """The page with every marked block as the code has it now."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}", text)


def pages() -> dict[Path, str]:
    """Every generated file with its right content."""
    wanted = {page: filled(page.read_text("utf-8")) for page in sorted(FOLDER.glob("*.md"))}
    return wanted | {FOLDER / "schema.json": schema_text()}


def main() -> int:
    different = [page for page, wanted in pages().items() if page.read_text("utf-8") != wanted]
    if "--check" in sys.argv[1:]:
        for page in different:
            print(f"{page.name} is not as the code has it; run `make docs`", file=sys.stderr)
        return 1 if different else 0
    for page in different:
        page.write_text(pages()[page], "utf-8")
        print(f"written: {page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
