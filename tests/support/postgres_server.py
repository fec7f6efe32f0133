"""A real PostgreSQL in a folder of its own, which tests can stop, restart and crash."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from tests.support.ports import free_port
from tests.support.services import missing, require_program
from tests.support.waiting import eventually

# It refuses to run as root; Debian's package makes this user.
_USER = "postgres"
_DEBIAN = Path("/usr/lib/postgresql")


def program(name: str) -> str:
    """Debian keeps PostgreSQL's programs in a folder for each version."""
    found = sorted(_DEBIAN.glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]) if path.parts[4].isdigit() else 0)
    return str(found[-1]) if found else require_program(name)


class PostgresServer:
    """Listens on a Unix socket in `folder` and on `port`; everybody but the user `guarded` gets in without a password. With `tls`
    (certificate, key) over TCP only who encrypts gets in."""

    def __init__(
        self, *, fsync: bool = False, settings: Mapping[str, str] | None = None, tls: tuple[Path, Path] | None = None
    ) -> None:
        try:
            import psycopg  # noqa: F401
        except ImportError:
            missing("psycopg is not installed (the extra postgres)")
        self._programs = {name: program(name) for name in ("initdb", "postgres")}
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self.port = free_port()
        self._as_user = {"user": _USER, "group": _USER, "extra_groups": []} if os.geteuid() == 0 else {}
        if self._as_user:
            shutil.chown(self.folder, _USER, _USER)
        self._settings = {
            "fsync": "on" if fsync else "off",
            "max_connections": "120",
            "shared_buffers": "32MB",
            "autovacuum_naptime": "10s",
            "log_line_prefix": "%m %a ",
            "lc_messages": "C",
            **({} if tls is None else {"ssl": "on"}),
            **(settings or {}),
        }
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Over the socket; `host=127.0.0.1 port=...` over TCP."""
        return f"postgresql:///postgres?host={self.folder}&port={self.port}&user=postgres"

    def tcp_url(self, port: int | None = None, *, user: str = "postgres") -> str:
        return f"postgresql://{user}@127.0.0.1:{port or self.port}/postgres"

    def start(self) -> PostgresServer:
        self.launch()
        eventually(self._ready, 30.0, every_s=0.05)
        return self

    def launch(self) -> None:
        """Start it, and do not wait until it has recovered."""
        data = self.folder / "data"
        if not data.exists():
            self._run(
                "initdb", "-D", str(data), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"
            )
            lines = [f"{name} = '{value}'" for name, value in self._settings.items()]
            with (data / "postgresql.conf").open("a") as file:
                file.write("\n".join(lines) + "\n")
            host = "host" if self._tls is None else "hostssl"
            rules = (
                f"local all all trust\n{host} all guarded 127.0.0.1/32 scram-sha-256\n"
                f"{host} all all 127.0.0.1/32 trust\n"
            )
            (data / "pg_hba.conf").write_text(rules)
            if self._tls is not None:
                self.show(self._tls)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._programs["postgres"], "-D", str(data), "-p", str(self.port)),
                    *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._as_user,  # type: ignore[call-overload]
            )

    def crash(self) -> None:
        """Kill all its processes at once: none of them has time for another byte."""
        assert self._process is not None
        main = self._process.pid
        self._process.send_signal(signal.SIGSTOP)
        eventually(lambda: _state(main) in "TZ")  # it begins no other process meanwhile
        children = _children(main)
        for pid in (main, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None
        # Its next life refuses to start as long as one of them has its memory.
        eventually(lambda: all(_state(pid) == "Z" for pid in children), 30.0)

    def show(self, tls: tuple[Path, Path]) -> None:
        """Show this certificate, with its key, from the next start on."""
        for source, name in zip(tls, ("server.crt", "server.key"), strict=True):
            file = self.folder / "data" / name
            file.write_bytes(source.read_bytes())
            file.chmod(0o600)
            if self._as_user:
                shutil.chown(file, _USER, _USER)

    def stop(self, how: str = "fast") -> None:
        """`fast` ends all connections, as a service manager does; with `immediate` it ends where it stands, see also `crash`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if how == "immediate" else signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def restart(self, how: str = "immediate") -> None:
        self.stop(how)
        self.start()

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def sql(self, statement: str) -> list[tuple[object, ...]]:
        """Run one statement as the superuser."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as db:
            found = db.execute(statement.encode())
            return found.fetchall() if found.description else []

    def _ready(self) -> bool:
        import psycopg

        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, name: str, *args: str) -> None:
        subprocess.run(
            [self._programs[name], *args],
            check=True,
            capture_output=True,
            **self._as_user,  # type: ignore[call-overload]
        )


def _state(pid: int) -> str:
    """T for a process that is stopped; Z for one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


class _Shared:
    server: PostgresServer | None = None
    lock = threading.Lock()


def shared_postgres() -> PostgresServer:
    """A running server for everybody in this process: leave it running, use a schema of your own."""
    with _Shared.lock:
        if _Shared.server is None:
            _Shared.server = PostgresServer().start()
        return _Shared.server


def close_shared() -> None:
    """At the end of the process."""
    if _Shared.server is not None:
        _Shared.server.close()
        _Shared.server = None
