"""Builds the Debian package of a release, in a system of that release: `python -m distribution.deb_build trixie bookworm`."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distribution.debian_root import PROJECT, RELEASES, ROOTS, CannotBuild, Root, kept, layered, own_architecture

PACKAGE = "llamacpp-mqtt-deploy"
BUILD_PACKAGES = (
    "debhelper",
    "dpkg-dev",
    "python3",
    "python3-pip",
    "python3-venv",
    "lintian",
    "gcc",
    "libc6-dev",
    "libgomp1",
    "libstdc++6",
)
"""What debian/control asks for, dpkg-shlibdeps' libraries and the checker. No compiler but for its tools: nothing is compiled."""
SOURCES = (
    "debian",
    "systemd",
    "config",
    "docs",
    "llamacpp_mqtt_deploy",
    "README.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "LICENSE",
)


def build(release: str, architecture: str, wheel: Path, out: Path) -> Path:
    """The package in `out`, without errors of lintian. Raises CannotBuild and CalledProcessError."""
    began_at = time.monotonic()
    base = kept(release, architecture, "build", BUILD_PACKAGES)
    with layered(base, f"{release}-{architecture}-building") as root:
        wheels = _gather(root, wheel)
        tree = root.upper / "build" / PACKAGE
        _copy_sources(tree)
        shutil.copytree(wheels, tree / "wheels")
        _name_release(tree / "debian" / "changelog", release)
        # -d: a compiler of C++ is "build-essential", and nothing here is compiled.
        root.run(f"cd /build/{PACKAGE} && dpkg-buildpackage -b -d -us -uc", network=False)
        said = root.run(
            "cd /build && lintian --allow-root --fail-on error --tag-display-limit 0 *.changes", network=False
        )
        (made,) = (root.upper / "build").glob("*.deb")
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, out)
    package = out / made.name
    print(
        f"{package.name}: {package.stat().st_size / 1e6:.1f} MB, {time.monotonic() - began_at:.0f} s; lintian has no errors"
    )
    if said.stdout.strip():
        print(said.stdout.strip())
    return package


def _gather(root: Root, wheel: Path) -> Path:
    """The wheels of everything that the package bundles, ours among them, as the constraints name them; downloaded once."""
    store = ROOTS / f"wheels-{root.release}-{root.architecture}"
    store.mkdir(parents=True, exist_ok=True)
    place = root.upper / "wheels"
    shutil.copytree(store, place)
    shutil.copy(PROJECT / "constraints.txt", place)
    shutil.copy(wheel, place)
    rules = (PROJECT / "debian" / "rules").read_text("utf-8")
    extras = re.search(r"(?m)^EXTRAS := (\S+)$", rules)
    assert extras
    root.run(
        "cd /wheels && python3 -m pip --disable-pip-version-check download --quiet --only-binary=:all: --no-cache-dir"
        f" --find-links . --constraint constraints.txt --dest chosen './{wheel.name}[{extras[1]}]'"
    )
    chosen = place / "chosen"
    shutil.rmtree(store)  # what is no longer bundled goes
    shutil.copytree(chosen, store, ignore=lambda _folder, names: [name for name in names if name == wheel.name])
    return chosen


def _copy_sources(tree: Path) -> None:
    """What git knows or would take, so that nothing of this checkout's own gets in."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SOURCES],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in listed.split("\0"):
        source = PROJECT / name
        if name and source.is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tree / name)


def _name_release(changelog: Path, release: str) -> None:
    """0.1.0-1 becomes 0.1.0-1~deb13u1: a release's package is older than the next release's."""
    text = changelog.read_text("utf-8")
    changelog.write_text(re.sub(r"\(([^)]+)\)", rf"(\1~deb{RELEASES[release]}u1)", text, count=1), "utf-8")


def newest_wheel(folder: Path) -> Path:
    """Raises CannotBuild."""
    found = sorted(folder.glob(f"{PACKAGE.replace('-', '_')}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CannotBuild(f"There is no wheel in {folder}: make build")
    return found[-1]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="*", default=list(RELEASES))
    parser.add_argument("--architecture", default=None)
    parser.add_argument("--out", type=Path, default=PROJECT / "dist")
    chosen = parser.parse_args(arguments)
    try:
        for release in chosen.releases:
            build(release, chosen.architecture or own_architecture(), newest_wheel(chosen.out), chosen.out)
    except CannotBuild as error:
        print(f"No package: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"{error.output}\nNo package: the command above failed.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
