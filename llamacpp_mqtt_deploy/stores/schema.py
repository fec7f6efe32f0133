"""The tables of the state file, as the steps that brought them about."""

from __future__ import annotations

import sqlite3

APPLICATION_ID = 0x4C4D4451
"""`LMDQ` in the file's header: tells our file from the database of another program."""

_STRICT = "STRICT" if sqlite3.sqlite_version_info >= (3, 37) else ""
"""Types are enforced where this SQLite can (Debian 12 has 3.40, RHEL 9 has 3.34)."""

_V1 = (
    # The body has its own table: UPDATE rewrites the whole row, and marking a request of 1 MiB as streaming would sync
    # that mebibyte again, on the way of the first token.
    f"""
    CREATE TABLE entries (
        id INTEGER PRIMARY KEY,
        route TEXT NOT NULL,
        session TEXT NOT NULL,
        request_id TEXT NOT NULL,
        topic TEXT NOT NULL,
        digest TEXT NOT NULL,
        correlation BLOB,
        accepted_at REAL NOT NULL,
        expires_at REAL,
        state TEXT NOT NULL CHECK (state IN ('accepted', 'streaming', 'ended')),
        starts INTEGER NOT NULL,
        terminal BLOB,
        reply_topic TEXT NOT NULL,
        delivered INTEGER NOT NULL,
        ended_at REAL,
        ended_order INTEGER,
        UNIQUE (route, session, request_id)
    ) {_STRICT}
    """,
    "CREATE INDEX entries_unfinished ON entries (route, session) WHERE state <> 'ended'",
    "CREATE INDEX entries_ended ON entries (delivered, ended_at) WHERE state = 'ended'",
    f"CREATE TABLE payloads (id INTEGER PRIMARY KEY, payload BLOB NOT NULL) {_STRICT}",
    f"""
    CREATE TABLE sessions (
        id INTEGER PRIMARY KEY,
        route TEXT NOT NULL,
        session TEXT NOT NULL,
        first_level TEXT NOT NULL,
        created REAL NOT NULL,
        last_used REAL NOT NULL,
        bytes INTEGER NOT NULL,
        UNIQUE (route, session)
    ) {_STRICT}
    """,
    "CREATE INDEX sessions_by_use ON sessions (last_used)",
    # JSON as bytes, not as columns: the order of the keys is part of the prompt that the engine has cached.
    f"""
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY,
        session_id INTEGER NOT NULL,
        role TEXT NOT NULL,
        message BLOB NOT NULL
    ) {_STRICT}
    """,
    "CREATE INDEX messages_of_session ON messages (session_id, id)",
)

_V2 = (
    # Who holds how much of what is remembered: without reading the rows, and the oldest first.
    "ALTER TABLE entries ADD COLUMN first_level TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE entries ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
    "UPDATE entries SET first_level = substr(session, 1, instr(session || '/', '/') - 1)",
    "UPDATE entries SET bytes = coalesce(length(terminal), 0)",
    "CREATE INDEX entries_by_level ON entries (first_level, delivered, ended_order, bytes) WHERE state = 'ended'",
)

_V3 = (
    # In a table of its own, as payloads are: it is read only when somebody asks again for an answer that he lost a part of.
    f"CREATE TABLE chunks (id INTEGER PRIMARY KEY, record BLOB NOT NULL) {_STRICT}",
)

_ADDED = (
    # Beside the versions: whoever goes back to an older worker keeps his state, and that worker passes over the table.
    f"""
    CREATE TABLE IF NOT EXISTS ledger (
        day INTEGER NOT NULL,
        first_level TEXT NOT NULL,
        requests INTEGER NOT NULL,
        tokens_in INTEGER NOT NULL,
        tokens_out INTEGER NOT NULL,
        engine_s REAL NOT NULL,
        PRIMARY KEY (day, first_level)
    ) {_STRICT}
    """,
    f"""
    CREATE TABLE IF NOT EXISTS system_prompts (
        route TEXT NOT NULL,
        session TEXT NOT NULL,
        prompt TEXT NOT NULL,
        PRIMARY KEY (route, session)
    ) {_STRICT}
    """,
    # The clock was set forward by `forward_s`: rows with numbers up to these are still to be moved, to `up_to` at most.
    f"""
    CREATE TABLE IF NOT EXISTS clock_moves (
        id INTEGER PRIMARY KEY,
        forward_s REAL NOT NULL,
        up_to REAL NOT NULL,
        entries_left INTEGER NOT NULL,
        sessions_left INTEGER NOT NULL
    ) {_STRICT}
    """,
    # When a worker was here: nothing becomes older while there is none.
    f"CREATE TABLE IF NOT EXISTS last_purge (id INTEGER PRIMARY KEY CHECK (id = 1), purged_at REAL NOT NULL) {_STRICT}",
)

_ORPHANS = (
    "FROM system_prompts WHERE NOT EXISTS "
    "(SELECT 1 FROM sessions s WHERE s.route = system_prompts.route AND s.session = system_prompts.session)"
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_V1, _V2, _V3)
"""Statements that bring a file from version N to N + 1, for N = 0, 1, ...; released steps never change."""


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the database to the newest version, one transaction for each step, and add and tidy what stands beside the
    versions."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    for target, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {target}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    for statement in _ADDED:
        connection.execute(statement)
    _forget_orphans(connection)


def _forget_orphans(connection: sqlite3.Connection) -> None:
    """An older worker has forgotten the session and knows nothing of its prompt."""
    # Asked first: a start needs no lock to write.
    if connection.execute(f"SELECT 1 {_ORPHANS} LIMIT 1").fetchone() is not None:
        connection.execute(f"DELETE {_ORPHANS}")
