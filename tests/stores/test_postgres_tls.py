"""Connections to a PostgreSQL that encrypts: what is checked, what is refused, and in which words."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.checking.journal_database import check_database
from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.pool_ports import Member, Notice
from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.service.assembly import make_store
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.stores.test_shared_journal import LIMITS, request
from tests.support.certificates import Authority
from tests.support.postgres_server import PostgresServer
from tests.support.waiting import eventually

PASSWORD = "geheim-und-lang"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "tls")


@pytest.fixture
def server(authority: Authority, start_postgres: Callable[..., PostgresServer]) -> PostgresServer:
    """Its certificate is for localhost, and for no address; it lets its user in with a password, over TLS alone."""
    server = start_postgres(tls=authority.issue("localhost", address=None))
    server.sql(f"CREATE ROLE guarded LOGIN PASSWORD '{PASSWORD}'")
    server.sql("CREATE DATABASE lmd OWNER guarded ENCODING 'UTF8' TEMPLATE template0")
    return server


def settings_for(
    server: PostgresServer, folder: Path, *, ca: Path, host: str = "localhost", mode: str = "verify-full"
) -> Settings:
    password = folder / "database-password"
    password.write_text(f"{PASSWORD}\n")
    given = {
        "mqtt.root": f"tls{uuid.uuid4().hex[:8]}",
        "sessions.store": "postgres",
        "sessions.url": f"postgresql://guarded@{host}:{server.port}/lmd?sslmode={mode}&sslrootcert={ca}",
        "sessions.password_file": str(password),
        "sessions.path": str(folder / "state.db"),
        "pool.name": "fleet",
    }
    return load(None, given, environ={}).settings


def why_refused(settings: Settings) -> str:
    store = make_store(settings)
    with pytest.raises(StoreError) as caught:
        store.open()
    store.close()
    problem = str(caught.value)
    (found,) = check_database(settings)
    assert (found.verdict, found.text) == ("FAIL", problem), "lmd check says the same"
    assert PASSWORD not in problem
    return problem


def test_every_connection_of_a_worker_is_encrypted_and_its_server_checked(
    server: PostgresServer, authority: Authority, tmp_path: Path
) -> None:
    settings = settings_for(server, tmp_path, ca=authority.ca_file)
    journal = make_store(settings)
    assert isinstance(journal, SharedPostgresJournal)
    journal.open()
    try:
        journal.join(Member(worker_id="w", instance="i", slots=1))
        heard: list[Notice] = []
        journal.listen(heard.append)
        eventually(lambda: Notice("work") in heard)
        heard.clear()
        journal.enqueue([request("r1")], limits=LIMITS, retry_after_s=1.0, aging_s=30.0)
        eventually(lambda: Notice("work") in heard)
        assert journal.load().queued["normal"] == 1
        connections = server.sql(
            "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'guarded'"
        )
        assert len(connections) >= 3, "one writes, one listens, one reads"
        assert {ssl for (ssl,) in connections} == {True}
    finally:
        journal.close()
    first = next(iter(check_database(settings)))
    assert (first.verdict, "encrypted" in first.text) == ("ok", True)


def test_a_server_of_another_authority_is_refused(server: PostgresServer, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "Another Authority")
    problem = why_refused(settings_for(server, tmp_path, ca=other.ca_file))
    assert "certificate does not verify" in problem
    assert "sslrootcert" in problem


def test_a_server_under_a_name_that_its_certificate_does_not_have_is_refused(
    server: PostgresServer, authority: Authority, tmp_path: Path
) -> None:
    problem = why_refused(settings_for(server, tmp_path, ca=authority.ca_file, host="127.0.0.1"))
    assert "certificate is for another name" in problem
    assert "as the certificate has it" in problem
    assert '"localhost"' in problem


def test_a_file_of_authorities_that_is_not_there_is_named(server: PostgresServer, tmp_path: Path) -> None:
    problem = why_refused(settings_for(server, tmp_path, ca=tmp_path / "missing.pem"))
    assert problem.startswith("The file that sslrootcert")
    assert str(tmp_path / "missing.pem") in problem


def test_a_server_that_does_not_encrypt_is_refused(
    start_postgres: Callable[..., PostgresServer], authority: Authority, tmp_path: Path
) -> None:
    problem = why_refused(settings_for(start_postgres(), tmp_path, ca=authority.ca_file))
    assert "ssl in postgresql.conf" in problem


def test_a_worker_that_does_not_encrypt_is_told_that_the_server_wants_it(
    server: PostgresServer, authority: Authority, tmp_path: Path
) -> None:
    problem = why_refused(settings_for(server, tmp_path, ca=authority.ca_file, mode="disable"))
    assert "no encryption" in problem
    assert "pg_hba.conf" in problem


def test_a_database_that_shows_a_strange_certificate_after_a_restart_hears_nothing_until_it_is_right(
    server: PostgresServer, authority: Authority, tmp_path: Path
) -> None:
    journal = make_store(settings_for(server, tmp_path, ca=authority.ca_file))
    assert isinstance(journal, SharedPostgresJournal)
    journal.open()
    try:
        journal.join(Member(worker_id="w", instance="i", slots=1))
        heard: list[Notice] = []
        journal.listen(heard.append)
        eventually(lambda: Notice("work") in heard)
        server.stop()
        server.show(Authority(tmp_path / "other", "Another Authority").issue("localhost", address=None))
        server.start()
        with pytest.raises(StoreError):
            journal.renew()
        eventually(lambda: "certificate does not verify" in journal.trouble(), 10)
        assert PASSWORD not in journal.trouble()
        assert server.sql("SELECT 1 FROM pg_stat_activity WHERE usename = 'guarded'") == []
        server.stop()
        server.show(authority.issue("localhost", address=None))
        heard.clear()
        server.start()
        eventually(lambda: journal.trouble() == "" and Notice("work") in heard, 20)
        journal.renew()
    finally:
        journal.close()
