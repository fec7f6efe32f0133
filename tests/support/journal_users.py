"""Workers of a pool that do nothing but use their common journal: accept, stream and end requests, and note what it confirmed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.spending import Spent
from llamacpp_mqtt_deploy.pool_ports import Claimed, LeaseLost, Member, PoolRequest
from llamacpp_mqtt_deploy.ports import EntryKey, StoreError
from llamacpp_mqtt_deploy.stores.postgres.database import Database
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.support.store_cases import NOW, change, entry

LEASE_S = 5.0
TOKENS_IN, TOKENS_OUT = 2, 5
"""Of each answer that came to its end."""

_LIMITS = QueueLimits(queue_size=48, session_queue=6)
_SESSIONS = 3
_PAUSE_S = 0.02
_RENEW_EVERY_S = 0.2


def answer_to(request_id: str) -> str:
    return f"answer to {request_id}"


def is_turn(request_id: str) -> bool:
    """Whether it is a prompt of its session's conversation; others wait for nobody and leave no history."""
    return not request_id.endswith("m")


@dataclass
class Confirmed:
    """What the journal has said that it has, each with the time when it said so (monotonic seconds)."""

    accepted: dict[EntryKey, float] = field(default_factory=dict)
    streaming: dict[EntryKey, float] = field(default_factory=dict)
    ended: dict[EntryKey, tuple[float, bytes]] = field(default_factory=dict)
    fences: dict[int, float] = field(default_factory=dict)
    members: dict[int, Member] = field(default_factory=dict)

    def count(self) -> int:
        return len(self.accepted) + len(self.streaming) + len(self.ended)


class ConfirmationLog:
    """What is confirmed to all users; may be written from any thread. `faults` is what must never be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._confirmed = Confirmed()
        self.faults: list[str] = []
        self.failed = 0
        """How many writes were refused."""

    def copy(self) -> Confirmed:
        with self._lock:
            now = self._confirmed
            return Confirmed(
                dict(now.accepted), dict(now.streaming), dict(now.ended), dict(now.fences), dict(now.members)
            )

    def count(self) -> int:
        with self._lock:
            return self._confirmed.count()

    def fault(self, words: str) -> None:
        with self._lock:
            self.faults.append(words)

    def refused(self) -> None:
        with self._lock:
            self.failed += 1

    def joined(self, fence: int, member: Member, *, began: float) -> None:
        with self._lock:
            highest = max((each for each, at in self._confirmed.fences.items() if at < began), default=0)
            if fence <= highest or fence in self._confirmed.fences:
                self.faults.append(f"the fence {fence} came after {highest}")
            self._confirmed.fences[fence] = time.monotonic()
            self._confirmed.members[fence] = member

    def updated(self, fence: int, member: Member) -> None:
        with self._lock:
            self._confirmed.members[fence] = member

    def accepted(self, key: EntryKey) -> None:
        with self._lock:
            self._confirmed.accepted[key] = time.monotonic()

    def claimed(self, claimed: Claimed, *, began: float) -> None:
        key = claimed.entry.key
        with self._lock:
            ended_at, _ = self._confirmed.ended.get(key, (began, b""))
            if ended_at < began:
                self.faults.append(f"{key.request_id} had ended and was claimed")
            if claimed.why == "run" and self._confirmed.streaming.get(key, began) < began:
                self.faults.append(f"{key.request_id} had a chunk and was claimed to be run again")

    def streaming(self, key: EntryKey) -> None:
        with self._lock:
            self._confirmed.streaming[key] = time.monotonic()

    def ended(self, key: EntryKey, terminal: bytes) -> None:
        with self._lock:
            _, other = self._confirmed.ended.get(key, (0.0, terminal))
            if other != terminal:
                self.faults.append(f"{key.request_id} has two ends: {other!r} and {terminal!r}")
            self._confirmed.ended[key] = (time.monotonic(), terminal)


class JournalUser:
    """One life of a worker: a thread that accepts, two that run what they claim, and one that renews the lease, changes what others
    see of it and takes over. Who waits for the database tries again until `close`."""

    def __init__(self, database: Database, name: str, *, life: int, seed: int, notes: ConfirmationLog) -> None:
        self.journal = SharedPostgresJournal(database, lease_s=LEASE_S)
        self._member = Member(worker_id=name, instance=f"{name}-{life}", slots=2, version="0")
        self._name = f"{name}.{life}"
        self._user = name
        self._notes = notes
        self._seed = seed
        self._closing = threading.Event()
        self._accepting = threading.Event()
        self._fence = 0
        works = {"accepts": self._accept, "runs": self._run, "runs too": self._run, "renews": self._renew}
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, number), name=f"{self._name} {what}", daemon=True)
            for number, (what, work) in enumerate(works.items())
        ]

    def start(self) -> None:
        self.journal.open()
        self._accepting.set()
        self._join()
        for thread in self._threads:
            thread.start()

    def accept_no_more(self) -> None:
        self._accepting.clear()

    def close(self) -> None:
        """The end without a word, as when a worker is killed: what it had is for others."""
        self._closing.set()
        self.journal.close()
        for thread in self._threads:
            thread.join(60)
            if thread.is_alive():
                self._notes.fault(f"the thread {thread.name} does not end")

    def _guarded(self, work: Callable[[random.Random], None], number: int) -> None:
        try:
            work(random.Random(f"{self._seed} {self._name} {number}"))
        except BaseException as error:  # noqa: BLE001  brought back to the test's thread
            self._notes.fault(f"{threading.current_thread().name}: {type(error).__name__}: {error}")

    def _until_done(self, step: Callable[[], object]) -> bool:
        """Try until the journal has it; False when it never will: it is another worker's, or this one ends."""
        while not self._closing.is_set():
            try:
                step()
            except LeaseLost:
                return False
            except StoreError:
                self._notes.refused()
                self._closing.wait(_PAUSE_S)
            else:
                return True
        return False

    # --- accepting -----------------------------------------------------------------------------------------------------

    def _accept(self, chance: random.Random) -> None:
        number = 0
        while self._accepting.is_set() and not self._closing.is_set():
            number += 1
            self._enqueue(f"{self._name}-{number}{'m' if chance.random() < 0.2 else ''}", chance)

    def _enqueue(self, request_id: str, chance: random.Random) -> None:
        session = ("default", f"{self._user}/s{chance.randrange(_SESSIONS)}")
        request = PoolRequest(
            entry=entry(request_id, session),
            first_level=self._user,
            lane=chance.randrange(3),
            in_turn=is_turn(request_id),
        )
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                (outcome,), evicted = self.journal.enqueue([request], limits=_LIMITS, retry_after_s=1.0, aging_s=30.0)
            except LeaseLost:
                self._closing.wait(_PAUSE_S)
            except StoreError:
                self._notes.refused()
                self._closing.wait(_PAUSE_S)
            else:
                if outcome.known is not None:
                    self._notes.fault(f"{request_id} was said not to be written, and was")
                if outcome.refused is None:
                    self._notes.accepted(request.entry.key)
                else:
                    self._closing.wait(_PAUSE_S)
                self._take(evicted, began=began)
                return

    # --- running -------------------------------------------------------------------------------------------------------

    def _run(self, chance: random.Random) -> None:
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                claimed = self.journal.claim(1, models=(), aging_s=30.0, prefer_for_s=0.0)
            except StoreError:
                self._closing.wait(_PAUSE_S)
                continue
            self._take(claimed, began=began, streams=chance.random() < 0.7)
            if not claimed:
                self._closing.wait(_PAUSE_S / 4)

    def _take(self, claimed: Sequence[Claimed], *, began: float, streams: bool = False) -> None:
        for each in claimed:
            if each.why != "ended":
                self._notes.claimed(each, began=began)
                self._answer(each, streams=streams)

    def _answer(self, claimed: Claimed, *, streams: bool) -> None:
        key = claimed.entry.key
        if claimed.why != "run":
            self._end(key, claimed.why, spent=Spent(first_level=self._user))
            return
        if not self._until_done(lambda: self.journal.mark_started(key)):
            return
        if streams:
            if not self._until_done(lambda: self.journal.mark_streaming(key)):
                return
            self._notes.streaming(key)
        spent = Spent(first_level=self._user, tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT, engine_s=0.25)
        self._end(key, "done", spent=spent)

    def _end(self, key: EntryKey, how: str, *, spent: Spent) -> None:
        terminal = f"{how} {key.request_id} by {self._fence}".encode()
        session = (key.route, key.session)
        done = how == "done"
        turn = done and is_turn(key.request_id)
        history = change(key.request_id, answer_to(key.request_id), session=session) if turn else None
        chunks = f"chunks of {key.request_id}".encode() if done else None
        if self._until_done(
            lambda: self.journal.finish(key, terminal, now=NOW, history=history, chunks=chunks, spent=spent)
        ):
            self._notes.ended(key, terminal)

    # --- membership ----------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        began = time.monotonic()
        self._fence = self.journal.join(self._member)
        self._notes.joined(self._fence, self._member, began=began)

    def _renew(self, chance: random.Random) -> None:
        while not self._closing.wait(_RENEW_EVERY_S):
            try:
                self.journal.renew()
                self._change(chance)
                for gone in self.journal.overdue():
                    began = time.monotonic()
                    self._take(self.journal.take_over(gone.fence), began=began)
            except LeaseLost:
                self._until_done(self._join)
            except StoreError:
                self._notes.refused()

    def _change(self, chance: random.Random) -> None:
        """What others see of this worker."""
        member = replace(self._member, slots=chance.randint(1, 4), version=str(int(self._member.version) + 1))
        self.journal.update(member)
        self._member = member
        self._notes.updated(self._fence, member)
