"""The tables in the database, as the steps that brought them about.

Workers of two versions use them at once while a fleet is upgraded one by one. So a step only adds: tables, indexes, columns
with a default, triggers that keep what older programs do not know of; takes away no more than an index that no program needs; and
says which is the oldest version of the tables whose programs can work with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from psycopg import sql

from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, Database, text


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutStep:
    """`works_with`: the oldest version whose programs can use the tables after this step."""

    statements: tuple[str, ...]
    works_with: int


# Keys compare byte by byte, whatever the language of the database.
_KEY = 'TEXT COLLATE "C" NOT NULL'

_V1 = (
    # What each connection that writes has committed last, see pg_writer.py. Updated in place again and again.
    """
    CREATE TABLE writers (
        name TEXT PRIMARY KEY, number BIGINT NOT NULL, since TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
    ) WITH (fillfactor = 50)
    """,
    "CREATE SEQUENCE places",
    "CREATE SEQUENCE fences",
    "CREATE SEQUENCE turns",
    # Bodies, and records of chunks, have tables of their own: an UPDATE writes the whole row anew.
    f"""
    CREATE TABLE entries (
        id BIGINT PRIMARY KEY,
        route {_KEY},
        session {_KEY},
        request_id {_KEY},
        topic TEXT NOT NULL,
        digest TEXT NOT NULL,
        correlation BYTEA,
        accepted_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION,
        state TEXT NOT NULL CHECK (state IN ('accepted', 'streaming', 'ended')),
        starts INTEGER NOT NULL,
        terminal BYTEA,
        reply_topic TEXT NOT NULL,
        delivered BOOLEAN NOT NULL,
        ended_at DOUBLE PRECISION,
        ended_order BIGINT,
        first_level {_KEY},
        bytes BIGINT NOT NULL,
        fence BIGINT,
        UNIQUE (route, session, request_id)
    )
    """,
    # Not compressed: what the tables take tells then how much is remembered.
    "ALTER TABLE entries ALTER COLUMN terminal SET STORAGE EXTERNAL",
    "CREATE INDEX entries_unfinished ON entries (route, session) WHERE state <> 'ended'",
    "CREATE INDEX entries_in_order ON entries (id) WHERE state <> 'ended'",
    "CREATE INDEX entries_ended ON entries (delivered, ended_at) WHERE state = 'ended'",
    "CREATE INDEX entries_undelivered ON entries (fence, ended_order) WHERE state = 'ended' AND NOT delivered",
    "CREATE INDEX entries_by_level ON entries (first_level, delivered, ended_order) INCLUDE (bytes) WHERE state = 'ended'",
    "CREATE TABLE payloads (id BIGINT PRIMARY KEY, payload BYTEA NOT NULL)",
    "CREATE TABLE chunks (id BIGINT PRIMARY KEY, record BYTEA NOT NULL)",
    "ALTER TABLE chunks ALTER COLUMN record SET STORAGE EXTERNAL",
    f"""
    CREATE TABLE sessions (
        id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        route {_KEY},
        session {_KEY},
        first_level {_KEY},
        created DOUBLE PRECISION NOT NULL,
        last_used DOUBLE PRECISION NOT NULL,
        bytes BIGINT NOT NULL,
        UNIQUE (route, session)
    )
    """,
    "CREATE INDEX sessions_by_use ON sessions (last_used, route, session)",
    "CREATE INDEX sessions_by_level ON sessions (first_level, last_used DESC, route DESC, session DESC)",
    """
    CREATE TABLE messages (
        id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        session_id BIGINT NOT NULL,
        role TEXT NOT NULL,
        message BYTEA NOT NULL
    )
    """,
    "CREATE INDEX messages_of_session ON messages (session_id, id)",
    # Bytes: a client's text may hold what PostgreSQL's TEXT cannot.
    f"CREATE TABLE system_prompts (route {_KEY}, session {_KEY}, prompt BYTEA NOT NULL, PRIMARY KEY (route, session))",
    # `part` is the worker that counts in this row, until the day is over: nobody waits for another's transaction.
    f"""
    CREATE TABLE ledger (
        day BIGINT NOT NULL,
        first_level {_KEY},
        part {_KEY},
        requests BIGINT NOT NULL,
        tokens_in BIGINT NOT NULL,
        tokens_out BIGINT NOT NULL,
        engine_s DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (day, first_level, part)
    ) WITH (fillfactor = 50)
    """,
    # --- for workers of a pool ---
    # One row for each registered worker.
    """
    CREATE TABLE members (
        fence BIGINT PRIMARY KEY,
        worker_id TEXT NOT NULL,
        instance TEXT NOT NULL,
        slots INTEGER NOT NULL,
        models TEXT[] NOT NULL,
        version TEXT NOT NULL,
        draining BOOLEAN NOT NULL,
        lease_until TIMESTAMPTZ NOT NULL,
        fresh_since TIMESTAMPTZ NOT NULL
    ) WITH (fillfactor = 50)
    """,
    # Every unfinished request: it waits where `owner` is null, and is the member's of that fence else. `ending` says why it is only
    # to be ended, `asked` what its owner was asked to do with it. `since` and `place` are its rank among others of its lane.
    f"""
    CREATE TABLE queue (
        id BIGINT PRIMARY KEY,
        route {_KEY},
        session {_KEY},
        request_id {_KEY},
        first_level {_KEY},
        lane SMALLINT NOT NULL,
        in_turn BOOLEAN NOT NULL,
        model TEXT,
        size BIGINT NOT NULL,
        arrived TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
        deadline TIMESTAMPTZ,
        since BIGINT NOT NULL,
        owner BIGINT,
        streaming BOOLEAN NOT NULL DEFAULT false,
        ending TEXT,
        by_own_level BOOLEAN NOT NULL DEFAULT false,
        asked TEXT,
        UNIQUE (route, session, request_id)
    ) WITH (fillfactor = 70)
    """,
    "CREATE INDEX queue_waiting ON queue (first_level, lane, since, arrived, id) WHERE owner IS NULL AND ending IS NULL",
    "CREATE INDEX queue_of_session ON queue (route, session, id)",
    "CREATE INDEX queue_of_owner ON queue (owner) WHERE owner IS NOT NULL",
    "CREATE INDEX queue_by_deadline ON queue (deadline) WHERE owner IS NULL AND deadline IS NOT NULL",
    "CREATE INDEX queue_to_be_ended ON queue (id) WHERE owner IS NULL AND ending IS NOT NULL",
    # When first levels and sessions had their last turns, and where a session's was.
    f"CREATE TABLE level_turns (first_level {_KEY} PRIMARY KEY, turn BIGINT NOT NULL) WITH (fillfactor = 50)",
    "CREATE INDEX level_turns_in_order ON level_turns (turn)",
    f"""
    CREATE TABLE session_turns (
        route {_KEY}, session {_KEY}, turn BIGINT NOT NULL, worker_id TEXT NOT NULL, PRIMARY KEY (route, session)
    ) WITH (fillfactor = 50)
    """,
    "CREATE INDEX session_turns_in_order ON session_turns (turn)",
    f"""
    CREATE TABLE held_sessions (
        route {_KEY}, session {_KEY}, fence BIGINT NOT NULL, until TIMESTAMPTZ NOT NULL, PRIMARY KEY (route, session)
    )
    """,
    f"""
    CREATE TABLE early_cancels (
        route {_KEY}, session {_KEY}, request_id {_KEY}, first_level {_KEY}, until TIMESTAMPTZ NOT NULL,
        PRIMARY KEY (route, session, request_id)
    )
    """,
    "CREATE INDEX early_cancels_by_level ON early_cancels (first_level, until)",
)

_WAITS = "owner IS NULL AND ending IS NULL"
_WAITED, _WAITS_NOW = "OLD.owner IS NULL AND OLD.ending IS NULL", "NEW.owner IS NULL AND NEW.ending IS NULL"
_NOTE = "FOR EACH ROW WHEN ({}) EXECUTE FUNCTION note_queue_change()"

# What waits is counted, so that nobody has to read it all; see queue_counts.py.
_V2 = (
    # By how many lanes a request has moved up while it waited.
    "ALTER TABLE queue ADD COLUMN risen SMALLINT NOT NULL DEFAULT 0",
    # Every change is added here, in the transaction that makes it and without waiting for another one; whoever holds the lock of
    # the queue moves them into the three tables below.
    f"""
    CREATE TABLE queue_changes (
        request BIGINT NOT NULL, first_level {_KEY}, model {_KEY}, lane SMALLINT NOT NULL, places BIGINT NOT NULL,
        bytes BIGINT NOT NULL
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500)
    """,
    # Of all together. After `counted_until`, which newer workers keep in the future, nothing is noted: where only older ones are left
    # nobody would take the notes away.
    """
    CREATE TABLE queue_total (
        places BIGINT NOT NULL, bytes BIGINT NOT NULL, counted_until TIMESTAMPTZ NOT NULL
    ) WITH (fillfactor = 50)
    """,
    "INSERT INTO queue_total VALUES (0, 0, clock_timestamp() + interval '2 hours')",
    f"CREATE TABLE queue_levels (first_level {_KEY} PRIMARY KEY, places BIGINT NOT NULL, bytes BIGINT NOT NULL)",
    "CREATE INDEX queue_levels_by_places ON queue_levels (places DESC, first_level)",
    "CREATE INDEX queue_levels_by_bytes ON queue_levels (bytes DESC, first_level)",
    # `turn` is the level's last one, `came` the number of the request that came first: the order of levels within a lane.
    f"""
    CREATE TABLE queue_lanes (
        first_level {_KEY}, model {_KEY}, lane SMALLINT NOT NULL, places BIGINT NOT NULL, bytes BIGINT NOT NULL,
        turn BIGINT NOT NULL, came BIGINT NOT NULL, PRIMARY KEY (first_level, model, lane)
    )
    """,
    "CREATE INDEX queue_lanes_in_turn ON queue_lanes (model, lane, turn, came) WHERE places > 0",
    "CREATE INDEX queue_lanes_empty ON queue_lanes (first_level) WHERE places = 0",
    """
    CREATE FUNCTION note_queue_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NOT EXISTS (SELECT 1 FROM THIS_SCHEMA.queue_total WHERE counted_until > clock_timestamp()) THEN
            RETURN NULL;
        END IF;
        IF TG_OP <> 'INSERT' AND OLD.owner IS NULL AND OLD.ending IS NULL THEN
            INSERT INTO THIS_SCHEMA.queue_changes (request, first_level, model, lane, places, bytes)
            VALUES (OLD.id, OLD.first_level, coalesce(OLD.model, ''), OLD.lane - OLD.risen, -1, -OLD.size);
        END IF;
        IF TG_OP <> 'DELETE' AND NEW.owner IS NULL AND NEW.ending IS NULL THEN
            INSERT INTO THIS_SCHEMA.queue_changes (request, first_level, model, lane, places, bytes)
            VALUES (NEW.id, NEW.first_level, coalesce(NEW.model, ''), NEW.lane - NEW.risen, 1, NEW.size);
        END IF;
        RETURN NULL;
    END $$
    """,
    f"CREATE TRIGGER queue_change_by_insert AFTER INSERT ON queue {_NOTE.format(_WAITS_NOW)}",
    f"CREATE TRIGGER queue_change_by_delete AFTER DELETE ON queue {_NOTE.format(_WAITED)}",
    "CREATE TRIGGER queue_change_by_update AFTER UPDATE ON queue "
    + _NOTE.format(f"({_WAITED}) <> ({_WAITS_NOW}) OR {_WAITS_NOW} AND OLD.risen <> NEW.risen"),
    # In the order of their turns within a level; from the newest of the lowest lane; by when they move up a lane; in a session.
    # Nothing looks up a row by it any more.
    "DROP INDEX queue_waiting",
    f"CREATE INDEX queue_next ON queue (first_level, coalesce(model, '') COLLATE \"C\", (lane - risen), since, arrived, id) WHERE {_WAITS}",
    f"CREATE INDEX queue_newest ON queue (first_level, lane, arrived, id) WHERE {_WAITS}",
    f"CREATE INDEX queue_to_rise ON queue (lane, risen, arrived) WHERE {_WAITS} AND risen < lane",
    "CREATE INDEX queue_in_turn ON queue (route, session, id) WHERE in_turn",
)

_V3 = (
    # The clock was set forward by `forward_s`: rows with numbers up to these are still to be moved, to `up_to` at most.
    """
    CREATE TABLE clock_moves (
        id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        forward_s DOUBLE PRECISION NOT NULL,
        up_to DOUBLE PRECISION NOT NULL,
        entries_left BIGINT NOT NULL,
        sessions_left BIGINT NOT NULL
    )
    """,
    # When a worker was here: nothing becomes older while there is none.
    "CREATE TABLE last_purge (id INTEGER PRIMARY KEY CHECK (id = 1), purged_at DOUBLE PRECISION NOT NULL)",
)

MIGRATIONS: tuple[LayoutStep, ...] = (
    LayoutStep(statements=_V1, works_with=1),
    LayoutStep(statements=_V2, works_with=1),
    LayoutStep(statements=_V3, works_with=1),
)
"""Step N brings the tables from version N to N + 1; released steps never change."""

log = structlog.get_logger(__name__)


def prepare(database: Database, db: BoundedConnection) -> None:
    """Create the schema and its tables, or bring them to the version of this program; nothing where they are newer and fit."""
    check_encoding(database, db)
    version, _ = version_of(database, db)
    if version < len(MIGRATIONS):
        with db.transaction():
            # Of several workers that start together one does it.
            db.execute("SELECT pg_advisory_xact_lock(%s)", (database.lock_key("layout"),))
            version, _ = version_of(database, db)
            if version < len(MIGRATIONS):
                _migrate(database, db, version)
                log.info("store.migrated", schema=database.schema, was=version, now=len(MIGRATIONS))
    check_version(database, db)


def check_encoding(database: Database, db: BoundedConnection) -> None:
    """Raises StoreError where the database cannot hold every text."""
    encoding = db.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StoreError(
            f"{database.shown} has the encoding {encoding}: create one with UTF8 (createdb --encoding=UTF8 --template=template0)."
        )


def check_version(database: Database, db: BoundedConnection) -> None:
    """Raises StoreError where only newer programs can work with the tables."""
    version, works_with = version_of(database, db)
    if works_with > len(MIGRATIONS):
        raise StoreError(
            f"The schema {database.schema} of {database.shown} was written by a newer version of this program (layout {version}, "
            f"this one knows up to {len(MIGRATIONS)}): install that version again."
        )


def version_of(database: Database, db: BoundedConnection) -> tuple[int, int]:
    """The version of the tables, and the oldest one that can work with them; 0 where there are none."""
    # Not to_regclass, which may answer from a cache that has not heard yet of what another worker has just made.
    there = db.execute(
        "SELECT 1 FROM pg_tables WHERE schemaname = %s AND tablename = 'layout'", (database.schema,)
    ).fetchone()
    if there is None:
        return 0, 0
    row = db.execute("SELECT version, works_with FROM layout").fetchone()
    return (0, 0) if row is None else (int(row[0]), int(row[1]))


def _migrate(database: Database, db: BoundedConnection, version: int) -> None:
    if version == 0:
        schema = sql.Identifier(database.schema)
        # Where it exists, no right to create one is needed.
        if db.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (database.schema,)).fetchone() is None:
            db.execute(sql.SQL("CREATE SCHEMA {}").format(schema))
        elif tables := _foreign_tables(database, db):
            raise StoreError(
                f"The schema {database.schema} of {database.shown} has tables of another program ({tables}): name another one."
            )
        db.execute("CREATE TABLE layout (version INTEGER NOT NULL, works_with INTEGER NOT NULL)")
        db.execute("INSERT INTO layout (version, works_with) VALUES (0, 0)")
    for statement in _statements(MIGRATIONS[version:]):
        # What a trigger does is done for whoever writes, whatever the schema in which its names are looked up.
        db.execute(text(statement.replace("THIS_SCHEMA", sql.Identifier(database.schema).as_string(db))))
    works_with = max(step.works_with for step in MIGRATIONS)
    db.execute("UPDATE layout SET version = %s, works_with = %s", (len(MIGRATIONS), works_with))


def _foreign_tables(database: Database, db: BoundedConnection) -> str:
    rows = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s LIMIT 3", (database.schema,)).fetchall()
    return ", ".join(row[0] for row in rows)


def _statements(steps: Sequence[LayoutStep]) -> list[str]:
    return [statement for step in steps for statement in step.statements]
