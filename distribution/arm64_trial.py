"""Runs the demo and a part of the tests on an emulated arm64 machine: `python -m distribution.arm64_trial`.

A Debian system for arm64 in a directory, whose programs the kernel hands to qemu. That shows that the wheels exist and load, that the
model answers and that nothing depends on x86; it shows no speed and no hardware, and a processor that qemu does not emulate may
still differ.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distribution.deb_build import BUILD_PACKAGES, newest_wheel
from distribution.debian_root import PROJECT, ROOTS, CannotBuild, Root, kept, layered, own_architecture

PACKAGES = ("python3", "python3-venv", "mosquitto", "mosquitto-clients")
"""Without libgomp1 on purpose: its absence is the first thing that is tried."""
LIBRARIES = (
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "gguf",
    "numpy",
    "jsonschema",
    "cryptography",
    "amqtt",
)
GLIBC = {"bookworm": 36, "trixie": 41}
"""glibc 2.x of a release: which wheels fit."""
DEMO_WITHIN_S = 600
TESTS_WITHIN_S = 1500
# Ten to twenty times slower than the same processor without emulation, so only a part: what counts bytes, parses, stores,
# and a whole worker with a broker; nothing that asks for a pace (a coloured traceback alone takes it ten seconds), and no
# PostgreSQL, which is not ours to try.
TESTS = (
    "tests/engines/test_wheel_server.py",
    "tests/engines/test_managed_parts.py",
    "tests/core/test_completion_stream.py",
    "tests/mqtt/test_buffered_socket.py",
    "tests/mqtt/test_packets.py",
    "tests/stores/test_contract.py",
    "tests/stores/test_writes.py",
    "tests/worker/test_requests_and_events.py",
)
SAID = "the library libgomp.so.1 is missing; on Debian and Ubuntu: sudo apt-get install libgomp1"


class Failed(Exception):
    """What did not work, with what was printed."""


def run(release: str, wheel: Path, tests: Sequence[str]) -> None:
    """Raises CannotBuild, Failed and CalledProcessError."""
    base = kept(release, "arm64", "python", PACKAGES)
    with layered(base, f"{release}-arm64-trial") as root:
        _told("the wheels for arm64 are in place", _install(root, wheel))
        print(f"emulated arm64: {' '.join(root.run('uname -m; /v/bin/python --version').stdout.split())}", flush=True)
        began_at = time.monotonic()
        refused = root.run(
            f"DEMO_ONCE=1 timeout {DEMO_WITHIN_S} /v/bin/python -P -m llamacpp_mqtt_deploy demo --no-web", check=False
        ).stdout
        if SAID not in refused:
            raise Failed(f"Without libgomp1 the demo did not say what to install:\n{refused}")
        _told("without libgomp1 the demo says what to install", time.monotonic() - began_at)
        root.run("apt-get -qq install -y libgomp1")
        began_at = time.monotonic()
        shown = root.run(
            f"DEMO_ONCE=1 timeout {DEMO_WITHIN_S} /v/bin/python -P -m llamacpp_mqtt_deploy demo --no-web", check=False
        )
        if shown.returncode != 0 or "Your name is Ada." not in shown.stdout:
            raise Failed(f"The demo did not answer:\n{shown.stdout}")
        _told("the demo has answered", time.monotonic() - began_at)
        _test(root, tests)


def _install(root: Root, wheel: Path) -> float:
    """The wheels for arm64 in an environment there. Nothing is compiled.

    They are fetched and unpacked by the same release's pip for this machine: emulated, that takes ten minutes, and TLS is too slow
    for many a server.
    """
    began_at = time.monotonic()
    store = ROOTS / f"wheels-{root.release}-arm64-trial"
    store.mkdir(parents=True, exist_ok=True)
    wanted = shlex.join([f"./{wheel.name}[managed,gateway,metrics]", *LIBRARIES])
    platforms = " ".join(f"--platform manylinux_2_{minor}_aarch64" for minor in range(17, GLIBC[root.release] + 1))
    chosen = f"--quiet --only-binary=:all: --implementation cp {platforms} --platform manylinux2014_aarch64"
    pip = "python3 -m pip --disable-pip-version-check"
    native = kept(root.release, own_architecture(), "build", BUILD_PACKAGES)
    with layered(native, f"{root.release}-arm64-wheels") as here:
        place = here.upper / "wheels"
        shutil.copytree(store, place)
        shutil.copy(wheel, place)
        shutil.copy(PROJECT / "constraints.txt", place)
        here.run(
            f"cd /wheels && {pip} download {chosen} --no-cache-dir --find-links . --constraint constraints.txt --dest chosen {wanted}"
        )
        here.run(f"cd /wheels/chosen && {pip} install {chosen} --no-index --find-links . --target /site {wanted}")
        shutil.rmtree(store)
        shutil.copytree(place / "chosen", store)
        root.run("python3 -m venv --without-pip /v", network=False)
        (site,) = (root.upper / "v/lib").glob("python3*/site-packages")
        shutil.copytree(here.upper / "site", site, dirs_exist_ok=True)
    return time.monotonic() - began_at


def _test(root: Root, tests: Sequence[str]) -> None:
    project = root.upper / "project"
    project.mkdir()
    shutil.copytree(PROJECT / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for name in ("docs", "config", "systemd", "llamacpp_mqtt_deploy"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", project)
    began_at = time.monotonic()
    # A test's own limit is for a machine that is twenty times faster; hypothesis' too.
    pytest = "PATH=$PATH:/usr/sbin /v/bin/python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider -o timeout=900 -o filterwarnings= -k 'not (postgres or five_hundred or defect)'"
    command = root.command(["sh", "-euc", f"cd /project && {pytest} {' '.join(tests)} 2>&1"])
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=TESTS_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"The tests did not end within {TESTS_WITHIN_S} s.") from None
    if ended.returncode != 0:
        raise Failed(
            "Tests failed, see above. A test that measures time may fail under emulation: run it alone, TESTS=PATH::NAME."
        )
    _told("the tests have passed", time.monotonic() - began_at)


def _told(what: str, seconds: float) -> None:
    print(f"emulated arm64: {what} ({seconds:.0f} s)", flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", default="trixie")
    parser.add_argument("--dist", type=Path, default=PROJECT / "dist")
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    chosen = parser.parse_args(arguments)
    try:
        run(chosen.release, newest_wheel(chosen.dist), chosen.tests)
    except (CannotBuild, Failed) as error:
        print(f"arm64 was not tried to the end: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"{error.output}\narm64 was not tried to the end: the command above failed.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
