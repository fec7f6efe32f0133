"""`python -m tests.faults.soak --minutes 30`: a worker at full load with cancels, and whether it still needs what it needed at first."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sqlite3
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import override

from llamacpp_mqtt_deploy import demo_model
from tests.faults.picture import write_between
from tests.faults.wishes import LONG, MAX_TOKENS, SHORT
from tests.support.bus_client import BusClient
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

SLOTS = 8
ASKERS, WINDOW = 8, 4
"""Four requests for each slot: none is ever idle."""
SESSIONS = 3
CANCELLED = 0.25
"""Share of the requests that are cancelled at their first chunk, or while they wait."""
WARM_UP = 1 / 6
"""Of the whole time: 5 of 30 minutes."""
GROWTH = 1.05
"""Most memory at the end, in parts of that after the warm-up."""
SAMPLE_EVERY_S = 1.0
REST_S = 60.0
ROWS = 12  # of the printed table

SETTINGS: dict[str, Any] = {
    "limits.queue_size": 2 * ASKERS * WINDOW,
    "limits.session_queue": 2 * WINDOW,
    "limits.remember_s": 5,
    "sessions.max_sessions": 2 * ASKERS * SESSIONS,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """What the worker holds at one moment."""

    at_s: float
    rss_bytes: int
    threads: int
    descriptors: int
    rows: int
    database_bytes: int
    """Pages in use; what the file holds beyond them is used again."""
    ended: int
    cancelled: int


@dataclass(slots=True)
class Soaked:
    """What a run found: samples under load, and one at rest each time the load paused."""

    minutes: float
    samples: list[Sample] = field(default_factory=list)
    rests: list[Sample] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    def rss_between(self, begin: float, end: float) -> float:
        """Median under load between two shares of the time."""
        whole_s = self.minutes * 60
        return statistics.median(s.rss_bytes for s in self.samples if begin * whole_s <= s.at_s <= end * whole_s)

    def broken(self) -> list[str]:
        """Sentences; none when the worker needs at the end what it needed after the warm-up."""
        early, late = self.rss_between(WARM_UP, WARM_UP * 1.2), self.rss_between(1 - WARM_UP / 5, 1.0)
        found = []
        if late > early * GROWTH:
            found.append(f"memory grew from {_mib(early)} to {_mib(late)}")
        return found + grown(self.rests[0], self.rests[-1])


def grown(before: Sample, after: Sample) -> list[str]:
    """What is held at rest that was not held at an earlier rest."""
    found = [
        f"{name} at rest grew from {getattr(before, name)} to {getattr(after, name)}"
        for name in ("threads", "descriptors", "rows")
        if getattr(after, name) > getattr(before, name)
    ]
    # A page more or less: where rows fall into pages is SQLite's business.
    if after.database_bytes > before.database_bytes + 4 * 4096:
        found.append(f"the database at rest grew from {before.database_bytes} to {after.database_bytes} bytes")
    return found


class Asker(threading.Thread):
    """One user with a few sessions who keeps `WINDOW` requests under way while he may, and cancels some of them."""

    def __init__(self, port: int, name: str, *, may_ask: threading.Event, over: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self._may_ask, self._over = may_ask, over
        self._chosen = random.Random(name)
        self._number = 0
        self._to_cancel: dict[str, str] = {}
        self.open: set[str] = set()
        self.ends: Counter[str] = Counter()
        self.bus = BusClient(port, version="5" if name[-1] in "02468" else "3.1.1")
        self.bus.subscribe(f"llm/reply/{name}/#")

    @override
    def run(self) -> None:
        with self.bus:
            while not self._over.is_set():
                while self._may_ask.is_set() and len(self.open) < WINDOW:
                    self._ask()
                with contextlib.suppress(TimeoutError):
                    self._take(json.loads(self.bus.receive(0.2).payload))

    def forget_sessions(self) -> None:
        for session in self._sessions():
            self.bus.publish(f"llm/control/{session}", b'{"action":"delete"}')

    def _sessions(self) -> list[str]:
        return [f"{self.name}/s{number}" for number in range(SESSIONS)]

    def _ask(self) -> None:
        self._number += 1
        request_id = f"{self.name}-{self._number}"
        session = self._chosen.choice(self._sessions())
        prompt = self._chosen.choice(SHORT + LONG)
        body: dict[str, Any] = {"request_id": request_id, "max_tokens": MAX_TOKENS}
        match self._chosen.randrange(4):
            case 0:
                body |= {"prompt": prompt, "new": self._chosen.random() < 0.1}
            case 1:
                body |= {"messages": [{"role": "user", "content": prompt}], "stream": False}
            case _:
                body |= {"messages": [{"role": "user", "content": prompt}]}
        self.open.add(request_id)
        cancel = self._chosen.random() < CANCELLED
        if cancel and body.get("stream", True):
            self._to_cancel[request_id] = session
        self.bus.publish(f"llm/request/{session}", json.dumps(body).encode())
        if cancel and request_id not in self._to_cancel:
            self._cancel(request_id, session)

    def _take(self, event: dict[str, Any]) -> None:
        request_id = event.get("request_id", "")
        if event.get("type") == "chunk" and request_id in self._to_cancel:
            self._cancel(request_id, self._to_cancel.pop(request_id))
        if event.get("final") and request_id in self.open:
            self._to_cancel.pop(request_id, None)
            self.ends[event.get("finish_reason") or event["code"]] += 1
            self.open.discard(request_id)

    def _cancel(self, request_id: str, session: str) -> None:
        self.bus.publish(f"llm/control/{session}", json.dumps({"action": "cancel", "request_id": request_id}).encode())


class Soak:
    """A broker, an engine, a worker and those who ask. `load` and `rest` take turns."""

    def __init__(self, worker: DaemonProcess, askers: Sequence[Asker], may_ask: threading.Event) -> None:
        self._worker, self._askers, self._may_ask = worker, askers, may_ask
        self._began_at = time.monotonic()

    def load(self, until_s: float, tell: Callable[[Sample], None]) -> None:
        """Full load until so many seconds after the beginning."""
        self._may_ask.set()
        pause = threading.Event()
        while time.monotonic() < self._began_at + until_s:
            pause.wait(SAMPLE_EVERY_S)
            assert self._worker.process.poll() is None, f"the worker ended:\n{self._worker.log_text()[-3000:]}"
            tell(self.sample())

    def rest(self) -> Sample:
        """Let all requests end, forget all sessions, and wait until the worker has forgotten what ended."""
        self._may_ask.clear()
        eventually(lambda: not any(asker.open for asker in self._askers), REST_S)
        for asker in self._askers:
            asker.forget_sessions()
        eventually(lambda: self._rows("entries") + self._rows("sessions") == 0, REST_S, every_s=0.2)
        return self.sample()

    def sample(self) -> Sample:
        process = Path(f"/proc/{self._worker.process.pid}")
        status = process.joinpath("status").read_text()
        ends = sum((asker.ends for asker in self._askers), Counter[str]())
        with self._database() as database:
            tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            used = _value(database, "PRAGMA page_count") - _value(database, "PRAGMA freelist_count")
            return Sample(
                at_s=time.monotonic() - self._began_at,
                rss_bytes=self._worker.rss_bytes(),
                threads=int(status.partition("Threads:")[2].split()[0]),
                descriptors=len(list(process.joinpath("fd").iterdir())),
                rows=sum(_value(database, f'SELECT count(*) FROM "{table}"') for table in tables),
                database_bytes=used * _value(database, "PRAGMA page_size"),
                ended=ends.total(),
                cancelled=ends["cancelled"],
            )

    def _rows(self, table: str) -> int:
        with self._database() as database:
            return _value(database, f"SELECT count(*) FROM {table}")

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        path = self._worker.settings["sessions.path"]
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
            yield database


@contextlib.contextmanager
def soak(folder: Path, **settings: Any) -> Iterator[Soak]:
    """Everything started; nothing is left of it afterwards."""
    broker = Mosquitto(folder / "broker", settings=["max_queued_messages 100000", "set_tcp_nodelay true"])
    engine = LlamaServer(demo_model.path(), slots=SLOTS, n_ctx=2048, alias="demo")
    may_ask, over = threading.Event(), threading.Event()
    askers: list[Asker] = []
    with contextlib.ExitStack() as ends:
        ends.callback(broker.close)
        broker.start()
        ends.callback(engine.close)
        engine.start()
        ports = {"mqtt.port": broker.port, "engine.url": engine.url}
        worker = DaemonProcess(folder / "daemon", SETTINGS | ports | settings)
        ends.callback(worker.close)
        worker.start().wait_ready()
        for number in range(ASKERS):
            askers.append(Asker(broker.port, f"u{number}", may_ask=may_ask, over=over))
            ends.callback(askers[-1].join, 20)
            askers[-1].start()
        ends.callback(over.set)
        yield Soak(worker, askers, may_ask)
        worker.check_log()


def run(minutes: float, folder: Path, tell: Callable[[Sample], None]) -> Soaked:
    found = Soaked(minutes)

    def keep(sample: Sample) -> None:
        found.samples.append(sample)
        tell(sample)

    with soak(folder) as world:
        world.load(minutes * 60 * WARM_UP, keep)
        found.rests.append(world.rest())
        world.load(minutes * 60, keep)
        found.rests.append(world.rest())
    return found


def table(found: Soaked) -> str:
    """In Markdown."""
    step = max(1, len(found.samples) // ROWS)
    early, late = found.rss_between(WARM_UP, WARM_UP * 1.2), found.rss_between(1 - WARM_UP / 5, 1.0)
    lines = [
        "| minute | ended, of these cancelled | memory | threads | file descriptors | rows | database |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(f"{sample.at_s / 60:.1f}", sample) for sample in found.samples[step - 1 :: step]),
        *(_row(f"{sample.at_s / 60:.1f}, at rest", sample) for sample in found.rests),
        "",
        f"Median memory after the first {found.minutes * WARM_UP:.1f} minutes {_mib(early)}, in the end {_mib(late)}.",
    ]
    return "\n".join(lines)


def _row(when: str, sample: Sample) -> str:
    return (
        f"| {when} | {sample.ended}, {sample.cancelled} | {_mib(sample.rss_bytes)} | {sample.threads} | {sample.descriptors} | "
        f"{sample.rows} | {sample.database_bytes // 1024} KiB |"
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _value(database: sqlite3.Connection, query: str) -> int:
    return int(database.execute(query).fetchone()[0])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    told_at = -60.0

    def tell(sample: Sample) -> None:
        nonlocal told_at
        if sample.at_s >= told_at + 10:
            told_at = sample.at_s
            print(_row(f"{sample.at_s / 60:.1f}", sample), flush=True)

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = run(options.minutes, Path(folder), tell)
    print(f"\n{table(found)}")
    broken = found.broken()
    for sentence in broken:
        print(f"BROKEN {sentence}")
    if options.write_docs and not broken:
        write_between("soak", f"Made by `make soak MINUTES={options.minutes:g}`.\n\n{table(found)}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
