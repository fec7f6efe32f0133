"""The database of `sessions.store = "postgres"`: does it answer, may this user work in it, does it keep what it was given."""

from __future__ import annotations

from collections.abc import Iterator

from llamacpp_mqtt_deploy.checking.findings import Finding, fail, ok, warn
from llamacpp_mqtt_deploy.checking.machine import CLOCKS_DIFFER_S
from llamacpp_mqtt_deploy.config.credentials import database_password
from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.stores.postgres import database_of, required

SLOW_S = 0.02
"""A request takes about six round trips on its way."""


def check_database(settings: Settings) -> Iterator[Finding]:
    """Try it with a connection of our own; a worker that runs is not disturbed."""
    try:
        database = database_of(settings, lambda: database_password(settings))
        with required():
            from llamacpp_mqtt_deploy.stores.postgres.database_probe import look_at  # noqa: PLC0415 - its library is an extra
    except ImportError as problem:
        yield fail("store.database", str(problem), 'pip install "llamacpp-mqtt-deploy[postgres]"')
        return
    try:
        found = look_at(database)
    except StoreError as problem:
        yield fail("store.database", str(problem), "see docs/fleet.md")
        return
    ms = found.answers_in_s * 1000
    text = f"PostgreSQL {found.version}, {found.where}, answers in {ms:.1f} ms" + (
        ", encrypted" if found.encrypted else ""
    )
    if found.answers_in_s > SLOW_S:
        yield warn("store.database", text, "a database nearby makes for quicker first tokens")
    else:
        yield ok("store.database", text)
    if found.schema_problem:
        yield fail("store.schema", found.schema_problem, "see docs/fleet.md")
    else:
        there = f"has tables of layout {found.tables}" if found.tables else "will be made at the first start"
        yield ok("store.schema", f"{database.schema} {there}")
    if found.unsafe:
        advice = "a power cut may lose requests that were acknowledged"
        yield warn("store.durability", f"{', '.join(found.unsafe)} off in postgresql.conf", advice)
    else:
        yield ok("store.durability", "commits survive a power cut")
    if abs(found.clock_ahead_s) > CLOCKS_DIFFER_S:
        yield warn(
            "store.clock", f"the database's clock differs by {abs(found.clock_ahead_s):.0f} s", "synchronise them"
        )
