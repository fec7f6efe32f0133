"""`make test-homeassistant` says in one line why a machine cannot do it, and leaves exit code 3."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.custom_integration.integration import ROOT

SCRIPT = ROOT / "tests" / "home_assistant" / "run.sh"


@pytest.mark.parametrize(
    "programs,said",
    [
        ({"id": "echo 1000"}, "debootstrap and chroot need root"),
        ({"id": "echo 0", "debootstrap": None}, "apt-get install debootstrap"),
        ({"id": "echo 0", "debootstrap": "exit 0", "unshare": "exit 1"}, "does not let root mount anything"),
        (
            {"id": "echo 0", "debootstrap": "echo E: Failed getting release file; exit 1", "unshare": "exit 0"},
            "debootstrap failed (no network, or no mirror with trixie?): E: Failed getting release file",
        ),
    ],
)
def test_a_machine_that_cannot_says_why(programs: dict[str, str | None], said: str, tmp_path: Path) -> None:
    """These programs stand for the machine's own, which are not started."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (
        "awk",
        "bash",
        "cat",
        "cut",
        "dirname",
        "env",
        "flock",
        "grep",
        "head",
        "mkdir",
        "rm",
        "sed",
        "sha256sum",
        "tail",
    ):
        found = shutil.which(name)
        if found is not None:
            (folder / name).symlink_to(found)
    for name, script in programs.items():
        if script is not None:
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
    cache = tmp_path / "cache"
    result = subprocess.run(
        [str(folder / "bash"), str(SCRIPT)],
        env={
            "PATH": str(folder),
            "HOME": str(tmp_path),
            "HOME_ASSISTANT_CACHE": str(cache),
            "LC_ALL": os.environ.get("LC_ALL", "C"),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 3, result.stderr
    assert said in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("The tests in Home Assistant cannot run here: ")
    assert not list(cache.glob("*/complete"))
