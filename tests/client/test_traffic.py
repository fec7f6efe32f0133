"""What a client keeps beside its answers: subscriptions in use, cancels that the broker has not heard, what workers said and when."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llamacpp_mqtt_deploy.client.acks import PendingAck
from llamacpp_mqtt_deploy.client.address import BrokerAddress
from llamacpp_mqtt_deploy.client.exceptions import AnswerLost
from llamacpp_mqtt_deploy.client.followed import FollowedAnswer
from llamacpp_mqtt_deploy.client.paho_client import NO_MATCHING_SUBSCRIBERS
from llamacpp_mqtt_deploy.client.retry import RetryRules
from llamacpp_mqtt_deploy.client.traffic import (
    KEPT_FILTERS,
    REPEAT_CANCELS_S,
    UNHEARD_CANCELS_S,
    UNSENT_CANCELS,
    Traffic,
    expiry_of,
)
from llamacpp_mqtt_deploy.client.watch import look_after
from llamacpp_mqtt_deploy.client.workers import StatusBoard


class Line:
    """A connection that the test plays."""

    def __init__(self, _address: BrokerAddress, *, on_ready: Callable[[], None], **_callbacks: Any) -> None:
        self.ready = True
        self.back = on_ready
        self.sent: list[tuple[str, Any]] = []
        self.given_up: list[str] = []
        self.acknowledges = True
        self.code = 0

    def publish(
        self, topic: str, payload: bytes, *, on_ack: Callable[[int, str], None] = lambda *_: None, **_options: Any
    ) -> bool:
        if not self.ready:
            return False
        self.sent.append((topic, json.loads(payload)))
        if self.acknowledges:
            on_ack(self.code, "of the broker")
        return True

    def unsubscribe(self, topic_filter: str) -> None:
        self.given_up.append(topic_filter)


class Held(FollowedAnswer):
    def __init__(self, request_id: str, session: str = "me/s") -> None:
        super().__init__(
            session=session,
            request_id=request_id,
            payload=json.dumps({"request_id": request_id}).encode(),
            rules=RetryRules(),
            lock=threading.Lock(),
        )

    def _notify(self) -> None:
        pass


@pytest.fixture
def traffic() -> Traffic[Any, Held, PendingAck]:
    return Traffic(BrokerAddress(host="broker"), root="llm", connect=Line, place=PendingAck, wake=lambda: None)


def cancels(line: Any) -> list[str]:
    return [message["request_id"] for topic, message in line.sent if topic.startswith("llm/control/")]


def test_a_cancel_that_could_not_be_sent_goes_out_when_the_broker_is_back(traffic: Traffic[Any, Held, Any]) -> None:
    line, answer = traffic.connection, Held("left")
    traffic.add(answer)
    traffic.publish(answer)
    line.ready = False
    assert not traffic.cancel(answer)
    answer.fail(AnswerLost("nobody waits for it"))
    line.ready = True
    line.back()
    assert cancels(line) == ["left"]
    line.back()
    assert cancels(line) == ["left"], "once the broker has it"


def test_a_cancel_without_an_acknowledgement_is_sent_again(traffic: Traffic[Any, Held, Any]) -> None:
    line, answer = traffic.connection, Held("left")
    line.acknowledges = False
    assert traffic.cancel(answer)
    line.acknowledges = True
    line.back()
    line.back()
    assert cancels(line) == ["left", "left"]


def test_a_cancel_that_no_worker_could_hear_is_repeated_until_one_does(
    traffic: Traffic[Any, Held, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.client.traffic.REPEAT_CANCELS_S", 0.0)
    line = traffic.connection
    line.code = NO_MATCHING_SUBSCRIBERS  # the worker is not back at the broker yet
    traffic.cancel(Held("left"))
    look_after(traffic, offline_limit_s=60)
    line.code = 0
    for _ in range(3):
        look_after(traffic, offline_limit_s=60)
    assert cancels(line) == ["left"] * 3


def test_a_cancel_is_not_repeated_for_ever_where_there_is_no_worker(
    traffic: Traffic[Any, Held, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = traffic.connection
    line.code = NO_MATCHING_SUBSCRIBERS
    traffic.cancel(Held("left"))
    now = time.monotonic()
    traffic.repeat_cancels(now)
    traffic.repeat_cancels(now + REPEAT_CANCELS_S / 2)
    assert cancels(line) == ["left"] * 2, "not more often than that"
    traffic.repeat_cancels(now + UNHEARD_CANCELS_S + 1)
    traffic.repeat_cancels(now + UNHEARD_CANCELS_S + 3)
    line.back()
    assert cancels(line) == ["left"] * 2


def test_the_cancel_of_a_request_that_goes_out_again_follows_it(traffic: Traffic[Any, Held, Any]) -> None:
    line, answer = traffic.connection, Held("stopped")
    line.ready = False
    traffic.add(answer)
    traffic.publish(answer)
    traffic.cancel(answer)
    line.ready = True
    line.back()
    look_after(traffic, offline_limit_s=60)
    assert [topic for topic, _ in line.sent] == ["llm/request/me/s", "llm/control/me/s"]


def test_the_same_request_again_is_not_stopped_by_the_cancel_of_the_first(traffic: Traffic[Any, Held, Any]) -> None:
    line = traffic.connection
    line.ready = False
    traffic.cancel(Held("again"))
    traffic.add(Held("again"))
    line.ready = True
    line.back()
    look_after(traffic, offline_limit_s=60)
    assert cancels(line) == []


def test_cancels_that_wait_are_bounded_and_the_latest_stay(traffic: Traffic[Any, Held, Any]) -> None:
    line = traffic.connection
    line.ready = False
    for number in range(UNSENT_CANCELS + 10):
        traffic.cancel(Held(f"r{number}"))
    line.ready = True
    line.back()
    assert cancels(line) == [f"r{number}" for number in range(10, UNSENT_CANCELS + 10)]


def test_who_is_stopped_while_he_subscribes_leaves_nothing_that_is_kept_for_ever(
    traffic: Traffic[Any, Held, Any],
) -> None:
    with pytest.raises(KeyboardInterrupt), traffic.listening("me/stopped"):
        raise KeyboardInterrupt
    for number in range(KEPT_FILTERS):
        with traffic.listening(f"me/s{number}"):
            pass
    assert traffic.connection.given_up == ["llm/reply/me/stopped"]


def test_a_subscription_is_not_given_up_while_somebody_uses_it(traffic: Traffic[Any, Held, Any]) -> None:
    with traffic.listening("me/asking"), traffic.listening("me/asking"):
        for number in range(2 * KEPT_FILTERS):
            with traffic.listening(f"me/s{number}"):
                pass
        assert len(traffic.connection.given_up) == KEPT_FILTERS + 1
        assert "llm/reply/me/asking" not in traffic.connection.given_up
    with traffic.listening("me/another"):
        assert traffic.connection.given_up[-1] == "llm/reply/me/asking"


def test_an_answer_that_cannot_be_followed_is_given_up_and_the_others_are_looked_after(
    traffic: Traffic[Any, Held, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, lost = Held("broken"), Held("lost")
    line = traffic.connection
    for answer in (broken, lost):
        traffic.add(answer)

    def fail(*_: object, **__: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(broken, "decide", fail)
    line.back()
    look_after(traffic, offline_limit_s=60)
    assert isinstance(broken.outcome, AnswerLost)
    assert "a defect" in str(broken.outcome)
    assert [message["request_id"] for _, message in line.sent] == ["lost"]


@pytest.mark.parametrize("timeout_s,expiry_s", [(0.1, 1), (1.5, 2), (2.0**40, 2**32 - 1), (float("inf"), 2**32 - 1)])
def test_every_time_limit_has_an_expiry_that_mqtt_can_hold(timeout_s: float, expiry_s: int) -> None:
    assert expiry_of(timeout_s) == expiry_s


def test_a_board_tells_what_workers_said_themselves_from_what_the_broker_had_kept() -> None:
    board = StatusBoard()
    board.note("kept", b'{"state":"online"}', retain=True)
    board.note("heard", b'{"state":"online"}', retain=True)
    board.note("heard", b'{"state":"online"}', retain=False)
    assert set(board.all()) == {"kept", "heard"}
    assert set(board.heard_at()) == {"heard"}
    board.note("heard", b'{"state":"offline"}', retain=True)
    assert board.heard_at() == {}, "after a reconnect the broker tells what it has kept"
    board.note("heard", b'{"state":"online"}', retain=False)
    board.note("heard", b"", retain=False)
    assert board.heard_at() == {}
