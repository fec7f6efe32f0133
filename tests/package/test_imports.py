"""Holds the import rules: worker and adapters meet only in the ports, core is pure, each foreign library has one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llamacpp_mqtt_deploy

NAME = "llamacpp_mqtt_deploy"
ROOT = Path(llamacpp_mqtt_deploy.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

ADAPTERS = ("mqtt", "engines", "stores")

# Where each foreign library may be imported: a folder, or a file. Whatever is not named here may not be imported at all.
PLACES: Mapping[str, tuple[str, ...]] = {
    "paho": ("mqtt/", "client/"),
    "requests": ("engines/",),
    "urllib3": ("engines/",),
    "tenacity": ("engines/", "mqtt/", "service/opening_store"),
    "llama_cpp": ("engines/inprocess/native",),
    "numpy": ("engines/inprocess/sampling",),
    "jinja2": ("engines/inprocess/templates",),
    "huggingface_hub": ("engines/inprocess/downloading",),
    "xllamacpp": ("engines/", "demo", "commands/demo"),
    "amqtt": ("demo", "commands/demo"),
    "click": ("cli", "commands/"),
    "rich": ("commands/",),
    "textual": ("commands/top_app",),
    "pydantic_settings": ("config/settings", "config/loading"),
    "sqlite3": ("stores/",),
    "psycopg": ("stores/postgres/",),
    "psycopg_pool": ("stores/postgres/",),
    "starlette": ("gateway/", "commands/gateway"),
    "uvicorn": ("gateway/", "commands/gateway"),
    "prometheus_client": ("metrics/exposition",),
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

# A folder (or a file at the top) is a rank: it may import lower ones and itself, nothing else. engines/ counts as one, its
# members stand above each other as ENGINES says.
RANKS: Mapping[str, int] = {
    "__main__": 100,
    "cli": 90,
    "commands": 80,
    "checking": 70,
    "demo": 70,
    "direct": 70,
    "gateway": 65,
    "client": 60,
    "service": 60,
    "metrics": 55,
    "worker": 50,
    "testing": 45,
    "mqtt": 40,
    "engines": 40,
    "stores": 40,
    "logs": 35,
    "config": 30,
    "pool_ports": 21,
    "ports": 20,
    "schema": 15,
    "io_loop": 10,
    "leaving_out": 10,
    "log_output": 10,
    "stopping": 10,
    "core": 10,
    "demo_model": 10,
    "durable_file": 5,
    "latch": 5,
    "": 0,
}
ENGINES: Mapping[str, int] = {"managed": 3, "server": 2, "inprocess": 2, "slots": 1, "draining": 1}


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
def test_no_import_points_up_or_aside(path: Path) -> None:
    importer = module_name(path)
    high = rank(importer)
    assert high is not None, f"{importer} has no rank"
    for imported, _ in ours(path):
        low = rank(imported)
        assert low is not None, f"{imported} has no rank"
        # `llamacpp_mqtt_deploy/__init__.py` names the modules of the public names, loaded when first asked for.
        if importer.split(".")[0] != imported.split(".")[0] and importer:
            assert low < high, f"{importer} imports {imported}, which does not stand below it"


@each_module
def test_members_of_engines_stand_above_each_other(path: Path) -> None:
    importer = module_name(path).split(".")
    for imported, _ in ours(path):
        there = imported.split(".")
        if importer[0] == there[0] == "engines" and len(importer) > 1 < len(there) and importer[1] != there[1]:
            assert ENGINES[there[1]] < ENGINES[importer[1]], f"{'.'.join(importer)} imports {imported}"


@each_module
def test_an_adapter_imports_neither_the_worker_nor_another_adapter(path: Path) -> None:
    importer = module_name(path)
    adapter = importer.split(".")[0]
    if adapter not in ADAPTERS:
        return
    allowed = {adapter, "ports", "pool_ports", "io_loop", "latch", "leaving_out", "stopping", "config", "core", ""}
    for imported, _ in ours(path):
        assert imported.split(".")[0] in allowed, f"{importer} imports {imported}; adapters know only {sorted(allowed)}"


@each_module
def test_the_gateway_sees_only_the_client_side_of_the_bus(path: Path) -> None:
    importer = module_name(path)
    if importer.split(".")[0] != "gateway":
        return
    for imported, _ in ours(path):
        assert imported.split(".")[0] in {"gateway", "client", "config", "schema", "core", "durable_file", ""}, (
            f"{importer} imports {imported}"
        )


@each_module
def test_only_assembly_and_the_top_name_an_adapter(path: Path) -> None:
    importer = module_name(path)
    top = importer.split(".")[0]
    if importer == "service.assembly" or top in {
        *ADAPTERS,
        "testing",
        "commands",
        "demo",
        "checking",
        "client",
        "direct",
    }:
        return
    for imported, _ in ours(path):
        assert imported.split(".")[0] not in ADAPTERS, f"{importer} imports {imported}; it should know only the ports"


def test_one_file_name_stands_for_one_thing() -> None:
    """Commands bear the names of what they show; everything else has a name of its own."""
    names = Counter(path.name for path in MODULES if path.name != "__init__.py" and path.parent.name != "commands")
    assert [name for name, times in names.items() if times > 1] == []


def test_one_class_name_stands_for_one_thing() -> None:
    """But `Done`: the schema's model of the event, and what a client's answer makes of it."""
    names = Counter(
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in names.items() if times > 1] == ["Done"]


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
def test_each_foreign_library_has_one_place(path: Path) -> None:
    where = path.relative_to(ROOT).with_suffix("").as_posix()
    for name, _ in imports(path):
        top = name.split(".")[0]
        if top == NAME or (top in sys.stdlib_module_names and top not in PLACES):
            continue
        places = PLACES.get(top)
        assert places is not None, f"{where} imports {name}, which is no dependency of ours"
        fits = any(where == place or where.startswith(place.rstrip("/") + "/") or place == "" for place in places)
        assert fits, f"{where} imports {name}, whose place is {', '.join(places)}"


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
        (
            f"{NAME}.commands.run, {NAME}.logs, {NAME}.config.loading",
            ("rich", "paho", "requests", "llama_cpp", "amqtt"),
        ),
        (f"{NAME}.service.daemon", ("prometheus_client",)),
        (f"{NAME}.commands.config", ("rich", "paho", "requests")),
    ],
)
def test_importing_a_part_loads_nothing_that_it_does_not_need(imported: str, absent: tuple[str, ...]) -> None:
    probe = f"import sys, {imported}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == []
