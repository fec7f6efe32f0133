"""Checks and lists what a release consists of: `python -m distribution.release_files dist`, after wheel, sdist and packages are built."""

from __future__ import annotations

import hashlib
import re
import sys
import tarfile
import zipfile
from pathlib import Path

from distribution.debian_root import RELEASES, own_architecture
from llamacpp_mqtt_deploy import __version__

SUMS = "SHA256SUMS"


def expected(folder: Path) -> list[Path]:
    """The files of this version. Raises SystemExit for one that is missing."""
    architecture = own_architecture()
    names = [f"llamacpp_mqtt_deploy-{__version__}-py3-none-any.whl", f"llamacpp_mqtt_deploy-{__version__}.tar.gz"]
    names += [f"llamacpp-mqtt-deploy_{__version__}-1~deb{number}u1_{architecture}.deb" for number in RELEASES.values()]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"No release: {', '.join(missing)} missing in {folder}")
    # A package for another architecture is a part of it where it was built.
    others = sorted(
        path.name
        for path in folder.glob(f"llamacpp-mqtt-deploy_{__version__}-1~deb*u1_*.deb")
        if path.name not in names
    )
    return [folder / name for name in names + others]


def tests_in(archive: Path) -> list[str]:
    """Files of tests in a wheel or source distribution; there should be none."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
    else:
        with tarfile.open(archive) as opened_tar:
            names = opened_tar.getnames()
    return [name for name in names if re.search(r"(^|/)tests(/|$)|(^|/)(test_[^/]*|conftest)\.py$", name)]


def main(folder: Path) -> None:
    files = expected(folder)
    for path in files[:2]:
        found = tests_in(path)
        if found:
            raise SystemExit(f"No release: {path.name} holds tests: {', '.join(found[:5])}")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    (folder / SUMS).write_text("".join(f"{line}\n" for line in lines))
    for path in files:
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path.name}")
    print(f"             {folder / SUMS}: sha256sum --check {SUMS}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
