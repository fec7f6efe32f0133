"""Any sequence of steps leaves the store with what the model knows, also across a restart."""

from __future__ import annotations

import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llamacpp_mqtt_deploy.core.spending import Spent
from llamacpp_mqtt_deploy.ports import EntryKey, HistoryChange
from tests.support.store_cases import NOW, entry, new_store
from tests.support.store_model import ModelStore

SESSIONS = [("default", "a/1"), ("default", "a/2"), ("default", "b"), ("maze", "a/1"), ("maze", "c")]
sessions = st.sampled_from(SESSIONS)
request_ids = st.sampled_from(["r1", "r2", "r3"])
keys = st.builds(lambda s, r: EntryKey(s[0], s[1], r), sessions, request_ids)
seconds = st.integers(0, 200_000).map(float)
texts = st.text(st.characters(codec="utf-8"), max_size=200)


class Stores(RuleBasedStateMachine):
    """A store that outlives its connections against the model of plain Python."""

    member = "sqlite"

    @initialize(bound=st.sampled_from([300, 4000]))
    def begin(self, bound: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="stores-"))
        self.real = new_store(self.member, self.directory, max_history_bytes=bound)
        self.model = ModelStore(max_history_bytes=bound)
        self.now = NOW
        self.real.open()
        self.model.open()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.real.close()
            shutil.rmtree(self.directory)

    @rule(passed=seconds)
    def time_passes(self, passed: float) -> None:
        self.now += passed

    @rule(chosen=st.lists(st.tuples(keys, texts), max_size=4))
    def accept(self, chosen: list[tuple[EntryKey, str]]) -> None:
        made = [
            entry(
                k.request_id,
                (k.route, k.session),
                payload=text.encode(),
                digest=sha256(text.encode()).hexdigest(),
                accepted_at=self.now,
            )
            for k, text in chosen
        ]
        self.real.accept(made)
        self.model.accept(made)

    @rule(chosen=keys)
    def start(self, chosen: EntryKey) -> None:
        assert self.real.mark_started(chosen) == self.model.mark_started(chosen)

    @rule(chosen=keys)
    def stream(self, chosen: EntryKey) -> None:
        self.real.mark_streaming(chosen)
        self.model.mark_streaming(chosen)

    @rule(chosen=keys, prompt=texts, answer=texts, new=st.booleans(), remembered=st.booleans())
    def finish(self, chosen: EntryKey, prompt: str, answer: str, *, new: bool, remembered: bool) -> None:
        history = HistoryChange(
            session=(chosen.route, chosen.session),
            append=({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}),
            forget_before=new,
        )
        spent = Spent(first_level=chosen.session, tokens_in=len(prompt), tokens_out=len(answer), engine_s=0.5)
        for store in (self.real, self.model):
            store.finish(chosen, answer.encode(), now=self.now, history=history if remembered else None, spent=spent)

    @rule(chosen=st.lists(keys, max_size=5))
    def deliver(self, chosen: list[EntryKey]) -> None:
        self.real.mark_delivered(chosen)
        self.model.mark_delivered(chosen)

    @rule(session=sessions)
    def reset(self, session: tuple[str, str]) -> None:
        self.real.reset(session)
        self.model.reset(session)

    @rule(session=sessions)
    def delete(self, session: tuple[str, str]) -> None:
        self.real.delete(session)
        self.model.delete(session)

    @rule(remember=seconds, ttl=seconds, most=st.integers(0, 5), ahead=st.sampled_from([0.0, -1e5, 1e5, -1.79e9]))
    def purge(self, remember: float, ttl: float, most: int, ahead: float) -> None:
        done = [
            s.purge(now=self.now + ahead, remember_s=remember, ttl_s=ttl, max_sessions=most)
            for s in (self.real, self.model)
        ]
        assert done[0] == done[1]

    @rule(forward=seconds)
    def set_the_clock_forward(self, forward: float) -> None:
        self.now += forward
        self.real.clock_was_set(forward, now=self.now).wait(10.0)
        self.model.clock_was_set(forward, now=self.now)
        # What it has begun to move is moved.
        self.purge(200_000.0, 200_000.0, 100, 0.0)

    @rule()
    def restart(self) -> None:
        self.real.close()
        self.real.open()

    @invariant()
    def both_know_the_same(self) -> None:
        assert self.real.unfinished() == self.model.unfinished()
        assert self.real.undelivered() == self.model.undelivered()
        assert self.real.ledger(since_day=0) == self.model.ledger(since_day=0)
        for route, session in SESSIONS:
            assert self.real.history((route, session)) == self.model.history((route, session))
            for request_id in ("r1", "r2", "r3"):
                chosen = EntryKey(route, session, request_id)
                assert self.real.find(chosen) == self.model.find(chosen)


Stores.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStores = Stores.TestCase


class StoresInPostgres(Stores):
    member = "postgres"


StoresInPostgres.TestCase.settings = settings(Stores.TestCase.settings, max_examples=12, stateful_step_count=30)
TestStoresInPostgres = StoresInPostgres.TestCase
