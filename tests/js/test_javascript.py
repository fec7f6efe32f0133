"""The JavaScript client: its own tests under node, the same reading as the Python client, its size, and a real broker with MQTT.js."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_mqtt_deploy import __version__
from llamacpp_mqtt_deploy.core.events import EventReader
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.gateway.world import RunningGateway
from tests.support.live_worker import LiveWorker
from tests.support.lost_deliveries import deliveries
from tests.support.mosquitto import Mosquitto
from tests.support.services import missing, require_program

HERE = Path(__file__).parent
MODULE = HERE.parents[1] / "clients" / "js"
PAGE = HERE.parents[1] / "llamacpp_mqtt_deploy" / "gateway" / "page"
SHIPPED_BYTES = 6144


def node(script: str, *arguments: str, given: str = "") -> str:
    result = subprocess.run(
        [require_program("node"), *arguments, str(HERE / script)],
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def installed(package: str) -> Path:
    """A package of tests/js/package.json, or the end of the test."""
    folder = HERE / "node_modules" / package
    if not folder.is_dir():
        missing(f"the npm package {package} is not installed: make javascript")
    return folder


@pytest.mark.parametrize("tests", ["reader", "asking", "transports"])
def test_the_tests_of_the_module_pass_under_node(tests: str) -> None:
    assert "# fail 0" in node(f"{tests}.test.mjs", "--test", "--test-reporter=tap")


# --- the same reading as in Python --------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(st.lists(deliveries(), min_size=60, max_size=60))
def test_the_reader_makes_of_any_delivery_what_the_python_client_makes_of_it(cases: list[list[dict[str, Any]]]) -> None:
    outcomes = json.loads(node("read_events.mjs", given=json.dumps([["r", case] for case in cases])))
    for case, outcome in zip(cases, outcomes, strict=True):
        reader = EventReader("r")
        readings = [reader.feed(event) for event in case]
        assert outcome["told"] == [reading.content if reading else "" for reading in readings]
        assert outcome["content"] == reader.content
        assert outcome["next"] == reader.next_seq
        assert outcome["end"] == (reader.terminal or {}).get("type")


# --- what is shipped ----------------------------------------------------------------------------------------------------


def test_what_is_shipped_is_the_module_made_small_and_under_6_kb() -> None:
    shipped = (MODULE / "lmd.min.js").read_bytes()
    assert len(shipped) < SHIPPED_BYTES
    assert b"import" not in shipped, "no dependencies"
    installed("terser")
    made = subprocess.run(
        [require_program("node"), "build.mjs"], cwd=MODULE, capture_output=True, timeout=60, check=True
    ).stdout
    assert made == shipped, "lmd.min.js is not what lmd.js makes: make javascript"


def test_the_page_uses_the_module_as_it_is() -> None:
    assert (PAGE / "lmd.js").read_bytes() == (MODULE / "lmd.js").read_bytes(), "make javascript"


# --- a real broker, worker and MQTT.js ----------------------------------------------------------------------------------


class Program:
    """over_mqtt.mjs, a program of somebody who uses the module."""

    def __init__(self, url: str, protocol: str = "5") -> None:
        installed("mqtt")
        self._process = subprocess.Popen(
            [require_program("node"), str(HERE / "over_mqtt.mjs"), url, protocol],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self.heard: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, name="node-output")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))

    def __enter__(self) -> Self:
        self.until(lambda said: said.get("connection") == "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)
        self._reader.join(10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def until(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 20.0) -> dict[str, Any]:
        while True:
            try:
                said = self._lines.get(timeout=timeout_s)
            except queue.Empty:
                raise AssertionError(f"not said within {timeout_s:g} s; said was {self.heard[-20:]}") from None
            self.heard.append(said)
            if wanted(said):
                return said

    def ended(self, name: str) -> dict[str, Any]:
        return self.until(lambda said: said.get("name") == name and "end" in said)

    def completed(self, name: str) -> None:
        self.until(lambda said: said.get("name") == name and "complete" in said)

    def text(self, name: str) -> str:
        """What was told of this answer, piece by piece."""
        return "".join(
            said["content"]
            for said in self.heard
            if said.get("name") == name and "end" not in said and "content" in said
        )


@pytest.fixture
def broker(start_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    return start_mosquitto(websockets=True, persistence=True)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def worker(broker: Mosquitto, engine: ScriptedEngine, tmp_path: Path) -> Iterator[LiveWorker]:
    with LiveWorker(broker.port, tmp_path, engine) as worker:
        yield worker


def websocket(broker: Mosquitto) -> str:
    return f"ws://127.0.0.1:{broker.websocket_port}"


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["5", "4"])
def test_an_answer_streams_over_a_websocket_of_the_broker(broker: Mosquitto, worker: LiveWorker, protocol: str) -> None:
    with Program(websocket(broker), protocol) as program:
        program.tell(ask="one", request={"session": "web", "prompt": "The sea says little, größer 🌊"})
        end = program.ended("one")
        assert end["end"]["finish_reason"] == "stop"
        assert program.text("one") == end["content"] == "The sea says little, größer 🌊"


@pytest.mark.broker
def test_a_broker_that_restarts_in_the_middle_costs_no_word_and_doubles_none(
    broker: Mosquitto, worker: LiveWorker, engine: ScriptedEngine
) -> None:
    gate = Gate()
    engine.play("one ", "two ", gate, "three ", "four")
    with Program(websocket(broker)) as program:
        program.tell(ask="it", request={"session": "web", "prompt": "Count"})
        program.until(lambda said: "two" in said.get("content", ""))
        broker.stop()
        program.until(lambda said: said.get("connection") == "down")
        gate.open()
        broker.start()
        end = program.ended("it")
        assert program.text("it") == end["content"] == "one two three four"
        assert len(engine.calls) == 1


@pytest.mark.broker
def test_an_abort_frees_the_slot_and_tells_the_text_so_far(
    broker: Mosquitto, worker: LiveWorker, engine: ScriptedEngine
) -> None:
    engine.play("one ", "two ", Gate())
    with Program(websocket(broker)) as program:
        program.tell(ask="it", request={"session": "web", "prompt": "Count"})
        program.until(lambda said: "two" in said.get("content", ""))
        program.tell(cancel="it")
        end = program.ended("it")
        assert (end["end"]["finish_reason"], end["content"]) == ("cancelled", "one two ")
        assert "made_here" not in end["end"]


@pytest.mark.broker
def test_a_cancel_by_post_frees_the_slot_at_once_and_tells_the_text_so_far(
    broker: Mosquitto, worker: LiveWorker, engine: ScriptedEngine, tmp_path: Path
) -> None:
    engine.play("one ", "two ", Gate())
    # Were the cancel only a request that is closed, the gateway would keep the slot for as long.
    gateway = RunningGateway(broker.port, tmp_path / "gateway", gateway__retry_grace_s=600)
    try:
        gateway.wait_ready()
        asked = {"url": f"{gateway.url}/ask/events", "cancelAt": "two ", "request": {"session": "s", "prompt": "Count"}}
        told = json.loads(node("over_fetch.mjs", given=json.dumps(asked)))
    finally:
        gateway.close()
    assert (told["end"]["finish_reason"], told["content"]) == ("cancelled", "one two ")
    assert "made_here" not in told["end"], "it is the worker that ended it"


@pytest.mark.broker
def test_chat_session_stream_keeps_the_session_between_two_messages(
    broker: Mosquitto, worker: LiveWorker, engine: ScriptedEngine
) -> None:
    with Program(websocket(broker)) as program:
        for message in ("My name is Ada.", "What is my name?"):
            program.tell(chat=message, request={"session_id": "my-session-123", "message": message, "max_tokens": 50})
            program.completed(message)
        second = engine.calls[-1].messages
        assert [message["content"] for message in second if message["role"] == "user"] == [
            "My name is Ada.",
            "What is my name?",
        ]


@pytest.mark.broker
def test_a_request_without_a_worker_ends_with_a_sentence(broker: Mosquitto) -> None:
    with Program(websocket(broker)) as program:
        program.tell(ask="it", request={"session": "web", "prompt": "Anybody?"})
        assert program.ended("it")["end"]["code"] == "no_worker"


# --- the page of the documentation ---------------------------------------------------------------------------------------


def example(word: str, **replaced: str) -> str:
    """The block of docs/javascript.md that has this word, with the module where it is here."""
    blocks = re.findall(r"```js\n(.*?)```", (HERE.parents[1] / "docs" / "javascript.md").read_text("utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    for old, new in {"./lmd.js": "../../clients/js/lmd.js", **replaced}.items():
        assert old in block
        block = block.replace(old, new)
    return str(block)


def run_example(program: str, *arguments: str) -> str:
    """As a module of tests/js, where the packages are."""
    path = HERE / f"example-{uuid.uuid4().hex}.mjs"
    path.write_text(program, "utf-8")
    try:
        return node(path.name, *arguments)
    finally:
        path.unlink()


def test_the_two_calls_of_the_documentation_run() -> None:
    preload = ["--import", str(HERE / "answering_fetch.mjs")]
    told = run_example(example("chatSessionStream, chatStream"), *preload)
    assert "Tell me about the sea" in told
    assert "And the wind?" in told
    assert "stop 25" in told


def test_the_events_of_the_documentation_are_told() -> None:
    program = example("toolCalls") + "console.log(end.finish_reason, content, toolCalls.length);"
    told = run_example(program, "--import", str(HERE / "answering_fetch.mjs"))
    assert told == "start \nchunk What is 6 x 7?\ndone \nstop What is 6 x 7? 0\n"


@pytest.mark.broker
def test_the_program_of_the_documentation_asks_over_mqtt(broker: Mosquitto, worker: LiveWorker) -> None:
    installed("mqtt")
    program = example("overMqtt(client)", **{"mqtt://localhost:1883": f"mqtt://127.0.0.1:{broker.port}"})
    assert run_example(program) == "Tell me about the sea"


def test_the_hook_of_the_documentation_shows_the_answer_as_it_comes() -> None:
    hook = example("useChat", react="./react_stand_in.mjs")
    program = """
import { render, shown, unmount } from "./react_stand_in.mjs";
render(useChat, "s").send("Hello");
for (let turn = 0; turn < 100 && (shown.length < 3 || shown.at(-1).running); turn += 1) await new Promise((next) => setTimeout(next, 10));
unmount();
console.log(JSON.stringify(shown.map(({ text, running, error }) => [text, running, error])));
"""
    told = json.loads(run_example(hook + program, "--import", str(HERE / "answering_fetch.mjs")))
    assert told[0] == ["", False, None]
    assert told[1] == ["", True, None]
    assert told[-1] == ["Hello", False, None]


def test_the_versions_of_the_module_and_the_package_are_the_same() -> None:
    assert json.loads((MODULE / "package.json").read_text())["version"] == __version__


def test_the_types_name_what_the_module_exports() -> None:
    program = 'import * as all from "../../clients/js/lmd.js"; console.log(Object.keys(all).sort().join(" "));'
    declared = re.findall(
        r"^export (?:class|function|const) (\w+)", (MODULE / "lmd.d.ts").read_text("utf-8"), re.MULTILINE
    )
    assert run_example(program).split() == sorted(declared)
