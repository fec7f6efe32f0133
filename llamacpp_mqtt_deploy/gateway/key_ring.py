"""Who may ask: keys of the keys file, each bound to a first topic level, a lane, a rate and models; only their hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from llamacpp_mqtt_deploy.core.fields import Lane
from llamacpp_mqtt_deploy.core.rates import RateLimiter
from llamacpp_mqtt_deploy.durable_file import replace_file
from llamacpp_mqtt_deploy.gateway.problems import Forbidden, Unauthorized

Level = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]

PREFIX = "lmd-"
KEY_BYTES = 32
"""Random bytes of a key: too many to guess, so that a plain SHA-256 is enough of a hash."""
MAX_KEY_CHARS = 256
MAX_KEYS = 1000
MAX_NAME_CHARS = 60
"""So that a topic level can hold more beside it."""
MAX_FILE_BYTES = 1024 * 1024
LOOK_EVERY_S = 1.0
"""How soon a changed keys file counts."""
LANES: tuple[Lane, ...] = ("batch", "normal", "interactive")


_UNKNOWN = "This key is not known here. `lmd gateway key add NAME` makes one."


class KeysFileError(Exception):
    """The keys file cannot be used; the text says why and what to do."""


class KeyEntry(BaseModel):
    """One table of the keys file; its name is the name of the key."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Hash of the key."""
    level: Level
    """First topic level of its sessions: whose share of the worker its requests use."""
    max_priority: Literal["interactive", "normal", "batch"] = "normal"
    """Highest lane that its requests may ask for."""
    requests_per_minute: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Requests in a minute; 0 is no limit of the gateway's."""
    models: tuple[str, ...] = ()
    """Models that it may name, `default` for the worker's own; all when empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whoever sent a request: the bearer of a key, or anybody on this machine where there are no keys."""

    name: str
    level: str
    max_priority: Lane = "normal"
    requests_per_minute: int = 0
    models: tuple[str, ...] = ()

    def lane(self, wish: str | None) -> str | None:
        """The lane that a request gets; None where it need not say."""
        asked = wish or "normal"
        if asked in LANES and LANES.index(asked) > LANES.index(self.max_priority):
            return self.max_priority
        return wish

    def model(self, wish: str | None) -> str | None:
        """The model to ask the worker for, None for its own. Raises Forbidden."""
        if not self.models:
            return wish
        if wish is None and "default" not in self.models:
            return self.models[0]
        if (wish or "default") not in self.models:
            raise Forbidden(
                f"This key may not use the model {wish!r}.", fields={"model": f"one of {', '.join(self.models)}"}
            )
        return wish

    def may_name(self, model: str) -> bool:
        return not self.models or model in self.models


@dataclass(slots=True)
class KeyRing:
    """The keys of a file, read again when it changes. A file that became unreadable leaves the keys as they were."""

    file: Path
    problem: str = ""
    """Why the file as it is now cannot be used; for the log."""
    _owners: list[tuple[bytes, Owner]] = field(default_factory=list)
    _limiters: dict[str, RateLimiter] = field(default_factory=dict)
    _stamp: tuple[int, int, int] | None = None
    _looked_at: float = float("-inf")

    def load(self) -> None:
        """Read the file; raises KeysFileError."""
        self._stamp = _stamp(self.file)
        entries = read_keys(self.file)
        self._owners = [
            (
                bytes.fromhex(entry.sha256),
                Owner(
                    name=name,
                    level=entry.level,
                    max_priority=entry.max_priority,
                    requests_per_minute=entry.requests_per_minute,
                    models=entry.models,
                ),
            )
            for name, entry in entries.items()
        ]
        kept = {name: limiter for name, limiter in self._limiters.items() if name in entries}
        for name, entry in entries.items():
            if name not in kept or kept[name].per_minute != entry.requests_per_minute:
                kept[name] = RateLimiter(entry.requests_per_minute)
        self._limiters = kept

    def levels(self) -> list[str]:
        """The first topic levels of all keys."""
        return sorted({owner.level for _, owner in self._owners})

    def owner(self, key: str | None) -> Owner:
        """Whose key this is; raises Unauthorized. It takes as long for a wrong key as for a right one."""
        self._look_again()
        if not key:
            raise Unauthorized("A key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.")
        digest = hashlib.sha256(key[: MAX_KEY_CHARS + 1].encode("utf-8", "replace")).digest()
        found: Owner | None = None
        for known, owner in self._owners:
            if hmac.compare_digest(known, digest):
                found = owner
        if found is None:
            raise Unauthorized(_UNKNOWN)
        return found

    def take(self, owner: Owner) -> None:
        """Count one request; raises RateLimited."""
        limiter = self._limiters.get(owner.name)
        if limiter is None:
            raise Unauthorized(_UNKNOWN)  # removed since it was looked up
        limiter.take(owner.level, time.monotonic())

    def _look_again(self) -> None:
        now = time.monotonic()
        if now < self._looked_at + LOOK_EVERY_S:
            return
        self._looked_at = now
        if _stamp(self.file) == self._stamp:
            return
        try:
            self.load()
            self.problem = ""
        except KeysFileError as error:
            self.problem = str(error)
            self._stamp = (
                None  # what only its mode, or a shortage, kept from being read looks the same once that is mended
            )


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


# --- the file ----------------------------------------------------------------------------------------------------------


def read_keys(file: Path) -> dict[str, KeyEntry]:
    """The keys of the file by name; raises KeysFileError."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysFileError(
            f"cannot read the keys file {file} ({error.strerror or error}); `lmd gateway key add NAME` makes it"
        ) from error
    if len(raw) > MAX_FILE_BYTES:
        raise KeysFileError(f"{file} has more than {MAX_FILE_BYTES} bytes; this is no keys file")
    try:
        tables = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise KeysFileError(f"{file} is not valid TOML: {error}") from error
    if len(tables) > MAX_KEYS:
        raise KeysFileError(f"{file} holds {len(tables)} keys; at most {MAX_KEYS} are taken")
    return {name: _entry(file, name, table) for name, table in tables.items()}


def _entry(file: Path, name: str, table: object) -> KeyEntry:
    try:
        check_key_name(name)
        return KeyEntry.model_validate(table)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, found["loc"]))
        raise KeysFileError(f"{file}: [{name}] {where}: {found['msg']}") from None
    except ValueError as error:
        raise KeysFileError(f"{file}: {error}") from None


def check_key_name(name: str) -> None:
    """Raise ValueError for what cannot name a key: it is a topic level of the key's requests that name no session."""
    if not 1 <= len(name) <= MAX_NAME_CHARS or not all(c.isascii() and (c.isalnum() or c in "_-") for c in name):
        raise ValueError(f"{name!r} is no name for a key: 1 to {MAX_NAME_CHARS} letters, digits, _ or -")


def new_key() -> str:
    """A key to give away."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write_keys(file: Path, entries: Mapping[str, KeyEntry]) -> None:
    """Replace the file in one step; only its owner, and the group that it had, may read it. Raises KeysFileError."""
    text = "".join(_lines(entries))
    try:
        before = file.stat() if file.exists() else None

        def as_before(draft: Path) -> None:
            if before is not None:
                draft.chmod(stat.S_IMODE(before.st_mode) & 0o640)
                if os.geteuid() == 0:
                    os.chown(draft, before.st_uid, before.st_gid)

        replace_file(file, text, prepare=as_before)
    except OSError as error:
        raise KeysFileError(f"cannot write the keys file {file} ({error.strerror or error})") from error


def _lines(entries: Mapping[str, KeyEntry]) -> Iterable[str]:
    yield "# Keys of the gateway. Made by `lmd gateway key add`; a key itself is shown once and kept nowhere.\n"
    for name, entry in entries.items():
        models = ", ".join(_quoted(model) for model in entry.models)
        yield f"\n[{name}]\n"
        yield f'sha256 = "{entry.sha256}"\n'
        yield f'level = "{entry.level}"\n'
        yield f'max_priority = "{entry.max_priority}"\n'
        yield f"requests_per_minute = {entry.requests_per_minute}\n"
        yield f"models = [{models}]\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
