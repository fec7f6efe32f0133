"""Debian systems in directories: made by debootstrap from this machine's own mirror, kept, and entered.

The first call for a release downloads some 100 MB; later ones take what is there. Everything runs as root in mount namespaces of
its own, so that nothing stays mounted whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
ROOTS = Path(os.environ.get("LMD_ROOTS") or PROJECT / ".roots")
"""Where the systems are kept. Ignored by git; `make clean-roots` removes them."""

RELEASES: Mapping[str, int] = {"bookworm": 12, "trixie": 13}
ARCHITECTURES: Mapping[str, str] = {"amd64": "x86_64", "arm64": "aarch64"}
"""Debian's names and the kernel's."""

BARE = ("systemd-sysv", "ca-certificates")
"""What a machine has that was just installed, beside the essential packages."""

_SOURCES = Path("/etc/apt")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_PIP_CONFIGURATION = Path("/etc/pip.conf")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_FOR_PIP = re.compile(r"PIP_(?!FIND_LINKS)\w+|https?_proxy|no_proxy", re.IGNORECASE)


class CannotBuild(Exception):
    """Something that this machine lacks; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Root:
    """A Debian system in a directory. `lower` is what an overlay in `path` lies on; None for a directory of its own."""

    path: Path
    release: str
    architecture: str
    lower: Path | None = None

    @property
    def upper(self) -> Path:
        """Where files are put that the system shall see, and found that it made."""
        return self.path if self.lower is None else self.path / "upper"

    def run(
        self, script: str, *, network: bool = True, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script in it, as root. Raises CalledProcessError with what it printed."""
        return subprocess.run(
            self.command(["sh", "-euc", script], network=network, environment=environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=check,
        )

    def command(
        self, words: Sequence[str], *, network: bool = True, environment: Mapping[str, str] | None = None
    ) -> list[str]:
        """What runs these words in it, in namespaces that end with them."""
        place = self.path / "merged" if self.lower else self.path
        mounts = [
            f"mount -t proc proc {shlex.quote(str(place))}/proc",
            f"mount --rbind /dev {shlex.quote(str(place))}/dev",
            f"mount -t tmpfs tmpfs {shlex.quote(str(place))}/dev/shm",  # noqa: S108 - a mount of its own
        ]
        given = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        given |= {name: value for name, value in os.environ.items() if _FOR_PIP.fullmatch(name)}
        variables = [f"{name}={value}" for name, value in (given | dict(environment or {})).items()]
        inside = (
            f'{" && ".join([*self.mounts(), *mounts])} && exec chroot {shlex.quote(str(place))} /usr/bin/env -i "$@"'
        )
        apart = ["--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
        return ["unshare", *apart, "sh", "-c", inside, "root", *variables, *words]

    def mounts(self) -> list[str]:
        """Commands that put the system together."""
        if self.lower is None:
            return []
        layers = f"lowerdir={self.lower},upperdir={self.upper},workdir={self.path / 'work'}"
        return [shlex.join(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.path / "merged")])]


@contextlib.contextmanager
def layered(base: Root, name: str) -> Iterator[Root]:
    """A copy of a system that costs nothing, in an overlay; gone at the end."""
    path = ROOTS / f"{name}.tmp{os.getpid()}"
    for part in ("upper", "work", "merged"):
        (path / part).mkdir(parents=True)
    try:
        yield Root(path, base.release, base.architecture, lower=base.path)
    finally:
        shutil.rmtree(path)


def own_architecture() -> str:
    machine = platform.machine()
    found = [debian for debian, kernel in ARCHITECTURES.items() if kernel == machine]
    if not found:
        raise CannotBuild(f"Packages are built on {', '.join(ARCHITECTURES.values())}; this machine is {machine}.")
    return found[0]


def kept(release: str, architecture: str, purpose: str, packages: Sequence[str]) -> Root:
    """The system with these packages, made now if it was not yet, or was made with others. Raises CannotBuild."""
    if release not in RELEASES:
        raise CannotBuild(f"{release} is not known; releases: {', '.join(RELEASES)}")
    check_tools(architecture)
    path = ROOTS / f"{release}-{architecture}-{purpose}"
    stamp, wanted = path.with_suffix(".packages"), " ".join(sorted(packages))
    if path.is_dir() and stamp.is_file() and stamp.read_text() == wanted:
        return Root(path, release, architecture)
    ROOTS.mkdir(parents=True, exist_ok=True)
    fresh = Root(path.with_suffix(f".tmp{os.getpid()}"), release, architecture)
    print(f"Making a {release} {architecture} system in {path} ...", flush=True)
    try:
        _make(fresh, packages)
        if path.exists():
            shutil.rmtree(path)
        fresh.path.rename(path)
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"The {release} {architecture} system cannot be made: {_end_of(error.output)}") from error
    finally:
        shutil.rmtree(fresh.path, ignore_errors=True)
    stamp.write_text(wanted)
    return Root(path, release, architecture)


def _make(root: Root, packages: Sequence[str]) -> None:
    command = ["debootstrap", "--variant=minbase", f"--arch={root.architecture}", f"--include={','.join(BARE)}"]
    _run([*command, root.release, str(root.path), mirror()])
    # So that pip and apt reach in there what they reach here.
    if _CERTIFICATES.is_file():
        shutil.copy(_CERTIFICATES, root.path / "etc/ssl/certs/")
    if _PIP_CONFIGURATION.is_file():
        shutil.copy(_PIP_CONFIGURATION, root.path / "etc/")
    # Debian's installer writes it; debootstrap does not, and without it not even localhost is found.
    (root.path / "etc/hosts").write_text("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
    # As policy wants it of a root that is worked in: installing a package starts nothing. Removed where systemd is booted.
    policy = root.path / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    root.run("apt-get -qq update")
    if packages:
        root.run(f"apt-get -qq install --no-install-recommends -y {shlex.join(packages)}")


def mirror() -> str:
    """The mirror of Debian that this machine's apt uses. Raises CannotBuild."""
    files = [*sorted(_SOURCES.glob("sources.list.d/*.sources")), *sorted(_SOURCES.glob("sources.list.d/*.list"))]
    files += [path for path in (_SOURCES / "sources.list",) if path.is_file()]
    for file in files:
        found = re.search(r"(?m)^(?:URIs:|deb(?: \[[^]]*\])?)\s+(\S+/debian/?)(?:\s|$)", file.read_text("utf-8"))
        if found:
            return found[1]
    raise CannotBuild("apt's sources name no mirror of Debian (…/debian); set one in /etc/apt/sources.list.d.")


def check_tools(architecture: str) -> None:
    """Raises CannotBuild."""
    if os.geteuid() != 0:
        raise CannotBuild("Debian systems are made and entered by root only; try it with sudo.")
    lacking = [name for name in ("debootstrap", "unshare", "chroot") if shutil.which(name) is None]
    if lacking:
        raise CannotBuild(f"{', '.join(lacking)} missing: apt-get install debootstrap util-linux coreutils")
    if architecture != own_architecture():
        _check_emulation(architecture)


def _check_emulation(architecture: str) -> None:
    """Let the kernel run the other architecture's programs. Raises CannotBuild."""
    kernel_name, table = ARCHITECTURES[architecture], Path("/proc/sys/fs/binfmt_misc")
    if not (table / "register").exists():
        # Fails where the kernel has no binfmt_misc, which the next look finds out.
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(table)], check=False, capture_output=True)
    if not (table / "register").exists():
        raise CannotBuild(f"This kernel has no binfmt_misc, so it cannot run programs for {architecture}.")
    entry = table / f"qemu-{kernel_name}"
    if entry.exists():
        return
    if shutil.which(f"qemu-{kernel_name}-static") is None:
        raise CannotBuild(f"qemu-{kernel_name}-static is missing: apt-get install qemu-user-static")
    _register(architecture, table)


# The first 20 bytes of an ELF program for it and which bits of them count; F loads the interpreter now, so that it is found in
# every chroot (Documentation/admin-guide/binfmt-misc.rst; the values are those of Debian's qemu-user-static).
_ELF = {
    "arm64": (
        rb"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00",
        rb"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff",
    ),
}


def _register(architecture: str, table: Path) -> None:
    kernel_name = ARCHITECTURES[architecture]
    interpreter = shutil.which(f"qemu-{kernel_name}-static") or ""
    magic, mask = _ELF[architecture]
    line = b":".join((f":qemu-{kernel_name}".encode(), b"M", b"", magic, mask, interpreter.encode(), b"F"))
    try:
        (table / "register").write_bytes(line)
    except OSError as error:
        raise CannotBuild(f"The kernel does not take an interpreter for {architecture}: {error.strerror}") from error


def _run(command: Sequence[str]) -> None:
    subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )


def _end_of(output: str) -> str:
    return " | ".join(output.strip().splitlines()[-4:])
