"""What the retained status says while the broker lets the worker read nothing, or only a part."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.service import daemon
from llamacpp_mqtt_deploy.stopping import Deadline
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker


def _status(bus: Bus) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(bus.broker.retained("llm/status/w1") or b"{}")
    return status


def _filters(worker: WholeWorker) -> list[str]:
    topics = worker.daemon.parts.topics
    return [*topics.request_filters(), *topics.control_filters(), topics.admin_topic]


def _lose_every_subscription(bus: Bus, worker: WholeWorker) -> None:
    for topic_filter in _filters(worker):
        bus.broker.refuse(topic_filter)
    bus.broker.drop_connection(worker.client_id)


def test_a_worker_that_may_read_nothing_after_a_reconnect_is_offline_until_it_may_again(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_START_UP_AGAIN_S", 0.05)
    worker = bus.worker()
    _lose_every_subscription(bus, worker)
    eventually(lambda: _status(bus).get("reason") == "not_subscribed")
    status = _status(bus)
    assert status["state"] == "offline"
    assert "llm/request/+" in status["problem"]
    assert "Not authorized" in status["problem"]
    before = status["ts"]
    eventually(lambda: _status(bus)["ts"] > before)
    worker.daemon._renew()
    worker.daemon.parts.presence.become("online")
    assert worker.daemon.parts.link.flush(Deadline(5))
    assert _status(bus)["state"] == "offline", "neither a renewal nor a `resume` makes requests arrive"
    for topic_filter in _filters(worker):
        bus.broker.allow(topic_filter)
    eventually(lambda: _status(bus).get("state") == "online")
    assert "problem" not in _status(bus)
    assert "reason" not in _status(bus)
    bus.ask("one", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"


def test_a_renewal_says_nothing_between_a_reconnect_and_its_subscriptions(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker()
    eventually(lambda: worker.daemon.ready)
    link, presence = worker.daemon.parts.link, worker.daemon.parts.presence

    def unanswered(*_: Any, **__: Any) -> dict[str, str]:
        raise TimeoutError("no SUBACK")

    monkeypatch.setattr(link, "subscribe", unanswered)
    with capture_logs() as lines:
        bus.broker.drop_connection(worker.client_id)
        eventually(lambda: any(line["event"] == "link.greeting_failed" for line in lines))
    told: list[str] = []
    monkeypatch.setattr(link, "publish", lambda topic, *_, **__: told.append(topic))
    worker.daemon._renew()
    presence.become("draining")
    presence.become("online")
    assert "llm/status/w1" not in told, "the will speaks until it is known whether requests arrive"


def test_a_worker_that_may_read_only_a_part_is_online_and_says_what_is_missing(bus: Bus) -> None:
    bus.broker.refuse("llm/control/+", "not in the access list")
    worker = bus.worker()
    problem = _status(bus)["problem"]
    assert "llm/control/+" in problem
    assert "not in the access list" in problem
    assert "llm/request/+" not in problem
    assert worker.daemon.parts.presence.state == "online"


def test_a_second_worker_does_not_start_beside_one_that_may_read_nothing_for_the_moment(bus: Bus) -> None:
    first = bus.worker(status__every_s=1)
    _lose_every_subscription(bus, first)
    eventually(lambda: _status(bus).get("reason") == "not_subscribed")
    second = bus.worker(wait=False, mqtt__worker_id="w2", sessions__path=str(bus.state / "other.db"), status__every_s=1)
    assert second.join() == 3
