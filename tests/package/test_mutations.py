"""The small changes with which the tests are tested."""

from __future__ import annotations

import textwrap

import pytest

from tests.support.mutations import FOLDERS, PACKAGE, ROOT, every_mutation, mutations


def _changed(source: str) -> list[str]:
    text = textwrap.dedent(source).strip().encode()
    return [change.applied(text).decode() for change in mutations("some.py", text)]


@pytest.mark.parametrize(
    "source,changed",
    [
        ("x = a < b", ["x = (a <= b)"]),
        ("x = a is not b", ["x = (a is b)"]),
        ("x = a + b", ["x = (a - b)"]),
        ("x = a and b", ["x = (a or b)"]),
        ("x = not a", ["x = (a)"]),
        ("LIMIT = 5", ["LIMIT = (6)"]),
        ("x = True", ["x = (False)"]),
        ("x = f(a)", []),
        ("x.y = a", ["pass"]),
        ("f(a)", ["pass"]),
        ("if a: b = c", ["if (not (a)): b = c"]),
        ("def f() -> int | None: return a", ["def f() -> int | None: return None"]),
        ('x = "a" + b', []),
        ('"""Prose."""', []),
        ('log.info("said", by=3)', []),
        ("Kind = A | B", []),
        ("_Kind = A | B", []),
        ("FLAGS = A | B", ["FLAGS = (A)"]),
    ],
)
def test_each_kind_of_expression_and_statement_has_its_change(source: str, changed: list[str]) -> None:
    assert _changed(source) == changed


def test_a_change_reads_as_a_diff_of_its_line() -> None:
    source = b"a = 1\nb = a < c\nd = 2\n"
    (change,) = [change for change in mutations("some.py", source) if change.line == 2]
    assert change.diff(source).splitlines() == ["     a = 1", "    -b = a < c", "    +b = (a <= c)", "     d = 2"]


def test_every_change_of_the_package_compiles_and_none_is_there_twice() -> None:
    found = every_mutation("core/history.py") + every_mutation("worker/deadlines.py")
    assert len(found) == len(set(found)) > 100
    assert {change.path.split("/")[1] for change in found} <= set(FOLDERS)
    for change in found:
        assert change.path.startswith(PACKAGE)
        compile(change.applied((ROOT / change.path).read_bytes()), change.path, "exec")
