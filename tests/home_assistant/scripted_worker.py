"""A worker whose engine does what the test says, as a process of its own: Home Assistant pins another version of the MQTT library.

Standard input and output speak lines of JSON. Heard: `{"play": [step, ...]}` for the next request that has no script yet (else the
question comes back as the answer), `{"open": gate}`. Said: `{"online": true}`, `{"call": ...}` for each generation, `{"reached": gate}`,
`{"ended": state}` when one ends. A step is a text, or an object with one of `thinks`, `calls`, `gate`, `error`, `finish`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamacpp_mqtt_deploy.core.deltas import EngineCall, Finished, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.ports import EngineInfo
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Step, echo
from tests.support.live_worker import LiveWorker

_printing = threading.Lock()
# The daemon logs to standard output; here that goes with the errors.
_said = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def say(**told: Any) -> None:
    with _printing:
        print(json.dumps(told), file=_said, flush=True)


def _tell_when_reached(gate: Gate, name: str) -> None:
    if gate.reached.wait(60):
        say(reached=name)


class SeeingEngine(ScriptedEngine):
    """Says that it sees images."""

    def info(self) -> EngineInfo:
        return replace(super().info(), vision=True)


class Scripts:
    """What the test wants to be played, and the gates in it."""

    def __init__(self) -> None:
        self._waiting: deque[list[Any]] = deque()
        self._gates: dict[str, Gate] = {}

    def play(self, steps: list[Any]) -> None:
        self._waiting.append(steps)

    def gate(self, name: str) -> Gate:
        return self._gates.setdefault(name, Gate())

    def script(self, call: EngineCall) -> Iterator[Step]:
        say(
            call={
                "messages": list(call.messages),
                "tools": list(call.tools or ()),
                "response_format": call.response_format,
                "thinking": call.thinking,
                "model": call.model,
                "sampling": dict(call.sampling),
            }
        )
        ended = "cancelled"
        try:
            if self._waiting:
                for step in self._waiting.popleft():
                    yield self._step(step)
            else:
                yield from echo(call)
            ended = "done"
        finally:
            say(ended=ended)

    def _step(self, step: Any) -> Step:
        if isinstance(step, str):
            return step
        match step:
            case {"thinks": str(text)}:
                return Reasoning(text)
            case {"calls": [int(index), str(name), str(arguments)]}:
                return ToolCall(index, f"call-{index}", name, arguments)
            case {"more": [int(index), str(arguments)]}:
                return ToolCall(index, None, None, arguments)
            case {"gate": str(name)}:
                gate = self.gate(name)
                threading.Thread(target=_tell_when_reached, args=[gate, name], daemon=True).start()
                return gate
            case {"error": str(message)}:
                return EngineFailed(message)
            case {"finish": str(reason)}:
                return Finished(reason, TokenUsage(prompt_tokens=1, completion_tokens=1))  # type: ignore[arg-type]
        raise ValueError(f"no step: {step}")


def main(port: str, folder: str, sees: str, settings: str) -> None:
    scripts = Scripts()
    kind = SeeingEngine if sees == "sees" else ScriptedEngine
    with LiveWorker(int(port), Path(folder), kind(scripts.script), **json.loads(settings)):
        say(online=True)
        for line in sys.stdin:
            match json.loads(line):
                case {"play": list(steps)}:
                    scripts.play(steps)
                case {"open": str(name)}:
                    scripts.gate(name).open()


if __name__ == "__main__":
    main(*sys.argv[1:])
