"""One SQLite file on a real disk: locked to one process, private, checked, migrated, moved aside when it is damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import structlog

from llamacpp_mqtt_deploy.ports import StoreError, StoreFull, StoreInUse
from llamacpp_mqtt_deploy.stores import schema
from llamacpp_mqtt_deploy.stores.reserve import Reserve
from llamacpp_mqtt_deploy.stores.told_ends import ToldEnds

BUSY_TIMEOUT_S = 1.0
"""How long another program on the file is waited for (an operator's `sqlite3` shell); no other worker gets past the lock."""

WAL_LIMIT_BYTES = 8 * 1024 * 1024
"""The log file is cut to this after a checkpoint; one large transaction would leave it large for ever."""

CACHE_KIB = 500
"""What each connection keeps of the file. The system keeps its pages too: with 10,000 sessions SQLite's own 2 MiB are no faster."""

KEPT_CORRUPT_FILES = 3
"""A dying disk damages the file again and again: the copies must not fill what is left of it."""

_LITTLE_BYTES = 256 * 1024
"""With less than this free, whatever went wrong at the opening went wrong for lack of room."""

_HEADER = b"SQLite format 3\x00"
_MARK = b"llamacpp-mqtt-deploy state"
_SUSPECT = b"damaged"
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SIDE_FILES = ("-wal", "-shm")

log = structlog.get_logger(__name__)


def translated(error: sqlite3.Error | OSError, path: Path) -> StoreError:
    """The error as a sentence for the operator: what happened, where, what to do."""
    if isinstance(error, OSError):
        return _translated_os_error(error, path)
    name = getattr(error, "sqlite_errorname", "") or type(error).__name__
    detail = f"{error}; {name}"
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _REFUSED_WRITES and _is_read_only(path):
        return StoreError(f"{_read_only(path)} ({detail}).")
    match code:
        case sqlite3.SQLITE_FULL:
            return StoreFull(f"{_full(path)} ({detail}).")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            advice = f"{path} cannot be written: {_WRITABLE}"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            advice = f"Another program holds {path} (an open sqlite3 shell, a backup): end it"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            advice = f"{path} is damaged: restart the worker, which then moves the file aside and begins a new one"
        case sqlite3.SQLITE_IOERR:
            advice = f"Reading or writing {path} failed: look for disk errors (dmesg), a quota or a file size limit"
        case _:
            advice = f"SQLite refused to work on {path}"
    return StoreError(f"{advice} ({detail}).")


def _full(path: Path) -> str:
    return f"The disk that holds {path} is full: free some space there"


_REFUSED_WRITES = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)


def _is_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path.parent).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _read_only(path: Path) -> str:
    return (
        f"The disk that holds {path} is read-only. After errors the kernel makes it so: look for them (dmesg), then make it writable "
        f"again (mount -o remount,rw). Or {_WRITABLE}"
    )


_WRITABLE = (
    "set sessions.path to a file in a directory that this user may write "
    "(under systemd's ProtectSystem=strict only StateDirectory= is writable), or set sessions.store to 'memory'"
)


def _translated_os_error(error: OSError, path: Path) -> StoreError:
    detail = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"{_full(path)} ({detail}).")
    if error.errno == errno.EROFS:
        return StoreError(f"{_read_only(path)} ({detail}).")
    return StoreError(f"{path} cannot be opened: {_WRITABLE} ({detail}).")


class StateFile:
    """Owns the lock beside the file and makes the connections to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.moved_aside: Path | None = None
        """Where a damaged file went when this one was opened."""
        self.reserve = Reserve(path.with_name(path.name + ".reserve"))
        self.told_ends = ToldEnds(path.with_name(path.name + ".ends"))
        self._lock_path = path.with_name(path.name + ".lock")
        self._lock_fd: int | None = None
        self._notes = b""
        self._wal = False

    def open(self, first_look: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        """Lock, create or check, and migrate the file; raises StoreError, and StoreInUse when another worker has it.

        Damage that `first_look` meets counts like damage met here.
        """
        try:
            return self._open(first_look)
        except StoreInUse:
            raise
        except StoreError:
            # Even to open it takes some room (SQLite's shared memory); there is some for this.
            if not self._disk_is_full():
                raise
        self.reserve.give_up()
        try:
            return self._open(first_look)
        except StoreInUse:
            raise
        except StoreError as problem:
            # What is wrong with the file itself (another program's, a newer version's) is not cured by waiting for room.
            if not isinstance(problem.__cause__, sqlite3.OperationalError | OSError) or not self._disk_is_full():
                raise
            raise StoreFull(*problem.args) from problem

    def _open(self, first_look: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._notes = self._lock()
            connection = self._connect_or_begin_anew(first_look)
            self._sign()
        except BaseException as error:
            self.release()
            if isinstance(error, sqlite3.Error | OSError):
                raise translated(error, self.path) from error
            raise
        return connection

    def _disk_is_full(self) -> bool:
        try:
            disk = os.statvfs(self.path.parent)
        except OSError:
            return False
        return disk.f_bavail * disk.f_frsize < _LITTLE_BYTES

    def full(self) -> StoreFull | None:
        """Why nothing new should be written; None while there is room to end what was accepted."""
        return (
            None
            if self.reserve.there()
            else StoreFull(f"{_full(self.path)} (what is left is for the ends of requests).")
        )

    def make_room(self) -> bool:
        """Give up the room that is kept for the ends of requests; False when there was none left."""
        return self.reserve.give_up()

    def reader(self) -> sqlite3.Connection | None:
        """A second connection, whose reads wait for no commit; None where only a write-ahead log would allow it."""
        if not self._wal:
            return None
        try:
            connection = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=32
            )
            connection.execute("PRAGMA query_only = 1")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        except sqlite3.Error as error:
            raise translated(error, self.path) from error
        return connection

    def release(self) -> None:
        """Give the lock back; the lock file stays, since removing it would race with the next worker."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    # --- the lock ----------------------------------------------------------------------------------------------------

    def suspect(self, error: sqlite3.Error) -> bool:
        """Whether this is damage; if so, note it in the lock file, so that the next start looks at all of the database."""
        if _is_damage(error) and self._lock_fd is not None:
            self._write_notes(_SUSPECT)
        return _is_damage(error)

    def _lock(self) -> bytes:
        """Take the lock; returns what its last holder noted, nothing when no worker has used this path before."""
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        self._lock_fd = fd
        held = os.pread(fd, 200, 0)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = held.rpartition(b"pid ")[2].strip().decode("ascii", "replace") or "unknown"
            message = (
                f"Another worker, pid {pid}, uses {self.path}: stop it, or give this one its own sessions.path "
                "(and its own mqtt.root or worker_id)."
            )
            raise StoreInUse(message) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            # Some network file systems have no locks; a worker that starts is worth more than this guard.
            log.warning("store.unlocked", path=str(self._lock_path), reason=error.strerror)
        return held

    def _sign(self) -> None:
        """Write mark and pid into the lock file; only after the file opened, so that a wrong path leaves no mark."""
        self._write_notes(b"")

    def _write_notes(self, remark: bytes) -> None:
        if self._lock_fd is not None:
            notes = b"%s\n%s\npid %d\n" % (_MARK, remark, os.getpid())
            # Written over the old ones before the rest is cut off: that much a full disk allows, and it must not stop us.
            with contextlib.suppress(OSError):
                os.pwrite(self._lock_fd, notes, 0)
                os.ftruncate(self._lock_fd, len(notes))

    # --- the file ----------------------------------------------------------------------------------------------------

    def _connect_or_begin_anew(self, first_look: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        try:
            return self._connect(first_look)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            if not self._notes.startswith(_MARK) and not self._looks_like_ours():
                message = (
                    f"{self.path} exists and is not a state file of this program: correct sessions.path, or move the "
                    "file away."
                )
                raise StoreError(message) from error
            # A worker without an operator must come back by itself; the old file is kept for whoever wants to look.
            self.moved_aside = self._move_aside()
            log.error(
                "store.moved_aside",
                reason=str(error),
                path=str(self.path),
                moved_to=str(self.moved_aside),
                lost="all session histories and the requests that were accepted and not yet answered",
                what_to_do="check the disk; `sqlite3 FILE .recover` may rescue the histories",
            )
        return self._connect(first_look)

    def _looks_like_ours(self) -> bool:
        """A file of zeros is what a power cut leaves on some file systems; else our mark is in the header."""
        with self.path.open("rb") as file:
            head = file.read(72)
        return not head.strip(b"\x00") or (
            head.startswith(_HEADER) and head[68:72] == schema.APPLICATION_ID.to_bytes(4, "big")
        )

    def _connect(self, first_look: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        # Created by us first: SQLite would take the umask, and gives its side files the mode of the main one.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=128
        )
        try:
            self._prepare(connection)
            first_look(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        killed = _size(self.path.with_name(self.path.name + "-wal")) > 0
        version = _number(connection, "user_version")
        application = _number(connection, "application_id")
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application not in (0, schema.APPLICATION_ID) or (application == 0 and tables):
            message = f"{self.path} is the database of another program: correct sessions.path."
            raise StoreError(message)
        if version > len(schema.MIGRATIONS):
            message = (
                f"{self.path} was written by a newer version of this program (schema {version}, this one knows up to "
                f"{len(schema.MIGRATIONS)}): install that version again, or move the file away to begin a new one."
            )
            raise StoreError(message)
        if not tables:
            # Only a file without tables can choose it: pages that purge freed go back to the disk, a few at a time.
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        self._wal = mode == "wal"
        if not self._wal:
            log.warning("store.without_wal", path=str(self.path), mode=mode, reason="the file system cannot")
        # Savepoints must not need a second disk that is full or read-only.
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        # Forgotten text is overwritten where that costs no further page; a promise against forensics it is not.
        connection.execute("PRAGMA secure_delete = FAST")
        suspected = _SUSPECT in self._notes
        if killed or suspected:
            # Look now, at a start, instead of failing at some request next week.
            check = "integrity_check" if suspected else "quick_check"
            finding = connection.execute(f"PRAGMA {check}(1)").fetchone()[0]
            if finding != "ok":
                raise _damaged(str(finding))
        connection.execute("PRAGMA synchronous = FULL")
        schema.migrate(connection)
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")  # now that all of the file may have been read
        if version == 0:
            log.info("store.created", path=str(self.path))
        elif version < len(schema.MIGRATIONS):
            log.info("store.migrated", path=str(self.path), was=version, schema=len(schema.MIGRATIONS))

    def _move_aside(self) -> Path:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        target = self.path.with_name(f"{self.path.name}.corrupt-{stamp}")
        for suffix in ("", *_SIDE_FILES):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).rename(target.with_name(target.name + suffix))
        # Not the one just made, though by a clock that is behind its name is the oldest.
        copies = sorted(
            copy
            for copy in self.path.parent.glob(f"{self.path.name}.corrupt-*")
            if copy != target and not copy.name.endswith(_SIDE_FILES)
        )
        for old in copies[: 1 - KEPT_CORRUPT_FILES]:
            for suffix in ("", *_SIDE_FILES):
                with contextlib.suppress(OSError):
                    old.with_name(old.name + suffix).unlink()
        return target


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


def _is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def _damaged(finding: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(finding)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    error.sqlite_errorname = "SQLITE_CORRUPT"
    return error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
