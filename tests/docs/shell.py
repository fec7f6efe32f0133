"""Runs a `console` block of the documentation as a reader would, and tells whether its output is the one that is shown.

Lines that begin with `$ ` are commands, `> ` goes on with the one before; all else is output, and `...` stands for any number of
lines. Ids, times, numbers and the model's own words may differ; the kind and order of events, their fields and all that the
programs say may not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.docs.pages import Block
from tests.support.waiting import eventually

ANY = "..."
_MARK = "\x1e"

# Waits until one more subscription stands than before the command; mosquitto's own log says so.
_PRELUDE = r"""
subscriptions() { grep -c 'Sending SUBACK' "$BROKER_LOG"; }
subscribed() {
  for _ in $(seq 500); do [ "$(subscriptions)" -gt "$1" ] && return; sleep 0.02; done
  echo "no subscription"; exit 1
}
"""


@dataclass(slots=True)
class Step:
    """One command with the output that is shown below it."""

    command: str
    shown: list[str] = field(default_factory=list)

    @property
    def listens(self) -> bool:
        return self.command.rstrip().endswith("&")

    @property
    def answers(self) -> bool:
        """The output is an answer of the model, which no test holds to its words."""
        tells_an_error = bool(self.shown) and self.shown[0].startswith("lmd ")
        return (
            bool(re.search(r"\blmd (ask|chat)\b", self.command)) and not tells_an_error and "--json" not in self.command
        )


def steps(block: Block) -> list[Step]:
    found: list[Step] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Step(line[2:]))
        elif line.startswith("> ") and found and not found[-1].shown:
            found[-1].command += "\n" + line[2:]
        else:
            found[-1].shown.append(line)
    return found


def script(commands: Sequence[Step]) -> str:
    lines = [_PRELUDE]
    for number, step in enumerate(commands):
        lines.append(f"printf '{_MARK}{number}\\n'")
        if step.listens:
            lines += ["before=$(subscriptions)", step.command, "subscribed $before"]
        else:
            lines.append(step.command)
    lines.append(f"printf '{_MARK}end\\n'")
    return "\n".join(lines)


def run(block: Block, environment: Mapping[str, str], folder: str) -> list[list[str]]:
    """The output of each step; that of listeners comes with the step after which it arrived."""
    commands = steps(block)
    process = subprocess.Popen(
        ["bash", "-c", script(commands)],
        env=dict(environment),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    collected: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        collected.extend(line.rstrip("\n") for line in process.stdout)

    reader = threading.Thread(target=read, name="docs-reader")
    reader.start()
    listening = any(step.listens for step in commands)
    due = sum(map(_ends, (line for step in commands for line in step.shown))) if listening else 0
    try:
        eventually(lambda: any(line.endswith(f"{_MARK}end") for line in collected), 30.0)
        if listening:
            quiet_since = [time.monotonic(), len(collected)]

            def over() -> bool:
                if len(collected) != quiet_since[1]:
                    quiet_since[:] = [time.monotonic(), len(collected)]
                quiet_s = time.monotonic() - quiet_since[0]
                return quiet_s > 0.3 if due and sum(map(_ends, collected)) >= due else quiet_s > 3.0

            eventually(over, 20.0)
    finally:
        _end(process)
        reader.join(5.0)
        assert process.stdout is not None
        process.stdout.close()
    return _parted(collected, len(commands))


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(5.0)


def _parted(lines: Sequence[str], count: int) -> list[list[str]]:
    parts: list[list[str]] = [[] for _ in range(count)]
    at = 0
    for line in lines:
        text, mark, number = line.partition(_MARK)
        if text:
            parts[at].append(text)
        if mark and number != "end":
            at = int(number)
    return parts


def _event(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _ends(line: str) -> bool:
    event = _event(line)
    return event is not None and (event.get("final") is True or event.get("type") in ("ack", "rejected"))


# --- comparing -----------------------------------------------------------------------------------------------------------

_FINDING = re.compile(r"^(ok|warn|FAIL|skip) +(\S+) ")
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\dT\S+ +(\[\w+ *\] [\w.]+) ")
_STEADY = (
    "type",
    "session_id",
    "final",
    "finish_reason",
    "code",
    "retryable",
    "action",
    "status",
    "content_omitted",
    "state",
)


def problem(block: Block, outputs: Sequence[Sequence[str]]) -> str | None:
    """What differs from what the page shows, in a sentence; None when nothing does."""
    commands = steps(block)
    free = block.note("output") == "the model's words"
    if any(step.listens for step in commands):
        shown = [line for step in commands for line in step.shown]
        found = [line for output in outputs for line in output]
        return (None if found else "nothing came") if free else _compare(shown, found)
    for step, output in zip(commands, outputs, strict=True):
        if step.answers or free:
            if bool(step.shown) != bool(output):
                return f"{step.command}: shown {step.shown}, found {output}"
        elif difference := _compare(step.shown, output):
            return f"{step.command}: {difference}"
    return None


def _compare(shown: Sequence[str], found: Sequence[str]) -> str | None:
    left, right = _shapes(shown), _shapes(found)
    if shown and all(map(_LOG_LINE.match, shown)):
        left, right = sorted(left), sorted(right)  # its threads log as they come
    if _matches(left, right):
        return None
    return "the page shows\n  " + "\n  ".join(shown) + "\nand it is\n  " + "\n  ".join(found)


def _matches(shown: Sequence[str], found: Sequence[str]) -> bool:
    if not shown:
        return not found
    if shown[0] == ANY:
        return any(_matches(shown[1:], found[at:]) for at in range(len(found) + 1))
    return bool(found) and shown[0] == found[0] and _matches(shown[1:], found[1:])


def _shapes(lines: Sequence[str]) -> list[str]:
    """The lines without what may differ; runs of chunks count as one, and signs of life as none."""
    shapes: list[str] = []
    for line in lines:
        event = _event(line)
        if event is None:
            shape = _plain(line)
        elif event.get("type") in ("queued", "progress", "ping"):
            continue
        else:
            steady = {name: event[name] for name in _STEADY if name in event}
            shape = json.dumps([steady, sorted(set(event) - {"stop_sequence"})])
        if shape == ANY and shapes and '"chunk"' in shapes[-1]:
            continue
        if not (shapes and shape == shapes[-1] and '"chunk"' in shape):
            shapes.append(shape)
    return shapes


def _plain(line: str) -> str:
    if finding := _FINDING.match(line):
        return " ".join(finding.groups())  # what `lmd check` says of this machine is this machine's
    if entry := _LOG_LINE.match(line):
        return entry[1]
    text = re.sub(r"[0-9a-f]{8,}", "ID", line)
    text = re.sub(r"\d+([.:T-]\d+)*Z?", "N", text)
    return re.sub(r"\s+", " ", text).strip()


# --- writing -------------------------------------------------------------------------------------------------------------

_CHUNKS_SHOWN = 3


def written(block: Block, outputs: Sequence[Sequence[str]]) -> str:
    """The block with what came out; of a long run of chunks the first ones and the last."""
    lines: list[str] = []
    for step, output in zip(steps(block), outputs, strict=True):
        lines.append("$ " + step.command.replace("\n", "\n> "))
        lines += _shortened(output)
    return "\n".join(lines) + "\n"


def _shortened(output: Sequence[str]) -> list[str]:
    lines: list[str] = []
    run: list[str] = []
    for line in [*output, ""]:
        event = _event(line)
        if event is not None and event.get("type") == "chunk":
            run.append(line)
            continue
        if len(run) > _CHUNKS_SHOWN + 2:
            run = [*run[:_CHUNKS_SHOWN], ANY, run[-1]]
        lines += [*run, line]
        run = []
    return lines[:-1]
