"""One SQLite file on a real disk: locked to one process, private, checked, migrated, moved aside when it is damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import structlog

from llamacpp_mqtt_deploy.ports import StoreError, StoreFull, StoreInUse
from llamacpp_mqtt_deploy.stores import schema
from llamacpp_mqtt_deploy.stores.reserve import Reserve
from llamacpp_mqtt_deploy.stores.told_ends import ToldEnds

BUSY_TIMEOUT_S = 1.0
"""How long another program on the file is waited for (an operator's `sqlite3` shell); no other worker gets past the lock."""

WAL_LIMIT_BYTES = 8 * 1024 * 1024
"""The log file is cut to this after a checkpoint; one large transaction would leave it large for ever."""

LONG_LOG_BYTES = 64 * 1024 * 1024
"""No healthy log comes near it, whatever the size of the database: it is folded in at 4 MiB, and one transaction adds a few."""

CACHE_KIB = 500
"""What each connection keeps of the file. The system keeps its pages too: with 10,000 sessions SQLite's own 2 MiB are no faster."""

KEPT_COPIES = 3
"""A dying disk damages the file again and again: what is moved aside must not fill what is left of it."""

MENDED_TOLD_FOR_S = 600.0
"""How long it is told that the file had to be written anew: nobody looks at every second, and it may happen again."""

_LITTLE_BYTES = 256 * 1024
"""With less than this free, whatever went wrong at the opening went wrong for lack of room."""

_HEADER = b"SQLite format 3\x00"
_MARK = b"llamacpp-mqtt-deploy state"
_SUSPECT = b"damaged"
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SIDE_FILES = ("-wal", "-shm")
_LOCK = ".lock"

Missing = Literal["", "lock", "log", "file"]
"""What of ours does not lie at its path any more; of several that whose loss is the worst."""

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
        self.unmended: StoreError | None = None
        """Why nothing new should be written: the file does not lie at its path any more, and could not be put there again."""
        self.unfolded: StoreError | None = None
        """Why the log grows without end."""
        self._mended: tuple[float, StoreError] | None = None
        self._ours: dict[str, tuple[int, int] | None] = {}
        self._lock_path = path.with_name(path.name + _LOCK)
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
            self._ours = self._there()
            self.unmended = self.unfolded = self._mended = None
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

    # --- the path ----------------------------------------------------------------------------------------------------

    def missing(self) -> Missing:
        """What somebody has removed or replaced while it was open; costs a few calls of `stat`."""
        there = self._there()
        changed = {suffix for suffix, was in self._ours.items() if there.get(suffix) != was}
        if not changed:
            self.unmended = None  # a mount that came back
            return ""
        if "" in changed:
            return "file"
        return "log" if changed.intersection(_SIDE_FILES) else "lock"

    def mend(
        self, missing: Missing, connection: sqlite3.Connection, first_look: Callable[[sqlite3.Connection], None]
    ) -> sqlite3.Connection:
        """Put at its path again what is missing there; returns the connection to go on with, which may be a new one, looked at
        first, with all that the old one knows. Raises StoreError; the old one serves on then. There must be no reader where the
        log is missing."""
        what, how = f"{self.path} ({_MISSING[missing]})", "removed or replaced"
        try:
            self._make_directory()
            self._lock_again()
            if missing == "file":
                aside = self._clear_the_path()
                how = "removed" if aside is None else f"replaced by what is now {aside}"
                connection = self._write_anew(connection, first_look)
            elif missing == "log":
                # Leaving this mode folds in what is in the log, though it has no name any more.
                connection.execute("PRAGMA journal_mode = DELETE").fetchall()
                self._choose_log(connection)
            self._sign()
        except (StoreError, sqlite3.Error, OSError) as error:
            problem = error if isinstance(error, StoreError) else translated(error, self.path)
            self.unmended = StoreError(f"{what} was {how} while the worker worked with it. {_UNMENDED} {problem}")
            raise self.unmended from error
        told = StoreError(f"{what} was {how} while the worker worked with it. {_MENDED}")
        self._ours, self.unmended, self._mended = self._there(), None, (time.monotonic(), told)
        return connection

    def log_is_long(self) -> bool:
        """Whether it should be cut; costs a call of `stat`."""
        if self._log_bytes() > LONG_LOG_BYTES:
            return True
        self.unfolded = None
        return False

    def cut_log(self, connection: sqlite3.Connection) -> None:
        """Cut a log that is folded in. One who reads in it hinders that, so there must be no reader of ours; he is not waited for."""
        connection.execute("PRAGMA busy_timeout = 0").fetchall()
        try:
            hindered = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}").fetchall()
        self.unfolded = _read_by_others(self.path, self._log_bytes()) if hindered else None

    def _log_bytes(self) -> int:
        try:
            return _size(self._beside("-wal")) if self._wal else 0
        except OSError:
            return 0  # a disk that does not say is another trouble

    def mended(self) -> StoreError | None:
        """What was missing of late, and is there again."""
        if self._mended is None or time.monotonic() - self._mended[0] > MENDED_TOLD_FOR_S:
            return None
        return self._mended[1]

    def _there(self) -> dict[str, tuple[int, int] | None]:
        side_files = _SIDE_FILES if self._wal else ()
        return {suffix: self._identity(suffix) for suffix in ("", *side_files, _LOCK)}

    def _identity(self, suffix: str) -> tuple[int, int] | None:
        try:
            found = self._beside(suffix).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return self._ours.get(suffix)  # a disk that does not say is another trouble
        return found.st_dev, found.st_ino

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _make_directory(self) -> None:
        directory = self.path.parent
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            message = (
                f"Make the directory {directory} again, writable for uid {os.getuid()} ({error.strerror or error})."
            )
            raise StoreError(message) from error

    def _clear_the_path(self) -> Path | None:
        """Make room for the file; returns where something went that is not ours to remove, perhaps a backup to be restored."""
        for suffix in _SIDE_FILES:
            if self._identity(suffix) == self._ours.get(suffix):
                self._beside(suffix).unlink(missing_ok=True)  # of the old file: it would spoil any other one
        if self._identity("") is None:
            return None
        aside = self._move_aside("replaced")
        log.warning("store.put_aside", path=str(self.path), moved_to=str(aside))
        return aside

    def _write_anew(
        self, old: sqlite3.Connection, first_look: Callable[[sqlite3.Connection], None]
    ) -> sqlite3.Connection:
        """All that is in the file that lost its name, in one transaction, with that name."""

        def copy(new: sqlite3.Connection) -> None:
            old.backup(new, progress=_must_not_wait)
            new.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            first_look(new)

        try:
            return self._connect(copy)
        except BaseException:
            for suffix in ("", *_SIDE_FILES):
                with contextlib.suppress(OSError):
                    self._beside(suffix).unlink(missing_ok=True)
            raise

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

    def _lock_again(self) -> None:
        """Where the lock file is gone another worker could start: the lock that we have is on a file that it does not see."""
        if self._identity(_LOCK) == self._ours[_LOCK]:
            return
        held = self._lock_fd
        try:
            self._lock()
        except BaseException:
            if self._lock_fd != held:
                self.release()
                self._lock_fd = held
            raise
        if held is not None:
            os.close(held)
        self._ours[_LOCK] = self._identity(_LOCK)

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
            self.moved_aside = self._move_aside("corrupt")
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
        self._choose_log(connection)
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

    def _choose_log(self, connection: sqlite3.Connection) -> None:
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        self._wal = mode == "wal"
        if not self._wal:
            log.warning("store.without_wal", path=str(self.path), mode=mode, reason="the file system cannot")

    def _move_aside(self, why: Literal["corrupt", "replaced"]) -> Path:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        target = self.path.with_name(f"{self.path.name}.{why}-{stamp}")
        for suffix in ("", *_SIDE_FILES):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).rename(target.with_name(target.name + suffix))
        # Not the one just made, though by a clock that is behind its name is the oldest.
        copies = sorted(
            copy
            for copy in self.path.parent.glob(f"{self.path.name}.{why}-*")
            if copy != target and not copy.name.endswith(_SIDE_FILES)
        )
        for old in copies[: 1 - KEPT_COPIES]:
            for suffix in ("", *_SIDE_FILES):
                with contextlib.suppress(OSError):
                    old.with_name(old.name + suffix).unlink()
        return target


_MISSING = {"": "", "file": "the database itself", "log": "its -wal or -shm", "lock": "its .lock"}
_MENDED = (
    "The worker put it there again and nothing is lost. Find what did this: a cleaning script, tmpfiles, a sync tool. To restore a "
    "backup, stop the worker first."
)
_UNMENDED = (
    "The worker still has all of it, takes no new requests and tries every few seconds to put it there again; if it stops before "
    "that, what it has is lost."
)


def _read_by_others(path: Path, log_bytes: int) -> StoreError:
    told = LONG_LOG_BYTES
    while 2 * told <= log_bytes:
        told *= 2  # the sentence becomes another one a few times, not every few seconds
    return StoreError(
        f"{path}-wal is larger than {told // 2**20} MiB and grows until the disk is full: another program has {path} open and reads in "
        f"it without end (an open sqlite3 shell, a backup). End it; `fuser -v {path}` names it beside the worker, pid {os.getpid()}. "
        "The file then shrinks by itself."
    )


def _must_not_wait(status: int, _left: int, _total: int) -> None:
    """Python tries for ever to copy into a database that another program holds."""
    if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        raise StoreError("Another program holds the new file (an open sqlite3 shell, a backup): end it.")


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
