"""`lmd config`: the effective configuration with the origin of each value, the example file, and the JSON Schema."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacpp_mqtt_deploy.commands.options import config_options, load_or_exit
from llamacpp_mqtt_deploy.commands.terminal import escaped

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.config.keys import Key, Table
    from llamacpp_mqtt_deploy.config.loading import Loaded

WIDTH = 118


@click.command()
@config_options
@click.option("--example", "form", flag_value="example", help="Print a commented configuration file with every key.")
@click.option("--schema", "form", flag_value="schema", help="Print the JSON Schema of the configuration.")
@click.option("--json", "form", flag_value="json", help="Print the effective configuration with its origins as JSON.")
def command(config_file: Path | None, overrides: Mapping[str, str], form: str | None) -> None:
    """Show the effective configuration and where each value comes from.

    Later wins: defaults, the file, the environment (LMD_ and the key in capitals, with __ for each dot: LMD_MQTT__HOST,
    lists as JSON or with commas), --set. Secrets are never shown.

    \b
    Examples:
      lmd config
      lmd config --set engine.kind=managed --set engine.model_path=model.gguf
      lmd config --example > llamacpp-mqtt-deploy.toml
      lmd config --json | jq '.["mqtt.host"]'

    Exit code 2 for a wrong configuration, with one line for each field.
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    match form:
        case "example":
            click.echo(example(), nl=False)
        case "schema":
            click.echo(schema())
        case "json":
            click.echo(escaped(_as_json(load_or_exit(config_file, overrides))))
        case _:
            _print_table(load_or_exit(config_file, overrides))


# --- the effective configuration ---------------------------------------------------------------------------------------


def _rows(loaded: Loaded) -> Iterator[tuple[tuple[str, ...], object, str]]:
    from llamacpp_mqtt_deploy.config import keys

    for path, value in keys.leaves(loaded.settings.model_dump()):
        yield path, value, loaded.origins[".".join(path)]


def _as_json(loaded: Loaded) -> str:
    from llamacpp_mqtt_deploy.config import keys

    rows = {
        ".".join(path): {"value": keys.MASK if value is not None and keys.is_secret(path) else value, "origin": origin}
        for path, value, origin in _rows(loaded)
    }
    return json.dumps(rows, indent=2, default=str)


def _print_table(loaded: Loaded) -> None:
    from llamacpp_mqtt_deploy.config import keys

    rows = [(".".join(path), keys.shown(path, value), origin) for path, value, origin in _rows(loaded)]
    file = str(loaded.file) if loaded.file else "none found (lmd config --example prints one)"
    if sys.stdout.isatty():
        _print_rich(rows, file)
    else:
        key_width = max(len(key) for key, _, _ in rows)
        value_width = max(len(value) for _, value, _ in rows)
        click.echo(f"# configuration file: {file}")
        for key, value, origin in rows:
            click.echo(f"{key:<{key_width}}  {value:<{value_width}}  {origin}")
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)


def _print_rich(rows: list[tuple[str, str, str]], file: str) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=None, header_style="bold", pad_edge=False)
    # A key can be copied as it stands, also on 80 columns; a long value or path goes on in the next line.
    table.add_column("key", no_wrap=True)
    for title in ("value", "from"):
        table.add_column(title, overflow="fold")
    section = rows[0][0].rpartition(".")[0]
    for key, value, origin in rows:
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            table.add_row()
        style = "dim" if origin == "default" else "bold"
        # Text, not markup: a value may hold [brackets].
        table.add_row(
            Text(key), Text(value, style=style), Text(origin, style="dim" if origin == "default" else "green")
        )
    console = Console()
    console.print(Text(f"configuration file: {file}\n"))
    console.print(table)


# --- what is generated from the models -----------------------------------------------------------------------------------


def schema() -> str:
    """The JSON Schema of the configuration file, for editors and for other programs."""
    from llamacpp_mqtt_deploy.config import keys

    found = keys.document()
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "llamacpp-mqtt-deploy configuration"}
    return json.dumps(dialect | found | {"title": dialect["title"]}, indent=2, ensure_ascii=False)


_HEAD = """\
# Configuration of llamacpp-mqtt-deploy: every key with its meaning, what it expects and its default.
#
# Made by `lmd config --example`. Nothing is set here: take the # from a key, and from the [table] above it, to set it. Each key
# can also come from the environment (LMD_MQTT__HOST for mqtt.host) or from a flag (--set mqtt.host=...); later wins: file,
# environment, flag. `lmd config` shows what is in force and where it comes from. An unknown key is an error.
#
# Passwords and keys: put them into files of their own (password_file, api_key_file) or into systemd credentials.
"""


def example() -> str:
    """The commented example file, made from the settings models."""
    from llamacpp_mqtt_deploy.config import keys

    return "\n".join([_HEAD, *(_table_text(table) for table in keys.tables() if table.keys)])


_DEFAULTS_IN_WORDS: Mapping[str, str] = {
    "mqtt.worker_id": "the host name",
    "sessions.path": "$STATE_DIRECTORY/state.db, else ~/.local/state/llamacpp-mqtt-deploy/state.db",
}
_EXAMPLES: Mapping[str, Any] = {
    "mqtt.worker_id": "kitchen",
    "mqtt.username": "llm-worker",
    "mqtt.password_file": "/etc/llamacpp-mqtt-deploy/mqtt-password",
    "mqtt.tls.ca_file": "/etc/llamacpp-mqtt-deploy/ca.crt",
    "mqtt.tls.cert_file": "/etc/llamacpp-mqtt-deploy/client.crt",
    "mqtt.tls.key_file": "/etc/llamacpp-mqtt-deploy/client.key",
    "engine.api_key_file": "/etc/llamacpp-mqtt-deploy/engine-api-key",
    "engine.model_path": "/var/lib/llama-models/model.gguf",
    "engine.managed.binary": "/usr/local/bin/llama-server",
    "sessions.path": "/var/lib/llamacpp-mqtt-deploy/state.db",
    "routes.NAME.request": "maze/request/{session}",
    "routes.NAME.reply": "maze/assistant_response/{session}",
    "routes.NAME.control": "maze/control/{session}",
    "engine.aliases": {"gpt-4": "default"},
    "routes.NAME.fields": {"prompt": "message"},
}


def _table_text(table: Table) -> str:
    name = ".".join(table.path)
    lines = [f"# {line}" for line in textwrap.wrap(table.description, WIDTH)]
    if name.startswith("routes."):
        lines.append("# A table for each route; NAME is yours (1 to 64 letters, digits, _ . or -).")
    lines.append(f"#[{name}]")
    for key in table.keys:
        lines += ["", *_key_text(key)]
    return "\n".join([*lines, "", ""])


def _key_text(key: Key) -> Iterator[str]:
    from llamacpp_mqtt_deploy.config import keys

    yield from (f"# {line}" for line in textwrap.wrap(key.description, WIDTH))
    in_words = _DEFAULTS_IN_WORDS.get(key.dotted)
    default = in_words or ("absent" if key.default is None else keys.toml_value(key.default))
    yield from (f"# {line}" for line in textwrap.wrap(f"Expects {key.expected}. Default: {default}.", WIDTH))
    shown = _EXAMPLES.get(key.dotted, key.default)
    yield f"#{key.path[-1]} = {keys.toml_value(shown) if shown is not None else _placeholder(key)}"


def _placeholder(key: Key) -> str:
    """Something of the right type for a key that is absent by default; the file must stay valid without its marks."""
    from llamacpp_mqtt_deploy.config import keys

    match key.expected.split():
        case ["a", "whole", *_] | ["a", "number", *_]:
            words = key.expected.replace("at most", "to").split()
            number = words[words.index("from") + 1] if "from" in words else "1"
            return {"mqtt.port": "1883", "engine.slots": "4", "engine.context_tokens": "8192"}.get(key.dotted, number)
        case ["true", *_]:
            return "true"
        case ["a", "list,", *_]:
            return "[]"
        case ["a", "table,", *_]:
            return "{}"
        case ["one", "of", first, *_]:
            return first.rstrip(",")
        case _:
            return keys.toml_value("...")
