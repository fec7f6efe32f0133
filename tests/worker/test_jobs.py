"""The jobs of a worker between their acceptance and their end: slots, sessions, ends, and the way to a stop."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.errors import Busy, RateLimited, SessionBusy, ShuttingDown
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from tests.support.lone_job import lone_job, registry
from tests.support.waiting import eventually


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def _waiting(jobs: JobRegistry, name: str, **more: Any) -> Job:
    given: dict[str, Any] = {"session": name, "received_at": time.monotonic()} | more
    job = lone_job(name, **given)
    jobs.enter(job)
    jobs.commit([job])
    return job


def _running(jobs: JobRegistry, name: str, **more: Any) -> Job:
    job = _waiting(jobs, name, **more)
    assert jobs.take(0.0) is job
    return job


# --- entering ----------------------------------------------------------------------------------------------------------


def test_a_request_is_not_taken_before_it_is_let_go() -> None:
    jobs = registry()
    first, second = lone_job("a", session="a"), lone_job("b", session="b")
    jobs.enter(first)
    jobs.enter(second)
    assert jobs.take(0.0) is None
    jobs.commit([second])
    assert jobs.take(0.0) is second
    assert jobs.take(0.0) is None


@pytest.mark.parametrize("how", ["drain", "pause", "close"])
def test_a_worker_that_stops_takes_nothing_new_and_what_it_had_accepted_all_the_same(how: str) -> None:
    jobs = registry()
    getattr(jobs, how)()
    with pytest.raises(ShuttingDown):
        jobs.enter(lone_job("new"))
    assert jobs.enter(lone_job("recovered"), recovered=True) == []
    assert [job.key.request_id for job in jobs.all()] == ["recovered"]
    assert len(jobs) == 1


def test_a_recovered_request_costs_its_client_nothing_of_his_rate(clock: Clock) -> None:
    jobs = registry(max_requests_per_minute=1)
    for number in range(3):
        jobs.enter(lone_job(f"r{number}", session=f"ada/{number}", received_at=clock.now), recovered=True)
    jobs.enter(lone_job("new", session="ada/9", received_at=clock.now))
    with pytest.raises(RateLimited):
        jobs.enter(lone_job("newer", session="ada/8", received_at=clock.now))


def test_new_limits_hold_for_whoever_comes_next(clock: Clock) -> None:
    jobs = registry(queue_size=1, max_requests_per_minute=1)
    jobs.set_limits(limits=QueueLimits(queue_size=9, session_queue=1), aging_s=5.0, max_requests_per_minute=3)
    for number in range(2):
        jobs.enter(lone_job(f"r{number}", session="ada", received_at=clock.now))
    with pytest.raises(SessionBusy):
        jobs.enter(lone_job("r2", session="ada", received_at=clock.now))
    jobs.enter(lone_job("r3", session="ada/3", received_at=clock.now))
    with pytest.raises(RateLimited):
        jobs.enter(lone_job("r4", session="ada/4", received_at=clock.now))
    batch = _waiting(jobs, "batch", session="bob", priority="batch")
    clock.now += 5.0
    _waiting(jobs, "late", session="cid")
    assert jobs.take(0.0) is batch, "it has moved up one lane"


def test_what_a_new_request_waits_for_is_what_all_wait_for() -> None:
    jobs = registry()
    jobs.wait_reason = "loading"
    job = lone_job("r1")
    jobs.enter(job)
    assert job.wait_reason == "loading"


@pytest.mark.parametrize(
    "ran_s, slots, retry_after_s", [(None, 1, 10.0), (None, 2, 5.0), (0.0, 1, 1.0), (10_000.0, 1, 120.0)]
)
def test_when_to_come_back_follows_from_how_long_requests_run(
    clock: Clock, ran_s: float | None, slots: int, retry_after_s: float
) -> None:
    """One waits already, so that it takes two rounds; where nothing ran yet, a round is taken for 5 s."""
    jobs = registry(slots=slots, queue_size=1)
    for number in range(0 if ran_s is None else 50):
        job = _running(jobs, f"before{number}")
        clock.now += ran_s or 0.0
        jobs.release_slot(job)
        jobs.leave(job)
    for number in range(slots):
        _running(jobs, f"runs{number}")
    _waiting(jobs, "waits")
    with pytest.raises(Busy) as told:
        jobs.enter(lone_job("late", session="late", received_at=clock.now))
    assert told.value.details["retry_after_s"] == retry_after_s


def test_one_long_run_moves_the_mean_by_a_fifth(clock: Clock) -> None:
    jobs = registry(queue_size=1)
    job = _running(jobs, "before")
    clock.now += 15.0
    jobs.release_slot(job)
    jobs.leave(job)
    _running(jobs, "runs")
    _waiting(jobs, "waits")
    with pytest.raises(Busy) as told:
        jobs.enter(lone_job("late", session="late", received_at=clock.now))
    assert told.value.details["retry_after_s"] == 14.0  # (5 + (15 - 5) / 5) * 2


# --- running -----------------------------------------------------------------------------------------------------------


def test_as_many_run_as_there_are_slots_and_a_slot_let_go_twice_is_free_once(clock: Clock) -> None:
    jobs = registry(slots=1)
    first = _running(jobs, "a")
    assert (first.phase, first.started_at) == ("running", 1000.0)
    second, third = _waiting(jobs, "b"), _waiting(jobs, "c")
    assert jobs.take(0.0) is None
    jobs.release_slot(first, pacing=True)
    assert first.phase == "pacing"
    assert jobs.take(0.0) is second
    jobs.release_slot(first)
    assert first.phase == "pacing", "its slot is another one's by now"
    assert jobs.take(0.0) is None
    jobs.release_slot(second)
    assert second.phase == "ending"
    assert jobs.take(0.0) is third


def test_the_number_of_slots_can_change_and_is_never_none(clock: Clock) -> None:
    jobs = registry(slots=1)
    _running(jobs, "a")
    second, third = _waiting(jobs, "b"), _waiting(jobs, "c")
    jobs.set_slots(2)
    assert jobs.take(0.0) is second
    jobs.set_slots(0)
    assert jobs.load().slots == 1
    assert jobs.take(0.0) is None
    assert jobs.load().busy == jobs.running() == 2
    for job in jobs.all_held_slots():
        jobs.release_slot(job)
    assert jobs.take(0.0) is third


@pytest.mark.parametrize("how", ["commit", "set_slots", "release_slot", "leave", "free_session"])
def test_a_thread_that_waits_is_woken_by_whatever_gives_it_a_job(how: str) -> None:
    jobs = registry(slots=2 if how in ("leave", "free_session") else 1)
    first = lone_job("a", session="s")
    jobs.enter(first)
    jobs.commit([first])
    assert jobs.take(0.0) is first
    second = lone_job("b", session="s" if how in ("leave", "free_session") else "t")
    jobs.enter(second)
    if how == "free_session":
        jobs.hold_session(("default", "s"))
        jobs.release_slot(first)
        jobs.leave(first)
    if how == "commit":
        jobs.release_slot(first)
        jobs.leave(first)
    else:
        jobs.commit([second])
    taken: list[Job | None] = []
    taker = threading.Thread(target=lambda: taken.append(jobs.take(60.0)), daemon=True)
    taker.start()
    eventually(lambda: len(jobs._takers) == 1)
    match how:
        case "commit":
            jobs.commit([second])
        case "set_slots":
            jobs.set_slots(2)
        case "release_slot":
            jobs.release_slot(first)
        case "leave":
            jobs.leave(first)
        case _:
            jobs.free_session(("default", "s"))
    taker.join(10)
    assert taken == [second]


def test_threads_that_wait_come_back_when_the_worker_closes() -> None:
    jobs = registry()
    taken: list[Job | None] = []
    takers = [threading.Thread(target=lambda: taken.append(jobs.take(60.0)), daemon=True) for _ in range(2)]
    for taker in takers:
        taker.start()
    eventually(lambda: len(jobs._takers) == 2)
    jobs.close()
    for taker in takers:
        taker.join(10)
    assert taken == [None, None]
    began = time.monotonic()
    assert jobs.take(60.0) is None
    assert time.monotonic() - began < 10


def test_no_more_threads_are_woken_than_find_something_to_do() -> None:
    jobs = registry(slots=2)
    real = jobs._takers.wake
    counts: list[int] = []

    def counted(count: int) -> None:
        counts.append(count)
        real(count)

    jobs._takers.wake = counted  # type: ignore[method-assign]
    three = [lone_job(name, session=name) for name in ("a", "b", "c")]
    for job in three:
        jobs.enter(job)
    jobs.commit(three)
    assert counts == [2], "two slots are free"
    first = jobs.take(0.0)
    assert first is not None
    jobs.take(0.0)
    counts.clear()
    jobs.release_slot(first)
    jobs.leave(first)
    assert counts[0] == 1


def test_a_request_must_wait_when_others_go_first_or_its_session_is_busy() -> None:
    jobs = registry(slots=1)
    first, second = lone_job("a", session="a"), lone_job("b", session="b")
    jobs.enter(first)
    jobs.enter(second)
    both = [first, second]
    assert jobs.waiting(both) == [second]
    jobs.commit(both)
    assert jobs.take(0.0) is first
    assert jobs.waiting(both) == [second], "the other one runs"
    jobs.release_slot(first)
    assert jobs.waiting(both) == []
    jobs.pause()
    assert jobs.waiting(both) == [second]
    assert jobs.take(0.0) is None


# --- ending ------------------------------------------------------------------------------------------------------------


def test_an_end_is_written_by_one_alone_and_takes_the_job_out_of_the_queue() -> None:
    jobs = registry()
    job = _waiting(jobs, "a")
    assert [jobs.claim_end(job), jobs.claim_end(job)] == [True, False]
    assert jobs.take(0.0) is None
    assert jobs.find(job.key) is job, "it is there until its end is stored"
    phases: list[str] = []
    for step in (jobs.hold_end, jobs.leave, jobs.hold_end):
        step(job)
        phases.append(job.phase)
    assert phases == ["ending", "ended", "ended"]
    assert jobs.find(job.key) is None


def test_the_next_prompt_of_a_session_goes_when_the_one_before_it_has_left() -> None:
    jobs = registry(slots=3)
    first = _running(jobs, "a", session="s")
    second = _waiting(jobs, "b", session="s")
    jobs.release_slot(first)
    assert jobs.take(0.0) is None, "its end is not stored yet"
    jobs.leave(first)
    assert jobs.take(0.0) is second


def test_a_stateless_request_that_leaves_frees_no_session() -> None:
    jobs = registry(slots=3)
    first = _running(jobs, "a", session="s")
    second = _waiting(jobs, "b", session="s")
    alone = _running(jobs, "c", session="s", messages=[{"role": "user", "content": "x"}])
    jobs.release_slot(alone)
    jobs.leave(alone)
    assert jobs.take(0.0) is None
    jobs.release_slot(first)
    jobs.leave(first)
    assert jobs.take(0.0) is second


def test_a_request_that_left_late_takes_no_other_of_the_same_id_with_it() -> None:
    jobs = registry()
    first = _waiting(jobs, "a")
    jobs.leave(first)
    again = _waiting(jobs, "a")
    jobs.leave(first)
    assert jobs.find(again.key) is again
    assert jobs.take(0.0) is again


def test_a_request_that_came_back_while_it_stopped_waits_and_runs_whatever_becomes_of_the_first_try() -> None:
    jobs = registry()
    first = _running(jobs, "a")
    again = lone_job("a", session="a")
    jobs.enter(again, recovered=True)
    jobs.commit([again])
    assert not jobs.withdraw(first)
    assert jobs.claim_end(first)
    jobs.leave(first)
    jobs.release_slot(first)
    assert jobs.take(0.0) is again
    assert jobs.find(again.key) is again


def test_who_waits_can_be_taken_out_and_who_runs_cannot() -> None:
    jobs = registry()
    first = _running(jobs, "a")
    second = _waiting(jobs, "b")
    assert not jobs.withdraw(first)
    assert [jobs.withdraw(second), jobs.withdraw(second)] == [True, False]


def test_a_session_whose_history_changes_waits_for_every_change_and_for_what_runs() -> None:
    jobs = registry(slots=3)
    session = ("default", "s")
    jobs.hold_session(session)
    jobs.hold_session(session)
    first, other = _waiting(jobs, "a", session="s"), _waiting(jobs, "b", session="t")
    assert jobs.take(0.0) is other
    jobs.free_session(session)
    assert jobs.take(0.0) is None
    jobs.free_session(session)
    assert jobs.take(0.0) is first
    jobs.hold_session(session)
    jobs.free_session(session)
    second = _waiting(jobs, "c", session="s")
    assert jobs.take(0.0) is None, "the first one runs"
    jobs.hold_session(session)
    jobs.leave(first)
    assert jobs.take(0.0) is None, "its history changes"
    jobs.free_session(session)
    assert jobs.take(0.0) is second


# --- looking -----------------------------------------------------------------------------------------------------------


def test_jobs_are_found_by_session_stateless_ones_too() -> None:
    jobs = registry()
    mine = [
        _waiting(jobs, "a", session="s"),
        _waiting(jobs, "b", session="s", messages=[{"role": "user", "content": "x"}]),
    ]
    _waiting(jobs, "c", session="t")
    assert jobs.of_session(("default", "s")) == mine
    assert jobs.of_session(("other", "s")) == []


def test_places_are_those_of_whoever_has_to_wait() -> None:
    jobs = registry(slots=1)
    first, second = _waiting(jobs, "a"), _waiting(jobs, "b")
    assert jobs.positions() == {second.key: 1}
    assert jobs.take(0.0) is first
    assert jobs.positions() == {second.key: 1}
    jobs.pause()
    jobs.release_slot(first)
    assert jobs.positions() == {second.key: 1}


def test_at_once_a_place_is_exact_in_a_short_queue_by_arrival_in_a_very_long_one_and_unknown_between() -> None:
    jobs = registry(queue_size=5000)
    _running(jobs, "running")

    def fill(number: int) -> None:
        while len(jobs) < number + 1:
            jobs.enter(lone_job(f"r{len(jobs)}", session=f"u{len(jobs)}"), recovered=True)

    fill(128)
    places = jobs.positions_at_once(2)
    assert places == jobs.positions()
    assert places is not None
    assert len(places) == 128
    fill(129)
    assert jobs.positions_at_once(1) is None
    fill(1000)
    assert jobs.positions_at_once(1) is None
    assert len(jobs.positions()) == 1000
    fill(1003)
    told = jobs.positions_at_once(3)
    assert told is not None
    assert {key.request_id: place for key, place in told.items()} == {"r1003": 1003, "r1002": 1002, "r1001": 1001}
    assert told.items() <= jobs.positions().items()


def test_a_job_is_found_by_session_as_long_as_it_is_there_and_its_successor_under_its_key_afterwards() -> None:
    jobs = registry(slots=3)
    first = _running(jobs, "a", session="s")
    again = lone_job("a", session="s")
    jobs.enter(again, recovered=True)
    assert jobs.of_session(("default", "s")) == [again]
    jobs.leave(first)
    assert jobs.of_session(("default", "s")) == [again]
    jobs.leave(again)
    assert jobs.of_session(("default", "s")) == []
    assert len(jobs) == 0


@pytest.mark.parametrize("how", ["leave", "hold_end"])
def test_a_paced_answer_counts_for_its_level_until_it_ends(how: str) -> None:
    jobs = registry(slots=1, queue_size=2)
    paced = _running(jobs, "p1", session="ada/1")
    jobs.release_slot(paced, pacing=True)
    _waiting(jobs, "r1", session="ada/2")
    with pytest.raises(Busy):
        jobs.enter(lone_job("r2", session="ada/3"))
    getattr(jobs, how)(paced)
    jobs.enter(lone_job("r3", session="ada/3"))


def test_the_load_tells_slots_queue_and_lanes() -> None:
    jobs = registry(slots=2)
    _running(jobs, "a")
    jobs.set_slots(1)
    _waiting(jobs, "b")
    _waiting(jobs, "c", priority="batch")
    load = jobs.load()
    assert (load.slots, load.busy, load.queued) == (1, 1, 2)
    assert dict(load.lanes) == {"interactive": 0, "normal": 1, "batch": 1}


def test_a_cancel_that_came_first_counts_once() -> None:
    jobs = registry()
    job = lone_job("a", session="ada/1")
    jobs.remember_cancel("ada", job.key)
    assert [jobs.was_cancelled(job), jobs.was_cancelled(job)] == [True, False]


# --- draining ----------------------------------------------------------------------------------------------------------


def test_a_drain_can_be_taken_back_and_a_stop_cannot() -> None:
    jobs = registry()
    jobs.drain()
    assert jobs.resume()
    _waiting(jobs, "a")
    jobs.pause()
    assert not jobs.resume()
    closed = registry()
    closed.close()
    assert not closed.resume()
    for each in (jobs, closed):
        with pytest.raises(ShuttingDown):
            each.enter(lone_job("late"))


@pytest.mark.parametrize("phase", ["running", "pacing"])
def test_a_worker_is_idle_when_nothing_runs_or_is_paced_any_more(phase: str) -> None:
    jobs = registry()
    assert jobs.wait_until_idle(0.0)
    job = _running(jobs, "a")
    _waiting(jobs, "b")
    if phase == "pacing":
        jobs.release_slot(job, pacing=True)
    jobs.pause()
    assert not jobs.wait_until_idle(0.0)
    idle: list[bool] = []
    waiter = threading.Thread(target=lambda: idle.append(jobs.wait_until_idle(60.0)), daemon=True)
    waiter.start()
    eventually(lambda: jobs._idle._waiters)  # type: ignore[attr-defined]
    jobs.leave(job)
    waiter.join(10)
    assert idle == [True]
