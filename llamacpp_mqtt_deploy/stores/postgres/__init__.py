"""The store on PostgreSQL: journal, histories and, for several workers at once, the common queue.

Its library comes with the extra `postgres` and is imported by the modules of this package only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llamacpp_mqtt_deploy.config.settings import Settings

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.stores.postgres.database import Database

_MOST_BYTES = 63
"""Of a name in PostgreSQL, which cuts a longer one."""

# Of the others' leases at least two thirds are left when a worker is frozen with locks that they need.
_IDLES_A_LEASE = 4


@contextmanager
def required() -> Iterator[None]:
    """Around the import of a module of this package: says in a sentence that the extra is missing."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'sessions.store = "postgres" needs the extra `postgres`: pip install "llamacpp-mqtt-deploy[postgres]" ({error}).'
        ) from error


def database_of(settings: Settings, password: Callable[[], str | None]) -> Database:
    """The database that `[sessions]` names. Raises ImportError without the extra `postgres`."""
    with required():
        from llamacpp_mqtt_deploy.stores.postgres.database import (  # noqa: PLC0415 - only when it is chosen
            IDLE_IN_TRANSACTION_S,
            SHORTEST_IDLE_S,
            Database,
        )

    idle_s = IDLE_IN_TRANSACTION_S
    if settings.pool.name is not None:
        idle_s = max(SHORTEST_IDLE_S, min(idle_s, settings.pool.lease_s / _IDLES_A_LEASE))
    return Database(
        url=settings.sessions.url or "", schema=schema_of(settings), password=password, idle_in_transaction_s=idle_s
    )


def schema_of(settings: Settings) -> str:
    """One for each root, so that two roots in one database never see each other."""
    given, root = settings.sessions.database_schema, settings.mqtt.root
    if given is not None:
        return given
    name = f"lmd_{root}"
    return name if len(name) <= _MOST_BYTES else f"{name[:46]}_{hashlib.sha256(root.encode()).hexdigest()[:16]}"


def aside_file(settings: Settings) -> Path:
    """The file of this machine for ends that the database does not take."""
    path = settings.sessions.path
    return path.with_name(path.name + ".ends")
