"""A client that publishes at QoS 0 as fast as the broker takes it: everybody else is served all the same."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import check_stream
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

REQUESTS = 3
WITHIN_S = 75.0
"""Each takes a tenth of a second alone, one to ten seconds beside a flood that shares two busy cores with all else. While floods were read
message by message none was answered in minutes: the broker dropped PUBACKs, so that nothing went out before the connection was given up, and
then again."""

_FLOOD = textwrap.dedent(
    """
    import socket, struct, sys

    def text(value):
        return struct.pack("!H", len(value)) + value

    def publish(topic, payload):
        body = text(topic) + payload
        size, left = b"", len(body)
        while left or not size:
            left, seven = divmod(left, 128)
            size += bytes([seven | (0x80 if left else 0)])
        return b"\\x30" + size + body

    broker = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    hello = text(b"MQTT") + bytes([4, 2]) + struct.pack("!H", 600) + text(b"flood")
    broker.sendall(bytes([0x10, len(hello)]) + hello)
    broker.recv(4)
    large = b"hi" * 300_000
    make, count, together = {
        "requests": (lambda n: publish(b"llm/request/flood/s%d" % n, b'{"prompt":"hi","request_id":"f%d"}' % n), 20_000, 100),
        "large": (lambda n: publish(b"llm/request/flood/s%d" % n, b'{"prompt":"%s","request_id":"f%d"}' % (large, n)), 100, 1),
        "cancels": (lambda n: publish(b"llm/control/u%d/s" % n, b'{"action":"cancel","request_id":"f%d"}' % n), 20_000, 100),
    }[sys.argv[2]]
    pieces = [b"".join(make(n) for n in range(first, first + together)) for first in range(0, count, together)]
    print("floods", flush=True)
    while True:
        for piece in pieces:
            broker.sendall(piece)
    """
)


@contextmanager
def _flooding(port: int, kind: str) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-c", _FLOOD, str(port), kind], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "floods\n"
            yield
            assert process.poll() is None, "it went on to the end"
        finally:
            process.kill()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kind, transport",
    [("requests", "tcp"), ("large", "tcp"), ("cancels", "tcp"), ("requests", "websockets"), ("cancels", "websockets")],
)
def test_others_are_answered_while_one_client_floods_the_broker_at_qos_0(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    llama_server: LlamaServer,
    watch: Watch,
    kind: str,
    transport: str,
) -> None:
    broker = start_mosquitto(settings=["set_tcp_nodelay true"], verbose=False, websockets=True)
    chat = watch(broker.port, filters=["llm/reply/good/#"])
    port = broker.websocket_port if transport == "websockets" else broker.port
    worker = start_worker(port, llama_server.url, mqtt__transport=transport)
    with _flooding(broker.port, kind):
        eventually(lambda: worker.log("link.flood"), 60)  # it is in full swing
        for number in range(REQUESTS):
            chat.ask("good/chat", "tell me more", request_id=f"chat{number}", max_tokens=100, new=True)
            end = chat.terminal(f"chat{number}", WITHIN_S)
            assert end["type"] == "done"
    for number in range(REQUESTS):
        # After a lost PUBACK an event comes twice, as at any other time.
        once = {repr(event): event for event in chat.of(f"chat{number}")}
        check_stream(once.values())
    (told, *_) = worker.log("link.flood")
    assert told["lost"] > 0
    assert told["topic"].startswith(f"'llm/{'control' if kind == 'cancels' else 'request'}/")
