"""Loads the settings: the file, then the environment, then flags; knows where each value came from and names every problem."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, SettingsError

from llamacpp_mqtt_deploy.config import consistency, foreign_variables, keys
from llamacpp_mqtt_deploy.config.configured_routes import configured_routes
from llamacpp_mqtt_deploy.config.credentials import database_password, engine_api_key, exposed, mqtt_password
from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.core.route_checks import check_routes

__all__ = ["ConfigurationError", "Loaded", "database_password", "engine_api_key", "find_file", "load", "mqtt_password"]

PREFIX = "LMD_"
FILE_VARIABLE = "LMD_CONFIG"
LOCAL_FILE = Path("llamacpp-mqtt-deploy.toml")
SYSTEM_FILE = Path("/etc/llamacpp-mqtt-deploy/config.toml")
# A configuration is a few kilobytes; whoever names a model file by mistake gets a sentence and not a full memory.
MAX_FILE_BYTES = 4 * 1024 * 1024

# What merges, checks and shows values follows them by calling itself, and Python allows about a thousand calls.
MAX_DEPTH = 100
_TOO_DEEP = f"is nested too deeply; at most {MAX_DEPTH} lists and tables in each other"
_SHOWN_LEVELS = 3
"""As many names has the longest key; of one that is nested too deeply no more are told."""

Tree = dict[str, Any]


class ConfigurationError(Exception):
    """The configuration cannot be used; `problems` has one line for each field, secrets left out. Exit code 2."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Settings with the origin of each key: `default`, `file PATH:LINE`, `environment LMD_X` or `flag`."""

    settings: Settings
    origins: Mapping[str, str]
    file: Path | None
    warnings: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    """The flags, to load the same configuration again."""


def load(
    config_file: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Load the configuration; later wins: defaults, file, environment, `overrides` (dotted key -> text).

    `config_file` is what `--config` named; else `$LMD_CONFIG`, `./llamacpp-mqtt-deploy.toml` and the system's file are looked
    for. Raises ConfigurationError with every problem at once.
    """
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    file = find_file(config_file, environ)
    tree: Tree = {}
    origins: dict[str, str] = {}
    for source in (
        _from_file(file, problems),
        _from_environment(environ, problems),
        _from_flags(overrides or {}, problems),
    ):
        for path, value, origin in source:
            _put(tree, path, value, problems, origin)
            _forget_below(origins, path)
            origins[".".join(path)] = origin
    settings = _validate(tree, origins, problems)
    if settings is None or problems:
        raise ConfigurationError(problems)
    found = list(consistency.problems(settings, given=origins.__contains__, environ=environ))
    faults = [_line(key.split("."), text, origins) for key, text in found] + _route_faults(settings)
    if faults:
        raise ConfigurationError(faults)
    everywhere = {".".join(path): "default" for path, _ in keys.leaves(settings.model_dump())}
    return Loaded(
        settings=settings,
        origins=everywhere | {key: origin for key, origin in origins.items() if key in everywhere},
        file=file,
        warnings=(
            *consistency.warnings(settings),
            *_secrets_in(file, origins),
            *foreign_variables.hints(environ, given=origins.__contains__, variable=_variable),
        ),
        overrides=dict(overrides or {}),
    )


def find_file(config_file: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: the first of `--config`, `$LMD_CONFIG`, the local and the system's that is named or exists."""
    if config_file is not None:
        return config_file
    if environ.get(FILE_VARIABLE):
        return Path(environ[FILE_VARIABLE])
    return next((file for file in (LOCAL_FILE, SYSTEM_FILE) if file.exists()), None)


# --- the three sources, each as (path, value, origin) ------------------------------------------------------------------

Given = tuple[tuple[str, ...], Any, str]


def _from_file(file: Path | None, problems: list[str]) -> list[Given]:
    if file is None:
        return []
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        problems.append(f"{file}: cannot read this configuration file: {error.strerror or error}")
        return []
    if len(raw) > MAX_FILE_BYTES:
        problems.append(f"{file}: is larger than {MAX_FILE_BYTES} bytes; this is no configuration file")
        return []
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(f"{file}:{line}: is not UTF-8 text")
        return []
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problems.append(_syntax_problem(file, text, str(error)))
        return []
    except RecursionError:
        problems.append(f"{file}: {_TOO_DEEP}")
        return []
    lines = _key_lines(text)
    if _depth(values) > MAX_DEPTH:
        path = _deepest(values)
        problems.append(_line(path, _TOO_DEEP, {".".join(path): _file_origin(file, path, lines)}))
        return []
    return [(path, value, _file_origin(file, path, lines)) for path, value in keys.leaves(values)]


def _depth(value: object) -> int:
    """How many lists and tables stand in each other, counted a little further than is allowed."""
    level, depth = [value], 0
    while depth <= MAX_DEPTH:
        nodes = [node for node in level if isinstance(node, dict | list)]
        if not nodes:
            break
        level = [child for node in nodes for child in (node.values() if isinstance(node, dict) else node)]
        depth += 1
    return depth


def _deepest(values: Tree) -> tuple[str, ...]:
    """The key with the deepest value, with as many names as keys have."""
    path: list[str] = []
    node: object = values
    while isinstance(node, dict) and node and len(path) < _SHOWN_LEVELS:
        name, node = max(node.items(), key=lambda item: _depth(item[1]))
        path.append(name)
    return tuple(path)


def _syntax_problem(file: Path, text: str, message: str) -> str:
    """The message of tomllib with its place in front; `Invalid value` alone helps nobody whose text lacks its quotes."""
    match = re.search(r"\(at (?:line (\d+), column (\d+)|end of document)\)", message)
    line = match[1] if match and match[1] else str(text.count("\n") + 1)
    reason = re.sub(r" \(at .*\)$", "", message)
    hint = ' (text needs quotes: key = "value")' if reason == "Invalid value" else ""
    return f"{file}:{line}: is not valid TOML: {reason}{hint}"


_HEADER = re.compile(r"^\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(r"""^\s*([A-Za-z0-9_.\-"' ]+?)\s*=""")


def _key_lines(text: str) -> dict[str, int]:
    """The line of each key, as far as a look at the text tells; only for messages, so a miss costs a line number."""
    lines: dict[str, int] = {}
    table = ""
    closing = ""
    for number, line in enumerate(text.splitlines(), 1):
        if closing:
            closing = "" if closing in line else closing
            continue
        if header := _HEADER.match(line):
            table = _bare(header[1])
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault(f"{table}.{_bare(assignment[1])}".lstrip("."), number)
            closing = next((q for q in ('"""', "'''") if line.count(q) == 1), "")
    return lines


def _bare(name: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in name.split("."))


def _file_origin(file: Path, path: tuple[str, ...], lines: Mapping[str, int]) -> str:
    for end in range(len(path), 0, -1):  # an inline table has the line of its key
        line = lines.get(".".join(path[:end]))
        if line is not None:
            return f"file {file}:{line}"
    return f"file {file}"


class _TooDeepError(Exception):
    """A value is nested too deeply to be read or shown."""


class _Variables(EnvSettingsSource):
    """pydantic-settings' reading of one variable at a time, so that each value and each problem keeps its variable's name."""

    def __init__(self) -> None:
        super().__init__(Settings)

    def read(self, name: str, value: str) -> Tree:
        """The nested values that this variable sets; empty when it names no setting. Raises SettingsError, _TooDeepError."""
        self.env_vars = {name: value}
        try:
            values = self()
        except RecursionError:
            raise _TooDeepError from None
        if _depth(values) > MAX_DEPTH:
            raise _TooDeepError
        return values

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """A list or table as JSON or as TOML writes it; a list also as plain items with commas between them."""
        text = str(value).strip()
        if not text.startswith(("[", "{")):
            return [item.strip() for item in text.split(",")]
        try:
            return super().decode_complex_value(field_name, field, text)
        except ValueError:
            return tomllib.loads(f"value = {text}")["value"]


def _from_environment(environ: Mapping[str, str], problems: list[str]) -> list[Given]:
    variables = _Variables()
    given: list[Given] = []
    for name, value in sorted(environ.items()):
        if not name.startswith(PREFIX) or name == FILE_VARIABLE:
            continue
        origin = f"environment {name}"
        try:
            values = variables.read(name.lower(), value)
        except _TooDeepError:
            path = name.removeprefix(PREFIX).lower().split("__")[:_SHOWN_LEVELS]
            problems.append(_line(path, _TOO_DEEP, {".".join(path): origin}))
            continue
        except (SettingsError, ValueError):
            path = name.removeprefix(PREFIX).lower().split("__")
            problems.append(
                _line(path, f"expected {keys.expected_at(path)}, written as JSON", {".".join(path): origin})
            )
            continue
        found = list(keys.leaves(values))
        if not found:
            near = keys.nearest(name.removeprefix(PREFIX).lower().split("__"))
            wanted = f"; did you mean {_variable(near)}?" if near else ""
            problems.append(f"{name}: this environment variable names no setting{wanted}")
        # An empty variable counts as not set: compose files and EnvironmentFile= write `LMD_X=` for "nothing".
        given += [(path, content, origin) for path, content in found if value or keys.find(path) is None]
    return given


def _variable(dotted: str) -> str:
    return PREFIX + dotted.upper().replace(".", "__")


def _from_flags(overrides: Mapping[str, str], problems: list[str]) -> list[Given]:
    variables = _Variables()
    given: list[Given] = []
    for dotted, value in overrides.items():
        path = tuple(dotted.split("."))
        if keys.names_a_secret(path):
            # Every user of the machine can read the arguments of every process.
            problems.append(
                _line(
                    path, "a secret does not belong on a command line; use a file or the environment", {dotted: "flag"}
                )
            )
            continue
        try:
            values = variables.read(PREFIX.lower() + "__".join(path), value)
        except _TooDeepError:
            path = path[:_SHOWN_LEVELS]
            problems.append(_line(path, _TOO_DEEP, {".".join(path): "flag"}))
            continue
        except (SettingsError, ValueError):
            problems.append(_line(path, f"expected {keys.expected_at(path)}, written as JSON", {dotted: "flag"}))
            continue
        found = list(keys.leaves(values)) or [(path, value)]
        given += [(where, content, "flag") for where, content in found]
    return given


# --- merging and checking ---------------------------------------------------------------------------------------------


def _put(tree: Tree, path: tuple[str, ...], value: Any, problems: list[str], origin: str) -> None:
    node = tree
    for name in path[:-1]:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            problems.append(_line(path, "expected a table above this key", {".".join(path): origin}))
            return
    node[path[-1]] = value


def _forget_below(origins: dict[str, str], path: tuple[str, ...]) -> None:
    below = ".".join(path) + "."
    for key in [key for key in origins if key.startswith(below)]:
        del origins[key]


def _validate(tree: Tree, origins: Mapping[str, str], problems: list[str]) -> Settings | None:
    try:
        return Settings(**tree)
    except ValidationError as error:
        seen: set[str] = set()
        for detail in error.errors(include_url=False, include_context=False):
            line = _problem(detail["type"], detail["loc"], detail["input"], origins)
            if line not in seen:
                problems.append(line)
            seen.add(line)
        return None


def _route_faults(settings: Settings) -> list[str]:
    mqtt = settings.mqtt
    return check_routes(root=mqtt.root, worker_id=mqtt.worker_id, routes=configured_routes(settings))


_NAMES = {
    "routes": "the name of a route is 1 to 64 letters, digits, _ . or -",
    "levels": 'the name of a first topic level is 1 to 64 letters, digits, _ . or -, or "route:NAME"',
}


def _problem(kind: str, loc: tuple[int | str, ...], found: object, origins: Mapping[str, str]) -> str:
    if loc[-1:] == ("[key]",):
        return _line([str(part) for part in loc[:-1]], _NAMES.get(str(loc[0]), "expected a name"), origins)
    path = tuple(str(part) for part in loc)
    if kind == "extra_forbidden":
        near = keys.nearest(path)
        same_table = near is not None and near.rpartition(".")[0] == ".".join(path[:-1])
        hint = "" if near is None else f"; did you mean {near.rpartition('.')[2] if same_table else near}?"
        return _line(path, f"unknown key{hint}", origins)
    return _line(path, f"expected {keys.expected_at(path)}, found {_found(path, found)}", origins)


def _found(path: tuple[str, ...], value: object) -> str:
    at = next((path[:end] for end in range(len(path), 0, -1) if keys.find(path[:end]) is not None), None)
    if at is None:
        return {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list"}.get(
            type(value), "something else"
        )
    if keys.is_secret(at):
        return "something else (not shown: it is a secret)"
    return "nothing" if value is None else keys.shown(at, value)


def _line(path: Iterable[str], text: str, origins: Mapping[str, str]) -> str:
    """`[section] key: what is wrong (where it stands)`; the one form of all problems of single keys."""
    *section, name = path
    parts = [*section, name]
    origin = next(
        (origins[k] for k in (".".join(parts[:end]) for end in range(len(parts), 0, -1)) if k in origins), None
    )
    if origin is None:  # a whole table: the place of the first key in it
        below = ".".join(parts) + "."
        origin = next((place for key, place in origins.items() if key.startswith(below)), None)
    where = f"[{'.'.join(section)}] {name}" if section else f"[{name}]"
    return f"{where}: {text}" + (f" ({origin})" if origin else "")


def _secrets_in(file: Path | None, origins: Mapping[str, str]) -> Iterable[str]:
    for key, origin in origins.items():
        if file is not None and origin.startswith("file ") and keys.names_a_secret(key.split(".")):
            yield from exposed({key: file})
