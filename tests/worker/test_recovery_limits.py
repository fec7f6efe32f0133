"""What an earlier life left in the journal, entry by entry, by clocks that stand still."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.chunk_record import packed
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Published
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.journaled import JournaledRequests
from llamacpp_mqtt_deploy.worker.policies import Policies, topic_map
from llamacpp_mqtt_deploy.worker.recovery import Recovered, Recovery
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery

WALL = 1_700_000_000.0
NOW = 5000.0
MAX_STARTS = 2
QUEUE_SIZE = 9
TIMEOUT_S = 200.0


class NextLife:
    """A journal with what was left behind, and the recovery that meets it."""

    def __init__(self, path: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.loop = IoLoop()
        self.loop.start()
        self.store = SqliteStore(path / "state.db")
        self.store.open()
        settings = load(
            None,
            {"limits.max_starts": str(MAX_STARTS), "generation.timeout_s": str(TIMEOUT_S)},
            environ={},
        ).settings
        policies = Policies.of(settings)
        self.registry = JobRegistry(
            limits=QueueLimits(queue_size=QUEUE_SIZE, session_queue=9),
            aging_s=60.0,
            max_requests_per_minute=60,
            slots=1,
        )
        self.recovery = Recovery(
            store=self.store,
            registry=self.registry,
            requests=JournaledRequests(
                store=self.store,
                maker=JobMaker(
                    outbox=self,
                    loop=self.loop,
                    policies=lambda: policies,
                    max_event_bytes=lambda: 4096,
                    active_streams=lambda: 1,
                ),
                topics=topic_map(settings),
                policies=lambda: policies,
                redelivery=Redelivery(outbox=self, store=self.store, max_event_bytes=lambda: 131072),
            ),
            max_starts=lambda: MAX_STARTS,
        )

    def publish(self, topic: str, payload: bytes, **_: Any) -> Published:
        self.events.append(json.loads(payload) | {"_topic": topic})
        return "queued"

    def acknowledge(self, delivery: Delivery) -> None:
        raise NotImplementedError

    def left_behind(self, name: str, *, starts: int = 0, topic: str = "llm/request/demo", **fields: Any) -> EntryKey:
        """An accepted request, 5 s old, that was started so many times."""
        key = EntryKey("default", "demo", name)
        given: dict[str, Any] = {"payload": b'{"prompt": "hello"}', "accepted_at": WALL - 5.0} | fields
        self.store.accept([Entry(key=key, topic=topic, digest="d", reply_topic="llm/reply/demo", **given)])
        for _ in range(starts):
            self.store.mark_started(key)
        return key

    def told(self, name: str) -> list[tuple[str, Any]]:
        """Types of the events of one request, with the code of an error or the place of a queued one."""
        return [
            (event["type"], event.get("code") or event.get("position"))
            for event in self.events
            if event["request_id"] == name
        ]

    def job(self) -> Job:
        (job,) = self.registry.all()
        return job


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NextLife]:
    life = NextLife(tmp_path)
    monkeypatch.setattr(time, "time", lambda: WALL)
    monkeypatch.setattr(time, "monotonic", lambda: NOW)
    yield life
    monkeypatch.undo()
    life.store.close()
    life.loop.close()


def test_a_request_that_was_started_as_often_as_allowed_ends_without_another_start(life: NextLife) -> None:
    life.left_behind("once more", starts=MAX_STARTS - 1)
    life.left_behind("too often", starts=MAX_STARTS)
    assert life.recovery.run() == Recovered(run_again=1, ended=1)
    assert life.told("too often") == [("error", "engine_lost")]
    assert life.told("once more") == [("queued", 1)]
    assert life.job().starts == MAX_STARTS - 1


def test_requests_that_wait_are_queued_again_in_their_order_and_told_their_places(life: NextLife) -> None:
    for name in ("first", "second", "third"):
        life.left_behind(name)
    assert life.recovery.run() == Recovered(run_again=3)
    # The first will go at once, so the second is the next one.
    places = [("first", 1), ("second", 1), ("third", 2)]
    assert [life.told(name) for name, _ in places] == [[("queued", place)] for _, place in places]
    assert [job.position for job in life.registry.all()] == [place for _, place in places]
    taken = life.registry.take(0.0)
    assert taken is not None
    assert taken.key.request_id == "first"


def test_the_time_before_the_restart_counts_against_the_time_limit(life: NextLife) -> None:
    life.left_behind("waits", expires_at=WALL + 30.0)
    life.recovery.run()
    job = life.job()
    assert (job.received_at, job.deadline) == (NOW - 5.0, NOW + 30.0)


def test_a_request_without_an_end_of_its_time_gets_the_limit_of_the_settings(life: NextLife) -> None:
    life.left_behind("waits", accepted_at=WALL + 60.0)  # by a clock that was ahead
    life.recovery.run()
    job = life.job()
    assert (job.received_at, job.deadline) == (NOW, NOW + TIMEOUT_S)


@pytest.mark.parametrize("late_s", [0.0, 1.0])
def test_a_request_whose_time_passed_while_the_worker_was_down_ends_in_timeout(life: NextLife, late_s: float) -> None:
    key = life.left_behind("late", expires_at=WALL - late_s)
    assert life.recovery.run() == Recovered(ended=1)
    assert life.told("late") == [("error", "timeout")]
    assert len(life.registry) == 0
    stored = life.store.find(key)
    assert stored is not None
    assert (stored.state, stored.ended_at) == ("ended", WALL)


def test_an_answer_that_was_begun_ends_in_interrupted_with_the_clients_metadata(life: NextLife) -> None:
    plain = life.left_behind("plain", payload=b"only text")
    tagged = life.left_behind("tagged", payload=b'{"prompt": "hello", "metadata": {"k": 1}}')
    life.store.mark_streaming(plain)
    life.store.mark_streaming(tagged)
    assert life.recovery.run() == Recovered(ended=2)
    assert [(event["code"], event["retryable"], event.get("metadata")) for event in life.events] == [
        ("interrupted", True, None),
        ("interrupted", True, {"k": 1}),
    ]
    assert life.store.unfinished() == []


def test_a_request_on_a_topic_that_is_served_no_more_ends_in_interrupted(life: NextLife) -> None:
    life.left_behind("elsewhere", topic="other/request/demo")
    assert life.recovery.run() == Recovered(ended=1)
    assert life.told("elsewhere") == [("error", "interrupted")]


def test_an_end_that_no_broker_has_taken_is_published_again_as_it_was(life: NextLife) -> None:
    key = life.left_behind("r1")
    life.store.finish(key, b'{"type": "done", "request_id": "r1", "seq": 4}', now=WALL - 1.0)
    assert life.recovery.run() == Recovered(delivered_again=1)
    assert life.events == [{"type": "done", "request_id": "r1", "seq": 4, "_topic": "llm/reply/demo"}]


def test_an_empty_journal_leaves_nothing_to_do(life: NextLife) -> None:
    assert (life.recovery.run(), life.events) == (Recovered(), [])


def test_half_a_second_before_its_time_limit_a_request_is_still_run(life: NextLife) -> None:
    life.left_behind("just in time", expires_at=WALL + 0.5)
    assert life.recovery.run() == Recovered(run_again=1)
    assert life.job().deadline == NOW + 0.5


def test_more_requests_than_the_queue_holds_are_all_run_after_a_restart(life: NextLife) -> None:
    for number in range(QUEUE_SIZE + 3):
        life.left_behind(f"r{number}")
    assert life.recovery.run() == Recovered(run_again=QUEUE_SIZE + 3)


def test_a_payload_in_which_no_request_stands_any_more_ends_in_interrupted(life: NextLife) -> None:
    life.left_behind("blank", payload=b"  ")
    assert life.recovery.run() == Recovered(ended=1)
    assert life.told("blank") == [("error", "interrupted")]


def test_an_entry_that_the_worker_failed_on_is_told_again_until_a_broker_has_taken_its_end(
    life: NextLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    key = life.left_behind("bad")
    monkeypatch.setattr(JobMaker, "make", broken)
    assert life.recovery.run() == Recovered(ended=1)
    assert life.told("bad") == [("error", "internal")]
    assert [entry.key for entry in life.store.undelivered()] == [key]


def test_the_log_says_what_an_earlier_life_left_and_nothing_of_an_empty_journal(life: NextLife) -> None:
    with capture_logs() as said:
        life.recovery.run()
    assert said == []
    life.left_behind("r1")
    with capture_logs() as said:
        life.recovery.run()
    (line,) = [each for each in said if each["event"] == "journal.recovered"]
    assert (line["run_again"], line["ended"], line["delivered_again"]) == (1, 0, 0)


def test_an_end_without_its_text_is_published_again_behind_the_chunks_that_told_it(life: NextLife) -> None:
    key = life.left_behind("r1")
    end = b'{"type": "done", "request_id": "r1", "seq": 2, "content_omitted": true}'
    life.store.finish(key, end, now=WALL - 1.0, chunks=packed([("content", "one "), ("content", "two")]))
    assert life.recovery.run() == Recovered(delivered_again=1)
    assert [(event["seq"], event.get("content")) for event in life.events] == [(0, "one "), (1, "two"), (2, None)]
