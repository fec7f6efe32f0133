"""What whoever is refused is told, and what the operator can count of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs
from typing_extensions import override

from llamacpp_mqtt_deploy.core.addresses import Address, TopicMap
from llamacpp_mqtt_deploy.core.errors import BadRequest, Busy
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Store, StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.loopback import LoopbackLink
from llamacpp_mqtt_deploy.testing.loopback_broker import LoopbackBroker
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.message_log import MessageLog
from llamacpp_mqtt_deploy.worker.refusals import Received, Refusals, first_level_of
from tests.support.lone_job import lone_job, registry

ADA = Address(kind="request", route="default", session="ada/1", reply_topic="llm/reply/ada/1", first_level="ada")


class Told(Answers):
    def __init__(self) -> None:
        super().__init__(LoopbackLink(LoopbackBroker()), max_event_bytes=lambda: 1024)
        self.events: list[dict[str, Any]] = []

    @override
    def publish(self, topic: str, payload: bytes, *, correlation: bytes | None, content_type: str = "") -> None:
        self.events.append(json.loads(payload) | {"_topic": topic, "_correlation": correlation})


class Bench:
    """Refusals over a journal that knows the request `ended`."""

    def __init__(self, store: Store | None = None) -> None:
        self.told, self.counters, self.registry = Told(), Counters(), registry()
        if store is None:
            store = SqliteStore(None)
            store.open()
            key = EntryKey("default", "ada/1", "ended")
            store.accept([Entry(key=key, topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/ada/1")])
            store.finish(key, b"{}", now=1.0)
        self.refusals = Refusals(
            answers=self.told,
            store=store,
            registry=self.registry,
            counters=self.counters,
            max_event_bytes=lambda: 4096,
            message_log=MessageLog(),
        )

    def errors(self) -> object:
        return self.counters.snapshot(period_s=1.0)["errors"]


def _received(topic: str = "llm/request/ada/1", address: Address | None = ADA) -> Received:
    return Received(Delivery(topic=topic, payload=b"{", qos=1), address, b"c")


def test_a_refusal_says_what_is_wrong_and_whether_to_come_back_and_is_counted() -> None:
    bench = Bench()
    bench.refusals.refuse(_received(), ADA, "r1", Busy("the queue is full", retry_after_s=3.0))
    (event,) = bench.told.events
    assert (event["type"], event["code"], event["retryable"], event["retry_after_s"]) == ("error", "busy", True, 3.0)
    assert (event["request_id"], event["session_id"], event["final"]) == ("r1", "ada/1", True)
    assert (event["_topic"], event["_correlation"]) == ("llm/reply/ada/1", b"c")
    assert bench.errors() == {"busy": 1}


def test_refusals_of_requests_without_an_id_can_be_told_apart() -> None:
    bench = Bench()
    for _ in range(2):
        bench.refusals.refuse(_received(), ADA, None, BadRequest("no"))
    first, second = (event["request_id"] for event in bench.told.events)
    assert first != second
    assert len(first) == 32


def test_a_refusal_that_nobody_can_hear_is_counted_all_the_same() -> None:
    bench = Bench()
    nowhere = Address(kind="request", route="default", session=None, reply_topic=None, first_level="route:default")
    bench.refusals.refuse(_received(), nowhere, "r1", BadRequest("no"))
    assert bench.told.events == []
    assert bench.errors() == {"bad_request": 1}


@pytest.mark.parametrize("known", ["ended", "runs"])
def test_a_broken_copy_of_a_known_request_is_rejected_and_ends_no_stream(known: str) -> None:
    bench = Bench()
    bench.registry.enter(lone_job("runs", session="ada/1"))
    bench.refusals.refuse(_received(), ADA, known, BadRequest("no"))
    (event,) = bench.told.events
    assert (event["type"], event["code"], event["request_id"]) == ("rejected", "duplicate_request", known)
    assert "final" not in event
    assert bench.errors() == {"duplicate_request": 1}, "one message counts once, under the code that its client got"


def test_the_line_of_a_broken_copy_says_what_is_wrong_with_it() -> None:
    bench = Bench()
    with capture_logs() as lines:
        bench.refusals.refuse(_received(), ADA, "ended", BadRequest("no prompt"))
    (line,) = lines
    assert (line["event"], line["code"], line["message"]) == ("request.rejected", "duplicate_request", "no prompt")


def test_a_broken_request_is_told_so_also_when_the_journal_cannot_be_read() -> None:
    class Unreadable(SqliteStore):
        @override
        def find(self, key: EntryKey) -> Entry | None:
            raise StoreError("disk I/O error")

    bench = Bench(Unreadable(None))
    bench.refusals.refuse(_received(), ADA, "r1", BadRequest("no"))
    assert [event["type"] for event in bench.told.events] == ["error"]


def test_a_response_topic_that_is_forbidden_is_answered_with_the_one_that_is_not() -> None:
    bench = Bench()
    bench.refusals.reject(_received(), ADA, "r1", "reply_topic_forbidden")
    (event,) = bench.told.events
    assert (event["code"], event["_topic"], event["_correlation"]) == (
        "reply_topic_forbidden",
        "llm/reply/ada/1",
        b"c",
    )
    assert "llm/reply/ada/1" in event["message"]
    assert bench.errors() == {"reply_topic_forbidden": 1}


def test_a_message_on_no_topic_of_ours_is_put_down_to_the_level_where_a_session_would_begin() -> None:
    assert _received("llm/request/bob/too/deep", None).first_level == "bob"
    assert _received("llm/request/" + "u" * 100, None).first_level == "u" * 64
    assert _received("llm", None).first_level == ""
    assert _received("game/input", ADA).first_level == "ada"


def test_a_refusal_and_a_rejection_leave_a_line_each_for_the_operator() -> None:
    bench = Bench()
    with capture_logs() as lines:
        bench.refusals.refuse(_received(), ADA, "r1", BadRequest("no prompt"))
        bench.refusals.reject(_received(), ADA, "r1", "duplicate_request")
    refused, rejected = lines
    assert (refused["event"], refused["code"], refused["message"]) == ("request.refused", "bad_request", "no prompt")
    assert (refused["topic"], refused["bytes"]) == ("llm/request/ada/1", 1)
    assert (rejected["event"], rejected["code"]) == ("request.rejected", "duplicate_request")
    assert rejected["topic"] == "llm/request/ada/1"


def test_whose_message_it_is_can_be_told_from_its_topic_alone() -> None:
    topics = TopicMap(root="llm", worker_id="w1")
    for topic, whose in (("llm/request/ada/1", "ada"), ("llm/request/ada/too/deep", "ada"), ("llm", "")):
        assert first_level_of(topics.address(topic), topic) == whose


def test_the_log_shows_no_more_of_a_topic_than_a_line_can_hold() -> None:
    topic = "llm/request/" + "u" * 300
    assert _received(topic, None).shown_topic() == topic[:200]
