"""Which troubles of a database pass by themselves, so that a worker that starts waits, and which need a person."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from llamacpp_mqtt_deploy.ports import StoreAway, StoreError, StoreFull
from llamacpp_mqtt_deploy.stores.postgres.database import Database
from llamacpp_mqtt_deploy.stores.postgres.postgres_store import PostgresStore
from tests.support.ports import free_port
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import database_in

DATABASE = Database(url="postgresql://u@db.lan/lmd", schema="s")


@pytest.mark.parametrize(
    "error",
    [
        errors.ConnectionFailure("gone"),
        errors.AdminShutdown("terminating connection due to administrator command"),
        errors.CrashShutdown("terminating connection because of crash"),
        errors.CannotConnectNow("the database system is starting up"),
        errors.IdleSessionTimeout("idle"),
        errors.TooManyConnections("sorry"),
        errors.OutOfMemory("out of memory"),
        errors.ReadOnlySqlTransaction("read-only"),
        errors.LockNotAvailable("lock timeout"),
        errors.DeadlockDetected("deadlock"),
        errors.ConnectionTimeout("connection timeout expired"),
        psycopg.OperationalError("connection failed: ... failed: FATAL:  the database system is shutting down"),
        psycopg.OperationalError("connection failed: ... failed: FATAL:  the database system is in recovery mode"),
        psycopg.OperationalError("connection failed: ... failed: FATAL:  sorry, too many clients already"),
        psycopg.OperationalError("... failed: server closed the connection unexpectedly\n\tThis probably means"),
        psycopg.OperationalError("... failed: SSL SYSCALL error: EOF detected"),
        psycopg.OperationalError("... failed: session is read-only"),
        psycopg.OperationalError("failed to resolve host 'db.lan': [Errno -2] Name or service not known"),
        psycopg.OperationalError("consuming input failed: the connection is lost"),
    ],
    ids=lambda error: f"{error.sqlstate}-{' '.join(str(error).split()[-3:])}",
)
def test_what_passes_by_itself_is_waited_for(error: psycopg.Error) -> None:
    problem = DATABASE.explained(error)
    assert type(problem) is StoreAway
    assert str(problem).endswith(".")


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidPassword("wrong"),
        errors.InvalidAuthorizationSpecification("no entry"),
        errors.InvalidCatalogName("no such database"),
        errors.DatabaseDropped("dropped"),
        errors.InsufficientPrivilege("permission denied for schema"),
        errors.UndefinedTable("missing"),
        errors.InvalidSchemaName("missing"),
        errors.SyntaxError("an older PostgreSQL"),
        errors.ProtocolViolation("unsupported startup parameter"),
        errors.InternalError_("damaged"),
        errors.IoError("disk"),
        psycopg.OperationalError('connection failed: ... failed: FATAL:  password authentication failed for user "u"'),
        psycopg.OperationalError('connection failed: ... failed: FATAL:  no pg_hba.conf entry for host "10.0.0.1"'),
        psycopg.OperationalError('connection failed: ... failed: FATAL:  database "lmd" does not exist'),
        psycopg.OperationalError('connection failed: ... failed: FATAL:  permission denied for database "lmd"'),
        psycopg.OperationalError("connection to server on socket ... failed: Permission denied"),
        psycopg.OperationalError("... failed: SSL error: certificate verify failed"),
        psycopg.OperationalError("... failed: server does not support SSL, but SSL was required"),
        psycopg.OperationalError("... expected authentication request from server, but received H"),
        psycopg.ProgrammingError('missing "=" after "nonsense" in connection info string'),
    ],
    ids=lambda error: f"{error.sqlstate}-{' '.join(str(error).split()[-3:])}",
)
def test_what_needs_a_person_is_told_at_once(error: psycopg.Error) -> None:
    assert type(DATABASE.judged(DATABASE.explained(error))) is StoreError


def test_a_full_disk_stays_a_full_disk() -> None:
    assert type(DATABASE.explained(errors.DiskFull("full"))) is StoreFull


# --- a server -------------------------------------------------------------------------------------------------------------


@contextmanager
def refusing(state: str, words: str) -> Iterator[int]:
    """A server that refuses every connection with these words; its port."""

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                while (request := connection.recv(4096)) and struct.unpack("!i", request[4:8])[0] != 3 << 16:
                    connection.sendall(b"N")  # neither TLS nor GSSAPI
                if request:
                    fields = f"SFATAL\0VFATAL\0C{state}\0M{words}\0\0".encode()
                    connection.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize(
    "state,words,waited_for",
    [
        ("57P03", "the database system is starting up", True),
        ("57P03", "das Datenbanksystem startet", True),
        ("28P01", "Passwort-Authentifizierung für Benutzer »u« fehlgeschlagen", False),
        ("3D000", "la base de données « lmd » n'existe pas", False),
    ],
    ids=["starting", "starting-in-german", "password-in-german", "database-in-french"],
)
def test_a_server_that_refuses_is_understood_in_any_language(state: str, words: str, waited_for: bool) -> None:
    with refusing(state, words) as port:
        store = PostgresStore(Database(url=f"postgresql://u@127.0.0.1:{port}/lmd", schema="s"))
        with pytest.raises(StoreError) as caught:
            store.open()
    assert (type(caught.value) is StoreAway) == waited_for
    assert words in str(caught.value)


def test_a_server_that_is_not_there_is_waited_for(postgres: PostgresServer, tmp_path: Path) -> None:
    there = database_in(postgres, tmp_path)
    urls = (
        f"postgresql://u@127.0.0.1:{free_port()}/lmd",
        f"postgresql:///lmd?host={tmp_path}&user=u",
        "postgresql://u@nobody.invalid/lmd",
        f"{there.url}&options=-c%20default_transaction_read_only%3Don",
    )
    for url in urls:
        with pytest.raises(StoreAway):
            PostgresStore(Database(url=url, schema=there.schema)).open()


def test_a_store_that_is_closed_while_it_waits_for_its_database_closes_at_once_and_stays_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = PostgresStore(Database(url=f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/lmd", schema="s"))
        problems: list[StoreError] = []

        def open_it() -> None:
            try:
                store.open()
            except StoreError as problem:
                problems.append(problem)

        opening = threading.Thread(target=open_it)
        opening.start()
        connection, _ = silent.accept()
        store.close()  # waits for nothing: the attempt has not failed yet
        assert opening.is_alive()
        connection.close()
    opening.join(20)
    assert type(problems[0]) is StoreAway
