"""Holds the import rules: corridor and families meet only in the ports, core is pure, each foreign library has one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llamacpp_mqtt_deploy

NAME = "llamacpp_mqtt_deploy"
ROOT = Path(llamacpp_mqtt_deploy.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

FAMILIES = ("mqtt", "engines", "stores")

# Where each foreign library may be imported: a folder, or a file. Whatever is not named here may not be imported at all.
HOMES: Mapping[str, tuple[str, ...]] = {
    "paho": ("mqtt/", "client/"),
    "requests": ("engines/",),
    "urllib3": ("engines/",),
    "tenacity": ("engines/",),
    "llama_cpp": ("engines/native",),
    "numpy": ("engines/sampling",),
    "jinja2": ("engines/templates",),
    "huggingface_hub": ("engines/downloading",),
    "xllamacpp": ("engines/", "demo", "commands/demo"),
    "amqtt": ("demo", "commands/demo"),
    "click": ("cli", "commands/"),
    "rich": ("commands/",),
    "pydantic_settings": ("settings", "loading"),
    "sqlite3": ("stores/",),
    "pydantic": ("",),
    "pydantic_core": ("",),
    "typing_extensions": ("",),
    "orjson": ("",),
    "regex": ("",),
    "structlog": ("",),
}

# Parts of the standard library that neither wait, nor look at the world, nor keep time.
PURE = {
    "__future__", "abc", "base64", "binascii", "bisect", "collections", "contextlib", "copy", "dataclasses", "difflib", "enum",
    "functools", "hashlib", "heapq", "itertools", "json", "math", "operator", "re", "string", "struct", "textwrap", "types",
    "typing", "unicodedata", "urllib.parse",
}  # fmt: skip
CORE_LIBRARIES = {"pydantic", "pydantic_core", "typing_extensions", "orjson", "regex"}

# What stands above what; a module may import those of its own rank and below. Everything that is not named is below the
# responder and above the ports, except what the rules for families and core say.
RANKS: Mapping[str, int] = {
    "__main__": 100,
    "cli": 90,
    "commands": 80,
    "demo": 75,
    "daemon": 70,
    "client": 70,
    "direct": 70,
    "checking": 72,
    "assembly": 68,
    "vitals": 66,
    "operations": 64,
    "greeting": 64,
    "choosing": 64,
    "workers": 60,
    "recovery": 55,
    "intake": 52,
    "generation": 52,
    "rounds": 50,
    "pacing": 50,
    "controls": 49,
    "composing": 48,
    "endings": 46,
    "reporting": 45,
    "admin": 42,
    "jobs": 40,
    "presence": 35,
    "deliveries": 32,
    "responder": 30,
    "enginewatch": 28,
    "policies": 26,
    "answers": 24,
    "reloading": 24,
    "tally": 22,
    "timers": 20,
    "consistency": 15,
    "loading": 16,
    "keys": 14,
    "credentials": 14,
    "logs": 14,
    "systemd": 14,
    "engines": 12,
    "mqtt": 12,
    "stores": 12,
    "ports": 5,
    "settings": 4,
    "stopping": 4,
    "core": 1,
    "demo_model": 1,
    "": 0,
}


def module_name(path: Path) -> str:
    """`core.topics` for core/topics.py, `core` for core/__init__.py, the empty name for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {module_name(path) for path in MODULES}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module with whether the import happens when the file is loaded; those for the type checker alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}".removeprefix(f"{NAME}.") in KNOWN else base
                for alias in node.names
            ]
        else:
            continue
        above = list(ancestors(node, parents))
        if any(isinstance(parent, ast.If) and "TYPE_CHECKING" in ast.dump(parent.test) for parent in above):
            continue
        at_load = not any(isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef) for parent in above)
        yield from ((name, at_load) for name in names)


def ancestors(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while node in parents:
        node = parents[node]
        yield node


def ours(path: Path) -> Iterator[tuple[str, bool]]:
    for name, at_load in imports(path):
        if name == NAME or name.startswith(f"{NAME}."):
            yield name.removeprefix(NAME).removeprefix("."), at_load


def rank(module: str) -> int | None:
    return RANKS.get(module.split(".", 1)[0])


ids = [module_name(path) or "package" for path in MODULES]
each_module = pytest.mark.parametrize("path", MODULES, ids=ids)


@each_module
def test_no_import_points_up(path: Path) -> None:
    importer = module_name(path)
    for imported, _ in ours(path):
        low, high = rank(imported), rank(importer)
        if low is not None and high is not None and importer.split(".")[0] != imported.split(".")[0]:
            assert low < high, f"{importer} imports {imported}, which stands above it"
        if high is None and low is not None:
            assert low < RANKS["workers"], f"{importer} imports {imported}; only cli, commands and daemon may"


@each_module
def test_a_family_imports_neither_the_corridor_nor_another_family(path: Path) -> None:
    importer = module_name(path)
    family = importer.split(".")[0]
    if family not in FAMILIES:
        return
    allowed = {family, "ports", "stopping", "settings", "core", ""}
    for imported, _ in ours(path):
        assert imported.split(".")[0] in allowed, f"{importer} imports {imported}; families know only {sorted(allowed)}"


@each_module
def test_only_the_top_names_a_concrete_adapter(path: Path) -> None:
    importer = module_name(path).split(".")[0]
    if importer in {*FAMILIES, "choosing", "commands", "cli", "demo", "checking", "client", "direct"}:
        return
    for imported, _ in ours(path):
        assert imported.split(".")[0] not in FAMILIES, f"{importer} imports {imported}; it should know only the ports"


@each_module
def test_the_core_is_pure(path: Path) -> None:
    importer = module_name(path)
    if importer.split(".")[0] != "core":
        return
    for name, _ in imports(path):
        top = name.split(".")[0]
        if top == NAME:
            assert name.removeprefix(f"{NAME}.").split(".")[0] == "core", f"{importer} imports {name}"
        else:
            assert top in CORE_LIBRARIES | PURE or name in PURE, f"{importer} imports {name}, which is not pure"


@each_module
def test_each_foreign_library_has_one_home(path: Path) -> None:
    where = path.relative_to(ROOT).with_suffix("").as_posix()
    for name, _ in imports(path):
        top = name.split(".")[0]
        if top == NAME or (top in sys.stdlib_module_names and top not in HOMES):
            continue
        homes = HOMES.get(top)
        assert homes is not None, f"{where} imports {name}, which is no dependency of ours"
        fits = any(where == home or where.startswith(home.rstrip("/") + "/") or home == "" for home in homes)
        assert fits, f"{where} imports {name}, whose home is {', '.join(homes)}"


def test_there_is_no_circle() -> None:
    graph = {
        module_name(path): {name for name, at_load in ours(path) if at_load and name and name in KNOWN}
        for path in MODULES
    }
    # A package and the modules in it import each other by nature; the question is about modules.
    for name, imported in graph.items():
        imported.discard(name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "imported,absent",
    [
        (f"{NAME}", ("pydantic", "click", "structlog")),
        (f"{NAME}.cli", ("pydantic", "rich", "structlog", "paho", "requests")),
        (f"{NAME}.commands.run, {NAME}.logs, {NAME}.loading", ("rich", "paho", "requests", "llama_cpp", "amqtt")),
        (f"{NAME}.commands.config", ("rich", "paho", "requests")),
    ],
)
def test_importing_a_part_loads_nothing_that_it_does_not_need(imported: str, absent: tuple[str, ...]) -> None:
    probe = f"import sys, {imported}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == []
