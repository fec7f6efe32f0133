"""Writes what the code knows best into the documentation: tables and a diagram between their marks, and the drawing of the folders
from the imports. `make docs` runs it.

A mark is `<!-- generated: NAME -->`, its end `<!-- end of NAME -->`. With `--check` nothing is written, and the exit code is 1 when
a page differs. A test does the same.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from pydantic import BaseModel

from llamacpp_mqtt_deploy import cli
from llamacpp_mqtt_deploy.commands.config import _DEFAULTS_IN_WORDS
from llamacpp_mqtt_deploy.config import keys
from llamacpp_mqtt_deploy.config.reloading import is_live
from llamacpp_mqtt_deploy.core.errors import LEAVES
from llamacpp_mqtt_deploy.core.events import ORDER
from llamacpp_mqtt_deploy.core.fields import AdminFields, CountFields, RequestFields
from llamacpp_mqtt_deploy.core.formats import (
    anthropic_body,
    ollama_body,
    openai_chat,
    openai_responses_body,
    seed_bodies,
)
from llamacpp_mqtt_deploy.core.formats.anthropic import anthropic_error
from llamacpp_mqtt_deploy.core.formats.http_routes import HTTP_ROUTES
from llamacpp_mqtt_deploy.core.formats.openai_errors import openai_error
from llamacpp_mqtt_deploy.core.formats.rendering import STATUS
from llamacpp_mqtt_deploy.core.validation import Expect
from llamacpp_mqtt_deploy.metrics.families import FAMILIES
from llamacpp_mqtt_deploy.schema import event_models, messages
from llamacpp_mqtt_deploy.schema.attribute_docs import attribute_docs
from llamacpp_mqtt_deploy.schema.document import schema, schema_text

FOLDER = Path(__file__).resolve().parent
PACKAGE = FOLDER.parent / "llamacpp_mqtt_deploy"
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
        yield f"`{name}`", expected, attribute_docs(model).get(name, "")


def _received(model: type[BaseModel], *, leave_out: set[str] = _COMMON) -> Iterator[tuple[str, ...]]:
    """Name, type, meaning; for messages that the worker publishes. `?` marks what may be absent."""
    document = schema()
    properties = document["$defs"][model.__name__]["properties"]
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        absent = "?" if not field.is_required() and field.default is None else ""
        yield f"`{name}{absent}`", _type(properties[name]), attribute_docs(model).get(name, "")


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


# --- the APIs of the gateway -------------------------------------------------------------------------------------------


def _named(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _api_fields(module: ModuleType) -> Callable[[], str]:
    """What becomes of the fields of a body, from the tables of the module that reads it."""

    def rows() -> Iterator[tuple[str, str]]:
        if passed := getattr(module, "PASSED", ()):
            yield _named(passed), "passed on"
        renamed = getattr(module, "RENAMED", {})
        yield from ((f"`{theirs}`", f"`{ours}`") for theirs, ours in renamed.items())
        options = getattr(module, "OPTIONS", {})
        yield from ((f"`options.{theirs}`", f"`{ours}`") for theirs, ours in options.items())
        yield from ((f"`{name}`", f"refused: {why}") for name, why in getattr(module, "REFUSED", {}).items())
        yield _named(module.IGNORED), "ignored"

    return lambda: _table(("field", "becomes"), rows())


def _http_paths() -> str:
    streams = {True: "yes", False: "no", None: "as the body says"}
    rows = ((f"`POST {route.path}`", f"`{route.dialect.name}`", streams[route.streams]) for route in HTTP_ROUTES)
    return _table(("path", "dialect", "streams"), rows)


def _http_errors() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for code, status in STATUS.items():
            openai = openai_error({"code": code})
            anthropic = anthropic_error({"code": code})["error"]["type"]
            yield f"`{code}`", str(status), f"`{openai['type']}`, `{openai['code'] or 'null'}`", f"`{anthropic}`"

    return _table(("code", "HTTP", "OpenAI: type, code", "Anthropic: type"), rows())


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


# --- the drawing of the folders ----------------------------------------------------------------------------------------

_BOX_HEIGHT, _ROW_HEIGHT, _GAP, _WIDTH = 32, 76, 32, 900


def _imported(tree: ast.AST) -> Iterator[str]:
    """Names of imported modules, those for the type checker alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from _imported(node)


def folder_imports() -> dict[str, set[str]]:
    """What each folder, or file at the top, of the package imports of the others."""
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    parts -= {"__init__", "__main__"}
    found: dict[str, set[str]] = {part: set() for part in parts}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own in found:
            names = (name.split(".") for name in _imported(ast.parse(path.read_text("utf-8"))))
            found[own] |= {name[1] for name in names if name[0] == PACKAGE.name and name[1] in parts - {own}}
    found["cli"].add("commands")  # imported by their names when they are called
    return found


def _rows(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """The highest row first; everything stands in the row right above the highest part that it imports."""
    height: dict[str, int] = {}
    for part in TopologicalSorter(imports).static_order():
        height[part] = 1 + max((height[below] for below in imports[part]), default=-1)
    return [sorted(part for part in height if height[part] == row) for row in range(max(height.values()), -1, -1)]


def _essential(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a longer way says already."""

    def reached(part: str) -> set[str]:
        return imports[part].union(*(reached(below) for below in imports[part]))

    return {part: below - set().union(*(reached(each) for each in below)) for part, below in imports.items()}


def _ways(rows: Sequence[Sequence[str]], arrows: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Each arrow as steps from row to row. On the rows that it passes it has a place of its own, shared by all with one target."""
    at = {part: number for number, row in enumerate(rows) for part in row}
    steps: set[tuple[str, str]] = set()
    for part, below in arrows.items():
        for target in below:
            way = [part, *(f"{number} {target}" for number in range(at[part] + 1, at[target])), target]
            steps |= set(pairwise(way))
    return steps


def _places(rows: list[list[str]], steps: set[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Middle and top of every box, and of every place where an arrow passes a row."""
    place: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        passing = {lower for _, lower in steps if lower.startswith(f"{number} ")}
        sources = {each: [place[upper][0] for upper, lower in steps if lower == each] for each in [*row, *passing]}
        middle = {each: sum(found) / len(found) if found else _WIDTH / 2 for each, found in sources.items()}
        ordered = sorted(sources, key=lambda each: (middle[each], each))
        left = (_WIDTH - sum(map(_width, ordered)) - _GAP * (len(ordered) - 1)) / 2
        for each in ordered:
            place[each] = (left + _width(each) / 2, 12 + number * _ROW_HEIGHT)
            left += _width(each) + _GAP
    return place


def _shown(part: str) -> str:
    return f"{part}/" if (PACKAGE / part).is_dir() else f"{part}.py"


def _width(each: str) -> int:
    return 0 if " " in each else len(_shown(each)) * 9 + 26


def drawing() -> str:
    """The folders of the package as SVG: an arrow leads from the importer down to what it imports."""
    imports = folder_imports()
    rows = _rows(imports)
    steps = _ways(rows, _essential(imports))
    place = _places(rows, steps)
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{len(rows) * _ROW_HEIGHT - 20}" '
            'font-family="monospace" font-size="14" text-anchor="middle">'
        ),
        "<title>The folders of the package; an arrow leads from the importer to what it imports</title>",
        (
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" fill="#567"/></marker></defs>'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for upper, lower in sorted(steps):
        (x1, y1), (x2, y2) = place[upper], place[lower]
        y1 += _BOX_HEIGHT
        if " " in upper:
            lines.append(f'<path d="M{x1:.0f},{y1 - _BOX_HEIGHT:.0f} V{y1:.0f}" fill="none" stroke="#567"/>')
        bend = (y2 - y1) / 2
        tip = "" if " " in lower else ' marker-end="url(#tip)"'
        curve = f"C{x1:.0f},{y1 + bend:.0f} {x2:.0f},{y2 - bend:.0f} {x2:.0f},{y2:.0f}"
        lines.append(f'<path d="M{x1:.0f},{y1:.0f} {curve}" fill="none" stroke="#567"{tip}/>')
    for part in sorted(imports):
        lines += _box(part, *place[part])
    return "\n".join([*lines, "</svg>", ""])


def _box(part: str, x: float, y: float) -> list[str]:
    width = _width(part)
    return [
        f'<rect x="{x - width / 2:.0f}" y="{y:.0f}" width="{width}" height="{_BOX_HEIGHT}" rx="4" fill="#eef3f7" stroke="#567"/>',
        f'<text x="{x:.0f}" y="{y + 21:.0f}">{_shown(part)}</text>',
    ]


def _metrics() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for family in FAMILIES:
            labels = (family.name,) if family.kind == "stateset" else family.labels
            yield f"`{family.name}`", family.kind, ", ".join(f"`{label}`" for label in labels), family.meaning

    return _table(("metric", "kind", "labels", "meaning"), rows())


BLOCKS: Mapping[str, Callable[[], str]] = {
    "request-fields": lambda: _table(("field", "expects", "meaning"), _fields(RequestFields)),
    "control-fields": lambda: _table(("field", "expects", "meaning"), _fields(CountFields)),
    "admin-fields": lambda: _table(("field", "expects", "meaning"), _fields(AdminFields)),
    "events": _events,
    "acks": lambda: _model(event_models.Ack, {"session_id"}),
    "admin-acks": lambda: _model(messages.AdminAck, set()),
    "status": _status,
    "health": _health,
    "order": _order,
    "errors": _errors,
    "settings": _settings,
    "metrics": _metrics,
    "http-paths": _http_paths,
    "http-errors": _http_errors,
    "openai-chat-fields": _api_fields(openai_chat),
    "openai-responses-fields": _api_fields(openai_responses_body),
    "anthropic-fields": _api_fields(anthropic_body),
    "ollama-fields": _api_fields(ollama_body),
    "seed-fields": _api_fields(seed_bodies),
}


# --- the man page ------------------------------------------------------------------------------------------------------


def _roff(text: str) -> str:
    """Text that means itself: no escapes, no requests at the beginning of a line, hyphens that can be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in text.splitlines())


def _paragraphs(text: str) -> Iterator[str]:
    """Help text: click's mark for text that must not be wrapped becomes a block that roff leaves alone."""
    for part in inspect.cleandoc(text).split("\n\n"):
        lines = part.strip("\n").splitlines()
        if lines and lines[0].strip() == "\b":
            body = textwrap.dedent("\n".join(lines[1:]))
            yield f".PP\n.nf\n{_roff(body)}\n.fi"
        elif lines:
            yield f".PP\n{_roff(textwrap.dedent(part))}"


def _command_page(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    yield f'.SS "{_roff(name)} {_roff(" ".join(command.collect_usage_pieces(context)))}"'
    yield from _paragraphs(command.help or "")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in record[0]:
            yield f".TP\n.B {_roff(record[0])}\n{_roff(record[1])}"
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from _command_page(f"{name} {inner}", found)


def man_page() -> str:
    """`lmd.1`, from the help of every command."""
    context = click.Context(cli.main, info_name="lmd", max_content_width=80)
    parts = [
        '.TH LMD 1 "" "llamacpp\\-mqtt\\-deploy" "User Commands"',
        '.\\" Made by docs/generate.py from the help of the commands.',
        ".SH NAME\nlmd, llamacpp\\-mqtt\\-deploy \\- a local language model on an MQTT bus",
        ".SH SYNOPSIS\n.B lmd\n.I COMMAND\n[OPTIONS] [ARGUMENTS]",
        f".SH DESCRIPTION\n{_roff(cli.main.help or '')}",
        ".SH COMMANDS",
    ]
    for name in cli.COMMANDS:
        command = cli.main.get_command(context, name)
        assert command is not None
        parts += _command_page(f"lmd {name}", command)
    files = ("$LMD_CONFIG", "./llamacpp-mqtt-deploy.toml", "/etc/llamacpp-mqtt-deploy/config.toml")
    parts.append(".SH FILES\nThe configuration is the first of these that is there:\n.PP\n.nf")
    parts += [_roff(file) for file in files]
    parts.append(".fi")
    return "\n".join(parts) + "\n"


def filled(text: str) -> str:
    """The page with every marked block as the code has it now."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}", text)


def pages() -> dict[Path, str]:
    """Every generated file with its right content."""
    wanted = {page: filled(page.read_text("utf-8")) for page in sorted(FOLDER.glob("*.md"))}
    made = {"schema.json": schema_text(), "architecture.svg": drawing(), "lmd.1": man_page()}
    return wanted | {FOLDER / name: text for name, text in made.items()}


def main() -> int:
    different = [page for page, wanted in pages().items() if not page.exists() or page.read_text("utf-8") != wanted]
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
