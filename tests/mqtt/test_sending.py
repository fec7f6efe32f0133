"""What becomes of a publish when the MQTT client raises on it: it keeps its place, or it ends; it never vanishes."""

from __future__ import annotations

import struct
import threading
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.outbox_budget import MIB, OutboxBudget
from llamacpp_mqtt_deploy.mqtt.sending import Sending
from llamacpp_mqtt_deploy.mqtt.session import FAULTS, Publish


class Wire:
    """Raises what it is told to on the topic `bad`, and numbers everything else."""

    version = "5"

    def __init__(self, *raises: BaseException) -> None:
        self.raises = list(raises)
        self.sent: list[str] = []

    def publish(self, publish: Publish, **_: Any) -> int:
        if publish.topic == "bad" and self.raises:
            raise self.raises.pop(0)
        self.sent.append(publish.topic)
        return len(self.sent)


def _publish(topic: str, done: dict[str, bool]) -> Publish:
    return Publish(topic, b"x", 1, False, None, None, lambda well: done.__setitem__(topic, well))


def _empty() -> Sending:
    lock = threading.RLock()
    return Sending(lock, threading.Condition(lock), OutboxBudget(most_messages=5000, most_bytes=64 * MIB))


def _sending(done: dict[str, bool]) -> Sending:
    sending = _empty()
    for topic in ("first", "bad", "last"):
        sending.outgoing.waiting.append(_publish(topic, done))
    sending.outgoing.connected(window=10, now=0.0)
    return sending


@pytest.mark.parametrize("error", [struct.error("too long"), RuntimeError("a defect"), MemoryError(), SystemExit()])
def test_a_publish_on_which_the_client_raises_keeps_its_place(error: BaseException) -> None:
    done: dict[str, bool] = {}
    sending, wire = _sending(done), Wire(error)
    with pytest.raises(type(error)):
        sending.pump(wire)  # type: ignore[arg-type]
    assert wire.sent == ["first"]
    assert len(sending.outgoing) == 3
    # The link drops the client and connects anew, maybe in another thread.
    sending.outgoing.requeue()
    sending.outgoing.connected(window=10, now=0.0)
    sending.pump(wire)  # type: ignore[arg-type]
    assert wire.sent == ["first", "first", "bad", "last"]
    assert done == {}


def test_a_publish_on_which_the_client_raises_each_time_ends_alone() -> None:
    done: dict[str, bool] = {}
    sending, wire = _sending(done), Wire(*[struct.error("too long")] * 100)
    for _ in range(FAULTS):
        assert done == {}
        with pytest.raises(struct.error):
            sending.pump(wire)  # type: ignore[arg-type]
        sending.outgoing.requeue()
    assert done == {"bad": False}
    wire.sent.clear()
    sending.pump(wire)  # type: ignore[arg-type]
    assert wire.sent == ["first", "last"]
    assert sending.poisoned == 1


def test_a_publish_that_is_unfit_for_the_client_ends_at_once_and_costs_no_connection() -> None:
    done: dict[str, bool] = {}
    sending, wire = _sending(done), Wire(ValueError("Invalid topic."))
    sending.pump(wire)  # type: ignore[arg-type]
    assert wire.sent == ["first", "last"]
    assert done == {"bad": False}
    assert len(sending.outgoing) == 2


def test_pubacks_are_overdue_when_none_comes_and_not_while_a_slow_line_goes_on_acknowledging() -> None:
    sending = _empty()
    assert not sending.overdue(1000.0, timeout_s=1.0), "nothing is in flight"
    for mid in range(20):
        publish = Publish("events/a", b"x", 1, False, None, None, None, sent_at=100.0)
        sending.outgoing.flying[mid] = publish
    for now in (100.9, 101.8, 102.7):
        assert not sending.overdue(now, timeout_s=1.0)
        sending.last_puback_at = now
    assert sending.overdue(103.8, timeout_s=1.0)
    sending.last_puback_at = 110.5
    assert sending.overdue(110.6, timeout_s=1.0), "others come, but the oldest was passed over"
    sending.connected_at = 110.6
    assert not sending.overdue(111.5, timeout_s=1.0), "a new connection begins anew"
