"""The ESP32 sketch of the recipes, compiled for the host with stand-ins for its libraries, reads answers as the protocol asks."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from llamacpp_mqtt_deploy.core.events import EventWriter
from tests.docs.conftest import WorldWith
from tests.docs.pages import ROOT
from tests.support.services import require_program
from tests.support.waiting import eventually

SKETCH = ROOT / "docs" / "esp32" / "esp32.ino"
STAND_INS = Path(__file__).with_name("arduino")
WHOLE = 'The sea says "little", größer 🌊\nand no more.'


class Board:
    """The running sketch: `tell` says what happens to it and returns what it published and printed."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.published: list[str] = []
        self.printed = ""
        self.dropped = 0
        self.wait(0)

    def wait(self, ms: int) -> None:
        self.tell(f"wait {ms}")

    def receive(self, *events: bytes | dict[str, Any]) -> None:
        for event in events:
            self.tell("message " + (event if isinstance(event, bytes) else orjson.dumps(event)).decode())

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        while (told := self._process.stdout.readline().rstrip("\n")) != ". ":
            assert self._process.poll() is None
            kind, _, text = told.partition(" ")
            if kind == "publish":
                self.published.append(text)
            elif kind == "serial":
                self.printed += text.replace("\\n", "\n").replace("\\\\", "\\")
            elif kind == "dropped":
                self.dropped += 1

    @property
    def request_id(self) -> str:
        return str(json.loads(self.published[0])["request_id"])

    def writer(self, max_bytes: int = 4000) -> EventWriter:
        return EventWriter(request_id=self.request_id, session_id="esp32", max_bytes=max_bytes)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(5)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sketch, compiled without a warning as the C++ of the oldest ESP32 core in use."""
    compiler = require_program("g++")
    made = tmp_path_factory.mktemp("esp32") / "sketch"
    strict = ["-std=c++11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    result = subprocess.run(
        [compiler, *strict, f'-DSKETCH="{SKETCH}"', f"-I{STAND_INS}", str(STAND_INS / "main.cpp"), "-o", str(made)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return made


@pytest.fixture
def board(program: Path) -> Iterator[Board]:
    running = Board(program)
    yield running
    running.close()


def an_answer(writer: EventWriter) -> tuple[bytes, list[bytes], bytes]:
    """Its start, its chunks and its end."""
    start = writer.start({"worker": "w", "created": 1})
    pieces = (WHOLE[at : at + 7] for at in range(0, len(WHOLE), 7))
    chunks = [event for piece in pieces for event in writer.chunks("content", piece)]
    message = {"role": "assistant", "content": WHOLE}
    done = writer.done({"full_content": WHOLE, "message": message, "finish_reason": "stop", "dropped_messages": 0})
    return start, chunks, done


def without_its_text(event: bytes) -> dict[str, Any]:
    done = orjson.loads(event)
    del done["full_content"], done["message"]
    return {**done, "content_omitted": True}


def test_an_esp32_joins_the_chunks_of_an_answer(board: Board) -> None:
    start, chunks, done = an_answer(board.writer())
    stranger = {**orjson.loads(chunks[0]), "request_id": "other"}
    board.receive(start, stranger, *chunks, done)
    assert board.printed == WHOLE + "\n"
    board.receive(*chunks, done)
    board.wait(600_000)
    assert board.printed == WHOLE + "\n", "what comes after the end is ignored"
    assert len(board.published) == 1


def test_an_esp32_reads_a_chunk_that_comes_twice_once(board: Board) -> None:
    start, chunks, done = an_answer(board.writer())
    board.receive(start, *(event for chunk in chunks for event in (chunk, chunk)), chunks[0], without_its_text(done))
    assert board.printed == WHOLE + "\n"


def test_an_esp32_asks_again_with_the_same_bytes_after_a_hole_and_goes_on_from_the_snapshot(board: Board) -> None:
    start, chunks, done = an_answer(board.writer())
    board.receive(start, *chunks[:2], chunks[3])
    assert len(board.published) == 1
    board.wait(1000)
    assert board.published == [board.published[0]] * 2
    board.wait(900)
    assert len(board.published) == 2, "at most one each second"
    snapshot = {"type": "snapshot", "request_id": board.request_id, "content": WHOLE[:35], "next_seq": 5}
    board.receive(snapshot, chunks[4], *chunks[5:])
    board.wait(5000)
    assert len(board.published) == 2, "the hole is filled"
    board.receive(without_its_text(done))
    assert board.printed == WHOLE + "\n"


def test_an_esp32_asks_again_after_three_heartbeats_of_silence(board: Board) -> None:
    board.wait(44_000)
    assert len(board.published) == 1
    board.wait(1_000)
    assert board.published == [board.published[0]] * 2
    board.wait(44_000)
    board.receive({"type": "ping", "request_id": board.request_id, "state": "prompt"})
    board.wait(44_000)
    assert len(board.published) == 2, "a ping is a sign of life"
    _, _, done = an_answer(board.writer())
    board.receive(done)
    assert board.printed == WHOLE + "\n", "the end alone brings the whole text"


def test_an_esp32_asks_again_after_a_lost_connection(board: Board) -> None:
    start, chunks, done = an_answer(board.writer())
    board.receive(start, *chunks[:2])
    board.tell("disconnect")
    assert board.published == [board.published[0]] * 2
    board.receive(done)
    assert board.printed == WHOLE + "\n"


def test_an_esp32_never_shows_an_incomplete_answer_as_complete(board: Board) -> None:
    start, chunks, done = an_answer(board.writer())
    board.receive(start, *chunks[:-1], without_its_text(done))
    assert board.printed.endswith(" [incomplete]\n")


def test_an_esp32_marks_what_was_too_large_for_a_snapshot(board: Board) -> None:
    start, chunks, done = an_answer(board.writer())
    omitted = {
        "type": "snapshot",
        "request_id": board.request_id,
        "content": "",
        "next_seq": 4,
        "content_omitted": True,
    }
    board.receive(start, *chunks[:2], chunks[3], omitted, *chunks[4:], without_its_text(done))
    assert " [...] " in board.printed
    assert board.printed.endswith(" [incomplete]\n")
    board.wait(60_000)
    assert len(board.published) == 1


def test_an_esp32_shows_the_message_of_an_error(board: Board) -> None:
    end = board.writer().error(code="busy", message="the queue is full", retryable=True, details={})
    board.receive(end)
    assert board.printed == "the queue is full\n"


def test_an_esp32_drops_an_event_that_is_larger_than_its_buffer_and_says_nothing(board: Board) -> None:
    """Why the worker's limit belongs below the device's buffer."""
    board.receive({"type": "chunk", "request_id": board.request_id, "seq": 0, "content": "x" * 4096})
    assert (board.dropped, board.printed) == (1, "")


@pytest.mark.broker
@pytest.mark.engine
def test_an_esp32_reads_a_long_answer_in_small_events_of_which_two_are_lost(
    program: Path, world_with: WorldWith
) -> None:
    """A real broker and worker; the answer is larger than the largest event, and two chunks never reach the device."""
    world = world_with(
        "LMD_LIMITS__MAX_EVENT_BYTES=1024 LMD_STREAMING__MODE=simulated LMD_STREAMING__CHUNK_INTERVAL_S=0.1"
    )
    world.start_worker()
    board = Board(program)
    arrived: queue.Queue[bytes] = queue.Queue()
    try:
        with on_the_bus(world.broker.port, arrived.put) as bus:
            sent, lost, chunks, end = 0, {2, 3}, dict[int, str](), dict[str, Any]()
            eventually(bus.is_connected, 5.0)
            while not end.get("final"):
                for payload in board.published[sent:]:
                    # The sketch greets; a long answer is wanted here.
                    request = json.loads(payload) | {"prompt": "Tell me a short story"}
                    bus.publish("llm/request/esp32", json.dumps(request), qos=1)
                    sent += 1
                payload_in = arrived.get(timeout=20)
                end = event = json.loads(payload_in)
                if event["type"] == "chunk":
                    chunks[event["seq"]] = event["content"]
                if event["type"] == "chunk" and event["seq"] in lost:
                    lost.discard(event["seq"])
                    continue
                board.wait(300)
                board.receive(payload_in)
    finally:
        board.close()
    assert (lost, board.dropped, end["content_omitted"]) == (set(), 0, True)
    assert len(board.published) >= 2
    assert board.printed == "".join(chunks[seq] for seq in range(end["seq"])) + "\n"


@contextlib.contextmanager
def on_the_bus(port: int, receive: Callable[[bytes], None]) -> Iterator[mqtt.Client]:
    """A client that is subscribed to the device's replies."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    subscribed = threading.Event()
    client.on_message = lambda _client, _data, message: receive(bytes(message.payload))
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect("127.0.0.1", port)
    client.subscribe("llm/reply/esp32", qos=1)
    client.loop_start()
    try:
        assert subscribed.wait(5)
        yield client
    finally:
        client.disconnect()
        client.loop_stop()
