"""`make audit`: what pip-audit says of the pinned dependencies, and how many of them it could say anything about.

pip-audit ends with success, and "no known vulnerabilities", also when its database was out of reach for every single package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTHING_AUDITED = 3
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def verdict(report: Mapping[str, Any]) -> tuple[list[str], int]:
    """The lines to print for pip-audit's JSON, and the exit code: 0 audited and clean, 1 vulnerable, 3 not (wholly) audited."""
    packages = report["dependencies"]
    skipped = [each for each in packages if "skip_reason" in each]
    vulnerable = [each for each in packages if each.get("vulns")]
    lines = []
    for package in vulnerable:
        for found in package["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no version yet"
            lines.append(f"{package['name']} {package['version']}: {found['id']}, mended in {mended}")
    lines.append(f"{len(packages) - len(skipped)} of {len(packages)} packages audited, {len(vulnerable)} vulnerable")
    if len(skipped) == len(packages):
        lines.append(
            "Nothing was audited: the package index here has no data about vulnerabilities. Run it with internet access."
        )
    elif skipped:
        lines.append(f"Not audited: {', '.join(each['name'] for each in skipped)}")
    return lines, 1 if vulnerable else NOTHING_AUDITED if skipped else 0


def main(pip_audit: str) -> int:
    command = [
        pip_audit,
        "-r",
        str(CONSTRAINTS),
        "--no-deps",
        "--disable-pip",
        "--progress-spinner",
        "off",
        "-f",
        "json",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        lines, code = verdict(json.loads(ended.stdout))
    except ValueError:
        reason = (ended.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"Nothing was audited: pip-audit failed: {reason}", file=sys.stderr)
        return NOTHING_AUDITED
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
