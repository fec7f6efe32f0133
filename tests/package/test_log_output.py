"""Where the lines of the log go: a reader that does not read holds nobody up, and what it misses is counted."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import structlog

from llamacpp_mqtt_deploy import log_output, logs
from llamacpp_mqtt_deploy.config.settings import LoggingSettings
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("log_as_it_was")

IN_THE_PIPE = 2 << 20
"""More than a pipe or a socket of this kernel holds, and one write to it."""


@dataclass
class Stream:
    """A log stream and its reader, who reads only when he is told to."""

    stream: IO[str]
    reader: int
    read: bytearray = field(default_factory=bytearray)

    def read_what_is_there(self) -> list[dict[str, Any]]:
        os.set_blocking(self.reader, False)
        try:
            while piece := os.read(self.reader, 65536):
                self.read += piece
        except BlockingIOError:
            pass
        return self.lines()

    def read_until(self, event: str) -> list[dict[str, Any]]:
        eventually(lambda: any(line["event"] == event for line in self.read_what_is_there()))
        return self.lines()

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines that were read so far."""
        return [json.loads(line) for line in bytes(self.read).split(b"\n")[:-1]]


def open_stream(kind: str, monkeypatch: pytest.MonkeyPatch) -> Stream:
    if kind == "socket":
        ours, theirs = socket.socketpair()
        return Stream(os.fdopen(ours.detach(), "w"), theirs.detach())
    if kind == "pipe of an older kernel":

        def refuse(*_: object) -> int:
            raise OSError(errno.EOPNOTSUPP, "not for pipes")

        monkeypatch.setattr(os, "pwritev", refuse)
    reader, writer = os.pipe()
    return Stream(os.fdopen(writer, "w"), reader)


@pytest.fixture(params=["pipe", "pipe of an older kernel", "socket"])
def unread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """The log of this process goes to a stream whose reader does not read yet."""
    made = open_stream(request.param, monkeypatch)
    logs.setup(LoggingSettings(format="json"), stream=made.stream, environ={})
    yield made
    os.set_blocking(made.reader, True)
    ended = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(made.reader, 65536), b"")])
    ended.start()
    log_output.close_all(5)
    made.stream.close()
    ended.join(10)
    os.close(made.reader)
    assert not ended.is_alive()


def log_in_threads(count: int, each: int, say: Callable[[int, int], None]) -> float:
    """Call `say(thread, number)` from some threads at once; the seconds until all are done."""

    def work(name: int) -> None:
        for number in range(each):
            say(name, number)

    began = time.monotonic()
    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "a thread that logs is held up by the reader of the log"
    return time.monotonic() - began


def test_a_reader_that_does_not_read_holds_up_no_thread_and_is_told_how_much_it_missed(unread: Stream) -> None:
    log = structlog.get_logger("x")
    took = log_in_threads(
        2, 5000, lambda name, number: log.info("x.happened", thread=name, number=number, note="y" * 200)
    )
    assert took < 15
    log.warning("x.ended")
    lines = unread.read_until("x.ended")
    (lost,) = [line for line in lines if line["event"] == "log.lost"]
    assert (lost["level"], lost["logger"]) == ("warning", "logs")
    happened = [line for line in lines if line["event"] == "x.happened"]
    assert len(happened) + lost["lines"] == 10_000
    assert lost["lines"] > 0
    for name in (0, 1):
        numbers = [line["number"] for line in happened if line["thread"] == name]
        assert numbers == sorted(numbers)
        assert numbers[-1] == 4999, "the newest lines are the ones that are kept"
    assert len(happened) <= log_output.MOST_LINES + IN_THE_PIPE // 300
    # The line stands where the others are missing.
    at = lines.index(lost)
    assert [line["number"] for line in lines[:at] if line["thread"] == 0] == list(
        range(sum(line["thread"] == 0 for line in lines[:at]))
    )
    assert "log.lost" in [kept["event"] for kept in logs.problems()]


def test_what_waits_for_a_reader_is_bounded_in_bytes_too(unread: Stream) -> None:
    log = structlog.get_logger("x")
    for number in range(120):
        log.info("x.happened", number=number, note="y" * 100_000)
    log.warning("x.ended")
    lines = unread.read_until("x.ended")
    (lost,) = [line for line in lines if line["event"] == "log.lost"]
    assert lost["lines"] + sum(line["event"] == "x.happened" for line in lines) == 120
    assert len(unread.read) <= log_output.MOST_BYTES + IN_THE_PIPE


def test_a_line_longer_than_all_that_may_wait_arrives_whole(unread: Stream) -> None:
    structlog.get_logger("x").warning("x.ended", note="y" * (log_output.MOST_BYTES + 10))
    (line,) = unread.read_until("x.ended")
    assert len(line["note"]) == log_output.MOST_BYTES + 10


def test_the_stream_which_other_processes_share_stays_a_blocking_one(unread: Stream) -> None:
    for _ in range(1000):
        structlog.get_logger("x").warning("x.happened", note="y" * 1000)
    assert os.get_blocking(unread.stream.fileno())


def test_a_stream_that_somebody_made_non_blocking_loses_nothing_either(unread: Stream) -> None:
    os.set_blocking(unread.stream.fileno(), False)
    for number in range(1000):
        structlog.get_logger("x").info("x.happened", number=number, note="y" * 1000)
    structlog.get_logger("x").info("x.ended")
    lines = unread.read_until("x.ended")
    assert [line["number"] for line in lines[:-1]] == list(range(1000))


def test_a_lone_line_is_written_at_once_by_its_own_thread(unread: Stream) -> None:
    before = log_threads()
    structlog.get_logger("x").info("x.happened")
    assert [line["event"] for line in unread.read_what_is_there()] == ["x.happened"]
    assert log_threads() <= before


def test_lines_of_a_burst_arrive_together_in_order_and_soon(unread: Stream) -> None:
    for number in range(100):
        structlog.get_logger("x").info("x.happened", number=number)
    eventually(lambda: len(unread.read_what_is_there()) == 100)
    assert [line["number"] for line in unread.lines()] == list(range(100))


def test_a_warning_is_written_at_once_behind_what_waits(unread: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_output, "_GATHER_S", 60.0)
    log = structlog.get_logger("x")
    for number in range(5):
        log.info("x.happened", number=number)
    log.warning("x.failed")
    assert [line["event"] for line in unread.read_what_is_there()] == ["x.happened"] * 5 + ["x.failed"]


def test_the_thread_of_the_log_ends_when_nothing_comes_and_starts_again(
    unread: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_output, "_IDLE_S", 0.05)
    log = structlog.get_logger("x")
    others = log_threads()
    for _ in range(2):
        before = len(unread.lines())
        for _ in range(20):
            log.info("x.happened")
        eventually(partial(_has_read, unread, before + 20))
        eventually(lambda: log_threads() <= others)


def test_without_a_thread_to_be_had_the_lines_come_with_the_next_warning(
    unread: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    log = structlog.get_logger("x")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for number in range(5):
            log.info("x.happened", number=number)
        log.warning("x.ended")
    lines = unread.read_what_is_there()
    assert [line.get("number") for line in lines] == [0, 1, 2, 3, 4, None]


def test_a_reader_that_went_away_holds_up_nobody() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        logs.setup(LoggingSettings(format="json"), stream=stream, environ={})
        log = structlog.get_logger("x")
        log.info("x.happened")
        os.close(reader)
        log_in_threads(2, 500, lambda _, number: log.info("x.happened", number=number, note="y" * 500))
        log_output.close_all(5)


def test_a_reader_that_keeps_up_loses_no_line_of_many_threads(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        # A process of its own: a thread here would wait for its turn among those that log.
        reading = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
    assert reading.stdin is not None
    with io.TextIOWrapper(reading.stdin) as stream:
        logs.setup(LoggingSettings(format="json"), stream=stream, environ={})
        log = structlog.get_logger("x")
        log_in_threads(8, 1500, lambda name, number: log.info("x.happened", thread=name, number=number))
        log_output.close_all(5)
    assert reading.wait(10) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_bytes().splitlines()]
    assert len(lines) == 12_000
    for name in range(8):
        assert [line["number"] for line in lines if line["thread"] == name] == list(range(1500))


def test_lines_in_a_file_are_gathered_and_all_there_at_the_end(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        logs.setup(LoggingSettings(format="json"), stream=stream, environ={})
        for number in range(500):
            structlog.get_logger("x").info("x.happened", number=number)
        log_output.close_all(5)
    written = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["number"] for line in written] == list(range(500))


# --- the end of a process ------------------------------------------------------------------------------------------------

LOGGING_PROCESS = """
import structlog, sys
from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.config.settings import LoggingSettings
logs.setup(LoggingSettings(format="json"), environ={})
log = structlog.get_logger("x")
for number in range(int(sys.argv[2])):
    log.info("x.happened", number=number)
match sys.argv[1]:
    case "exit":
        sys.exit(3)
    case "raise":
        raise LookupError("gone")
"""


@pytest.mark.parametrize("ending,code,last", [("return", 0, None), ("exit", 3, None), ("raise", 1, "process.failed")])
def test_what_waits_is_written_when_the_process_ends(ending: str, code: int, last: str | None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGGING_PROCESS, ending, "100"], stderr=subprocess.PIPE, timeout=60, check=False
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == code
    assert [line["number"] for line in lines[:100]] == list(range(100))
    assert [line["event"] for line in lines[100:]] == ([last] if last else [])


def test_a_process_whose_log_nobody_reads_ends_all_the_same() -> None:
    with subprocess.Popen([sys.executable, "-c", LOGGING_PROCESS, "exit", "3000"], stderr=subprocess.PIPE) as process:
        assert process.wait(30) == 3
        assert process.stderr is not None
        first = process.stderr.readline()
    assert json.loads(first)["number"] == 0


def _has_read(unread: Stream, lines: int) -> bool:
    return len(unread.read_what_is_there()) == lines


def log_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "log"}
