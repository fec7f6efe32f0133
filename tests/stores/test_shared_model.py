"""Any sequence of steps of several workers on one journal: every request has one owner and one end, every session its order."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.pool_ports import Claimed, LeaseLost, Member, PoolRequest
from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.support.postgres_server import shared_postgres
from tests.support.store_cases import NOW, change, database_in, entry

SESSIONS = [("default", "a/1"), ("default", "b"), ("maze", "a/1")]
LIMITS = QueueLimits(queue_size=6, session_queue=2)
WORKERS = 3

workers = st.integers(0, WORKERS - 1)
sessions = st.sampled_from(SESSIONS)
seldom = st.sampled_from([False, False, False, True])
mostly = st.sampled_from([True, True, True, False])


@dataclass
class Known:
    """What the test knows of a request."""

    key: EntryKey
    in_turn: bool
    owner: int | None = None
    streaming: bool = False
    ending: str | None = None
    terminal: bytes | None = None


@dataclass
class Worker:
    journal: SharedPostgresJournal
    fence: int = 0
    over: bool = False
    """Its lease is over, and nobody has taken over yet."""
    dead: bool = False
    """Somebody has; it does not know."""
    had: list[EntryKey] = field(default_factory=list)
    undelivered: list[EntryKey] = field(default_factory=list)
    """Ends that it has to deliver."""


class Workers(RuleBasedStateMachine):
    """Three journals on one schema against dictionaries."""

    @initialize()
    def begin(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pool-"))
        self.server = shared_postgres()
        self.schema = database_in(self.server, self.directory).schema
        self.requests: dict[EntryKey, Known] = {}
        self.order: list[EntryKey] = []
        self.ended: list[EntryKey] = []
        self.told: dict[tuple[str, str], list[str]] = {session: [] for session in SESSIONS}
        self.early: set[EntryKey] = set()
        self.number = 0
        self.workers: list[Worker] = []
        for _ in range(WORKERS):
            journal = SharedPostgresJournal(database_in(self.server, self.directory), lease_s=600.0)
            journal.open()
            self.workers.append(Worker(journal))
            self._join(len(self.workers) - 1)

    def teardown(self) -> None:
        if not hasattr(self, "workers"):
            return
        try:
            self._everything_comes_to_its_end()
        finally:
            for worker in self.workers:
                worker.journal.close()
            self.server.sql(f"DROP SCHEMA {self.schema} CASCADE")
            shutil.rmtree(self.directory)

    def _join(self, number: int) -> None:
        worker = self.workers[number]
        fence = worker.journal.join(Member(worker_id=f"w{number}", instance="i", slots=2))
        assert fence > max((other.fence for other in self.workers), default=0)
        worker.fence, worker.over, worker.dead, worker.had = fence, False, False, []

    def _claimed(self, number: int, claimed: list[Claimed]) -> None:
        for each in claimed:
            known = self.requests[each.entry.key]
            assert known.owner is None
            assert known.terminal is None
            if each.why == "run":
                assert known.ending is None
                assert not known.streaming
                before = [self.requests[k] for k in self.order if self._same_session(k, known.key)]
                for other in before[: [o.key for o in before].index(known.key)]:
                    assert not (known.in_turn and other.in_turn) or other.terminal is not None, (
                        "an earlier prompt waits"
                    )
            else:
                known.ending = each.why
            known.owner = number
            self.workers[number].had.append(known.key)

    @staticmethod
    def _same_session(one: EntryKey, other: EntryKey) -> bool:
        return (one.route, one.session) == (other.route, other.session)

    # --- what workers do -----------------------------------------------------------------------------------------------

    @rule(number=workers, session=sessions, in_turn=mostly, lane=st.integers(0, 2), again=seldom)
    def enqueue(self, number: int, session: tuple[str, str], *, in_turn: bool, lane: int, again: bool) -> None:
        worker = self.workers[number]
        mine = [key for key in self.order if (key.route, key.session) == session]
        if again and mine:
            key = mine[-1]
        else:
            self.number += 1
            key = EntryKey(*session, f"r{self.number}")
        request = PoolRequest(
            entry=entry(key.request_id, session), first_level=session[1].partition("/")[0], lane=lane, in_turn=in_turn
        )
        if worker.dead:
            self._refused(lambda: worker.journal.enqueue([request], limits=LIMITS, retry_after_s=1, aging_s=30))
            return
        outcomes, leaving = worker.journal.enqueue([request], limits=LIMITS, retry_after_s=1.0, aging_s=30.0)
        (outcome,) = outcomes
        if key in self.requests:
            known = self.requests[key]
            assert outcome.known is not None
            assert outcome.known.terminal == known.terminal
            assert outcome.owner == (None if known.owner is None else self.workers[known.owner].fence)
            return
        if outcome.refused is not None:
            return
        self.requests[key] = Known(key, in_turn)
        self.order.append(key)
        if key in self.early:
            self.early.discard(key)
            assert [(c.entry.key, c.why) for c in leaving] == [(key, "cancelled")]
        self._claimed(number, leaving)

    @rule(number=workers, free=st.integers(0, 4))
    def claim(self, number: int, free: int) -> None:
        worker = self.workers[number]
        if worker.dead:
            self._refused(lambda: worker.journal.claim(free, models=(), aging_s=30.0, prefer_for_s=0.0))
            return
        claimed = worker.journal.claim(free, models=(), aging_s=30.0, prefer_for_s=0.0)
        if worker.over:
            assert claimed == []
        assert sum(each.why == "run" for each in claimed) <= free
        self._claimed(number, claimed)

    @rule(number=workers, place=st.integers(0, 5))
    def stream(self, number: int, place: int) -> None:
        worker, key = self._one_of(number, place)
        if key is None:
            return
        known = self.requests[key]
        if known.owner != number or worker.dead or known.terminal is not None:
            self._refused(lambda: worker.journal.mark_streaming(key)) if known.owner != number else None
            return
        worker.journal.mark_streaming(key)
        known.streaming = True

    @rule(number=workers, place=st.integers(0, 5), remembered=mostly)
    def finish(self, number: int, place: int, *, remembered: bool) -> None:
        worker, key = self._one_of(number, place)
        if key is None:
            return
        known, session = self.requests[key], (key.route, key.session)
        terminal = f"{key.request_id} by {worker.fence}".encode()
        history = change(key.request_id, "yo", session=session) if remembered else None

        def write() -> None:
            worker.journal.finish(key, terminal, now=NOW, history=history)

        if known.terminal == terminal:
            if not worker.dead:  # else the end is its heir's, who delivers it
                write()  # a second end changes nothing
        elif known.owner != number or worker.dead:
            self._refused(write)
        else:
            write()
            known.terminal, known.owner = terminal, None
            worker.undelivered.append(key)
            self.ended.append(key)
            if remembered:
                self.told[session].append(key.request_id)

    @rule(number=workers, place=st.integers(0, 5))
    def release(self, number: int, place: int) -> None:
        worker, key = self._one_of(number, place)
        if key is None:
            return
        worker.journal.release([key])
        known = self.requests[key]
        to_be_ended = known.ending not in (None, "asked")
        may = not known.streaming or to_be_ended
        if known.owner == number and not worker.dead and may and known.terminal is None:
            known.owner = None

    @rule(number=workers, session=sessions, whole=seldom, place=st.integers(0, 8), early=seldom)
    def cancel(self, number: int, session: tuple[str, str], *, whole: bool, place: int, early: bool) -> None:
        worker = self.workers[number]
        mine = [key for key in self.order if (key.route, key.session) == session]
        request_id = None if whole else (mine[place % len(mine)].request_id if mine else "unknown")
        if early and not whole:
            request_id = f"r{self.number + 1}"
        if worker.dead:
            self._refused(lambda: worker.journal.cancel(session, request_id))
            return
        found = worker.journal.cancel(session, request_id)
        if request_id is not None and EntryKey(*session, request_id) not in self.requests:
            self.early.add(EntryKey(*session, request_id))
        asked = [self.requests[k] for k in mine if request_id in (None, k.request_id)]
        waiting = {each.key for each in asked if each.owner is None and each.terminal is None}
        assert {each.entry.key for each in found.claimed} == waiting
        assert set(found.running_here) == {e.key for e in asked if e.owner == number and e.ending in (None, "asked")}
        assert found.running_elsewhere == sum(each.owner not in (None, number) for each in asked)
        for each in asked:
            if each.owner is not None and each.owner != number and each.ending is None:
                each.ending = "asked"
        self._claimed(number, list(found.claimed))

    @rule(number=workers)
    def lease_ends(self, number: int) -> None:
        worker = self.workers[number]
        if not worker.dead:
            self.server.sql(
                f"UPDATE {self.schema}.members SET lease_until = 'epoch' WHERE fence = {worker.fence} RETURNING fence"
            )
            worker.over = True

    @rule(number=workers, other=workers)
    def take_over(self, number: int, other: int) -> None:
        mine, theirs = self.workers[number], self.workers[other]
        if number == other:
            return
        if mine.dead or mine.over:
            if mine.dead:
                self._refused(lambda: mine.journal.take_over(theirs.fence))
            return
        taken = mine.journal.take_over(theirs.fence)
        if not theirs.over or theirs.dead:
            assert taken == []
            return
        theirs.dead = True
        told = [each.entry.key for each in taken if each.why == "ended"]
        assert told == sorted(theirs.undelivered, key=self.ended.index)
        mine.undelivered += told
        theirs.undelivered = []
        taken = [each for each in taken if each.why != "ended"]
        left = [known for known in self.requests.values() if known.owner == other]
        for known in left:
            known.owner = None
        to_end = {known.key for known in left if known.streaming or known.ending is not None}
        assert {each.entry.key for each in taken} == to_end
        for each in taken:
            if self.requests[each.entry.key].streaming and self.requests[each.entry.key].ending in (None, "asked"):
                assert each.why == "interrupted"
        self._claimed(number, taken)

    @rule(number=workers)
    def join(self, number: int) -> None:
        worker = self.workers[number]
        if not worker.dead:
            return
        self._join(number)

    # --- what always holds ---------------------------------------------------------------------------------------------

    @invariant()
    def every_end_and_every_history_is_as_told(self) -> None:
        if not hasattr(self, "workers"):
            return
        reader = self.workers[0].journal
        for session, told in self.told.items():
            assert [m["content"] for m in reader.history(session)][::2] == told
        for key, known in self.requests.items():
            found = reader.find(key)
            assert found is not None
            assert found.terminal == known.terminal

    @invariant()
    def every_worker_has_what_it_should(self) -> None:
        for number, worker in enumerate(getattr(self, "workers", ())):
            mine = [key for key in self.order if self.requests[key].owner == number]
            assert [e.key for e in worker.journal.unfinished()] == ([] if worker.dead else mine)

    # --- helpers -------------------------------------------------------------------------------------------------------

    def _one_of(self, number: int, place: int) -> tuple[Worker, EntryKey | None]:
        """One of those that the worker has, or has had in this life."""
        worker = self.workers[number]
        return worker, worker.had[-1 - place % min(4, len(worker.had))] if worker.had else None

    @staticmethod
    def _refused(write: object) -> None:
        assert callable(write)
        try:
            write()
        except LeaseLost:
            return
        raise AssertionError("a worker wrote what is not its own")

    def _everything_comes_to_its_end(self) -> None:
        """Whatever happened: a worker that lives gets all that is left, and can end it."""
        last = SharedPostgresJournal(database_in(self.server, self.directory), lease_s=600.0)
        last.open()
        try:
            last.join(Member(worker_id="last", instance="i", slots=9))
            for worker in self.workers:
                self.server.sql(
                    f"UPDATE {self.schema}.members SET lease_until = 'epoch' WHERE fence = {worker.fence} RETURNING fence"
                )
                for each in last.take_over(worker.fence):
                    if each.why != "ended":
                        last.finish(each.entry.key, b"end", now=NOW)
            while claimed := last.claim(9, models=(), aging_s=30.0, prefer_for_s=0.0):
                for each in claimed:
                    last.finish(each.entry.key, b"end", now=NOW)
            found = [last.find(key) for key in self.order]
            assert all(each is not None and each.state == "ended" for each in found)
            assert last.unfinished() == []
            undelivered = {each.key for each in last.undelivered()}
            assert undelivered == set(self.order), "every end is somebody's to deliver"
        finally:
            last.close()


Workers.TestCase.settings = settings(
    max_examples=10,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TestWorkers = Workers.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_a_long_walk_with_full_queues_keeps_what_always_holds(seed: int) -> None:
    """Beside the machine above, which prefers short and simple walks."""
    chance = random.Random(seed)
    walk = Workers()
    walk.begin()

    def number() -> int:
        return chance.randrange(WORKERS)

    def session() -> tuple[str, str]:
        return chance.choice(SESSIONS)

    def enqueue() -> None:
        walk.enqueue(
            number(), session(), in_turn=chance.random() < 0.8, lane=chance.randrange(3), again=chance.random() < 0.2
        )

    def cancel() -> None:
        walk.cancel(
            number(), session(), whole=chance.random() < 0.3, place=chance.randrange(9), early=chance.random() < 0.3
        )

    steps: dict[Callable[[], None], int] = {
        enqueue: 8,
        lambda: walk.claim(number(), chance.randrange(5)): 4,
        lambda: walk.stream(number(), chance.randrange(9)): 3,
        lambda: walk.finish(number(), chance.randrange(9), remembered=chance.random() < 0.8): 8,
        lambda: walk.release(number(), chance.randrange(9)): 1,
        cancel: 2,
        lambda: walk.lease_ends(number()): 1,
        lambda: walk.take_over(number(), number()): 3,
        lambda: walk.join(number()): 3,
    }
    try:
        for step in chance.choices([*steps], [*steps.values()], k=400):
            step()
            walk.every_worker_has_what_it_should()
        walk.every_end_and_every_history_is_as_told()
        assert sum(known.terminal is not None for known in walk.requests.values()) > 10
    finally:
        walk.teardown()
