"""One client floods the worker, another one chats: the chat is neither refused nor ended, whatever the flood consists of."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import Event, Watcher, check_stream
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.services import require_program

pytestmark = [pytest.mark.broker, pytest.mark.engine]

COUNT = int(os.environ.get("FLOOD_MESSAGES", "200"))
"""Messages of each kind; `make flood` sends 5000."""
TOKENS = 20
CALM_REQUESTS = 20
LEAST_REQUESTS = 3
"""In the shortest flood too the chat asks this often."""


def _requests(**fields: object) -> Iterator[str]:
    for number in range(COUNT):
        messages = [{"role": "user", "content": f"number {number}"}]
        yield json.dumps({"messages": messages, "max_tokens": TOKENS, "request_id": f"f{number}"} | fields)


KINDS: Mapping[str, tuple[str, Callable[[], Iterable[str]]]] = {
    "requests": ("llm/request/flood/a", _requests),
    "interactive requests": ("llm/request/flood/b", lambda: _requests(priority="interactive")),
    "prompts of one session": (
        "llm/request/flood/c",
        lambda: (json.dumps({"prompt": f"number {n}", "max_tokens": TOKENS}) for n in range(COUNT)),
    ),
    "bad messages": ("llm/request/flood/d", lambda: (f'{{"prompt": {n}, "top_k": "x"' for n in range(COUNT))),
    "controls": (
        "llm/control/flood/e",
        lambda: (json.dumps({"action": ("ping", "history", "reset")[n % 3]}) for n in range(COUNT)),
    ),
    "cancels": (
        "llm/control/flood/f",
        lambda: (json.dumps({"action": "cancel", "request_id": f"unknown{n}"}) for n in range(COUNT)),
    ),
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request of the chat as its client saw it."""

    end: Event
    first_event_s: float
    first_token_s: float


class Chat:
    """A user who asks again as soon as he was answered."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        wire = watcher.client.socket()
        assert isinstance(wire, socket.socket)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._asked = 0

    def ask(self) -> Exchange:
        name = f"chat{self._asked}"
        self._asked += 1
        since, asked_at = self._watcher.count(), time.monotonic()
        self._watcher.ask("good/chat", "tell me more", request_id=name, max_tokens=TOKENS, new=True)
        end = self._watcher.terminal(name, 60)
        seen = [each for each in self._watcher.seen()[since:] if each.event.get("request_id") == name]
        check_stream([each.event for each in seen])
        first_chunk = next((each for each in seen if each.event["type"] == "chunk"), seen[-1])
        return Exchange(end, seen[0].at - asked_at, first_chunk.at - asked_at)


@dataclass(frozen=True, slots=True)
class Row:
    """What one kind of flood did to the chat."""

    kind: str
    messages: int
    took_s: float
    exchanges: tuple[Exchange, ...]

    def unwell(self) -> list[Event]:
        return [
            each.end
            for each in self.exchanges
            if each.end["type"] != "done" or each.end["finish_reason"] == "cancelled"
        ]

    def text(self) -> str:
        events = [1000 * each.first_event_s for each in self.exchanges]
        tokens = [1000 * each.first_token_s for each in self.exchanges]
        rate = f"{self.messages / self.took_s:.0f}" if self.messages else "-"
        figures = (
            f"{statistics.median(events):.0f} | {max(events):.0f} | {statistics.median(tokens):.0f} | {max(tokens):.0f}"
        )
        return f"| {self.kind} | {self.messages} | {rate} | {len(self.exchanges)} | {len(self.unwell())} | {figures} |"


TABLE_HEAD = (
    "| the other one floods with | messages | a second | chat: requests | not done | first event, ms: median | worst "
    "| first token, ms: median | worst |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def _flood(port: int, kind: str, lines: Path) -> subprocess.Popen[bytes]:
    """Publish a file's lines as fast as the broker takes them, from a process of their own."""
    topic, messages = KINDS[kind]
    lines.write_text("\n".join(messages()) + "\n")
    with lines.open("rb") as source:
        return subprocess.Popen(
            [require_program("mosquitto_pub"), "-p", str(port), "-V", "mqttv5", "-q", "1", "-t", topic, "-l"],
            stdin=source,
        )


def _while_flooded(kind: str, chat: Chat, operator: Watcher, broker: Mosquitto, folder: Path) -> Row:
    """Chat until the flood has been sent and read to its end: what was sent after it is answered."""
    flooding = _flood(broker.port, kind, folder / "lines")
    exchanges: list[Exchange] = []
    begun, asked_for_end = time.monotonic(), False
    try:
        while True:
            exchanges.append(chat.ask())
            if not asked_for_end and flooding.poll() is not None:
                assert flooding.returncode == 0
                operator.control("ping", "ping", transaction=kind)
                asked_for_end = True
            acks = [seen.at for seen in operator.seen() if seen.event.get("transaction") == kind]
            if acks and len(exchanges) >= LEAST_REQUESTS:
                return Row(kind, COUNT, acks[0] - begun, tuple(exchanges))
    finally:
        flooding.kill()
        flooding.wait(10)


@pytest.mark.timeout(max(60, COUNT // 10))
def test_a_client_that_floods_costs_another_one_no_request(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    llama_server: LlamaServer,
    watch: Watch,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    # The queue of a broker belongs to all its clients: with room for the flood in it, what is seen is the worker.
    broker = start_mosquitto(settings=["max_queued_messages 100000", "set_tcp_nodelay true"], verbose=False)
    chat, operator = (
        Chat(watch(broker.port, filters=["llm/reply/good/#"])),
        watch(broker.port, filters=["llm/reply/ping"]),
    )
    worker = start_worker(broker.port, llama_server.url)
    chat.ask()
    rows = [Row("nothing", 0, 0.0, tuple(chat.ask() for _ in range(CALM_REQUESTS)))]
    rows += [_while_flooded(kind, chat, operator, broker, tmp_path) for kind in KINDS]
    table = "\n".join([TABLE_HEAD, *(row.text() for row in rows)])
    record_property("table", table)
    print(f"\n{table}")
    assert not [row.unwell() for row in rows if row.unwell()], table
    # A flood that overruns the inbox makes the worker connect again, which is its own doing; the broker ends nothing.
    assert all("inbox was full" in line["why"] for line in worker.log("link.lost")), worker.log("link.lost")
    assert worker.stop() == 0
