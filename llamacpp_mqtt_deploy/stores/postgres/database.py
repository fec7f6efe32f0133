"""Connections to one PostgreSQL database: how they are made, how long they may take, and what went wrong with them."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, LiteralString, TypeVar, cast

import psycopg
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from llamacpp_mqtt_deploy.ports import StoreAway, StoreError, StoreFull
from llamacpp_mqtt_deploy.stores.postgres.database_errors import cause_of, passes, sentence
from llamacpp_mqtt_deploy.stores.postgres.refused_connections import state_of_refusal

CONNECT_S = 5
"""How long a connection may take to come about."""

STATEMENT_S = 10.0
"""How long the database may work on one statement."""

LOCK_S = 6.0
"""How long one statement may wait for what another worker has locked."""

IDLE_IN_TRANSACTION_S = 3.0
"""After so long without a word in the middle of a transaction the database ends the connection: a worker that was frozen there
must not keep the others waiting. Less than LOCK_S, so that they get on; in a pool with short leases much less than a lease, or
the others could not renew theirs meanwhile."""

SHORTEST_IDLE_S = 0.5
"""A worker that lives may be silent for a moment, on a machine with much to do."""

ANSWER_S = 15.0
"""How long any answer is waited for; more than a statement may take. A firewall that forgot the connection sends none."""

_MIN_VERSION = 13_00_00
_Result = TypeVar("_Result")


class BoundedConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that is given up when an answer takes longer than `ANSWER_S`: libpq itself would wait for ever."""

    def wait(self, gen: Generator[Any, Any, _Result], *args: Any, **kwargs: Any) -> _Result:
        try:
            return super().wait(_within(gen, ANSWER_S), *args, **kwargs)
        except _NoAnswer:
            self.pgconn.finish()
            raise


class _NoAnswer(psycopg.OperationalError):
    pass


def _within(gen: Generator[Any, Any, _Result], seconds: float) -> Generator[Any, Any, _Result]:
    """The generator, which is asked again every tenth of a second, until the time is over."""
    ends_at = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > ends_at:
                raise _NoAnswer(f"no answer for {seconds:g} s")
            wanted = gen.send(ready)
    except StopIteration as end:
        return cast("_Result", end.value)


@dataclass(frozen=True, kw_only=True)
class Database:
    """One schema in one database. `password` is asked for each connection, so that a renewed one is taken up."""

    url: str
    schema: str
    password: Callable[[], str | None] = lambda: None
    idle_in_transaction_s: float = IDLE_IN_TRANSACTION_S
    name: str = field(default_factory=lambda: f"lmd {secrets.token_hex(6)}")
    """What its connections are called in pg_stat_activity; another one for each life."""

    @property
    def shown(self) -> str:
        """Where it is, without a password."""
        try:
            parts = conninfo_to_dict(self.url)
        except psycopg.ProgrammingError:
            return "the database of sessions.url"
        host = parts.get("host") or parts.get("hostaddr") or "the local socket"
        return f"the database {parts.get('dbname') or parts.get('user') or ''!s} at {host}".replace("  ", " ")

    def lock_key(self, purpose: str) -> int:
        """The number of an advisory lock: a database has one space of them for all its schemas."""
        digest = hashlib.sha256(f"llamacpp-mqtt-deploy {self.schema} {purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    def channel(self, name: str = "") -> str:
        """The name of a channel of notices, within the 63 bytes that PostgreSQL allows."""
        return "lmd_" + hashlib.sha256(f"{self.schema} {name}".encode()).hexdigest()[:24]

    def conninfo(self) -> str:
        """The whole connection string. Raises psycopg.ProgrammingError for a url that is none."""
        given = conninfo_to_dict(self.url)
        wanted: dict[str, Any] = {
            "connect_timeout": CONNECT_S,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
            "target_session_attrs": "read-write",
        }
        fixed = {
            "application_name": self.name,
            "client_encoding": "utf8",
            "options": f"{given.get('options') or ''} {self._options()}".strip(),
        }
        password = self.password()
        if password is not None:
            fixed["password"] = password
        return make_conninfo(self.url, **{k: v for k, v in wanted.items() if k not in given}, **fixed)

    def _options(self) -> str:
        settings = {
            "search_path": self._search_path,
            "statement_timeout": f"{STATEMENT_S * 1000:.0f}",
            "lock_timeout": f"{LOCK_S * 1000:.0f}",
            "idle_in_transaction_session_timeout": f"{self.idle_in_transaction_s * 1000:.0f}",
            # The database too notices a worker that was unplugged: it lets go of its locks then.
            "tcp_keepalives_idle": "5",
            "tcp_keepalives_interval": "2",
            "tcp_keepalives_count": "3",
            "tcp_user_timeout": "10000",
            "jit": "off",
            "TimeZone": "UTC",
        }
        return " ".join(f"-c {name}={value}" for name, value in settings.items())

    @property
    def _search_path(self) -> str:
        return f'"{self.schema}"'

    def connect(self) -> BoundedConnection:
        """A connection in autocommit mode. Raises StoreError."""
        try:
            db = BoundedConnection.connect(self.conninfo(), autocommit=True)
        except psycopg.Error as error:
            raise self.explained(error) from error
        if db.info.server_version < _MIN_VERSION:
            version = db.info.parameter_status("server_version")
            db.close()
            raise StoreError(f"{self.shown} is PostgreSQL {version}; at least 13 is needed.")
        try:
            self._check_options(db)
        except BaseException:
            db.close()
            raise
        return db

    def _check_options(self, db: BoundedConnection) -> None:
        """Without them the tables of all roots would be those of one schema, and nothing would keep a statement from waiting for ever."""
        try:
            row = db.execute("SELECT current_setting('search_path')").fetchone()
        except psycopg.Error as error:
            raise self.explained(error) from error
        if row != (self._search_path,):
            raise StoreError(
                f"A connection pooler before {self.shown} ignores the options of a connection (PgBouncer: ignore_startup_parameters), in "
                "which the worker names its schema and its time limits: let it hand them on, or connect to PostgreSQL itself."
            )

    def judged(self, problem: StoreError) -> StoreError:
        """The same as a StoreAway where no connection came about for a reason that passes by itself, but that its words do not tell:
        a server that takes no connection says so in its language. It may ask the server."""
        error = problem.__cause__
        if not isinstance(error, psycopg.OperationalError) or error.sqlstate or cause_of(error) is not None:
            return problem
        tried = error.pgconn
        if tried is None:
            return problem
        state = state_of_refusal(
            (tried.hostaddr or tried.host).decode(),
            int(tried.port),
            user=tried.user.decode(),
            database=tried.db.decode(),
        )
        if state is not None and not passes(state):
            return problem
        away = StoreAway(*problem.args)
        away.__cause__ = error
        return away

    # --- in sentences --------------------------------------------------------------------------------------------------

    def explained(self, error: Exception) -> StoreError:
        """The error as a sentence for the operator: what happened, where, what to do."""
        if isinstance(error, StoreError):
            return error
        if not isinstance(error, psycopg.Error) or (isinstance(error, psycopg.DataError) and error.sqlstate is None):
            return StoreError(f"{self.shown} cannot hold this: {type(error).__name__}: {error}.")
        cause = cause_of(error)
        away = cause is not None and cause.passes
        kind = StoreFull if isinstance(error, errors.DiskFull) else StoreAway if away else StoreError
        problem = kind(sentence(error, self.shown))
        problem.__cause__ = error
        return problem


def concerns_all(error: Exception) -> bool:
    """Whether the error is one of the database as a whole; any other is that of one statement."""
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return True
    state = getattr(error, "sqlstate", None) or ""
    return state[:2] in ("08", "53", "57", "58", "XX", "3F") or state in ("25006", "25P03", "42P01", "42501")


def quoted(name: str) -> sql.Identifier:
    return sql.Identifier(name)


def text(statement: str) -> LiteralString:
    """A statement that was joined from constants; values are always bound."""
    return statement
