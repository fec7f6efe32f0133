"""The dashboard and the alerts as tests see them: their queries, and the metrics that these name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "config" / "grafana" / "lmd-dashboard.json"
RULES = ROOT / "config" / "prometheus" / "lmd-rules.yml"
RULES_TEST = ROOT / "tests" / "metrics" / "lmd-rules.test.yml"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel, as it stands there."""

    panel: str
    expression: str

    def filled(self, *, interval: str) -> str:
        """As Grafana sends it with all workers chosen."""
        filled = self.expression.replace("$__rate_interval", interval).replace("$worker", ".+")
        assert "$" not in filled
        return filled


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    return found


def queries() -> list[Query]:
    return [Query(panel["title"], target["expr"]) for panel in panels() for target in panel.get("targets", ())]


def expressions_of_rules() -> Iterator[str]:
    text = RULES.read_text("utf-8")
    for found in re.finditer(r"^ +expr: (\|\n((?: {10,}.*\n)+)|.*\n)", text, re.MULTILINE):
        yield found[2] or found[1]


def metrics_in(expression: str) -> set[str]:
    """Names of metrics, without the labels in braces and in `by (...)`."""
    bare = re.sub(r"\{[^}]*\}|(by|on) \([^)]*\)", "", expression)
    return set(re.findall(r"\b(?:lmd|node)_[a-z_]+\b|\bup\b", bare))
