"""What a broker with Nagle's algorithm on (mosquitto's default) has for us comes at once, however much we publish meanwhile."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.mqtt.link import MqttLink
from tests.support.bus_client import BusClient
from tests.support.link_case import LinkCase
from tests.support.mosquitto import Mosquitto

REQUESTS = 25
CHUNKS_EVERY_S = 0.02


def test_requests_are_not_held_back_while_a_stream_runs(start_mosquitto: Callable[..., Mosquitto]) -> None:
    broker = start_mosquitto(settings=["set_tcp_nodelay false"])
    case = LinkCase(MqttLink(MqttSettings(host="127.0.0.1", port=broker.port), client_id="link")).open()
    ended = threading.Event()

    def stream() -> None:
        while not ended.wait(CHUNKS_EVERY_S):
            assert case.link.publish("chunks", b"x" * 80) == "queued"

    streaming = threading.Thread(target=stream)
    ways_s = []
    try:
        assert case.link.subscribe([("request", 1)], timeout_s=5) == {}
        with BusClient(broker.port) as reader, BusClient(broker.port) as asker:
            reader.subscribe("chunks", 0)
            streaming.start()
            for _ in range(REQUESTS):
                reader.receive()
                reader.receive()  # just now: the PUBACK of this chunk goes before what the broker has for us next
                asked_at = time.monotonic()
                asker.publish("request", b"")
                ways_s.append(case.receive().received_at - asked_at)
    finally:
        ended.set()
        streaming.join(5)
        case.close(last_message=False, seconds=2.0)
    assert statistics.median(ways_s) < 0.006, "half a millisecond is usual"
