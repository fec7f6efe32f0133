"""Are the tests awake? Breaks the package in small ways, one at a time, and counts the breaks that the tests notice.

    python -m tests.support.mutations --seed 7 8 --count 40 [--only worker/deadlines.py] [--list]

Of all small changes to core/, worker/ and stores/ (another comparison, another operator, a number more, a statement less)
a random sample with a seed is tried, each in a copy of the tree. One run under coverage.py first says which tests of tests/core,
tests/worker and tests/stores come past each line. A change is tried with these, and when it survives them with all tests of the
files that come past the module or import it: what runs in a thread that outlives a test is put down to the wrong one, and what
runs at the import to none. What survives is printed as a diff: a missing test, or a change that nobody can see (an equivalent
mutant). Each run of pytest is forked from this process, which has the libraries loaded and nothing of the package.

Why not a library: mutmut goes through all mutants of a file (some thousand here, hours) and leaves out code outside of functions,
where our tables and limits stand; Cosmic Ray edits the working tree itself; neither draws a sample by seed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "llamacpp_mqtt_deploy"
FOLDERS = ("core", "worker", "stores")
LIBRARIES = (
    "hypothesis.stateful",
    "orjson",
    "paho.mqtt.client",
    "pydantic_settings",
    "pytest",
    "requests",
    "structlog",
    "tenacity",
)

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change of one file: these bytes of the source by this text."""

    path: str
    line: int
    last_line: int
    start: int
    end: int
    text: str

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def diff(self, source: bytes) -> str:
        old, new = (text.decode().splitlines() for text in (source, self.applied(source)))
        lines = difflib.unified_diff(old, new, lineterm="", n=1)
        return "\n".join(f"    {line}" for line in list(lines)[3:])


def mutations(path: str, source: bytes) -> list[Mutation]:
    """All small changes of a source, in its order; each leaves a text that compiles."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: dict[Mutation, None] = {}
    for node, text in _changes(ast.parse(source)):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        if text != source[start:end].decode():
            found[Mutation(path, node.lineno, node.end_lineno, start, end, text)] = None
    return list(found)


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Nodes with the text that stands in for them."""
    if isinstance(node, ast.expr):
        for changed in _expressions(node):
            yield node, f"({ast.unparse(changed)})"
    elif isinstance(node, ast.stmt):
        yield from ((node, text) for text in _statements(node))
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not _is_negated_elsewhere(node.test):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    for child in _children(node):
        yield from _changes(child)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """What is run: no annotations, docstrings, log lines or parts of f-strings (their places are wrong before Python 3.12)."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr) and not _is_silent(child):
                yield child


def _is_silent(node: ast.AST) -> bool:
    """A docstring, a line of log, or a union that names a type."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log")))):
            return True
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp(op=ast.BitOr())):
            return not name.isupper() and name.lstrip("_")[:1].isupper()
        case _:
            return False


def _is_negated_elsewhere(test: ast.expr) -> bool:
    """A condition whose opposite is among the changes of its own expression; or one for the type checker."""
    match test:
        case ast.UnaryOp(op=ast.Not()) | ast.Constant() | ast.Name(id="TYPE_CHECKING"):
            return True
        case ast.Compare(ops=[ast.Is() | ast.IsNot() | ast.Eq() | ast.NotEq() | ast.In() | ast.NotIn()]):
            return True
        case _:
            return False


def _expressions(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Compare(left=left, ops=[op, *others], comparators=comparators):
            yield ast.Compare(left, [COMPARISONS[type(op)](), *others], comparators)
        case ast.BinOp(left=left, op=ast.BitOr()) if not _is_type(node):
            yield left
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC and not _is_text(left, right):
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case _:
            pass


def _is_text(*parts: ast.expr) -> bool:
    """Joining text is no arithmetic: `-` would fail at once and prove nothing."""
    return any(
        isinstance(part, ast.JoinedStr) or (isinstance(part, ast.Constant) and isinstance(part.value, str | bytes))
        for part in parts
    )


def _is_type(node: ast.expr) -> bool:
    """A union of types that nothing looks at, such as `str | None`."""
    return any(isinstance(part, ast.Constant) and part.value is None for part in ast.walk(node))


def _statements(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.Delete() | ast.Break() | ast.Continue():
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield "pass"
        case ast.Return(value=None):
            yield "pass"
        case ast.Return(value=ast.Constant()):
            pass  # its value is changed by itself, and None would often mean the same
        case ast.Return():
            yield "return None"
        case _:
            pass


class Tree:
    """A copy of the package and its tests in a temporary folder, where one file at a time is changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        skip = shutil.ignore_patterns("__pycache__", ".*")
        for name in (PACKAGE, "tests", "docs", "config"):
            shutil.copytree(ROOT / name, root / name, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", root)
        self.said = ""  # by the last run of pytest
        self.passed: dict[str, dict[int, set[str]]] = {}
        """By path and line: the tests that come past it, and "" for what runs outside of tests."""
        self.tests = sorted(
            str(path.relative_to(root)) for folder in FOLDERS for path in (root / "tests" / folder).glob("test_*.py")
        )

    def watch(self, limit_s: float) -> str | None:
        """Run all tests without a change and note which ones come past which line; returns the first failure."""
        (self.root / ".coveragerc").write_text(
            "[run]\ndynamic_context = test_function\nrelative_files = true\n"
            f"source = {PACKAGE}\n[json]\nshow_contexts = true\n"
        )
        if (
            failure := self.failure(self.tests, limit_s, runner=["coverage", "run", "-m"], first_only=False)
        ) is not None:
            failed = [line.split(" ")[1] for line in self.said.splitlines() if line.startswith("FAILED ")]
            if not failed or self.failure(failed, limit_s) is not None:
                return failure  # else by chance: coverage.py makes a loaded machine slower still
        told = self.root / "coverage.json"
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", str(told)], cwd=self.root, check=True)
        for path, found in json.loads(told.read_text())["files"].items():
            self.passed[path] = {int(line): set(names) for line, names in found["contexts"].items()}
        # A name that pytest does not know would fail with every change and so pass for a test that notices all of them.
        names = {name for lines in self.passed.values() for contexts in lines.values() for name in contexts}
        return self.failure(["--collect-only", *self._named(names, self.tests)], limit_s)

    def killer(self, mutation: Mutation, limit_s: float) -> str | None:
        """The test that notices this change; None when all pass."""
        path = self.root / mutation.path
        source = path.read_bytes()
        try:
            path.write_bytes(mutation.applied(source))
            self._forget(path)
            fitting, passing = self._fitting(mutation), self._passing(mutation.path)
            return self._certain_failure(fitting, limit_s) or self._certain_failure(passing, limit_s)
        finally:
            path.write_bytes(source)
            self._forget(path)

    def _certain_failure(self, tests: list[str], limit_s: float) -> str | None:
        """As `failure`; a test that passes when it is run again has failed by chance (a loaded machine) and proves nothing."""
        doubted: list[str] = []
        while (found := self.failure(tests, limit_s, leave_out=doubted)) is not None:
            test = found.removeprefix("FAILED ").split(" - ")[0]
            if not found.startswith("FAILED ") or test in doubted or self.failure([test], limit_s) is not None:
                return found
            doubted.append(test)
        return None

    def _passing(self, path: str) -> list[str]:
        """The test files that import this module or come past any line of it."""
        near = self._near(path)
        names = {name for contexts in self.passed[path].values() for name in contexts}
        files = {"/".join(name.split(".")[:3]) + ".py" for name in names}
        return near + [test for test in self.tests if test in files and test not in near]

    def _fitting(self, mutation: Mutation) -> list[str]:
        """The tests that come past the changed lines, those that import the module first."""
        near = self._near(mutation.path)
        lines = self.passed[mutation.path]
        names = {name for at in range(mutation.line, mutation.last_line + 1) for name in lines.get(at, ())}
        order = near + [test for test in self.tests if test not in near]
        return self._named(names, order)

    def _named(self, names: set[str], order: Sequence[str]) -> list[str]:
        """The tests that coverage.py names, as pytest does, file by file in this order."""
        tests: dict[str, list[str]] = {}
        for name in sorted(names):
            if name.startswith("tests."):  # `tests.core.test_topics.test_name`, with its class where it has one
                _, folder, file, test = name.split(".", 3)
                tests.setdefault(f"tests/{folder}/{file}.py", []).append(test.replace(".", "::"))
        return [f"{file}::{test}" for file in order for test in tests.get(file, ())]

    def _near(self, path: str) -> list[str]:
        """The test files that import this module, those about little else first."""
        module = path.removesuffix(".py").replace("/", ".")
        imports = {test: _imports((self.root / test).read_bytes()) for test in self.tests}
        return sorted((test for test in self.tests if module in imports[test]), key=lambda test: len(imports[test]))

    def _forget(self, path: Path) -> None:
        """The compiled file: it is compared by whole seconds and by size, which two changes may share."""
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()

    def failure(
        self,
        tests: list[str],
        limit_s: float,
        *,
        runner: Sequence[str] = (),
        leave_out: Sequence[str] = (),
        first_only: bool = True,
    ) -> str | None:
        """The first failure of these tests; None when all pass."""
        if not tests:
            return None
        arguments = ["-q", "-n0", "-pno:cacheprovider", "--tb=no", "--hypothesis-seed=1"]
        arguments += ["-x", "-otimeout=60"] if first_only else ["-otimeout=300"]
        arguments += [f"--basetemp={self.root / 'tmp'}", *(f"--deselect={test}" for test in leave_out), *tests]
        shutil.rmtree(
            self.root / ".hypothesis", ignore_errors=True
        )  # what failed for one change is not tried on the next
        said_at = self.root / "said"
        process = multiprocessing.get_context("fork").Process(target=_run, args=(self.root, arguments, said_at, runner))
        process.start()
        process.join(limit_s)
        if process.exitcode is None:
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return f"no end within {limit_s:g} s"
        self.said = said = said_at.read_text(errors="replace")
        if process.exitcode in (0, 5):  # 5: none are left of these
            return None
        failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR", "E  ", "ImportError"))]
        return (failed or said.splitlines() or [f"exit status {process.exitcode}"])[-1][:200]


def _run(root: Path, arguments: list[str], said_at: Path, runner: Sequence[str]) -> None:
    """In the forked process: become pytest, as if it had been started in this folder."""
    os.setsid()
    with said_at.open("w") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    os.chdir(root)
    search = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ |= {"PYTHONPATH": search, "HYPOTHESIS_PROFILE": "unshrunk"}
    if runner:
        os.execv(sys.executable, [sys.executable, "-m", *runner, "pytest", *arguments])
    sys.path.insert(0, str(root))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", PACKAGE)]:
        del sys.modules[name]  # this tool itself, from the tree that is not changed
    sys.argv = ["pytest", *arguments]
    status = int(
        importlib.import_module("pytest").main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments])
    )
    sys.stdout.flush()
    sys.exit(status)


def _imports(source: bytes) -> set[str]:
    """Names of the package's modules that this source imports (with names that are none: what is imported from them)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith(PACKAGE)}
    return names


def every_mutation(only: str = "", *, root: Path = ROOT) -> list[Mutation]:
    paths = sorted(path for folder in FOLDERS for path in (root / PACKAGE / folder).glob("*.py"))
    names = [str(path.relative_to(root)) for path in paths]
    return [change for name in names if only in name for change in mutations(name, (root / name).read_bytes())]


def main() -> int:
    parser = argparse.ArgumentParser(description="How many small defects do the tests notice?")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[1], help="chooses the changes; several share one coverage run"
    )
    parser.add_argument("--count", type=int, default=40, help="how many changes are tried")
    parser.add_argument(
        "--only", default="", help="part of a path: change only such files, for example core/history.py"
    )
    parser.add_argument(
        "--limit-s", type=float, default=300.0, help="a test run longer than this has noticed the change"
    )
    parser.add_argument("--list", action="store_true", help="show the changes, try none")
    wishes = parser.parse_args()
    if wishes.list:
        samples = _samples(every_mutation(wishes.only), wishes.seed, wishes.count)
        for mutation in (mutation for chosen in samples.values() for mutation in chosen):
            print(f"{mutation.path}:{mutation.line}\n{mutation.diff((ROOT / mutation.path).read_bytes())}")
        return 0
    for name in LIBRARIES:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Tree(Path(folder))
        found = every_mutation(wishes.only, root=tree.root)  # the working tree may change meanwhile
        samples = _samples(found, wishes.seed, wishes.count)
        if (failure := tree.watch(2 * wishes.limit_s)) is not None:
            print(f"The tests fail without any change: {failure}", file=sys.stderr)
            return 2
        survivors = 0
        for seed, chosen in samples.items():
            survived = sum(_survives(tree, mutation, wishes.limit_s) for mutation in chosen)
            noticed = len(chosen) - survived
            print(
                f"Seed {seed}: {noticed} of {len(chosen)} changes noticed, out of {len(found)} possible ones.",
                flush=True,
            )
            survivors += survived
    return 1 if survivors else 0


def _samples(found: Sequence[Mutation], seeds: Sequence[int], count: int) -> dict[int, list[Mutation]]:
    return {seed: random.Random(seed).sample(found, min(count, len(found))) for seed in seeds}


def _survives(tree: Tree, mutation: Mutation, limit_s: float) -> bool:
    began = time.monotonic()
    killer = tree.killer(mutation, limit_s)
    took_s = time.monotonic() - began
    outcome = killer or f"SURVIVED\n{mutation.diff((tree.root / mutation.path).read_bytes())}"
    print(f"{mutation.path}:{mutation.line} ({took_s:.0f} s) {outcome}", flush=True)
    return killer is None


if __name__ == "__main__":
    sys.exit(main())
