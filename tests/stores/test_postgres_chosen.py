"""`sessions.store = "postgres"` in the configuration: what is made of it, what is refused, and what `lmd check` says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.checking.findings import Finding
from llamacpp_mqtt_deploy.checking.journal_database import check_database
from llamacpp_mqtt_deploy.config.credentials import database_password
from llamacpp_mqtt_deploy.config.loading import ConfigurationError, load
from llamacpp_mqtt_deploy.config.settings import MqttSettings, PoolSettings, SessionsSettings, Settings
from llamacpp_mqtt_deploy.ports import ToldEnd
from llamacpp_mqtt_deploy.service.assembly import make_store
from llamacpp_mqtt_deploy.stores.postgres import schema_of
from llamacpp_mqtt_deploy.stores.postgres.postgres_store import PostgresStore
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import NOW, SESSION, change, database_in, entry, key


def chosen(url: str | None, *, root: str = "llm", pool: str | None = None, **sessions: Any) -> Settings:
    return Settings(
        mqtt=MqttSettings(root=root),
        sessions=SessionsSettings(store="postgres", url=url, **sessions),
        pool=PoolSettings(name=pool),
    )


def test_a_worker_alone_and_one_of_a_pool_get_the_store_that_fits(postgres: PostgresServer, tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    assert type(make_store(chosen(postgres.url, path=path))) is PostgresStore
    assert type(make_store(chosen(postgres.url, path=path, pool="p"))) is SharedPostgresJournal


def test_each_root_has_a_schema_of_its_own_within_the_length_that_postgresql_allows() -> None:
    assert schema_of(chosen(None, root="home")) == "lmd_home"
    long = {schema_of(chosen(None, root="x" * 63 + end)) for end in "ab"}
    assert len(long) == 2
    assert all(len(name) <= 63 for name in long)
    assert schema_of(chosen(None, root="home", database_schema="mine")) == "mine"


@pytest.mark.parametrize(
    "given,said",
    [
        ({}, "[sessions] url: is missing"),
        ({"sessions.url": "http://db"}, "[sessions] url: expected postgresql://"),
        ({"sessions.url": "postgresql://u:geheim@db/lmd"}, "password_file"),
        ({"sessions.url": "postgresql://u@db/lmd?password=geheim"}, "password_file"),
        ({"sessions.url": "postgresql://u@db/lmd", "sessions.password_file": "/missing"}, "cannot read /missing"),
        ({"sessions.store": "sqlite", "sessions.url": "postgresql://u@db/lmd"}, "has no meaning"),
        ({"sessions.store": "sqlite", "pool.name": "p"}, "[pool] name: needs store"),
    ],
)
def test_what_contradicts_itself_is_told_by_its_key(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(None, {"sessions.store": "postgres", **given}, environ={})
    text = "\n".join(caught.value.problems)
    assert said in text
    assert "geheim" not in text


def test_a_database_across_the_network_without_encryption_brings_a_warning() -> None:
    def warnings(url: str) -> str:
        given = {"sessions.store": "postgres", "sessions.url": url}
        return "\n".join(load(None, given, environ={}).warnings)

    assert "sessions.url" in warnings("postgresql://u@db.example.org/lmd")
    assert "sessions.url" not in warnings("postgresql://u@db.example.org/lmd?sslmode=verify-full")
    assert "sessions.url" not in warnings("postgresql://u@localhost/lmd")


def test_the_password_comes_from_a_file_or_from_systemd(tmp_path: Path) -> None:
    (tmp_path / "database-password").write_text("from systemd\n")
    (tmp_path / "own").write_text("from a file\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert database_password(chosen("postgresql://u@db/x"), environ=environ) == "from systemd"
    own = chosen("postgresql://u@db/x", password_file=tmp_path / "own")
    assert database_password(own, environ=environ) == "from a file"
    assert database_password(chosen("postgresql://u@db/x"), environ={}) is None


def test_without_the_extra_a_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("llamacpp_mqtt_deploy.stores.postgres.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ImportError, match=r'pip install "llamacpp-mqtt-deploy\[postgres\]"'):
        make_store(chosen("postgresql://u@db/lmd"))
    (found,) = check_database(chosen("postgresql://u@db/lmd"))
    assert (found.name, found.verdict) == ("store.database", "FAIL")
    assert "extra" in found.text


def test_an_end_that_the_database_did_not_take_is_kept_on_this_machine_until_it_does(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    database, file = database_in(postgres, tmp_path), tmp_path / "deep" / "ends"
    store = PostgresStore(database, aside=file)
    store.open()
    store.accept([entry("told"), entry("other")])
    assert store.set_aside([ToldEnd(key=key("told"), terminal=b"end", now=NOW, history=change("q", "a"))])
    store.close()
    again = PostgresStore(replace(database, name="lmd again"), aside=file)
    again.open()
    assert [e.key for e in again.unfinished()] == [key("other")]
    assert len(again.history(SESSION)) == 2
    assert not file.exists()
    again.close()


# --- lmd check -----------------------------------------------------------------------------------------------------------------


def found(settings: Settings) -> dict[str, Finding]:
    return {each.name: each for each in check_database(settings)}


def test_check_says_that_the_database_is_fit_and_leaves_nothing_behind(postgres: PostgresServer) -> None:
    settings = chosen(postgres.tcp_url(), database_schema="looked_at")
    first = found(settings)
    assert first["store.database"].verdict == "ok"
    assert "PostgreSQL 1" in first["store.database"].text
    assert first["store.schema"].text == "looked_at will be made at the first start"
    assert (first["store.durability"].verdict, "fsync" in first["store.durability"].text) == ("warn", True)
    assert postgres.sql("SELECT 1 FROM pg_namespace WHERE nspname = 'looked_at'") == []
    store = make_store(settings)
    store.open()  # a worker that runs is not disturbed
    second = found(settings)
    assert second["store.schema"].text.startswith("looked_at has tables of layout")
    store.close()


def test_check_says_what_is_wrong_with_the_database(postgres: PostgresServer) -> None:
    away = found(chosen("postgresql://u@127.0.0.1:1/lmd"))
    assert [(each.verdict, each.name) for each in away.values()] == [("FAIL", "store.database")]
    if not postgres.sql("SELECT 1 FROM pg_roles WHERE rolname = 'guest'"):
        postgres.sql("CREATE ROLE guest LOGIN")
    poor = found(chosen(postgres.tcp_url(user="guest"), database_schema="not_mine"))
    assert poor["store.schema"].verdict == "FAIL"
    assert "may not do this" in poor["store.schema"].text
