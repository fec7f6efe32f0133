"""`make audit` says what was audited, and never calls clean what nobody looked at."""

from __future__ import annotations

from typing import Any

from tests.support.dependency_audit import NOTHING_AUDITED, verdict

CLEAN = {"name": "orjson", "version": "3.1", "vulns": []}
SKIPPED = {"name": "paho-mqtt", "skip_reason": "Dependency not found on PyPI"}
BAD = {"name": "requests", "version": "2.0", "vulns": [{"id": "CVE-2018-18074", "fix_versions": ["2.20"]}]}


def told(*packages: dict[str, Any]) -> tuple[str, int]:
    lines, code = verdict({"dependencies": list(packages), "fixes": []})
    return "\n".join(lines), code


def test_packages_without_a_finding_are_clean() -> None:
    assert told(CLEAN) == ("1 of 1 packages audited, 0 vulnerable", 0)


def test_a_finding_is_named_with_the_version_that_mends_it() -> None:
    text, code = told(CLEAN, BAD)
    assert "requests 2.0: CVE-2018-18074, mended in 2.20" in text
    assert code == 1


def test_an_audit_that_saw_nothing_is_no_success() -> None:
    text, code = told(SKIPPED, SKIPPED)
    assert "Nothing was audited" in text
    assert code == NOTHING_AUDITED


def test_packages_that_were_left_out_are_named() -> None:
    text, code = told(CLEAN, SKIPPED)
    assert "Not audited: paho-mqtt" in text
    assert code == NOTHING_AUDITED
