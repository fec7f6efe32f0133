"""What jobs are told and how they are ended as time passes, by a clock that the test moves."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.addresses import Address
from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.errors import ShuttingDown
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.requests import RequestPolicy, check_request, read_request
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Published
from llamacpp_mqtt_deploy.worker.deadlines import CHECK_EVERY_S, Deadlines
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.responder import Responder

HEARTBEAT_S = 10.0


class Bench:
    """A registry of one slot, its deadlines, what they publish and what they end."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events: list[dict[str, Any]] = []
        self.ended: list[Job] = []
        self.registry = JobRegistry(
            limits=QueueLimits(queue_size=9, session_queue=9), aging_s=60.0, max_requests_per_minute=60, slots=1
        )
        self.deadlines = Deadlines(
            registry=self.registry, end=self.stopped, heartbeat_s=lambda: HEARTBEAT_S, unavailable_after_s=lambda: 60.0
        )

    def stopped(self, job: Job) -> None:
        """Stands for `Completion.stopped`."""
        self.ended.append(job)

    def publish(self, topic: str, payload: bytes, **_: Any) -> Published:
        self.events.append(json.loads(payload))
        return "queued"

    def acknowledge(self, delivery: Delivery) -> None:
        raise NotImplementedError

    def after(self, seconds: float) -> list[dict[str, Any]]:
        """Let time pass and check; returns the events that this brought."""
        self.now += seconds
        before = len(self.events)
        self.deadlines.check()
        return self.events[before:]

    def job(self, name: str, *, limit_s: float = 600.0) -> Job:
        raw = read_request(b'{"prompt": "x"}', policy=RequestPolicy())
        assert raw is not None
        writer = EventWriter(request_id=name, session_id=name, max_bytes=4096)
        key = EntryKey("default", name, name)
        job = Job(
            key=key,
            entry=Entry(key=key, topic="t", payload=b"", digest="d"),
            address=Address(kind="request", route="default", session=name, reply_topic="r", first_level=name),
            request=check_request(raw, policy=RequestPolicy()),
            responder=Responder(
                outbox=self, topic="r", writer=writer, correlation=None, silent=False, wake=lambda _s, _call: None
            ),
            session=("default", name),
            received_at=self.now,
            deadline=self.now + limit_s,
        )
        self.registry.enter(job)
        self.registry.commit([job])
        return job

    def waiting(self, name: str, *, position: int, limit_s: float = 600.0) -> Job:
        """A job in the queue that has been told its place."""
        job = self.job(name, limit_s=limit_s)
        job.position = position
        job.responder.queued(position=position, reason="waiting")
        return job

    def running(self, name: str, *, limit_s: float = 600.0) -> Job:
        job = self.job(name, limit_s=limit_s)
        assert self.registry.take(0.0) is job
        job.responder.start({"worker": "w", "created": 1})
        return job


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench()
    monkeypatch.setattr(time, "monotonic", lambda: bench.now)
    return bench


def test_a_new_place_in_the_queue_is_told_a_second_after_the_last_and_not_before(bench: Bench) -> None:
    bench.running("running")
    first, second = bench.waiting("first", position=1), bench.waiting("second", position=2)
    bench.waiting("third", position=3)
    assert bench.after(0.0) == []  # all places are as they were told
    bench.registry.leave(first)
    assert bench.after(0.99) == []
    told = bench.after(0.01)
    assert [(event["request_id"], event["position"]) for event in told] == [("second", 1), ("third", 2)]
    bench.registry.leave(second)
    assert bench.after(0.99) == []
    assert [(event["request_id"], event["position"]) for event in bench.after(0.01)] == [("third", 1)]


def test_a_place_that_did_not_change_is_not_told_again(bench: Bench) -> None:
    bench.running("running")
    bench.waiting("waiting", position=1)
    assert [bench.after(1.0) for _ in range(3)] == [[], [], []]


def test_what_the_queue_waits_for_is_told_when_it_changes(bench: Bench) -> None:
    bench.running("running")
    bench.waiting("waiting", position=1)
    bench.registry.wait_reason = "engine_restarting"
    (told,) = bench.after(1.0)
    assert (told["type"], told["request_id"], told["reason"]) == ("queued", "waiting", "engine_restarting")
    assert bench.after(1.0) == []


def test_a_request_without_any_event_is_told_its_place_after_half_a_second(bench: Bench) -> None:
    bench.running("running")
    bench.after(0.0)
    waiting = bench.job("waiting")
    waiting.position = 1
    assert bench.after(0.49) == []
    (told,) = bench.after(0.01)
    assert (told["type"], told["request_id"], told["position"]) == ("queued", "waiting", 1)
    assert bench.after(0.25) == []


def test_a_ping_follows_a_silence_of_one_heartbeat_and_says_what_the_worker_does(bench: Bench) -> None:
    running = bench.running("running")
    bench.waiting("waiting", position=1)
    assert bench.after(HEARTBEAT_S - 0.01) == []
    states = {event["request_id"]: (event["type"], event["state"]) for event in bench.after(0.01)}
    assert states == {"running": ("ping", "prompt"), "waiting": ("ping", "queued")}
    assert bench.after(HEARTBEAT_S - 0.01) == []
    running.prompt_done = True
    assert {event["request_id"]: event["state"] for event in bench.after(0.01)}["running"] == "generating"


def test_a_queued_request_ends_at_its_time_limit_and_not_before(bench: Bench) -> None:
    bench.running("running")
    waiting = bench.waiting("waiting", position=1, limit_s=5.0)
    bench.after(4.99)
    assert (bench.ended, waiting.stop.is_set()) == ([], False)
    bench.after(0.01)
    assert (bench.ended, waiting.stop.reason) == ([waiting], "timeout")


def test_all_wait_together_for_an_engine_that_cannot_be_reached(bench: Bench) -> None:
    running = bench.running("running")
    running.wait_reason = "engine_restarting"
    early = bench.waiting("early", position=1)
    bench.registry.engine_away_since = bench.now
    bench.after(30.0)
    late = bench.waiting("late", position=2)
    bench.after(29.99)
    assert (bench.ended, running.stop.is_set()) == ([], False)
    bench.after(0.01)
    assert (bench.ended, running.stop.reason) == ([early], "engine_away")
    bench.registry.leave(early)
    bench.registry.release_slot(running)
    bench.registry.leave(running)
    bench.after(29.99)
    assert not late.stop.is_set(), "each may wait as long as the settings say, from when it came"
    bench.after(0.01)
    assert late.stop.reason == "engine_away"


def test_an_engine_that_comes_back_ends_the_wait_of_all(bench: Bench) -> None:
    waiting = bench.waiting("waiting", position=1)
    bench.registry.engine_away_since = bench.now
    bench.after(59.0)
    bench.registry.engine_away_since = None
    bench.after(60.0)
    assert not waiting.stop.is_set()


def test_a_server_too_busy_to_be_asked_is_not_away_while_an_answer_comes(bench: Bench) -> None:
    running, waiting = bench.running("running"), bench.waiting("waiting", position=1)
    running.opened = True
    bench.registry.engine_away_since = bench.now
    for _ in range(10):
        bench.after(30.0)
    assert (waiting.stop.is_set(), running.stop.is_set()) == (False, False)
    bench.registry.release_slot(running)
    bench.registry.leave(running)
    bench.after(59.99)
    assert not waiting.stop.is_set()
    bench.after(0.01)
    assert waiting.stop.reason == "engine_away"


def test_a_running_request_over_its_limit_is_stopped_and_ended_from_outside_when_its_engine_is_stuck(
    bench: Bench,
) -> None:
    running = bench.running("running", limit_s=5.0)
    bench.after(5.0)
    assert (bench.ended, running.stop.reason) == ([], "timeout")
    bench.after(5.0)
    assert bench.ended == []  # its own thread has until here to end it
    bench.after(0.25)
    assert bench.ended == [running]


@pytest.mark.parametrize("phase", ["ending", "ended"])
def test_a_request_that_is_ending_is_not_ended_a_second_time(bench: Bench, phase: Any) -> None:
    running = bench.running("running", limit_s=5.0)
    running.phase = phase
    bench.after(60.0)
    assert bench.ended == []


def test_an_answer_that_is_being_stored_is_not_taken_for_one_that_is_still_paced(bench: Bench) -> None:
    whole, paced = bench.running("whole"), bench.job("paced")
    bench.registry.release_slot(whole)
    taken = bench.registry.take(0.0)
    assert taken is paced
    bench.registry.release_slot(paced, pacing=True)
    assert (whole.phase, paced.phase) == ("ending", "pacing")


def test_a_request_that_comes_right_after_a_check_gets_its_first_event_within_a_second(bench: Bench) -> None:
    bench.running("running")
    bench.after(0.0)
    bench.job("late").position = 1
    told, waited_s = bench.after(CHECK_EVERY_S), CHECK_EVERY_S
    while not told:
        told = bench.after(CHECK_EVERY_S)
        waited_s += CHECK_EVERY_S
    assert (told[0]["type"], told[0]["request_id"]) == ("queued", "late")
    assert waited_s < 1.0


def test_a_registry_that_is_closed_gives_out_no_job_and_takes_none(bench: Bench) -> None:
    bench.job("waiting")
    bench.registry.close()
    assert bench.registry.take(0.0) is None
    with pytest.raises(ShuttingDown):
        bench.job("late")


# --- a long queue ------------------------------------------------------------------------------------------------------


def _long_queue(bench: Bench, number: int) -> list[Job]:
    bench.registry.set_limits(
        limits=QueueLimits(queue_size=10_000, session_queue=9, share=1.0), aging_s=1e9, max_requests_per_minute=0
    )
    bench.running("running")
    return [bench.job(f"w{n}") for n in range(number)]


def test_newcomers_of_a_long_queue_hear_their_place_oldest_first_some_at_each_look(bench: Bench) -> None:
    _long_queue(bench, 600)
    assert bench.registry.positions_at_once(1) is None
    assert bench.after(0.49) == []
    told: list[dict[str, Any]] = []
    for count in (250, 250, 100, 0):
        news = bench.after(CHECK_EVERY_S)
        assert len(news) == count
        told += news
    assert [(event["type"], event["request_id"], event["position"]) for event in told] == [
        ("queued", f"w{n}", n + 1) for n in range(600)
    ]


def test_of_a_long_queue_a_few_at_a_time_hear_that_their_place_has_changed_and_nobody_is_passed_over(
    bench: Bench,
) -> None:
    jobs = _long_queue(bench, 300)
    while any(job.responder.last_event_at is None for job in jobs):
        bench.after(CHECK_EVERY_S)
    last: dict[str, list[int]] = {}
    for n in range(8):  # one of them gets its turn each second: all others move up
        bench.registry.leave(jobs[n])
        for _ in range(4):
            news = bench.after(CHECK_EVERY_S)
            assert len(news) <= 100
            for event in news:
                last.setdefault(event["request_id"], []).append(event["position"])
    assert set(last) == {f"w{n}" for n in range(1, 300)}
    assert all(places == sorted(places, reverse=True) for places in last.values())
    assert last["w299"][-1] in (292, 293), "no place is told that is older than a second"


def test_a_request_that_wants_no_events_keeps_no_place_among_the_newcomers(bench: Bench) -> None:
    jobs = _long_queue(bench, 600)
    for job in jobs[:500]:
        job.responder.silent = True
    news = [event for _ in range(4) for event in bench.after(CHECK_EVERY_S)]
    assert [event["request_id"] for event in news] == [f"w{n}" for n in range(500, 600)]
    bench.registry.all()[1].stop.set("timeout")
    bench.after(CHECK_EVERY_S)
    assert bench.ended == [jobs[0]], "its limits hold all the same"


def test_what_waits_quietly_is_still_ended_and_pinged_in_time(bench: Bench) -> None:
    bench.running("running")
    first, second = bench.waiting("first", position=1, limit_s=25.0), bench.waiting("second", position=2)
    assert bench.after(0.0) == []
    assert first.quiet_until == bench.now + HEARTBEAT_S
    assert [event["type"] for event in bench.after(HEARTBEAT_S - 0.1)] == []
    assert [event["type"] for event in bench.after(0.1)] == ["ping"] * 3
    bench.after(HEARTBEAT_S)
    assert first.quiet_until == first.deadline
    bench.after(5.0)
    assert bench.ended == [first]
    second.stop.set("cancelled")
    bench.after(0.01)
    assert bench.ended[-1] is second
