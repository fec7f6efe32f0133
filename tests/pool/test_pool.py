"""What a client sees of a pool: one address, whoever of its workers takes a request, runs it, or is asked about it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.pool.fleet import Fleet, PooledWorker, fleet_on
from tests.support.mosquitto import Mosquitto
from tests.support.postgres_server import PostgresServer
from tests.support.waiting import eventually


def _told(fleet: Fleet, request_id: str, kind: str, times: int) -> bool:
    return [event["type"] for event in fleet.of(request_id)].count(kind) == times


def _knows(worker: PooledWorker, model: str) -> bool:
    return model in (worker.daemon.parts.in_force.policies().routes["default"].parse.models or ())


@pytest.fixture
def fleet(mosquitto: Mosquitto, postgres: PostgresServer) -> Iterator[Fleet]:
    with fleet_on(mosquitto, postgres.url) as made:
        yield made


def test_a_request_to_a_pool_of_one_is_answered_as_ever(fleet: Fleet) -> None:
    fleet.worker()
    asked = fleet.ask("one two three")
    end = fleet.end(asked)
    assert (end["type"], end["full_content"]) == ("done", "one two three")
    assert fleet.read(asked).content == "one two three"


def test_each_request_runs_once_whichever_worker_received_it(fleet: Fleet) -> None:
    workers = [fleet.worker() for _ in range(3)]
    asked = [fleet.ask(f"question {number}", session=f"user{number}") for number in range(24)]
    assert {fleet.end(each)["full_content"] for each in asked} == {f"question {number}" for number in range(24)}
    for each in asked:
        fleet.read(each)
    assert sum(len(worker.engine.calls) for worker in workers) == 24


def test_a_worker_with_a_free_slot_takes_what_another_received(fleet: Fleet) -> None:
    gates = [Gate(), Gate()]
    busy, free = fleet.worker(), fleet.worker()
    busy.engine.play("held ", gates[0], "here")
    free.engine.play("held ", gates[1], "there")
    held = [fleet.ask("first", session="a"), fleet.ask("second", session="b")]
    for gate in gates:
        assert gate.reached.wait(10)
    waiting = [fleet.ask(f"later {number}", session=f"c{number}") for number in range(6)]
    gates[1].open()
    assert {fleet.end(each)["full_content"] for each in waiting} == {f"later {number}" for number in range(6)}
    assert len(busy.engine.calls) == 1
    gates[0].open()
    assert [fleet.end(each)["type"] for each in held] == ["done", "done"]


def test_a_conversation_goes_on_wherever_it_lands(fleet: Fleet) -> None:
    workers = [fleet.worker() for _ in range(2)]
    for number in range(6):
        fleet.end(fleet.ask(f"turn {number}"))
    turns = [call for worker in workers for call in worker.engine.calls]
    last = max(turns, key=lambda call: len(call.messages))
    assert [message["content"] for message in last.messages if message["role"] == "user"] == [
        f"turn {number}" for number in range(6)
    ]
    assert [message["role"] for message in fleet.control("history")["messages"]] == ["user", "assistant"] * 6


def test_prompts_of_a_session_run_one_at_a_time_and_in_order(fleet: Fleet) -> None:
    gate = Gate()
    one, two = fleet.worker(), fleet.worker()
    for worker in (one, two):
        worker.engine.play("the first ", gate, "is over")
    asked = []
    for prompt in "abc":  # two that are under way at the same time may go to two workers, and either may be the first
        asked.append(fleet.ask(prompt))
        fleet.until(type="queued" if asked[1:] else "chunk", request_id=asked[-1])
    assert len(one.engine.calls) + len(two.engine.calls) == 1
    gate.open()
    for each in asked:
        fleet.end(each)
    assert [m["content"] for m in fleet.control("history")["messages"] if m["role"] == "user"] == ["a", "b", "c"]


def test_a_request_that_waits_is_told_so_and_is_cancelled_wherever_the_cancel_arrives(fleet: Fleet) -> None:
    gate = Gate()
    workers = [fleet.worker(engine=ScriptedEngine(slots=1)) for _ in range(2)]
    for worker in workers:
        worker.engine.play("x ", gate, "y")
    running = [fleet.ask("r", session=f"s{number}") for number in range(2)]
    for each in running:
        fleet.until(type="chunk", request_id=each)
    waiting = [fleet.ask("w", session=f"t{number}") for number in range(4)]
    for each in waiting:
        fleet.until(type="queued", request_id=each)
    for number, each in enumerate(waiting):
        ack = fleet.control("cancel", session=f"t{number}", request_id=each)
        assert (ack["state"], ack["cancelled"]) == ("queued", 1)
        end = fleet.end(each)
        assert (end["type"], end["finish_reason"], end["full_content"]) == ("done", "cancelled", "")
    # Several times each: some arrive at the worker that runs the request, and some at the other one.
    for number, each in enumerate(running):
        assert fleet.control("cancel", session=f"s{number}", request_id=each)["state"] == "running"
        assert fleet.end(each)["finish_reason"] == "cancelled"
        assert fleet.control("cancel", session=f"s{number}", request_id=each)["state"] == "ended"


def test_whoever_gets_the_question_counts_the_tokens_with_its_own_engine(fleet: Fleet) -> None:
    fleet.worker(engine=ScriptedEngine(slots=1, count=lambda _call: 1))
    fleet.worker(engine=ScriptedEngine(slots=1, count=lambda _call: 2))
    counted = {fleet.control("count_tokens", session=f"s{number}", prompt="x")["prompt_tokens"] for number in range(8)}
    assert counted == {1, 2}


def test_a_cancel_that_comes_before_its_request_ends_it_on_any_worker(fleet: Fleet) -> None:
    for _ in range(2):
        fleet.worker()
    for number in range(4):
        assert fleet.control("cancel", request_id=f"early{number}")["state"] == "unknown"
        end = fleet.end(fleet.ask("never", request_id=f"early{number}"))
        assert (end["type"], end["finish_reason"]) == ("done", "cancelled")


def test_a_request_that_is_sent_again_is_answered_and_not_run_again(fleet: Fleet) -> None:
    gate = Gate()
    workers = [fleet.worker() for _ in range(2)]
    for worker in workers:
        worker.engine.play("half ", gate, "and half")
    fleet.ask("hello", request_id="r1")
    fleet.until(type="chunk", request_id="r1")
    for number in range(1, 5):  # some for the worker that runs it, some for the other one
        fleet.ask("hello", request_id="r1")
        eventually(partial(_told, fleet, "r1", "snapshot", number))
    gate.open()
    fleet.end("r1")
    for number in range(2, 6):
        fleet.ask("hello", request_id="r1")
        eventually(partial(_told, fleet, "r1", "done", number))
    assert sum(len(worker.engine.calls) for worker in workers) == 1
    fleet.ask("something else", request_id="r1")
    assert fleet.until(type="rejected", request_id="r1")["code"] == "duplicate_request"


def test_a_reset_ends_what_runs_elsewhere_and_forgets_everything(fleet: Fleet) -> None:
    gate = Gate()
    workers = [fleet.worker() for _ in range(2)]
    fleet.end(fleet.ask("remember me"))
    for worker in workers:
        worker.engine.play("half ", gate, "and half")
    running = fleet.ask("go on")
    fleet.until(type="chunk", request_id=running)
    assert fleet.control("reset")["status"] == "ok"
    assert fleet.end(running)["finish_reason"] == "cancelled"
    assert fleet.control("history")["messages"] == []
    gate.open()
    for worker in workers:  # the script that nobody has used
        worker.engine._played.clear()
    fleet.end(fleet.ask("again"))
    assert [m["content"] for m in fleet.control("history")["messages"]] == ["again", "again"]


def test_a_request_for_a_model_goes_to_a_worker_that_serves_it(fleet: Fleet) -> None:
    small = fleet.worker(engine=ScriptedEngine(slots=1, model="small", further_models=("both",)))
    large = fleet.worker(engine=ScriptedEngine(slots=1, model="large", further_models=("both",)))
    eventually(lambda: all(_knows(worker, "large") for worker in (small, large)))
    asked = [fleet.ask("for the large one", session=f"s{number}", model="large") for number in range(4)]
    for each in asked:
        assert fleet.end(each)["type"] == "done"
    assert (len(small.engine.calls), len(large.engine.calls)) == (0, 4)


def test_a_worker_that_stops_leaves_what_waits_to_the_others(fleet: Fleet) -> None:
    gates = [Gate(), Gate()]
    leaving, staying = fleet.worker(), fleet.worker()
    leaving.engine.play("mine ", gates[0], "to the end")
    staying.engine.play("also ", gates[1], "to the end")
    running = [fleet.ask("r", session=f"s{number}") for number in range(2)]
    for each in running:
        fleet.until(type="chunk", request_id=each)
    waiting = [fleet.ask(f"w{number}", session=f"t{number}") for number in range(6)]
    leaving.daemon.stop()
    gates[0].open()
    eventually(lambda: leaving.exit_code == 0, 20)
    later = [fleet.ask(f"l{number}", session=f"u{number}") for number in range(6)]
    gates[1].open()
    for each in (*running, *waiting, *later):
        assert fleet.end(each)["type"] == "done"
        fleet.read(each)
    assert len(leaving.engine.calls) == 1


def test_the_pool_tells_how_it_is(fleet: Fleet) -> None:
    for _ in range(2):
        fleet.worker(status__health_every_s=1)
    told = fleet.until(pool="fleet", workers=2)
    assert (told["slots"], told["queue"]) == ({"total": 2, "busy": 0}, {"interactive": 0, "normal": 0, "batch": 0})
    assert {member["worker"] for member in told["members"]} == {"w1", "w2"}


@pytest.mark.parametrize("silent_s, trouble", [(90.0, None), (130.0, "the membership thread hangs")])
def test_a_worker_whose_database_hangs_is_not_killed_for_it(fleet: Fleet, silent_s: float, trouble: str | None) -> None:
    worker = fleet.worker()
    watchdog, now = worker.daemon._watchdog, time.monotonic()
    threads = {"claims": SimpleNamespace(beat_at=now), "membership": SimpleNamespace(beat_at=now - silent_s)}
    watchdog._pool = SimpleNamespace(**threads)  # type: ignore[assignment]  # the real ones come round at once
    assert watchdog.trouble() == trouble


def test_a_worker_without_the_pool_does_not_serve_its_root(fleet: Fleet) -> None:
    fleet.worker()
    with pytest.raises(AssertionError, match="ended with 3"):
        fleet.worker(pool__name="another")
