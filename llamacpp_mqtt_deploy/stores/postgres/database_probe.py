"""What `lmd check` asks a database: whether a worker could work with it. Leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.stores.postgres import pg_schema
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, Database

_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseFound:
    """`schema_problem` is empty where the worker may write, or make its tables. `unsafe` names settings with which a power cut takes
    what was told to be kept."""

    where: str
    version: str
    answers_in_s: float
    clock_ahead_s: float
    encrypted: bool
    tables: int
    """The version of the tables; 0 where there are none yet."""
    schema_problem: str
    unsafe: Sequence[str]


def look_at(database: Database) -> DatabaseFound:
    """Raises StoreError when no connection comes about, with what to do about it."""
    with database.connect() as db:
        try:
            took, ahead = _time(db)
            tables, problem = _try_schema(database, db)
            return DatabaseFound(
                where=database.shown,
                version=db.info.parameter_status("server_version") or "",
                answers_in_s=took,
                clock_ahead_s=ahead,
                encrypted=bool(db.pgconn.ssl_in_use),
                tables=tables,
                schema_problem=problem,
                unsafe=_unsafe(db),
            )
        except psycopg.Error as error:
            raise database.explained(error) from error


def _time(db: BoundedConnection) -> tuple[float, float]:
    """Seconds of the quickest of a few round trips, and by how much the database's clock is ahead of ours."""
    best, ahead = 3600.0, 0.0
    for _ in range(_TRIES):
        began = time.monotonic()
        row = db.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone()
        took = time.monotonic() - began
        if row is not None and took < best:
            best, ahead = took, float(row[0]) - (time.time() - took / 2)
    return best, ahead


def _try_schema(database: Database, db: BoundedConnection) -> tuple[int, str]:
    """The version of the tables, and why a worker could not work with them."""
    try:
        pg_schema.check_encoding(database, db)
        version, _ = pg_schema.version_of(database, db)
        if version:
            pg_schema.check_version(database, db)
        with db.transaction(force_rollback=True):
            if version:
                db.execute("INSERT INTO writers (name, number) VALUES (%s, 0)", (database.name,))
            elif db.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (database.schema,)).fetchone() is None:
                db.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(database.schema)))
            else:
                db.execute("CREATE TABLE lmd_check (name TEXT)")
    except StoreError as problem:
        return 0, str(problem)
    except psycopg.Error as error:
        if db.closed:
            raise
        return 0, str(database.explained(error))
    return version, ""


def _unsafe(db: BoundedConnection) -> list[str]:
    rows = db.execute(
        "SELECT name FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit') AND setting = 'off' "
        "ORDER BY name"
    ).fetchall()
    return [str(row[0]) for row in rows]
