"""A real mosquitto on free ports, with the options that tests need; can be restarted, killed and frozen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.ports import free_port
from tests.support.services import require_program
from tests.support.waiting import eventually


class Mosquitto:
    """`users` makes a password file, `acl` an ACL file; `tls` names (ca, cert, key), and asks for client certificates with
    `client_certificates`; without `verbose` it logs what `settings` say. `port` is plain TCP, `tls_port`, `websocket_port` and `unix_path` exist where asked for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        users: Mapping[str, str] | None = None,
        acl: str | None = None,
        tls: tuple[Path, Path, Path] | None = None,
        client_certificates: bool = False,
        websockets: bool = False,
        unix: bool = False,
        persistence: bool = False,
        settings: Sequence[str] = (),
        verbose: bool = True,
    ) -> None:
        self._program = require_program("mosquitto")
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._users, self._acl, self._tls, self._client_certificates = users, acl, tls, client_certificates
        self._persistence, self._settings, self._verbose = persistence, tuple(settings), verbose
        self.host = "127.0.0.1"
        self.port = free_port()
        self.tls_port = free_port() if tls else 0
        self.websocket_port = free_port() if websockets else 0
        self.unix_path = folder / "m.sock" if unix else None
        self._process: subprocess.Popen[bytes] | None = None
        self.log_path = folder / "mosquitto.log"

    def start(self) -> Mosquitto:
        """Start it and wait until it takes connections."""
        config = self._folder / "mosquitto.conf"
        config.write_text("\n".join(self._lines()) + "\n")
        with self.log_path.open("ab") as log:
            # mosquitto drops root for the user `mosquitto`, who may not read a test's folder.
            self._process = subprocess.Popen(
                [self._program, "-c", str(config), *(["-v"] if self._verbose else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        eventually(self._listens, 10.0)
        return self

    def stop(self) -> None:
        """As a package update does: SIGTERM, which saves the state when persistence is on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As a power cut does."""
        self._end(signal.SIGKILL)

    def restart(self) -> Mosquitto:
        self.stop()
        return self.start()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self.kill()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        self._process.wait(10)
        self._process = None

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            socket.create_connection((self.host, self.port), 1).close()
        except OSError:
            return False
        return True

    def _lines(self) -> list[str]:
        lines = ["per_listener_settings false", *(["log_type all"] if self._verbose else [])]
        if os.geteuid() == 0:
            lines.append("user root")
        if self._users is None:
            lines.append("allow_anonymous true")
        else:
            passwords = self._folder / "passwords"
            if not passwords.exists():
                passwords.touch(0o600)
                for name, password in self._users.items():
                    subprocess.run(
                        [require_program("mosquitto_passwd"), "-b", str(passwords), name, password],
                        check=True,
                        capture_output=True,
                    )
            lines += ["allow_anonymous false", f"password_file {passwords}"]
        if self._acl is not None:
            acl = self._folder / "acl"
            acl.write_text(self._acl)
            acl.chmod(0o600)
            lines.append(f"acl_file {acl}")
        if self._persistence:
            lines += ["persistence true", f"persistence_location {self._folder}/", "autosave_interval 0"]
        lines += self._settings
        lines.append(f"listener {self.port} {self.host}")
        if self._tls is not None:
            ca, cert, key = self._tls
            lines += [f"listener {self.tls_port} {self.host}", f"cafile {ca}", f"certfile {cert}", f"keyfile {key}"]
            if self._client_certificates:
                lines.append("require_certificate true")
        if self.websocket_port:
            lines += [f"listener {self.websocket_port} {self.host}", "protocol websockets"]
        if self.unix_path is not None:
            lines.append(f"listener 0 {self.unix_path}")
        return lines
