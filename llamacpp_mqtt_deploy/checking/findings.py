"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "FAIL", "skip"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `name` is stable (`broker.password`), `advice` says what to do."""

    name: str
    verdict: Verdict
    text: str
    advice: str = ""


def ok(name: str, text: str) -> Finding:
    return Finding(name, "ok", text)


def warn(name: str, text: str, advice: str = "") -> Finding:
    return Finding(name, "warn", text, advice)


def fail(name: str, text: str, advice: str = "") -> Finding:
    return Finding(name, "FAIL", text, advice)


def skip(name: str, text: str, advice: str = "") -> Finding:
    return Finding(name, "skip", text, advice)
