"""What becomes of requests that were published with the retain flag (`mosquitto_pub -r`), with a real broker."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_retained_request_runs_for_a_worker_that_is_subscribed_and_never_again_from_the_brokers_memory(
    protocol: str,
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    watch: Watch,
    llama_server: LlamaServer,
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    settings = {"mqtt__protocol": protocol, "mqtt__worker_id": "w1", "generation__max_tokens": 5}
    watcher.publish("llm/request/before", b"kept before the first worker came", retain=True).wait_for_publish(5)

    worker = start_worker(broker.port, llama_server.url, **settings)
    # Live: the broker delivers it to standing subscriptions without the flag, like any other request.
    watcher.publish("llm/request/live", b"published while the worker is subscribed", retain=True)
    watcher.first(type="done", session_id="live")
    worker.stop()
    # Away: it waits in the worker's session at the broker, without the flag too.
    watcher.publish("llm/request/away", b"published while the worker is away", retain=True).wait_for_publish(5)

    again = start_worker(broker.port, llama_server.url, **settings)
    watcher.first(type="done", session_id="away")
    watcher.ask("last", "whatever the broker kept was delivered before this", request_id="last")
    watcher.terminal("last")

    starts = [seen.event["session_id"] for seen in watcher.seen() if seen.event.get("type") == "start"]
    assert starts == ["live", "away", "last"]
    # From the broker's memory, because of a subscription: MQTT 5 leaves it there, 3.1.1 brings it with the flag.
    ignored = [line["topic"] for found in (worker, again) for line in found.log("message.ignored")]
    if protocol == "5":
        assert ignored == []
    else:
        eventually(lambda: len(again.log("message.ignored")) >= 3)
        assert {line["topic"] for line in worker.log("message.ignored")} == {"llm/request/before"}
        kept = {"llm/request/before", "llm/request/live", "llm/request/away"}
        assert {line["topic"] for line in again.log("message.ignored")} == kept
