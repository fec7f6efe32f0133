"""What first levels spend, what they may spend, and which lanes they may use, in a whole worker."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.spending import DAY_S, Estimate, LedgerRow, LevelLimits, Spent, day_of
from llamacpp_mqtt_deploy.pool_ports import Claimed
from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.service.ledger_report import day_name
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, last_user_text
from llamacpp_mqtt_deploy.worker.jobs import Job
from llamacpp_mqtt_deploy.worker.pooled.claiming import Claims
from tests.support.lone_job import lone_job, registry
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker
from tests.worker.test_payload_sessions import GAME


def _usage(bus: Bus, transaction: str = "u", **fields: Any) -> dict[str, Any]:
    bus.admin("usage", transaction=transaction, **fields)
    return bus.listener.until(action="usage", transaction=transaction)


def _counts(ack: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    return {row["first_level"]: (row["requests"], row["tokens_in"], row["tokens_out"]) for row in ack["usage"]}


def _ask(
    bus: Bus, request_id: str, level: str = "alice", prompt: str | None = "one two three", **fields: Any
) -> dict[str, Any]:
    bus.ask(prompt, request_id=request_id, session=f"{level}/{request_id}", **fields)
    return bus.listener.terminal(request_id)


def test_an_operator_sees_who_has_spent_what_today(bus: Bus) -> None:
    bus.worker()
    _ask(bus, "r1")
    _ask(bus, "r2")
    _ask(bus, "r3", "bob", "hello")
    ack = _usage(bus)
    assert ack["status"] == "ok"
    assert _counts(ack) == {"alice": (2, 6, 6), "bob": (1, 1, 1)}
    assert {row["day"] for row in ack["usage"]} == {ack["today"]}
    assert all(row["engine_s"] >= 0 and "tokens_per_day" not in row for row in ack["usage"])
    assert _counts(_usage(bus, "b", first_level="bob")) == {"bob": (1, 1, 1)}


def test_failed_and_cancelled_requests_count_with_what_they_took(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(engine)
    gate = Gate()
    engine.play("one ", "two ", gate)
    bus.ask("hi", request_id="c", session="alice/c")
    eventually(gate.reached.is_set)
    bus.control("cancel", session="alice/c", request_id="c")
    assert bus.listener.terminal("c")["finish_reason"] == "cancelled"
    assert _ask(bus, "e", messages=[{"role": "user", "content": "x " * 5000}], prompt=None)["type"] == "error"
    assert _counts(_usage(bus)) == {"alice": (2, 0, 2)}


def test_requests_whose_session_stands_in_the_payload_count_for_their_route(bus: Bus) -> None:
    bus.worker(**GAME)
    bus.sender.publish("game/input", b'{"sessionId":"alice","requestId":"g","message":{"text":"go north"}}')
    bus.listener.terminal("g")
    assert _counts(_usage(bus)) == {"route:game": (1, 2, 2)}


def test_who_has_spent_his_tokens_is_refused_before_the_engine_hears_of_it(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(engine, limits__tokens_per_day=6)
    assert _ask(bus, "r1")["type"] == "done"
    refused = _ask(bus, "r2")
    assert (refused["code"], refused["retryable"]) == ("rate_limited", True)
    assert 0 < refused["retry_after_s"] <= DAY_S
    assert "6 tokens" in refused["message"]
    assert len(engine.calls) == 1
    assert _ask(bus, "r3", "bob")["type"] == "done"
    (alice, bob) = sorted(_usage(bus)["usage"], key=lambda row: row["first_level"])
    assert (alice["requests"], alice["tokens_per_day"], bob["requests"]) == (1, 6, 1)


def test_an_answer_that_is_sent_for_again_costs_nothing(bus: Bus) -> None:
    bus.worker(limits__tokens_per_day=6)
    first = _ask(bus, "r1")
    bus.listener.events.clear()
    assert _ask(bus, "r1") == first
    assert _counts(_usage(bus)) == {"alice": (1, 3, 3)}


def test_a_quota_outlives_a_restart(bus: Bus) -> None:
    first = bus.worker(limits__tokens_per_day=6)
    _ask(bus, "r1")
    first.stop()
    bus.worker(limits__tokens_per_day=6)
    assert _ask(bus, "r2")["code"] == "rate_limited"
    assert _counts(_usage(bus)) == {"alice": (1, 3, 3)}


def test_a_clock_that_jumps_forth_and_back_gives_no_tokens_twice(bus: Bus) -> None:
    clock = bus.worker(limits__tokens_per_day=6).daemon.parts.clock
    _ask(bus, "r1")
    assert _ask(bus, "r2")["code"] == "rate_limited"
    clock._wall = lambda: time.time() + DAY_S
    assert _ask(bus, "r3")["type"] == "done", "another day"
    assert _ask(bus, "r4")["code"] == "rate_limited"
    clock._wall = time.time
    assert _ask(bus, "r5")["code"] == "rate_limited"
    assert [row["requests"] for row in _usage(bus)["usage"]] == [1, 1]


def test_a_hundred_requests_at_once_come_past_the_quota_by_one_at_most(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1, n_ctx=None)
    bus.worker(engine, limits__tokens_per_day=100, limits__queue_size=200, limits__queue_share=1.0)
    gate = Gate()
    engine.play(gate, *["word "] * 20)
    for number in range(100):
        bus.ask("say twenty words", request_id=f"r{number}", session=f"alice/{number}", max_tokens=20)
    eventually(gate.reached.is_set)
    gate.open()
    ends = [bus.listener.terminal(f"r{number}") for number in range(100)]
    assert {end["code"] for end in ends if end["type"] == "error"} == {"rate_limited"}
    under_way = [end for end in ends if "under way" in end.get("message", "")]
    assert under_way
    assert all(end["retry_after_s"] <= 120 for end in under_way)
    ((row),) = _usage(bus)["usage"]
    assert row["tokens_in"] + row["tokens_out"] < 100 + 23


def test_a_queued_request_that_is_cancelled_gives_back_what_was_set_aside_for_it(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine, limits__tokens_per_day=1000)
    gate = Gate()
    engine.play(gate, "held")
    bus.ask("hold", request_id="holder", session="bob")
    eventually(gate.reached.is_set)
    bus.ask("x", request_id="greedy", session="alice/1", max_tokens=2000)
    bus.listener.until(request_id="greedy", type="queued")
    assert "under way" in _ask(bus, "refused", max_tokens=1)["message"]
    bus.control("cancel", session="alice/1", request_id="greedy")
    bus.listener.terminal("greedy")
    bus.ask("x", request_id="taken", session="alice/2", max_tokens=1)
    bus.listener.until(request_id="taken", type="queued")
    gate.open()
    assert bus.listener.terminal("taken")["type"] == "done"


def test_a_level_has_limits_and_a_lane_of_its_own(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(
        engine,
        limits__tokens_per_day=6,
        limits__max_requests_per_minute=2,
        levels__ada__max_priority="interactive",
        levels__ada__tokens_per_day=0,
        levels__ada__max_requests_per_minute=0,
        levels__guest__max_priority="batch",
    )
    for number in range(4):
        end = _ask(bus, f"a{number}", "ada", priority="interactive")
        assert end["type"] == "done"
        assert "warnings" not in end
    lowered = _ask(bus, "g", "guest", "hi", priority="normal")
    assert lowered["warnings"] == ["priority was lowered from normal to the highest one allowed here, batch"]
    assert _ask(bus, "o", "other", "hi", priority="interactive")["warnings"]


def test_the_limits_of_levels_change_at_a_reload(bus: Bus) -> None:
    worker = bus.worker(levels__alice__tokens_per_day=6)
    _ask(bus, "r1")
    assert _ask(bus, "r2")["code"] == "rate_limited"
    worker.daemon._loaded.overrides.update({"levels.alice.tokens_per_day": "600"})  # type: ignore[attr-defined]
    bus.admin("reload")
    assert bus.listener.until(action="reload")["changed"] == ["levels.alice"]
    assert _ask(bus, "r3")["type"] == "done"


def test_a_long_list_of_usage_comes_in_parts_that_fit_into_events(bus: Bus) -> None:
    worker = bus.worker(limits__max_event_bytes=2048)
    for number in range(40):
        bus.ask("hi", request_id=f"r{number}", session=f"user{number}/x")
    for number in range(40):
        bus.listener.terminal(f"r{number}")
    found: list[str] = []
    offset: int | None = 0
    while offset is not None:
        ack = _usage(bus, f"t{offset}", offset=offset, limit=30)
        assert len(bus.listener.deliveries[-1].payload) <= 2048
        found += [row["first_level"] for row in ack["usage"]]
        offset = ack.get("next_offset")
    assert sorted(found) == sorted(f"user{number}" for number in range(40))
    assert worker.exit_code is None


@pytest.mark.parametrize(
    "fields", [{"days": 0}, {"days": "all"}, {"limit": 100_000}, {"offset": -1}, {"first_level": 7}]
)
def test_a_wrong_question_for_usage_is_refused_by_name(bus: Bus, fields: dict[str, Any]) -> None:
    bus.worker()
    refused = _usage(bus, **fields)
    assert refused["status"] == "error"
    assert list(refused["fields"]) == list(fields)


def test_a_ledger_that_cannot_be_read_is_told_to_the_operator_and_stops_no_worker(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamacpp_mqtt_deploy.ports import StoreError
    from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore

    def broken(self: SqliteStore, **_: Any) -> list[LedgerRow]:
        raise StoreError("The disk is gone.")

    monkeypatch.setattr(SqliteStore, "ledger", broken)
    bus.worker()
    assert _ask(bus, "r1")["type"] == "done"
    assert (_usage(bus)["status"], _usage(bus)["code"]) == ("error", "internal")


def test_days_of_a_clock_that_was_ahead_are_no_usage_and_hide_nobodys_spending_of_today(bus: Bus) -> None:
    worker = bus.worker(limits__tokens_per_day=100)
    parts = worker.daemon.parts
    now = parts.clock.now()

    def spend(first_level: str, at: float, tokens: int) -> None:
        key = EntryKey("default", f"{first_level}/elsewhere", f"{at}")
        parts.store.accept([Entry(key=key, topic=f"llm/request/{key.session}", payload=b"{}", digest="d")])
        parts.store.finish(key, b"{}", now=at, spent=Spent(first_level=first_level, tokens_in=tokens))

    spend("alice", now, 100)
    spend("alice", now + DAY_S, 7)  # the clock was set back over midnight
    for day in range(2, 5):
        for number in range(400):
            spend(f"user{number}", now + day * DAY_S, 1)
    assert [(row["first_level"], row["tokens_in"]) for row in _usage(bus)["usage"]] == [("alice", 7), ("alice", 100)]
    worker.daemon.upkeep.purge_soon()  # as it does every few seconds
    eventually(lambda: parts.registry._quotas.spent("alice", now) == 100)
    assert _ask(bus, "r1")["code"] == "rate_limited"


def test_a_day_has_the_name_that_people_write() -> None:
    assert day_name(day_of(1_800_000_000.0)) == "2027-01-15"
    assert day_name(0) == "1970-01-01"


def test_what_another_worker_of_the_pool_has_counted_is_spent_here_too(bus: Bus) -> None:
    worker = bus.worker(limits__tokens_per_day=100)
    parts = worker.daemon.parts
    key = EntryKey("default", "alice/elsewhere", "e")
    parts.store.accept([Entry(key=key, topic="llm/request/alice/elsewhere", payload=b"{}", digest="d")])
    parts.store.finish(key, b"{}", now=parts.clock.now(), spent=Spent(first_level="alice", tokens_in=100))
    worker.daemon.upkeep.purge_soon()  # as it does every few seconds
    eventually(lambda: parts.registry._quotas.spent("alice", parts.clock.now()) == 100)
    assert _ask(bus, "r1")["code"] == "rate_limited"
    assert _ask(bus, "r2", "bob")["type"] == "done"


class _Journaled:
    """What the claims make jobs with, and end requests with."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str]] = []

    def job(self, entry: Entry, **_: Any) -> Job:
        job = lone_job(entry.key.request_id, session=entry.key.session)
        job.entry = entry
        job.estimate = Estimate(tokens_in=10, tokens_out=50)
        return job

    def end(self, entry: Entry, error: RequestError) -> None:
        self.ended.append((entry.key.request_id, error.code))


def test_of_those_that_a_pool_has_queued_only_so_many_run_as_the_quota_allows() -> None:
    jobs, journaled, nothing = registry(slots=9), _Journaled(), cast("Any", None)
    jobs.set_limits(
        limits=QueueLimits(queue_size=99, session_queue=9),
        aging_s=9.0,
        max_requests_per_minute=0,
        levels=LevelLimits(tokens_per_day=100),
    )
    claims = Claims(
        journal=nothing,
        registry=jobs,
        requests=cast("Any", journaled),
        completion=nothing,
        engine_ready=lambda: True,
        models=tuple,
        aging_s=lambda: 9.0,
        now=lambda: DAY_S,
    )

    def entry(name: str, starts: int = 0) -> Entry:
        key = EntryKey("default", f"alice/{name}", name)
        return Entry(key=key, topic="t", payload=b"{}", digest="d", accepted_at=DAY_S, starts=starts)

    claims.take([Claimed(entry=entry(name)) for name in ("a", "b", "c", "d")])
    claims.take([Claimed(entry=entry("begun elsewhere", starts=1))])
    assert [job.key.request_id for job in jobs.all()] == ["a", "b", "begun elsewhere"]
    assert journaled.ended == [("c", "rate_limited"), ("d", "rate_limited")]


# --- a flooder ---------------------------------------------------------------------------------------------------------


def _tokens_until_the_quiet_one_is_done(bus: Bus, worker: WholeWorker, engine: ScriptedEngine) -> float:
    """How much longer a client's twenty short requests take beside a flooder, in tokens that the engine makes: with one slot,
    that is time."""
    made: dict[str, int] = {"quiet": 0, "flood": 0}
    for number in range(60):
        bus.ask("flood " * 30, request_id=f"f{number}", session=f"flooder/{number}", max_tokens=30)
    for number in range(20):
        bus.ask("quiet " * 10, request_id=f"q{number}", session="quiet/1", new=True, max_tokens=10)
        assert bus.listener.terminal(f"q{number}")["type"] == "done"
    for call in list(engine.calls):
        words = last_user_text(call).split()
        made[words[0]] += len(words)
    return sum(made.values()) / made["quiet"]


def _echo(call: EngineCall) -> list[str]:
    return last_user_text(call).split()


def test_a_flooder_with_a_quota_slows_another_client_by_a_factor_of_two_at_most(bus: Bus) -> None:
    engine = ScriptedEngine(_echo, slots=1)
    worker = bus.worker(engine, levels__flooder__tokens_per_day=200, limits__queue_size=100)
    assert _tokens_until_the_quiet_one_is_done(bus, worker, engine) <= 2.0


def test_without_a_quota_the_same_flooder_slows_him_more(bus: Bus) -> None:
    engine = ScriptedEngine(_echo, slots=1)
    worker = bus.worker(engine, limits__queue_size=100)
    assert _tokens_until_the_quiet_one_is_done(bus, worker, engine) > 2.0
