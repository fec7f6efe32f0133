"""The machine: place for the state, free disk, the clock, and which versions run here."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamacpp_mqtt_deploy import __version__
from llamacpp_mqtt_deploy.checking.findings import Finding, fail, ok, warn
from llamacpp_mqtt_deploy.config.settings import SessionsSettings

LOW_DISK_BYTES = 200 * 1024 * 1024  # SQLite needs room for its log beside the database, and the system some for itself
CLOCKS_DIFFER_S = 5.0
BUILT_IN = 2025  # a clock before this year is a board without a battery that has not met a time server


def check_store(sessions: SessionsSettings) -> Iterator[Finding]:
    """Can the state be written, and is there room."""
    if sessions.store == "memory":
        yield warn(
            "store.path", "the state is kept in memory and lost when the worker ends", 'set sessions.store = "sqlite"'
        )
        return
    file = sessions.path
    folder = next((parent for parent in file.absolute().parents if parent.exists()), Path("/"))
    try:
        # Trying is the proof: access rights, read-only mounts and a full disk all end here.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
        if file.exists() and not os.access(file, os.R_OK | os.W_OK):
            raise PermissionError(13, f"this user may not write {file.name}")
    except OSError as error:
        yield fail(
            "store.path",
            f"{folder}: {error.strerror or error}",
            "set sessions.path, or run the check as the user of the service",
        )
    else:
        yield ok("store.path", f"{file} can be written")
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    text = f"{free / 1024 / 1024:.0f} MB free at {folder}"
    if free < LOW_DISK_BYTES:
        yield warn("store.disk", text, "make room: without it no request can be accepted")
    else:
        yield ok("store.disk", text)


def check_clock(online: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Is the clock plausible, and does it agree with those of the workers on the bus."""
    now = dt.datetime.now(tz=dt.UTC)
    text = now.strftime("%Y-%m-%d %H:%M:%S UTC")
    if now.year < BUILT_IN:
        return fail("machine.clock", text, "set the clock: certificates and the age of a status depend on it")
    for worker, status in online.items():
        ts, every_s = status.get("ts"), status.get("every_s")
        if not isinstance(ts, int | float) or not isinstance(every_s, int | float):
            continue
        # A status is up to `every_s` old by nature; one from the future is certain.
        ahead_s = ts - time.time()
        if ahead_s > CLOCKS_DIFFER_S or -ahead_s > every_s + CLOCKS_DIFFER_S:
            return warn(
                "machine.clock",
                f"{text}; the clock of worker {worker} differs by {abs(ahead_s):.0f} s",
                "synchronise them",
            )
    return ok("machine.clock", text)


def check_versions() -> Finding:
    parts = [f"llamacpp-mqtt-deploy {__version__}", f"Python {platform.python_version()}"]
    for name in ("paho-mqtt", "psycopg", "llama-cpp-python", "xllamacpp"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ok("machine.versions", ", ".join([*parts, platform.machine()]))
