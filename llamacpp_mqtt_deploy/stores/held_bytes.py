"""How much each first level holds of ended requests: counted once for a connection, and kept by triggers from then on."""

# ruff: noqa: S608  every statement is joined from constants of this file
from __future__ import annotations

import sqlite3

from llamacpp_mqtt_deploy.stores.bounds import ROW_BYTES

# Whoever ends, delivers or drops a request changes these bytes in the same transaction, so they go back with it.
_LESS = f"""
    UPDATE held_bytes SET bytes = bytes - OLD.bytes - {ROW_BYTES}
    WHERE OLD.state = 'ended' AND first_level = OLD.first_level AND delivered = OLD.delivered;
    DELETE FROM held_bytes
    WHERE OLD.state = 'ended' AND first_level = OLD.first_level AND delivered = OLD.delivered AND bytes <= 0;
"""
_MORE = f"""
    INSERT INTO held_bytes SELECT NEW.first_level, NEW.delivered, NEW.bytes + {ROW_BYTES} WHERE NEW.state = 'ended'
    ON CONFLICT (first_level, delivered) DO UPDATE SET bytes = bytes + excluded.bytes;
"""
_STEPS = (
    """
    CREATE TEMP TABLE held_bytes (
        first_level TEXT,
        delivered INTEGER,
        bytes INTEGER,
        PRIMARY KEY (first_level, delivered)
    ) WITHOUT ROWID
    """,
    f"""
    INSERT INTO held_bytes SELECT first_level, delivered, sum(bytes + {ROW_BYTES}) FROM entries
    WHERE state = 'ended' AND delivered IN (0, 1) GROUP BY first_level, delivered
    """,
    f"CREATE TEMP TRIGGER held_bytes_inserted AFTER INSERT ON main.entries WHEN NEW.state = 'ended' BEGIN {_MORE} END",
    f"CREATE TEMP TRIGGER held_bytes_dropped AFTER DELETE ON main.entries WHEN OLD.state = 'ended' BEGIN {_LESS} END",
    f"CREATE TEMP TRIGGER held_bytes_changed AFTER UPDATE OF bytes, delivered ON main.entries BEGIN {_LESS} {_MORE} END",
)


def count(db: sqlite3.Connection) -> None:
    """Read all ended requests, once: with a hundred thousand of them that takes longer than a request should wait."""
    for step in _STEPS:
        db.execute(step)


def read(db: sqlite3.Connection) -> dict[tuple[str, bool], int]:
    """Bytes by (first level, delivered)."""
    rows = db.execute("SELECT first_level, delivered, bytes FROM held_bytes").fetchall()
    return {(first_level, bool(delivered)): held for first_level, delivered, held in rows}
