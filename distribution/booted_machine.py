"""A machine of Debian, booted with its own systemd in a container (systemd-nspawn), without any network but its loopback."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

from distribution.debian_root import CannotBuild, Root

_BOOT_S = 120.0
_POWER_OFF_S = 60.0
_ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LANG=C.UTF-8",
    "DEBIAN_FRONTEND=noninteractive",
)


class BootedMachine:
    """Booted by `with`, powered off at its end. Raises CannotBuild where this machine cannot do that."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None
        self.leader = 0
        """Its first process, as this machine numbers it; for nsenter."""

    def __enter__(self) -> Self:
        if shutil.which("systemd-nspawn") is None:
            raise CannotBuild("systemd-nspawn is missing: apt-get install systemd-container")
        place = self._root.path / "merged"
        boot = ["systemd-nspawn", f"--directory={place}", f"--machine=lmd{os.getpid()}", "--boot", "--private-network"]
        # Neither of them is there when the outer system was not started by systemd.
        boot += ["--register=no", "--keep-unit", "--console=pipe"]
        # A new installation has services that the policy keeps from starting; here they shall.
        script = " && ".join([*self._root.mounts(), f"rm -f {place}/usr/sbin/policy-rc.d", f"exec {shlex.join(boot)}"])
        self._log = self._root.path / "console.log"
        with self._log.open("wb") as console:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        try:
            self._wait_booted()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, script: str, *, check: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a shell script on the machine, as root. Raises CalledProcessError with what it printed."""
        inside = [
            "nsenter",
            f"--target={self.leader}",
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--cgroup",
            "--root",
            "--wdns=/",
        ]
        ended = subprocess.run(
            [*inside, "/usr/bin/env", "-i", *_ENVIRONMENT, "/bin/sh", "-euc", script],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and ended.returncode != 0:
            raise AssertionError(f"exit code {ended.returncode} of {script}\n{ended.stdout}")
        return ended

    def close(self) -> None:
        """Power it off."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)  # systemd-nspawn(1): an orderly end of a booted container
        try:
            self._process.wait(_POWER_OFF_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _wait_booted(self) -> None:
        ends_at = time.monotonic() + _BOOT_S
        while True:
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > ends_at:
                said = self._log.read_text("utf-8", "replace").strip()
                raise CannotBuild(
                    f"No container can be booted here (systemd-nspawn --boot): {said or 'no reason told'}"
                )
            self.leader = _child_of(self._process.pid)
            if self.leader and self._booted():
                return
            time.sleep(0.1)

    def _booted(self) -> bool:
        state = self.run("systemctl is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")


def _child_of(pid: int) -> int:
    """The first process that this one started; 0 when there is none."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            return int(stat.parent.name)
    return 0
