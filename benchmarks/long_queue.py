"""What a pool's journal does in a long queue: `python -m benchmarks.long_queue`, a part of `make fleet`.

Milliseconds of `enqueue` and `claim` while so many requests wait, of 50 clients and of as many clients as requests; and how many requests
a second the journal alone takes from their arrival to their end, with some members and so many waiting.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.pool_ports import Member, PoolRequest
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import NOW, change, database_in, entry

WAITING = (10, 1_000, 10_000)
MEMBERS = (1, 4, 8)
TURNS = 60
LIMITS = QueueLimits(queue_size=100_000, session_queue=1000, share=1.0, max_bytes=1 << 40)

_FILL = (
    """
    INSERT INTO {s}.entries (id, route, session, request_id, topic, digest, accepted_at, state, starts, reply_topic, delivered,
        first_level, bytes)
    SELECT nextval('{s}.places'), 'default', 'u' || n % {clients} || '/s' || n, 'w' || n, 't', 'd', {now}, 'accepted', 0, 'r',
        false, 'u' || n % {clients}, 0 FROM generate_series(1, {waiting}) n RETURNING id
    """,
    "INSERT INTO {s}.payloads (id, payload) SELECT id, 'x' FROM {s}.entries RETURNING id",
    """
    INSERT INTO {s}.queue (id, route, session, request_id, first_level, lane, in_turn, size, since)
    SELECT id, route, session, request_id, first_level, 1, true, 1, 0 FROM {s}.entries RETURNING id
    """,
)


def _members(
    server: PostgresServer, folder: Path, *, waiting: int, clients: int, members: int
) -> list[SharedPostgresJournal]:
    """On a schema of their own, with so many waiting."""
    database = database_in(server, folder / uuid.uuid4().hex)
    journals = [
        SharedPostgresJournal(database_in(server, folder / database.schema), lease_s=60.0) for _ in range(members)
    ]
    for number, journal in enumerate(journals):
        journal.open()
        if number == 0 and waiting:
            schema = database_in(server, folder / database.schema).schema
            for statement in _FILL:
                server.sql(statement.format(s=schema, now=NOW, clients=clients, waiting=waiting))
        journal.join(Member(worker_id=f"w{number}", instance="i", slots=4))
    return journals


def _request(number: int, client: str) -> PoolRequest:
    session = ("default", f"{client}/s{number}")
    return PoolRequest(entry=entry(f"r{number}-{client}", session), first_level=client, lane=1, in_turn=True)


def steps(server: PostgresServer, folder: Path, *, waiting: int, clients: int) -> dict[str, float]:
    """Milliseconds of each step, at the median."""
    (journal,) = _members(server, folder, waiting=waiting, clients=clients, members=1)
    took: dict[str, list[float]] = {"enqueue": [], "claim": []}
    for number in range(TURNS):
        began = time.monotonic()
        journal.enqueue([_request(number, "new")], limits=LIMITS, retry_after_s=1.0, aging_s=3600.0)
        enqueued = time.monotonic()
        (claimed,) = journal.claim(1, models=(), aging_s=3600.0, prefer_for_s=0.05)
        took["claim"].append(time.monotonic() - enqueued)
        took["enqueue"].append(enqueued - began)
        journal.finish(claimed.entry.key, b"end", now=NOW)
    journal.close()
    return {name: 1000 * statistics.median(times) for name, times in took.items()}


def requests_a_second(server: PostgresServer, folder: Path, *, members: int, waiting: int, seconds: float) -> float:
    """Each member enqueues, claims, marks and finishes one after the other; from the first to the last."""
    journals = _members(server, folder, waiting=waiting, clients=50, members=members)
    ends_at = time.monotonic() + seconds
    done = [0] * (4 * members)

    def live(place: int) -> None:
        journal, number = journals[place % members], 0
        while time.monotonic() < ends_at:
            number += 1
            journal.enqueue([_request(number, f"c{place}")], limits=LIMITS, retry_after_s=1.0, aging_s=3600.0)
            for claimed in journal.claim(1, models=(), aging_s=3600.0, prefer_for_s=0.05):
                key = claimed.entry.key
                journal.mark_started(key)
                journal.mark_streaming(key)
                journal.finish(key, b"end", now=NOW, history=change("q", "a", session=(key.route, key.session)))
                done[place] += 1

    threads = [threading.Thread(target=live, args=(place,)) for place in range(len(done))]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    for journal in journals:
        journal.close()
    return sum(done) / took


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each figure of requests a second")
    seconds = parser.parse_args(arguments).seconds
    folder = Path(tempfile.mkdtemp(prefix="long-queue-"))
    server = PostgresServer(fsync=True).start()
    try:
        for waiting in WAITING:
            for clients in (50, waiting):
                found = steps(server, folder, waiting=waiting, clients=clients)
                each = ", ".join(f"{name} {took:.1f} ms" for name, took in found.items())
                print(f"{waiting} waiting, of {clients} clients: {each}", flush=True)
        for waiting in (0, WAITING[-1]):
            for members in MEMBERS:
                rate = requests_a_second(server, folder, members=members, waiting=waiting, seconds=seconds)
                print(f"{members} members, {waiting} waiting: {rate:.0f} requests/s", flush=True)
    finally:
        server.close()


if __name__ == "__main__":
    main()
