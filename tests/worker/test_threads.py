"""The threads that run requests: enough of them, none lost to a defect, and those that hang are known."""

from __future__ import annotations

import threading
import time

import pytest
from structlog.testing import capture_logs
from typing_extensions import override

from llamacpp_mqtt_deploy.worker.generation import Generation
from llamacpp_mqtt_deploy.worker.jobs import Job
from llamacpp_mqtt_deploy.worker.threads import GenerationThreads
from tests.support.lone_job import lone_job, registry
from tests.support.waiting import eventually


class Runs(Generation):
    """Ends each job at once; `broken` ones by a defect."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    @override
    def run(self, job: Job) -> None:
        self.ran.append(job.key.request_id)
        if job.key.request_id == "broken":
            raise RuntimeError("a defect")


def test_there_is_a_thread_more_than_slots_and_never_one_less() -> None:
    jobs = registry(slots=2)
    threads = GenerationThreads(registry=jobs, generation=Runs())
    for slots, wanted in ((2, 3), (1, 3), (3, 4)):
        threads.ensure(slots)
        assert len(threads._threads) == wanted
    assert [thread.name for thread in threads._threads] == [f"generation-{number}" for number in range(4)]
    assert all(thread.daemon for thread in threads._threads), "none keeps a program alive"
    threads.close(10)
    assert not any(thread.is_alive() for thread in threads._threads)
    threads.ensure(9)
    assert len(threads._threads) == 4, "a worker that stops starts none"


def test_a_defect_ends_neither_the_thread_nor_the_session() -> None:
    jobs, generation = registry(slots=1), Runs()
    threads = GenerationThreads(registry=jobs, generation=generation)
    threads.ensure(0)
    broken, fine = lone_job("broken"), lone_job("fine")
    with capture_logs() as lines:
        jobs.enter(broken)
        jobs.commit([broken])
        eventually(lambda: jobs.find(broken.key) is None)
        jobs.release_slot(broken)  # the generation's part
        jobs.enter(fine)
        jobs.commit([fine])
        eventually(lambda: generation.ran == ["broken", "fine"])
    assert [(line["event"], line["request_id"]) for line in lines] == [("generation.failed", "broken")]
    threads.close(10)


def test_a_request_that_was_stopped_half_a_minute_ago_and_still_holds_its_slot_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    jobs = registry(slots=2)
    threads = GenerationThreads(registry=jobs, generation=Runs())
    stopped, running = lone_job("stopped", session="a"), lone_job("running", session="b")
    for job in (stopped, running):
        jobs.enter(job)
    jobs.commit([stopped, running])
    assert {jobs.take(0.0), jobs.take(0.0)} == {stopped, running}
    stopped.stop.set("cancelled")
    now[0] += 30.0
    assert threads.stuck() == []
    now[0] += 0.1
    assert threads.stuck() == [stopped]


def test_closing_waits_no_longer_than_it_may() -> None:
    jobs, gate = registry(slots=1), threading.Event()

    class Hangs(Runs):
        @override
        def run(self, job: Job) -> None:
            gate.wait(60)

    threads = GenerationThreads(registry=jobs, generation=Hangs())
    threads.ensure(1)
    job = lone_job()
    jobs.enter(job)
    jobs.commit([job])
    eventually(lambda: jobs.running() == 1)
    began = time.monotonic()
    threads.close(0.2)
    assert 0.2 <= time.monotonic() - began < 10
    assert sum(thread.is_alive() for thread in threads._threads) == 1
    gate.set()
