"""The journal that the workers of a pool share, on a real PostgreSQL: who gets what, and who may write it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.errors import Busy, SessionBusy
from llamacpp_mqtt_deploy.pool_ports import Claimed, Enqueued, LeaseLost, Member, Notice, PoolRequest
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import NOW, SESSION, change, database_in, entry, key
from tests.support.waiting import eventually

OTHER = ("default", "hall")
LIMITS = QueueLimits(queue_size=8, session_queue=4)


class Worker:
    """A member of the pool as a test speaks to it."""

    def __init__(self, journal: SharedPostgresJournal, name: str, *, slots: int = 1, **fields: Any) -> None:
        self.journal = journal
        self.member = Member(worker_id=name, instance=f"{name}-1", slots=slots, **fields)
        self.fence = journal.join(self.member)

    def enqueue(self, *requests: PoolRequest, limits: QueueLimits = LIMITS) -> list[Enqueued]:
        return self.journal.enqueue(requests, limits=limits, retry_after_s=1.0, aging_s=30.0)[0]

    def claim(self, free: int = 1, **wishes: Any) -> list[Claimed]:
        return self.journal.claim(free, **{"models": (), "aging_s": 30.0, "prefer_for_s": 0.0, **wishes})

    def takes(self, free: int = 1, **wishes: Any) -> list[str]:
        return [claimed.entry.key.request_id for claimed in self.claim(free, **wishes)]

    def end(self, name: str, session: tuple[str, str] = SESSION, **fields: Any) -> None:
        self.journal.finish(key(name, session), name.encode(), now=NOW, **fields)


def request(
    name: str, session: tuple[str, str] = SESSION, *, lane: int = 1, in_turn: bool = True, **fields: Any
) -> PoolRequest:
    model = fields.pop("model", None)
    replaces = fields.pop("replaces", None)
    return PoolRequest(
        entry=entry(name, session, **fields),
        first_level=session[1].partition("/")[0],
        lane=lane,
        in_turn=in_turn,
        model=model,
        replaces=replaces,
    )


@pytest.fixture
def pool(postgres: PostgresServer, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start a worker of the pool: `pool("a", slots=2)`."""
    journals: list[SharedPostgresJournal] = []

    def start(name: str, *, lease_s: float = 30.0, aside: Path | None = None, **fields: Any) -> Worker:
        journal = SharedPostgresJournal(database_in(postgres, tmp_path), lease_s=lease_s, aside=aside)
        journal.open()
        journals.append(journal)
        return Worker(journal, name, **fields)

    yield start
    for journal in journals:
        journal.close()


# --- from one worker to another ----------------------------------------------------------------------------------------


def test_whoever_has_a_slot_free_takes_a_request_that_another_worker_received(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    assert a.enqueue(request("r1", expires_at=NOW + 60)) == [Enqueued(position=0)]
    (taken,) = b.claim()
    assert (taken.why, taken.entry.key, taken.entry.payload) == ("run", key("r1"), b'{"prompt":"hi"}')
    assert taken.entry.expires_at is not None
    assert taken.entry.expires_at - taken.entry.accepted_at == pytest.approx(60)
    assert a.takes() == b.takes() == []
    assert b.journal.mark_started(key("r1")) == 1
    b.journal.mark_streaming(key("r1"))
    b.end("r1", history=change("q", "a"), chunks=b"record")
    assert [m["content"] for m in a.journal.history(SESSION)] == ["q", "a"]
    assert a.journal.chunks(key("r1")) == b"record"
    found = a.journal.find(key("r1"))
    assert found is not None
    assert (found.state, found.terminal, found.payload) == ("ended", b"r1", b"")
    assert [e.key for e in b.journal.undelivered()] == [key("r1")]
    assert a.journal.undelivered() == []
    b.journal.mark_delivered([key("r1")])
    assert b.journal.undelivered() == []


def test_a_worker_that_has_not_claimed_a_request_can_write_nothing_of_it(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    a.enqueue(request("r1"))
    assert b.takes() == ["r1"]
    writes: list[Callable[[], object]] = [
        lambda: a.journal.mark_started(key("r1")),
        lambda: a.journal.mark_streaming(key("r1")),
        lambda: a.end("r1", history=change("q", "a")),
        lambda: a.end("unknown", history=change("q", "a")),
    ]
    for write in writes:
        with pytest.raises(LeaseLost):
            write()
    assert a.journal.history(SESSION) == ()
    b.end("r1", history=change("q", "a"))
    b.end("r1", history=change("again", "a"))
    assert len(a.journal.history(SESSION)) == 2


def test_a_start_that_is_counted_after_the_end_is_no_lost_lease(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    a.enqueue(request("r1"))
    assert a.takes() == ["r1"]
    assert a.journal.mark_started(key("r1")) == 1
    a.end("r1")
    assert a.journal.mark_started(key("r1")) == 1
    with pytest.raises(LeaseLost):
        b.journal.mark_started(key("r1"))


def test_prompts_of_a_session_go_one_at_a_time_and_in_order_whoever_runs_them(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    a.enqueue(request("1"), request("2"), request("elsewhere", OTHER), request("alone", in_turn=False))
    assert set(a.takes(4)) == {"1", "elsewhere", "alone"}
    assert b.takes(4) == []
    a.end("1")
    assert b.takes(4) == ["2"]


def test_urgent_ones_go_first_and_first_levels_take_turns(pool: Callable[..., Worker]) -> None:
    a = pool("a", slots=9)
    greedy = [request(f"g{n}", ("default", f"greedy/{n}")) for n in range(3)]
    late = [request("quiet", ("default", "quiet")), request("batch", ("default", "third"), lane=2)]
    a.enqueue(*greedy, *late, request("now", ("default", "greedy/x"), lane=0))
    assert a.takes(6) == ["now", "quiet", "g0", "g1", "g2", "batch"]


def test_a_request_moves_up_a_lane_while_it_waits(pool: Callable[..., Worker]) -> None:
    a = pool("a")
    a.enqueue(request("slow", ("default", "x"), lane=2))
    eventually(lambda: a.journal.load().oldest_wait_s > 0.11)
    a.enqueue(request("new", ("default", "y"), lane=1))
    assert a.takes(aging_s=0.05) == ["slow"]


def test_what_came_before_the_clock_of_the_database_was_set_back_keeps_its_lane(
    pool: Callable[..., Worker], postgres: PostgresServer
) -> None:
    a = pool("a", slots=9)
    a.enqueue(request("old", ("default", "x")))
    schema = a.journal._database.schema
    postgres.sql(f"UPDATE {schema}.queue SET arrived = arrived + interval '1 h'")
    assert a.journal.load().oldest_wait_s == 0
    a.enqueue(request("batch", ("default", "y"), lane=2))
    places = a.journal.watched([key("old", ("default", "x")), key("batch", ("default", "y"))])
    assert list(places.values()) == [0, 0]
    assert a.takes(1) == ["old"]
    assert a.takes(1) == ["batch"]


def test_a_model_goes_to_workers_that_serve_it(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b", models=("big",))
    a.enqueue(request("r1", model="big"), request("r2", OTHER))
    assert a.takes(5) == ["r2"]
    assert b.takes(5, models=("big",)) == ["r1"]


def test_a_conversation_is_left_for_a_while_to_the_worker_that_has_it_in_its_cache(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    a.enqueue(request("1"))
    assert a.takes() == ["1"]
    a.end("1")
    b.enqueue(request("2"))
    assert b.takes(prefer_for_s=60.0) == []
    assert a.takes(prefer_for_s=60.0) == ["2"]
    a.end("2")
    b.enqueue(request("3"), request("other", OTHER))
    assert a.takes(prefer_for_s=60.0) in (["3"], ["other"])
    left = {"3", "other"} - {e.key.request_id for e in a.journal.unfinished()}
    assert b.takes(2, prefer_for_s=60.0) == [*left]  # a has no slot free now


def test_what_is_known_is_not_enqueued_again(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    a.enqueue(request("r1"))
    (again,) = b.enqueue(request("r1"))
    assert again.known == entry("r1")
    assert again.owner is None
    a.claim()
    (running,) = b.enqueue(request("r1", payload=b"other"))
    assert (running.owner, running.refused) == (a.fence, None)
    a.end("r1")
    (ended,) = b.enqueue(request("r1"))
    assert ended.known is not None
    assert (ended.known.state, ended.known.terminal) == ("ended", b"r1")
    assert b.takes() == []
    (replaced,) = b.enqueue(request("r1", replaces=ended.known.ended_at, payload=b"new"))
    assert replaced.known is None
    assert [c.entry.payload for c in b.claim()] == [b"new"]


# --- places --------------------------------------------------------------------------------------------------------------


def test_who_has_no_place_is_refused_as_on_one_box(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    small = QueueLimits(queue_size=2, session_queue=1)
    outcomes = a.enqueue(*(request(str(n)) for n in range(3)), limits=small)
    assert isinstance(outcomes[2].refused, SessionBusy)
    outcomes = b.enqueue(request("x", ("default", "kitchen/other")), limits=small)
    assert isinstance(outcomes[0].refused, Busy)
    assert a.journal.find(key("2")) is None
    assert b.journal.load().queued == {"interactive": 0, "normal": 2, "batch": 0}


def test_a_more_urgent_request_takes_the_place_of_another_of_its_level(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    full = QueueLimits(queue_size=2, session_queue=4)
    a.enqueue(request("1", ("default", "x/1"), lane=2), request("2", ("default", "x/2"), lane=2), limits=full)
    requests = [request("now", ("default", "x/3"), lane=0)]
    outcomes, leaving = b.journal.enqueue(requests, limits=full, retry_after_s=1.0, aging_s=30.0)
    assert outcomes[0].refused is None
    assert [(c.entry.key.request_id, c.why, c.by_own_level) for c in leaving] == [("2", "evicted", True)]
    b.end("2", ("default", "x/2"))
    assert a.takes(5) == ["now", "1"]


def test_places_are_told_as_on_one_box(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    made = [request(str(n), ("default", f"s{n}")) for n in range(4)]
    assert [outcome.position for outcome in a.enqueue(*made)] == [0, 0, 1, 2]
    assert len(b.claim(1)) == len(a.claim(1)) == 1
    keys = [r.entry.key for r in made]
    assert a.journal.watched([*keys, key("unknown")]) == {keys[2]: 1, keys[3]: 2}


# --- cancels -------------------------------------------------------------------------------------------------------------


def test_a_cancel_works_whoever_receives_it(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    notices: list[Notice] = []
    a.journal.listen(notices.append)
    eventually(lambda: Notice("work") in notices)
    b.enqueue(request("1"), request("2"), request("3"))
    assert a.takes() == ["1"]
    found = b.journal.cancel(SESSION, "2")
    assert [(c.entry.key.request_id, c.why) for c in found.claimed] == [("2", "cancelled")]
    assert b.journal.cancel(SESSION, "2").running_here == ()
    b.end("2")
    assert b.journal.cancel(SESSION, "2").ended
    found = b.journal.cancel(SESSION, "1")
    assert (found.claimed, found.running_here, found.running_elsewhere) == ((), (), 1)
    eventually(lambda: Notice("cancel", key("1")) in notices)
    assert a.journal.renew().cancelled == (key("1"),)
    assert a.journal.cancel(SESSION, "1").running_here == (key("1"),)
    found = b.journal.cancel(SESSION, None, forget=True)
    assert [(c.entry.key.request_id, c.why) for c in found.claimed] == [("3", "forgotten")]
    eventually(lambda: Notice("forget", key("1")) in notices)
    assert a.journal.renew().forgotten == (key("1"),)


def test_a_cancel_that_comes_before_its_request_ends_it_at_once(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    assert not a.journal.cancel(SESSION, "early").ended
    outcomes, leaving = b.journal.enqueue(
        [request("early"), request("2")], limits=LIMITS, retry_after_s=1.0, aging_s=30.0
    )
    assert [outcome.known for outcome in outcomes] == [None, None]
    assert [(c.entry.key.request_id, c.why) for c in leaving] == [("early", "cancelled")]
    b.end("early")
    assert a.takes(5) == ["2"]


def test_a_request_whose_time_has_passed_is_handed_out_to_be_ended_even_without_a_free_slot(
    pool: Callable[..., Worker],
) -> None:
    a = pool("a")
    a.enqueue(request("late", expires_at=NOW + 0.01), request("2", OTHER))
    eventually(lambda: a.journal.load().oldest_wait_s > 0.05)
    assert [(c.entry.key.request_id, c.why) for c in a.claim(0)] == [("late", "expired")]
    assert a.takes(3) == ["2"]


def test_a_held_session_waits(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    a.enqueue(request("1"), request("2"))
    assert b.takes() == ["1"]
    a.journal.hold_session(SESSION, hold_s=60.0)
    assert a.journal.running_in(SESSION) == 1
    b.end("1")
    assert a.takes() == []
    assert a.journal.running_in(SESSION) == 0
    a.journal.free_session(SESSION)
    assert b.takes() == ["2"]


def test_a_snapshot_is_asked_of_the_worker_that_runs_the_request(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    notices: list[Notice] = []
    b.journal.listen(notices.append)
    a.enqueue(request("1"))
    assert not a.journal.ask_snapshot(key("1"))
    b.claim()
    eventually(lambda: notices)
    assert a.journal.ask_snapshot(key("1"))
    eventually(lambda: Notice("snapshot", key("1")) in notices)


def test_what_was_claimed_can_be_given_back(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    a.enqueue(request("1"), request("2", OTHER))
    assert a.takes() == ["1"]
    b.journal.release([key("1")])
    assert b.takes(0) == []
    a.journal.release([key("1")])
    a.journal.update(Member(worker_id="a", instance="a-1", slots=1, draining=True))
    assert a.takes(5) == []
    assert b.takes(5) == ["2", "1"]  # the level of 1 had its turn


# --- leases --------------------------------------------------------------------------------------------------------------


def test_another_worker_ends_what_a_dead_one_streamed_and_runs_the_rest(pool: Callable[..., Worker]) -> None:
    # Long enough for what `a` does before, on a busy machine too; b renews its own while it waits.
    a, b = pool("a", lease_s=3.0), pool("b", lease_s=3.0)
    a.enqueue(*(request(str(n), ("default", f"s{n}")) for n in range(4)))
    assert len(a.claim(3)) == 3
    streamed, started, ended = (e.key for e in a.journal.unfinished())
    a.journal.mark_started(started)
    a.journal.mark_streaming(streamed)
    a.journal.finish(ended, b"end", now=NOW)

    def seen() -> list[int]:
        b.journal.renew()
        return [other.fence for other in b.journal.overdue()]

    eventually(lambda: seen() == [a.fence])
    taken = b.journal.take_over(a.fence)
    assert [(c.entry.key, c.why, c.entry.terminal) for c in taken] == [
        (streamed, "interrupted", None),
        (ended, "ended", b"end"),
    ]
    assert b.journal.take_over(a.fence) == []
    assert [e.key for e in b.journal.undelivered()] == [ended]
    waited = {c.entry.key: c.entry.starts for c in b.claim(5)}
    assert waited[started] == 1
    assert len(waited) == 2  # and the one that nobody had
    for write in (
        lambda: a.journal.finish(streamed, b"zombie", now=NOW, history=change("z", "z")),
        lambda: a.journal.mark_streaming(started),
        lambda: a.journal.mark_started(started),
        a.journal.renew,
        a.claim,
    ):
        with pytest.raises(LeaseLost):
            write()
    assert a.journal.history((streamed.route, streamed.session)) == ()
    b.journal.finish(streamed, b"interrupted", now=NOW)
    fence = a.journal.join(a.member)
    assert fence > b.fence > a.fence


def test_a_dead_worker_is_taken_over_although_the_clock_of_the_database_was_set_back(
    pool: Callable[..., Worker], postgres: PostgresServer
) -> None:
    a, b, c = (pool(name, lease_s=3.0) for name in "abc")
    a.enqueue(request("1"))
    assert a.takes() == ["1"]
    a.journal.mark_streaming(key("1"))
    # All that the database has written was written an hour later than now.
    postgres.sql(
        f"UPDATE {a.journal._database.schema}.members SET lease_until = lease_until + interval '1 h', "
        "fresh_since = fresh_since + interval '1 h'"
    )

    def seen() -> list[list[int]]:
        for other in (b, c):
            other.journal.renew()
        return [[gone.fence for gone in other.journal.overdue()] for other in (b, c)]

    assert seen() == [[], []]
    eventually(lambda: seen() == [[a.fence], [a.fence]])
    assert [taken.why for taken in c.journal.take_over(a.fence)] == ["interrupted"]


def test_a_worker_that_comes_back_under_its_name_is_over_as_what_it_was(pool: Callable[..., Worker]) -> None:
    a = pool("a")
    a.enqueue(request("1"), request("2", OTHER))
    assert a.takes() == ["1"]
    a.journal.mark_streaming(key("1"))
    again = pool("a")
    with pytest.raises(LeaseLost):
        a.journal.renew()
    assert [other.fence for other in again.journal.overdue()] == [a.fence]
    assert [c.why for c in again.journal.take_over(a.fence)] == ["interrupted"]


def test_who_leaves_leaves_what_waits_to_others(pool: Callable[..., Worker]) -> None:
    a, b = pool("a", slots=3), pool("b")
    a.enqueue(request("1"), request("2", OTHER))
    assert len(a.claim(2)) == 2
    a.end("1")
    a.journal.leave()
    with pytest.raises(LeaseLost):
        a.claim()
    assert b.takes(3) == ["2"]
    (gone,) = b.journal.overdue()
    assert [(c.entry.key, c.why) for c in b.journal.take_over(gone.fence)] == [(key("1"), "ended")]
    assert [e.key for e in b.journal.undelivered()] == [key("1")]
    assert [seen.member.worker_id for seen in b.journal.load().members] == ["b"]


def test_one_worker_leads_until_it_is_gone(pool: Callable[..., Worker]) -> None:
    a, b = pool("a"), pool("b")
    assert a.journal.lead()
    assert not b.journal.lead()
    assert a.journal.lead()
    a.journal.close()
    eventually(b.journal.lead)
    assert not a.journal.lead()


# --- many at once --------------------------------------------------------------------------------------------------------


def test_many_workers_at_once_run_everything_once_and_each_session_in_order(pool: Callable[..., Worker]) -> None:
    workers = [pool(f"w{n}", slots=2) for n in range(5)]
    sessions = [("default", f"u{n % 4}/s{n}") for n in range(10)]
    limits = QueueLimits(queue_size=1000, session_queue=100, share=1.0)
    turns, failures = 8, []
    total = len(sessions) * turns
    done: list[str] = []

    def feed() -> None:
        for turn in range(turns):
            workers[turn % 5].enqueue(*(request(f"{turn}", session) for session in sessions), limits=limits)

    def work(worker: Worker) -> None:
        try:
            while len(done) < total:
                for claimed in worker.claim(2):
                    chosen = claimed.entry.key
                    session = (chosen.route, chosen.session)
                    assert worker.journal.mark_started(chosen) == 1
                    worker.journal.mark_streaming(chosen)
                    history = change(chosen.request_id, "yo", session=session)
                    worker.journal.finish(chosen, b"end", now=NOW, history=history)
                    done.append(chosen.request_id)
        except BaseException as error:  # noqa: BLE001  brought back to the test's thread
            failures.append(error)
            done.extend([""] * total)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    threads.append(threading.Thread(target=feed))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    for session in sessions:
        contents = [m["content"] for m in workers[0].journal.history(session)]
        assert contents[::2] == [str(turn) for turn in range(turns)]
    assert len(done) == total


def test_what_was_taken_over_to_be_ended_and_given_back_is_ended_by_another(pool: Callable[..., Worker]) -> None:
    a = pool("a")
    a.enqueue(request("1"))
    assert a.takes() == ["1"]
    a.journal.mark_streaming(key("1"))
    again = pool("a")
    (taken,) = again.journal.take_over(a.fence)
    again.journal.release([taken.entry.key])
    (claimed,) = pool("b").claim()
    assert (claimed.entry.key, claimed.why) == (key("1"), "interrupted")


def test_many_claims_at_once_never_wait_for_each_other_in_a_circle(
    postgres: PostgresServer, pool: Callable[..., Worker]
) -> None:
    def deadlocks() -> object:
        return postgres.sql("SELECT sum(deadlocks) FROM pg_stat_database")[0][0]

    before = deadlocks()
    workers = [pool(f"w{n}", slots=8) for n in range(3)]
    limits = QueueLimits(queue_size=10_000, session_queue=100, share=1.0)
    failures: list[BaseException] = []

    def live(number: int) -> None:
        worker = workers[number % 3]
        try:
            for turn in range(8):
                session = ("default", f"u{(number * 5 + turn * 3) % 7}/s{number}")
                worker.enqueue(request(f"{number}-{turn}", session), limits=limits)
                for claimed in worker.claim(1):
                    worker.journal.finish(claimed.entry.key, b"end", now=NOW)
        except BaseException as error:  # noqa: BLE001  brought back to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for worker in workers:
        worker.journal.close()  # a connection counts what it met when it ends
    assert failures == []
    assert deadlocks() == before
