"""The world of a pool: four workers on one PostgreSQL, each behind connections of its own to broker, database and engine."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from typing_extensions import override

from tests.faults.clock_hook import SetClock
from tests.faults.history import Entry
from tests.faults.model import Broken
from tests.faults.processes import clean_end, ended
from tests.faults.proxy import Bend, Proxy
from tests.faults.schedule import WORKERS, Fault
from tests.faults.takeovers import Takeovers
from tests.faults.world import CLOCK_JUMPS_S, ENGINE_BEND, SETTINGS, World
from tests.support.daemon_process import DaemonProcess
from tests.support.postgres_server import PostgresServer
from tests.support.waiting import eventually

LEASE_S = 2.5
TAKEN_OVER_WITHIN_S = LEASE_S + 2.0
SLOTS = 2
"""Of each worker; the engine has as many as all of them."""
REST_S = 15.0
"""When nothing is asked any more the database has nothing left after this time."""

_OWNED = "SELECT request_id FROM queue JOIN members ON fence = owner WHERE worker_id = %s"
# Each is to find nothing when every request has ended and every worker is there.
_LEFT_OVER = {
    "requests in the queue": "SELECT request_id, owner, ending FROM queue",
    "unfinished entries": "SELECT request_id, state FROM entries WHERE state <> 'ended'",
    "ends that nobody delivers": (
        "SELECT request_id FROM entries WHERE NOT delivered AND (fence IS NULL OR fence NOT IN (SELECT fence FROM members))"
    ),
    "held sessions": "SELECT session FROM held_sessions",
    "members that are gone": "SELECT worker_id, fence FROM members WHERE lease_until < clock_timestamp()",
}


@dataclass(slots=True)
class Post:
    """One worker of the pool with its connections."""

    name: str
    clock: SetClock
    uplink: Proxy
    data: Proxy
    line: Proxy
    life: DaemonProcess | None = None


class PoolWorld(World):
    def __init__(self, folder: Path, *, seed: int, clients: int, requests: int, window: int) -> None:
        super().__init__(folder, seed=seed, clients=clients, requests=requests, window=window)
        # A crash of it may lose nothing that was committed.
        self.database = PostgresServer(fsync=True)
        self.posts: list[Post] = []
        self._takeovers = Takeovers(TAKEN_OVER_WITHIN_S)
        self._unmarked = 0

    # --- life ----------------------------------------------------------------------------------------------------------

    @override
    def _begin(self) -> None:
        self.broker.start()
        self.engine.start()
        self.database.start()
        self._trunk = self.network.lay(self.database.port, mqtt=False)
        self.wires = {client.name: self.network.lay(self.broker.port, mqtt=True) for client in self.clients}
        for number in range(WORKERS):
            name = f"w{number + 1}"
            post = Post(
                name,
                SetClock(self.folder / f"clock-{name}"),
                uplink=self.network.lay(self.broker.port, mqtt=True),
                data=self.network.lay(self._trunk.port, mqtt=False),
                line=self.network.lay(self.engine.port, mqtt=False),
            )
            post.line.change(ENGINE_BEND)
            self.posts.append(post)
            self._start(post)
        self.wait_ready()

    @override
    def _close(self) -> None:
        self._end_processes()
        self.network.close()
        self.broker.close()
        self.engine.close()
        self.database.close()

    def _start(self, post: Post) -> None:
        settings: dict[str, Any] = SETTINGS | {
            "mqtt.worker_id": post.name,
            "mqtt.port": post.uplink.port,
            "mqtt.keepalive_s": 5,
            "engine.url": f"http://127.0.0.1:{post.line.port}",
            "engine.slots": SLOTS,
            "sessions.store": "postgres",
            "sessions.url": self.database.tcp_url(post.data.port),
            "pool.name": "fleet",
            "pool.lease_s": LEASE_S,
        }
        post.life = DaemonProcess(self.folder / post.name, settings, environment=post.clock.environment).start()
        self._lives.append(post.life)

    @override
    def wait_ready(self) -> None:
        for post in self.posts:
            assert post.life is not None
            post.life.wait_ready()
        eventually(self._all_joined, REST_S, every_s=0.1)

    def _all_joined(self) -> bool:
        alive = self._ask("SELECT worker_id FROM members WHERE lease_until > clock_timestamp() AND NOT draining")
        return sorted(alive) == [(post.name,) for post in self.posts]

    @override
    def stop_workers(self) -> list[Broken]:
        return [broken for post in self.posts if post.life is not None for broken in clean_end(post.life)]

    @override
    def _watch_workers(self) -> None:
        for post in self.posts:
            assert post.life is not None
            code = post.life.process.poll()
            if code is not None and post.name not in self.away:
                end = " | ".join(post.life.log_text().splitlines()[-3:])
                self.broken.append(Broken("process", "", f"{post.name} ended by itself with {code}: {end[-600:]}"))
                self._start(post)

    # --- faults --------------------------------------------------------------------------------------------------------

    @override
    def why_not(self, kind: str) -> str:
        return ""

    @override
    def begin(self, fault: Fault) -> bool:
        post = self.posts[fault.worker]
        part, _, kind = fault.kind.partition(".")
        match part:
            case "worker":
                self._break_worker(kind, post, fault)
            case "database":
                self._break_database(kind)
            case "data":
                self._bend(post.data, kind)
            case "net":
                self._bend(post.uplink, kind)
            case "line":
                self._break_line(kind, post)
            case _:
                if not super().begin(fault):
                    return False
        self._takeovers.disturbed(str(fault), time.monotonic())
        return True

    @override
    def mend(self, fault: Fault) -> None:
        post = self.posts[fault.worker]
        part, _, kind = fault.kind.partition(".")
        match part:
            case "worker":
                self._mend_worker(kind, post)
            case "database":
                self._mend_database(kind)
            case "data":
                post.data.change(Bend())
            case "net":
                post.uplink.change(Bend())
            case "line":
                post.line.change(ENGINE_BEND)
            case _:
                super().mend(fault)
        self._takeovers.disturbed(str(fault), time.monotonic(), over=True)

    def _break_worker(self, kind: str, post: Post, fault: Fault) -> None:
        assert post.life is not None
        match kind:
            case "kill" | "stop":
                began_at = time.monotonic()
                post.life.send(signal.SIGSTOP)
                # What a worker has that stands still does not change any more.
                owned = self._owned(post)
                if kind == "kill":
                    self.away.add(post.name)
                    post.life.kill()
                self._takeovers.begin(post.name, str(fault), owned, began_at)
            case "term":
                self.away.add(post.name)
                post.life.send(signal.SIGTERM)
            case "clock":
                post.clock.jump(CLOCK_JUMPS_S[fault.number % len(CLOCK_JUMPS_S)])

    def _mend_worker(self, kind: str, post: Post) -> None:
        assert post.life is not None
        match kind:
            case "kill" | "term":
                self.broken += ended(post.life, by_term=kind == "term")
                self.away.discard(post.name)
                self._start(post)
            case "stop":
                post.life.send(signal.SIGCONT)
            case "clock":
                post.clock.jump(0.0)
        self._takeovers.end(post.name, time.monotonic())

    def _break_line(self, kind: str, post: Post) -> None:
        match kind:
            case "hang":
                post.line.change(Bend(silent=True))
            case "cut":
                post.line.change(ENGINE_BEND, cut=True)
            case lie:
                post.line.change(Bend(lie=lie, down_bytes_per_s=ENGINE_BEND.down_bytes_per_s))

    def _break_database(self, kind: str) -> None:
        match kind:
            case "kill":
                self.database.stop("immediate")
            case "restart":
                self.database.stop("fast")
            case "silent":
                self._trunk.change(Bend(silent=True))

    def _mend_database(self, kind: str) -> None:
        if kind == "silent":
            self._trunk.change(Bend())
        else:
            self.database.start()

    # --- looking -------------------------------------------------------------------------------------------------------

    @override
    def saw(self, client: str, entry: Entry) -> None:
        self._takeovers.saw(entry)

    @override
    def notes(self) -> list[str]:
        return [*self._takeovers.notes(), f"delivered ends without their mark | {self._unmarked}"]

    @override
    def at_rest(self) -> list[Broken]:
        """No request anywhere, no row of a worker that is gone, every worker there; and every takeover was in time."""
        broken = self._takeovers.close()
        # Marks of the last moments before a crash of the database, which no worker waits for: such an end comes once more, identical.
        self._unmarked = len(self._ask("SELECT 1 FROM entries WHERE state = 'ended' AND NOT delivered"))
        for what, statement in _LEFT_OVER.items():
            if left := self._left_of(statement):
                broken.append(Broken("process", "", f"in the end there are {what}: {left[:5]}"))
        if not self._all_joined():
            members = self._ask("SELECT worker_id, fence, draining, lease_until - clock_timestamp() FROM members")
            broken.append(Broken("process", "", f"in the end not every worker is a member: {members}"))
        return broken

    def _left_of(self, statement: str) -> list[tuple[Any, ...]]:
        """What it still finds after a while."""
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self._ask(statement), REST_S, every_s=0.2)
        return self._ask(statement)

    def _owned(self, post: Post) -> list[str]:
        """What the worker has, as the database says; nothing where the database is away too."""
        try:
            owned = [str(row[0]) for row in self._ask(_OWNED, post.name)]
        except psycopg.OperationalError:
            return []
        # What events there were for the package's own client nobody has written down.
        return [request_id for request_id in owned if request_id.partition("-")[0] not in self.by_package()]

    def _ask(self, statement: str, *values: str) -> list[tuple[Any, ...]]:
        url = f"{self.database.url}&options=-csearch_path%3Dlmd_llm"
        with psycopg.connect(url, autocommit=True, connect_timeout=3) as db:
            return db.execute(statement.encode(), values).fetchall()

    @override
    def _calm_down(self) -> None:
        with contextlib.suppress(Exception):
            self.broker.thaw()
        with contextlib.suppress(Exception):
            os.kill(self.engine.pid, signal.SIGCONT)
