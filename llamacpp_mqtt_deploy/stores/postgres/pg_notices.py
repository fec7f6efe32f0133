"""Notices of other workers: one connection that listens, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import get_args

import orjson
import psycopg
import structlog

from llamacpp_mqtt_deploy.pool_ports import Notice, NoticeKind
from llamacpp_mqtt_deploy.ports import EntryKey, StoreError
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, Database, quoted
from llamacpp_mqtt_deploy.stores.postgres.pg_writer import FIRST_PAUSE_S, LONGEST_PAUSE_S

MAX_NOTICE_BYTES = 7900
"""PostgreSQL takes 8000."""

_LOOK_EVERY_S = 0.5
_ALIVE_EVERY_S = 10.0

_KINDS = get_args(NoticeKind)

log = structlog.get_logger(__name__)


def written(kind: NoticeKind, key: EntryKey | None = None) -> str | None:
    """A notice as it is sent; None for one that is too long: the worker hears of it when it renews its lease."""
    text = orjson.dumps([kind] if key is None else [kind, key.route, key.session, key.request_id]).decode()
    return text if len(text.encode()) <= MAX_NOTICE_BYTES else None


def read(text: str) -> Notice | None:
    """The mirror of `written`; None for what a newer version may send."""
    try:
        kind, *key = orjson.loads(text)
        return Notice(kind, EntryKey(*key) if key else None) if kind in _KINDS else None
    except (ValueError, TypeError):
        return None


class Listener:
    """Calls back for each notice in one of its channels, and once with `work` whenever some may have been missed."""

    def __init__(self, database: Database, on_notice: Callable[[Notice], None]) -> None:
        self._database = database
        self._on_notice = on_notice
        self._channels: tuple[str, ...] = ()
        self._closed = threading.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pool-notices", daemon=True)

    def start(self, channels: Sequence[str]) -> None:
        self._channels = tuple(channels)
        self._thread.start()

    def also(self, channels: Sequence[str]) -> None:
        """Listen in these too, from half a second on."""
        self._listening.clear()
        self._channels = tuple(dict.fromkeys([*self._channels, *channels]))

    def wait_until_listening(self, timeout_s: float) -> bool:
        return self._listening.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        self._closed.set()
        self._thread.join(timeout_s)

    # --- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._closed.is_set():
            try:
                with self._database.connect() as db:
                    pause_s = FIRST_PAUSE_S
                    self._listen(db)
            except (StoreError, psycopg.Error) as problem:
                self._listening.clear()
                log.info("pool.notices_lost", reason=" ".join(str(problem).split()), again_in_s=pause_s)
                self._closed.wait(pause_s)
                pause_s = min(LONGEST_PAUSE_S, pause_s * 2)

    def _listen(self, db: BoundedConnection) -> None:
        names: set[str] = set()
        heard_at = time.monotonic()
        while not self._closed.is_set():
            for name in set(self._channels) - names:
                db.execute(_listen_to(name))
                names.add(name)
                heard_at = 0.0
            if heard_at == 0.0:
                self._listening.set()
                self._tell(Notice("work"))
                heard_at = time.monotonic()
            for notice in db.notifies(timeout=_LOOK_EVERY_S):
                heard_at = time.monotonic()
                found = read(notice.payload)
                if found is not None:
                    self._tell(found)
            if time.monotonic() - heard_at > _ALIVE_EVERY_S:
                db.execute("SELECT 1")
                heard_at = time.monotonic()

    def _tell(self, notice: Notice) -> None:
        try:
            self._on_notice(notice)
        except Exception:
            # A defect of whoever listens must not cost the pool its notices.
            log.exception("pool.notice_failed")


def _listen_to(name: str) -> psycopg.sql.Composed:
    return psycopg.sql.SQL("LISTEN {}").format(quoted(name))
