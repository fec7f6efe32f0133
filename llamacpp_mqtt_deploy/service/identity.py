"""Who this worker is at the broker: a client id that nobody can guess, the same in each of its lives."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

import structlog

from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.durable_file import replace_file

log = structlog.get_logger(__name__)

_RANDOM_BYTES = 8
_KEPT = re.compile(r"[0-9a-f]{16}")
_MACHINE_ID = Path("/etc/machine-id")


def client_id(settings: Settings) -> str:
    """`lmd-{hash of root}-{worker_id}-{random part}`: another one for each root, and kept beside the state file.

    With an id that can be guessed, anyone who may connect could push the worker off the broker again and again.
    """
    root = hashlib.sha256(settings.mqtt.root.encode()).hexdigest()[:8]
    return f"lmd-{root}-{settings.mqtt.worker_id}-{_random_part(settings)}"


def mark(client_id: str) -> str:
    """What the instances of all lives under this client id begin with; tells nobody the client id."""
    return hashlib.sha256(client_id.encode()).hexdigest()[:12]


def _random_part(settings: Settings) -> str:
    if settings.sessions.store != "memory":
        path = settings.sessions.path
        file = path.with_name(path.name + ".client")
        try:
            return _kept(file)
        except OSError as problem:
            # The state file will not open either, and says so.
            log.warning("identity.not_kept", file=str(file), why=problem.strerror)
    return _of_this_machine(settings) or secrets.token_hex(_RANDOM_BYTES)


def _kept(file: Path) -> str:
    """The random part in this file, which is written where there is none."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if file.exists() and _KEPT.fullmatch(found := file.read_text(errors="replace").strip()):
        return found
    part = secrets.token_hex(_RANDOM_BYTES)
    # Another one after a power cut would leave a session at the broker, with the requests that wait in it.
    replace_file(file, part + "\n")
    return part


def _of_this_machine(settings: Settings) -> str | None:
    """Where no state is kept: the same after a restart, or each life would leave a session at the broker for ever."""
    try:
        machine = _MACHINE_ID.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    told = f"llamacpp-mqtt-deploy {machine} {os.getuid()} {settings.mqtt.worker_id}"
    return hashlib.sha256(told.encode()).hexdigest()[: 2 * _RANDOM_BYTES] if machine else None
