"""What becomes of a request: what its client hears of it, whose turn it takes, and what stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.io_loop import IoLoop, Timer
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.jobs import Job
from llamacpp_mqtt_deploy.worker.policies import Policies
from tests.support.lone_job import Taker, lone_job


class Bench:
    def __init__(self, **settings: str) -> None:
        given = {name.replace("__", "."): value for name, value in settings.items()}
        policies = Policies.of(load(None, given, environ={}).settings)
        self.outbox, self.loop = Taker(), IoLoop()
        self.maker = JobMaker(
            outbox=self.outbox,
            loop=self.loop,
            policies=lambda: policies,
            max_event_bytes=lambda: 4096,
            active_streams=lambda: 1,
        )

    def job(self, **fields: object) -> Job:
        like = lone_job(**fields)  # type: ignore[arg-type]  # fields of a request
        return self.maker.make(
            entry=replace(like.entry, correlation=b"c"),
            address=like.address,
            request=like.request,
            received_at=7.0,
            deadline=9.0,
        )


@pytest.mark.parametrize(
    "mode, stream, silent",
    [("native", True, False), ("native", False, True), ("native", "sentence", False), ("off", True, True)],
)
def test_whoever_wants_no_stream_hears_the_end_alone(mode: str, stream: object, silent: bool) -> None:
    job = Bench(streaming__mode=mode).job(stream=stream)
    assert job.responder.silent is silent


def test_a_prompt_takes_its_turn_in_its_session_and_a_stateless_request_takes_none() -> None:
    bench = Bench()
    assert bench.job().session == ("default", "demo")
    assert bench.job(messages=[{"role": "user", "content": "x"}]).session is None
    job = bench.job()
    assert (job.received_at, job.deadline) == (7.0, 9.0)


def test_a_stream_whose_outbox_is_full_stops_its_engine() -> None:
    bench = Bench()
    job = bench.job()
    bench.outbox.says = "full"
    job.responder.start({"worker": "w", "created": 1})
    assert job.stop.reason == "outbox_full"


def test_text_that_waits_for_its_moment_goes_out_at_that_moment_and_not_before(loop: IoLoop) -> None:
    bench = Bench()
    maker = bench.maker
    maker._loop = loop
    woken = threading.Event()
    timer = maker._wake(30.0, woken.set)
    assert isinstance(timer, Timer)
    timer.cancel()
    assert not woken.is_set()
    now: Callable[[], None] = woken.set
    assert maker._wake(0.0, now) is None
    assert woken.wait(10)
