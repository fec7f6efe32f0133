"""Messages that nobody should send, 20 000 of them (`make hostile`: 100 000): the worker answers every good one among them, and its
memory stays as it was."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.hostility import Hostility
from tests.service.watcher import Event, Watcher, check_stream
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

COUNT = int(os.environ.get("HOSTILE_MESSAGES", "20000"))
WARM_UP = 4_000
BATCH = 400
"""Fewer than the broker keeps for a client (1000): after each batch the worker is asked whether it has read it."""


def _flood(
    watcher: Watcher, hostility: Hostility, count: int, *, tag: str, among: Callable[[str], object] = lambda _: None
) -> None:
    """`among` is called four times in each batch, with a name of its own."""
    for batch in range(0, count, BATCH):
        sent = []
        for piece in range(4):
            sent += [
                watcher.publish(each.topic, each.payload, qos=each.qos, retain=each.retain, **each.properties)
                for each in hostility.messages(BATCH // 4)
            ]
            among(f"{tag}{batch}.{piece}")
        for info in sent:
            info.wait_for_publish(30)
        watcher.control("ping", "ping", transaction=f"{tag}-{batch}")
        watcher.first(60, type="ack", transaction=f"{tag}-{batch}")


class GoodRequests:
    """A user who asks again as soon as he was answered while the others flood; every one of his requests has to be done."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._asked: list[str] = []

    def ask(self, name: str) -> None:
        if self._asked and not any(event.get("final") for event in self._watcher.of(self._asked[-1])):
            return
        self._watcher.ask(f"good/{name}", "a good request", request_id=name, max_tokens=5)
        self._asked.append(name)

    def check(self) -> int:
        """How many were asked, all of them answered."""
        for name in self._asked:
            end = self._watcher.terminal(name, 60)
            assert end["type"] == "done", json.dumps(end)
        events: dict[str, list[Event]] = {name: [] for name in self._asked}
        for seen in self._watcher.seen():
            if seen.event.get("request_id") in events:
                events[seen.event["request_id"]].append(seen.event)
        for found in events.values():
            check_stream(found)
        return len(self._asked)


def _quiet_rss(worker: DaemonProcess) -> int:
    """The resident memory once everything accepted has ended."""
    eventually(lambda: worker.log_text().endswith("\n"))
    return worker.rss_bytes()


def _worst_lines(worker: DaemonProcess) -> Counter[str]:
    return Counter(line["event"] for line in worker.log())


@pytest.mark.timeout(max(120, COUNT // 50))
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_in_a_flood_of_hostile_messages_every_good_one_is_answered_and_memory_stays_flat(
    protocol: str,
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    llama_server: LlamaServer,
    watch: Watch,
    record_property: Callable[[str, object], None],
) -> None:
    broker = start_mosquitto()
    good = watch(broker.port, version=protocol, filters=["llm/reply/good/#", "llm/status/w1", "home/#", "$SYS/x"])
    bad = watch(broker.port, version="5", filters=["llm/reply/ping"])
    # What the hostile one is answered has to keep to the protocol too, but is not kept: it is 20 000 events.
    worker = start_worker(
        broker.port,
        llama_server.url,
        mqtt__protocol=protocol,
        # More places than the flood has first levels: each of them, and so the good one too, has a share.
        limits__queue_size=32,
        limits__max_tokens=8,
        limits__remember_s=5,
        limits__max_request_bytes=200_000,
        generation__max_tokens=2,
        sessions__max_sessions=50,
    )
    hostility = Hostility(20_241_120 + len(protocol))
    good_requests = GoodRequests(good)
    count = COUNT if protocol == "5" else COUNT // 4
    begun = time.monotonic()
    _flood(bad, hostility, WARM_UP, tag="warm", among=good_requests.ask)
    before = _quiet_rss(worker)
    rss: list[int] = []
    for fifth in range(5):
        _flood(bad, hostility, (count - WARM_UP) // 5, tag=f"hot{fifth}-", among=good_requests.ask)
        rss.append(_quiet_rss(worker))
    took_s = time.monotonic() - begun
    answered = good_requests.check()
    growth = _quiet_rss(worker) - before
    figures = (
        f"{count} messages in {took_s:.1f} s, {answered} good requests among them, none unanswered; "
        f"MiB after the first {WARM_UP}: {before / 2**20:.1f}, then {', '.join(f'{each / 2**20:.1f}' for each in rss)}"
    )
    record_property("flood", figures)
    print(f"\nflood, MQTT {protocol}: {figures}; {_worst_lines(worker).most_common(12)}")
    assert growth < 15 * 2**20, figures
    # Nothing was published outside of the worker's own tree, whatever response topics were asked for.
    assert {seen.topic.rpartition("/")[0] for seen in good.seen()} <= {"llm/reply/good", "llm/status"}
    worker.check_log()
    assert "forged" not in {line["event"] for line in worker.log()}
    assert not re.search(r"[\u2028\u202e\ufeff\u200b]", worker.log_text())
    assert len(worker.log("link.online")) == 1, "no message may cost the connection"
    assert worker.stop() == 0


def test_events_that_answer_hostile_messages_keep_to_the_protocol(
    start_worker: StartWorker, start_mosquitto: Callable[..., Mosquitto], llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    sessions = ("a", "b", "c", "u1/x", "u2/y", "..", ".", "-", "0", "s" * 64, "u/" + "n" * 64)
    watcher = watch(broker.port, filters=[f"llm/reply/{each}" for each in sessions] + ["llm/admin-reply/w1"])
    bad = watch(broker.port, filters=["llm/reply/ping"])
    start_worker(broker.port, llama_server.url, limits__queue_size=4, limits__max_tokens=8, generation__max_tokens=2)
    _flood(bad, Hostility(7), 2_000, tag="t")
    # Every event is held against the schema when the watcher closes; here: each request that began has ended.
    eventually(lambda: not _unended(watcher), 30)
    kinds = Counter(seen.event["type"] for seen in watcher.seen())
    assert set(kinds) >= {"ack", "error", "rejected", "done", "start", "chunk", "queued"}, kinds


def _unended(watcher: Watcher) -> set[str]:
    begun = {s.event["request_id"] for s in watcher.seen() if s.event.get("type") in ("start", "queued", "chunk")}
    return begun - {s.event["request_id"] for s in watcher.seen() if s.event.get("final")}


def test_packets_that_make_a_broker_hang_up_on_their_sender_do_not_reach_the_worker(
    start_worker: StartWorker, start_mosquitto: Callable[..., Mosquitto], llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url)

    def raw_publish(topic: bytes) -> None:
        connect = b"\x00\x04MQTT\x04\x02\x00\x3c\x00\x04evil"
        publish = len(topic).to_bytes(2, "big") + topic + b"payload"
        with socket.create_connection(("127.0.0.1", broker.port), 5) as wire:
            wire.sendall(bytes([0x10, len(connect)]) + connect)
            wire.recv(4)
            wire.sendall(bytes([0x30, len(publish)]) + publish)
            wire.sendall(b"\xc0\x00")
            wire.settimeout(5)
            try:
                wire.recv(16)
            except OSError:
                return

    for topic in (
        b"\xff\xfe",
        b"a\x00b",
        b"\x01",
        b"s\x1b[31m",
        b"\xed\xa0\x80",
        b"\x7f",
        b"\xc2\x85",
        b"+",
        b"a/#",
        b"x/\n",
    ):
        raw_publish(b"llm/request/" + topic)
    watcher.ask("good", "still there?", request_id="good", max_tokens=3)
    assert watcher.terminal("good")["type"] == "done"
    assert len(worker.log("link.online")) == 1


def test_a_stranger_who_forges_statuses_does_not_stop_a_worker_that_runs(
    start_worker: StartWorker, start_mosquitto: Callable[..., Mosquitto], llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url)
    for number in range(600):
        forged = f'{{"instance":"x{number}","state":"online","ts":1e308,"every_s":1e308}}'
        watcher.publish(f"llm/status/ghost{number}", forged.encode())
    watcher.publish("llm/status/w1", b'{"instance":[[]],"state":{},"ts":"NaN","every_s":null}').wait_for_publish(10)
    watcher.publish("llm/status/w1", b"\xff").wait_for_publish(10)
    watcher.ask("good", "still there?", request_id="good", max_tokens=3)
    assert watcher.terminal("good")["type"] == "done"
    assert worker.process.poll() is None
    watcher.forget()
