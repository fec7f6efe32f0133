"""One run: the schedule meets the world, the checker reads along."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.checker import Checker
from tests.faults.history import Entry, Reader
from tests.faults.model import Broken
from tests.faults.pace import Pace
from tests.faults.schedule import Fault
from tests.faults.wishes import LONG, MAX_TOKENS, SHORT, wishes
from tests.faults.world import World
from tests.support.bus_client import BusClient
from tests.support.daemon_process import DEFECTS
from tests.support.llama_server import LlamaServer

RECOVER_S = 30.0
"""A request begun after everything was mended ends within this time, or something is stuck."""
END_S = 45.0
"""The same for the end of the run."""
TICK_S = 0.02
CANCEL_TOKENS = 500
"""As many more as the worker saw may be generated for a cancelled request: the server is ahead by what the line holds back (4 tokens
on a machine at rest, 102 on a busy one). Whoever is never told that the client hung up generates 1 009."""


@dataclass(slots=True)
class Happening:
    """A fault under way, and how long it took until a new request ended well after it."""

    fault: Fault
    began_at: float
    mended_at: float | None = None
    begun_before: int = 0
    """How many requests the clients had begun when it ended."""
    recovered_s: float | None = None
    stuck: bool = False


@dataclass(slots=True)
class Figures:
    """What a run shows while it runs and in the end."""

    requests: int
    planned: int
    began_at: float
    happenings: list[Happening] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    left_out_faults: int = 0
    took_s: float = 0.0
    lives: int = 0
    broken: list[Broken] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Rows of the table: what it is, and how many."""

    def by_kind(self) -> Counter[str]:
        return Counter(happening.fault.kind for happening in self.happenings)

    def recovery_by_kind(self) -> dict[str, tuple[int, float, float]]:
        """Times, median and worst for each kind."""
        found = {}
        for kind, times in sorted(self.by_kind().items()):
            seconds = [
                h.recovered_s for h in self.happenings if h.fault.kind == kind and h.recovered_s is not None
            ] or [math.nan]
            found[kind] = (times, statistics.median(seconds), max(seconds))
        return found

    def recoveries(self) -> list[float]:
        return [happening.recovered_s for happening in self.happenings if happening.recovered_s is not None]

    def median_s(self) -> float:
        return statistics.median(self.recoveries() or [0.0])

    def worst_s(self) -> float:
        return max(self.recoveries() or [0.0])


Show = Callable[[Figures, Checker, World], None]


class Run:
    def __init__(
        self,
        *,
        seed: int,
        requests: int,
        faults: Sequence[Fault],
        clients: int = 5,
        window: int = 3,
        without: Sequence[str] = (),
        show: Show | None = None,
        world: type[World] = World,
    ) -> None:
        self._world_of = world
        self._seed, self._requests, self._clients, self._window = seed, requests, clients, window
        self._faults = list(faults)
        self._without = tuple(without)
        self._show = show or (lambda *_: None)
        self.figures = Figures(requests, len(self._faults), time.monotonic())
        self._pace = Pace(clients)
        self._quiet_since = time.monotonic()

    def go(self, folder: Path) -> Figures:
        """Everything; the folder holds the histories and logs afterwards."""
        figures = self.figures
        with self._world_of(
            folder, seed=self._seed, clients=self._clients, requests=self._requests, window=self._window
        ) as world:
            self._world = world
            self._leave_out(world)
            answers = known_answers(world.engine)
            planned = {
                client.name: wishes(
                    client=client.name, seed=self._seed, count=world.count, without=world.without(client, self._without)
                )
                for client in world.clients
            }
            kinds = frozenset(fault.kind for fault in self._faults)
            self.checker = checker = Checker(planned, answers, kinds, by_package=world.by_package())
            self._readers = {client.name: Reader(folder / f"{client.name}.jsonl") for client in world.clients}
            self._allow(world)
            world.start_clients(self._without)
            self._loop(world)
            self._mend_all(world)
            figures.broken += self._epilogue(world)
            self._read()
            figures.broken += world.broken + checker.close()
        ends = ", ".join(f"{code} {count}" for code, count in checker.ends.most_common())
        figures.notes = [
            f"asked again after a retryable end, sent again | {checker.retries}, {checker.resends}",
            f"terminal events that came again, identical | {checker.repeats}",
            f"histories compared | {checker.histories}",
            f"ends | {ends}",
            *world.notes(),
        ]
        figures.took_s = time.monotonic() - figures.began_at
        figures.lives = len(world.logs())
        return figures

    def _leave_out(self, world: World) -> None:
        for kind in {fault.kind for fault in self._faults}:
            if why := world.why_not(kind):
                self.figures.left_out[kind] = why
        self._faults = [fault for fault in self._faults if fault.kind not in self.figures.left_out]
        self.figures.left_out_faults = self.figures.planned - len(self._faults)

    # --- the loop ------------------------------------------------------------------------------------------------------

    def _loop(self, world: World) -> None:
        pause = threading.Event()
        waiting = list(self._faults)
        stuck_at = time.monotonic() + END_S
        seen = (0, 0)
        while not world.over():
            pause.wait(TICK_S)
            now = time.monotonic()
            self._read()
            world.watch()
            self._mend_due(world, now)
            if waiting and self._may_begin(waiting[0], now):
                fault = waiting.pop(0)
                if world.begin(fault):
                    self.figures.happenings.append(Happening(fault, time.monotonic()))
            self._next = waiting[0] if waiting else None
            self._allow(world)
            self._show(self.figures, self.checker, world)
            if (at := (self.checker.done, len(self.figures.happenings))) != seen:
                seen, stuck_at = at, now + END_S
            if now > stuck_at:
                self.figures.broken.append(Broken("stuck", "", f"nothing ended for {END_S:g} s"))
                return

    _next: Fault | None = None

    def _allow(self, world: World) -> None:
        """The clients keep pace with the faults, and something new is asked after each."""
        following = self._next if self.figures.happenings or self._next else self._faults[0] if self._faults else None
        if following is None:
            world.allow(10**9)
            return
        begun, after = self.checker.begun, following.after
        unrecovered = self._unrecovered()
        needed = self.checker.open == 0 and (begun < after or bool(unrecovered))
        # One of each client: what was asked before the end of a fault says nothing of what is after it.
        needed = needed or any(h.mended_at is not None and begun < h.begun_before + self._clients for h in unrecovered)
        world.allow(self._pace.allowed(after=after, begun=begun, needed=needed, now=time.monotonic()))

    def _unrecovered(self) -> list[Happening]:
        return [h for h in self.figures.happenings if h.recovered_s is None and not h.stuck]

    def _may_begin(self, fault: Fault, now: float) -> bool:
        if self.checker.begun < fault.after:
            return False
        under_way = [h for h in self.figures.happenings if h.mended_at is None]
        if any(h.fault.target == fault.target for h in under_way):
            return False
        return not (fault.alone and self._unrecovered())

    def _mend_due(self, world: World, now: float) -> None:
        for happening in self.figures.happenings:
            if happening.mended_at is None and now >= happening.began_at + happening.fault.lasts_s:
                world.mend(happening.fault)
                happening.mended_at, happening.begun_before = time.monotonic(), self.checker.begun
        for happening in self._unrecovered():
            if happening.mended_at is not None and now > happening.mended_at + RECOVER_S:
                happening.stuck = True
                what = f"{RECOVER_S:g} s after {happening.fault} nothing new had ended well"
                self.figures.broken.append(Broken("stuck", "", what))

    def _mend_all(self, world: World) -> None:
        for happening in self.figures.happenings:
            if happening.mended_at is None:
                world.mend(happening.fault)
                happening.mended_at = time.monotonic()

    def _read(self) -> None:
        for name, reader in self._readers.items():
            for entry in reader.news():
                self.checker.take(name, entry)
                self._world.saw(name, entry)
                if entry.what == "ended":
                    self._recovered(name, entry)

    def _recovered(self, client: str, entry: Entry) -> None:
        sent_at = self.checker.first_sent.get(entry.request_id)
        if sent_at is None:
            return
        for happening in self._unrecovered():
            fault = happening.fault
            mine = not fault.target.startswith("client") or self._world.client_of(fault).name == client
            if happening.mended_at is not None and sent_at >= happening.mended_at and mine:
                happening.recovered_s = entry.at - happening.mended_at

    # --- the end -------------------------------------------------------------------------------------------------------

    def _epilogue(self, world: World) -> list[Broken]:
        """When all is calm: no slot at work, a cancelled request frees its slot before it says so, a clean end, a clean log."""
        broken: list[Broken] = []
        try:
            world.engine.idle_within(10.0)
            world.wait_ready()
            broken += cancelled_means_free(world)
        except (AssertionError, TimeoutError, OSError) as error:
            broken.append(Broken("slot", "", f"the engine is not idle after the last request: {error}"))
        broken += world.at_rest()
        broken += world.stop_workers()
        for life in world.logs():
            broken += [
                Broken("process", "", f"in {life.log_path.name}: {json.dumps(line)[:1500]}")
                for line in life.log()
                if line.get("event") in DEFECTS or "exception" in line
            ]
            if "Traceback" in (text := life.log_text()):
                at = text.index("Traceback")
                broken.append(Broken("process", "", f"in {life.log_path.name}: {text[at : at + 1500]}"))
        return broken


def cancelled_means_free(world: World) -> list[Broken]:
    """Cancels a long answer at its first chunk; asks again where the worker still recovers from the last fault.

    Not by how soon the slot is free: the server hears that its client hung up when it has its next token, which on a busy machine
    is later than a look at its slots. By what it went on to generate.
    """
    eos = _eos(world.engine)
    with BusClient(world.broker.port) as client:
        client.subscribe("llm/reply/probe/#")
        pause = threading.Event()
        end = _cancelled(client, "last-cancel-0", eos)
        for attempt in range(1, 40):
            if end.get("finish_reason") == "cancelled":
                break
            pause.wait(0.5)
            end = _cancelled(client, f"last-cancel-{attempt}", eos)
        else:
            return [Broken("slot", end["request_id"], f"the last request ended with {end.get('code') or end}")]
    world.engine.idle_within(10.0)
    generated = world.engine.last_tokens() - end["usage"]["prompt_tokens"]
    after = generated - end["usage"]["completion_tokens"]
    return (
        [Broken("slot", end["request_id"], f"{after} tokens generated after its end")] if after > CANCEL_TOKENS else []
    )


def _cancelled(client: BusClient, request_id: str, eos: int) -> dict[str, Any]:
    """The terminal event of a request that is cancelled at its first chunk, and would go on to the end of the context."""
    body = {"request_id": request_id, "messages": [{"role": "user", "content": LONG[0]}], "max_tokens": 1500}
    body |= {"temperature": 0, "logit_bias": {str(eos): -100}}
    client.publish("llm/request/probe/s", json.dumps(body).encode())
    while True:
        event: dict[str, Any] = json.loads(client.receive().payload)
        if event.get("final") and event["request_id"] == request_id:
            return event
        if event["type"] == "chunk" and event["seq"] == 0:
            cancel = {"action": "cancel", "request_id": request_id}
            client.publish("llm/control/probe/s", json.dumps(cancel).encode())


def _eos(engine: LlamaServer) -> int:
    """The token that ends an answer."""
    wish = {"content": engine.get("/props")[1]["eos_token"], "parse_special": True}
    (token,) = _post(engine, "/tokenize", wish)["tokens"]
    return int(token)


def known_answers(engine: LlamaServer) -> dict[str, str]:
    """The engine's own answer to each prompt, asked without anything in between."""
    return {prompt: _direct(engine, prompt) for prompt in SHORT + LONG}


def _direct(engine: LlamaServer, prompt: str) -> str:
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": MAX_TOKENS}
    return str(_post(engine, "/v1/chat/completions", body)["choices"][0]["message"]["content"])


def _post(engine: LlamaServer, path: str, body: Mapping[str, Any]) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())


def run(
    *,
    seed: int,
    requests: int,
    faults: Sequence[Fault],
    keep: Path | None = None,
    show: Show | None = None,
    without: Sequence[str] = (),
    window: int = 3,
    world: type[World] = World,
) -> Figures:
    """One run in a folder that is gone afterwards, unless something broke and `keep` names a place for it."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        made = Run(seed=seed, requests=requests, faults=faults, show=show, without=without, window=window, world=world)
        figures = made.go(folder)
        if figures.broken and keep is not None:
            shutil.copytree(folder, keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
        return figures
    finally:
        shutil.rmtree(folder, ignore_errors=True)
