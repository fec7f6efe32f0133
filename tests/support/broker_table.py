"""`make brokers`: runs the promises on every broker that is installed and writes what held into docs/brokers.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree as ET

from tests.support import other_brokers

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "brokers.md"
SUITES = ("tests/brokers/test_whole.py", "tests/mqtt/test_contract.py")
_BLOCK = re.compile(r"(<!-- made by make brokers -->\n).*?(<!-- end of make brokers -->)", re.DOTALL)
_NAME = re.compile(r"(?P<test>\w+)\[(?P<member>[a-z]+-(?:5|3\.1\.1|auto))(?:-[\w-]+)?\]$")


@dataclass(frozen=True, slots=True)
class Result:
    """One test on one member, as pytest told it."""

    test: str
    member: str
    held: bool | None
    """None: it does not apply."""
    why: str = ""


def read(xml: str) -> Iterator[Result]:
    """The results in a JUnit report; tests that are of no broker are left out."""
    for case in ET.fromstring(xml).iter("testcase"):
        found = _NAME.match(case.get("name", ""))
        if found is None:
            continue
        fault, skipped = case.find("failure"), case.find("skipped")
        fault = case.find("error") if fault is None else fault
        if fault is not None:
            yield Result(found["test"], found["member"], False, _first_line(fault.get("message", "")))
        elif skipped is not None:
            yield Result(found["test"], found["member"], None, _first_line(skipped.get("message", "")))
        else:
            yield Result(found["test"], found["member"], True)


def _first_line(text: str) -> str:
    return re.sub(r"^\w*(?:Error|Exception|Failed): ", "", (text.strip().splitlines() or [""])[0])[:160]


def table(results: Sequence[Result], notes: Mapping[tuple[str, str], str]) -> str:
    """A row for each promise, a column for each broker; what does not hold has a number, and below is why.

    `notes` are the known reasons by (broker, test); else it is the test's own words. A promise with several cases holds when all do.
    """
    members = list(dict.fromkeys(result.member for result in results))
    reasons: list[str] = []
    lines = [f"| | {' | '.join(_title(member) for member in members)} |", "| --- |" + " --- |" * len(members)]
    for test in dict.fromkeys(result.test for result in results):
        cells = [
            _cell([each for each in results if (each.test, each.member) == (test, m)], notes, reasons) for m in members
        ]
        lines.append(f"| {_sentence(test)} | {' | '.join(cells)} |")
    reasons = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *reasons])


def _cell(found: Sequence[Result], notes: Mapping[tuple[str, str], str], reasons: list[str]) -> str:
    if not found or all(each.held is None for each in found):
        return "-"
    failed = [each for each in found if each.held is False]
    if not failed:
        return "yes"
    broker = failed[0].member.partition("-")[0]
    reason = notes.get((broker, failed[0].test)) or f"Not known; the test says: {failed[0].why}"
    reason = f"{broker}: {reason}"
    if reason not in reasons:
        reasons.append(reason)
    return f"**no** ({reasons.index(reason) + 1})"


def _title(member: str) -> str:
    name, _, spoken = member.partition("-")
    name = "mosquitto by websocket" if name == "websocket" else name
    return f"{name}, {'5 or 3.1.1' if spoken == 'auto' else spoken}"


def _sentence(test: str) -> str:
    text = test.removeprefix("test_").replace("_", " ").replace("3 1 1", "3.1.1")
    return text[0].upper() + text[1:]


# --- the run -----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What is installed of the brokers, by name."""
    found = {"amqtt": version("amqtt")}
    commands = {
        "mosquitto": ["mosquitto", "-h"],
        "nats": ["nats-server", "--version"],
        "rabbitmq": ["dpkg-query", "-W", "-f", "${Version}", "rabbitmq-server"],
    }
    for name, command in commands.items():
        if name == "mosquitto" or other_brokers.installed(name):
            told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            number = re.search(r"\d+\.\d+\.\d+", told)
            found[name] = number[0] if number else "?"
    if other_brokers.installed("aedes"):
        package = ROOT / ".venv" / "node" / "node_modules" / "aedes" / "package.json"
        found["aedes"] = json.loads(package.read_text())["version"]
    return found


def main() -> int:
    known = ("nats", "rabbitmq", "aedes")
    here = [name for name in known if other_brokers.installed(name)]
    for name in sorted(set(known) - set(here)):
        print(f"not installed, so not tested: {name}", file=sys.stderr)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, suite in enumerate(SUITES):
            report = Path(folder) / f"{number}.xml"
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "--tb=line",
                "-p",
                "no:cacheprovider",
                f"--junitxml={report}",
                suite,
            ]
            # A failed promise is a result here, not a failure; 2 and more is pytest itself.
            code = subprocess.run(
                command, cwd=ROOT, env=os.environ | {"BROKERS": " ".join(here)}, check=False
            ).returncode
            if code > 1:
                return code
            results += read(report.read_text("utf-8"))
    stated = "Tested: " + ", ".join(f"{name} {number}" for name, number in sorted(versions().items())) + "."
    absent = (
        f" Not installed, so not tested: {', '.join(sorted(set(known) - set(here)))}." if len(here) < len(known) else ""
    )
    text = f"{stated}{absent}\n\n{table(results, other_brokers.REASONS)}\n"
    page = PAGE.read_text("utf-8")
    PAGE.write_text(_BLOCK.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page), "utf-8")
    lost = sum(result.held is False for result in results if result.member.startswith(("mosquitto", "loopback")))
    print(f"written: {PAGE.relative_to(ROOT)}; {len(results)} results, {lost} of them failures with mosquitto")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
