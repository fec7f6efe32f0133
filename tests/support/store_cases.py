"""Requests and members for the tests of the stores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, HistoryChange, Store
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from tests.support.postgres_server import PostgresServer, shared_postgres

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.stores.postgres.database import Database

NOW = 1_800_000_000.0
SESSION = ("default", "kitchen/tablet")


class Reopening:
    """A store that is closed and opened again before each call: what it knows, it read from the file."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store

    def open(self) -> None:
        self._store.open()

    def close(self) -> None:
        self._store.close()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._store.close()
            self._store.open()
            return getattr(self._store, name)(*args, **kwargs)

        return call


MEMBERS = ("memory", "sqlite", "sqlite-reopened", "postgres")


def database_in(server: PostgresServer, directory: Path) -> Database:
    """A schema that belongs to this directory."""
    from llamacpp_mqtt_deploy.stores.postgres.database import Database

    return Database(url=server.url, schema="t_" + hashlib.sha256(str(directory).encode()).hexdigest()[:16])


def new_store(member: str, directory: Path, **options: Any) -> Store:
    if member == "memory":
        return SqliteStore(None, **options)
    if member == "postgres":
        from llamacpp_mqtt_deploy.stores.postgres.postgres_store import PostgresStore

        return PostgresStore(database_in(shared_postgres(), directory), **options)
    store = SqliteStore(directory / "state.db", **options)
    return Reopening(store) if member == "sqlite-reopened" else store


def key(request_id: str = "r1", session: tuple[str, str] = SESSION) -> EntryKey:
    return EntryKey(session[0], session[1], request_id)


def entry(request_id: str = "r1", session: tuple[str, str] = SESSION, **fields: Any) -> Entry:
    return Entry(
        key=key(request_id, session),
        **{
            "topic": f"llm/request/{session[1]}",
            "payload": b'{"prompt":"hi"}',
            "digest": "d1",
            "accepted_at": NOW,
            "reply_topic": f"llm/reply/{session[1]}",
            **fields,
        },
    )


def change(
    *texts: str, session: tuple[str, str] = SESSION, new: bool = False, messages: Sequence[Message] = ()
) -> HistoryChange:
    """Texts are user and assistant in turn."""
    made = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return HistoryChange(session=session, append=(*made, *messages), forget_before=new)


def talk(store: Store, session: tuple[str, str], *, at: float = NOW, text: str = "hi") -> None:
    """One finished and delivered request that leaves an exchange in the session."""
    name = f"talk-{at}-{text[:8]}"
    store.accept([entry(name, session, accepted_at=at)])
    store.finish(key(name, session), b"{}", now=at, history=change(text, "yo", session=session))
    store.mark_delivered([key(name, session)])
