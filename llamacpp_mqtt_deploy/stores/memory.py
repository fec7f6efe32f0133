"""What `sessions.store = "memory"` has instead of a state file: a database that ends with its connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.stores import schema
from llamacpp_mqtt_deploy.stores.statefile import Missing


class MemoryFile:
    """For tests, demos and machines without a writable disk."""

    path = Path(":memory:")
    moved_aside: Path | None = None
    told_ends = None
    """Nothing of it outlives the process."""
    unmended = unfolded = None

    def open(self, first_look: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, cached_statements=128)
        # Pages that were freed go back to the system here too.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        schema.migrate(connection)
        first_look(connection)
        return connection

    def reader(self) -> sqlite3.Connection | None:
        """None: another connection would see another database, and there is no disk to wait for."""
        return None

    def suspect(self, error: sqlite3.Error) -> bool:
        """False: there is nothing to look at again, a database in memory does not outlive its damage."""
        return False

    def missing(self) -> Missing:
        """Nothing: there is no path at which it could lie."""
        return ""

    def mend(
        self, _missing: Missing, connection: sqlite3.Connection, _first_look: Callable[[sqlite3.Connection], None]
    ) -> sqlite3.Connection:
        return connection

    def log_is_long(self) -> bool:
        """False: there is no log."""
        return False

    def cut_log(self, _connection: sqlite3.Connection) -> None:
        """Nothing is cut."""

    def mended(self) -> StoreError | None:
        return None

    def full(self) -> StoreError | None:
        """None: there is no disk."""
        return None

    def make_room(self) -> bool:
        return False

    def release(self) -> None:
        """Nothing is locked."""
