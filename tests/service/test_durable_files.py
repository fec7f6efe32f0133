"""What is written once and has to be there after a power cut: it is on the disk before it has its name, and so is the name."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.durable_file import replace_file
from llamacpp_mqtt_deploy.gateway.key_ring import KeyEntry, KeysFileError, write_keys
from llamacpp_mqtt_deploy.service.discovery import Remembered
from llamacpp_mqtt_deploy.service.identity import client_id


def _write_identity(file: Path) -> None:
    client_id(load(None, {"sessions.path": str(file.with_suffix(""))}, environ={}).settings)


WRITERS: dict[str, Callable[[Path], None]] = {
    "state.db.client": _write_identity,
    "state.db.discovery": lambda file: Remembered(file).add("homeassistant/device/w1/config"),
    "keys.toml": lambda file: write_keys(file, {"alice": KeyEntry(sha256="0" * 64, level="alice")}),
}


@pytest.fixture(params=WRITERS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "state" / str(request.param)


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.parent.mkdir()
    synced: list[tuple[str, bytes, bool]] = []
    real = os.fsync

    def noting(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").resolve()
        what = "directory" if path == file.parent else "draft" if path != file else "file"
        synced.append((what, path.read_bytes() if path.is_file() else b"", file.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", noting)
    WRITERS[file.name](file)
    assert synced == [("draft", file.read_bytes(), False), ("directory", b"", True)]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_disk_that_takes_nothing_leaves_what_was_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir()
    file.write_text("before", encoding="utf-8")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with contextlib.suppress(KeysFileError):  # the others go on without their file
        WRITERS[file.name](file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_text(encoding="utf-8") == "before"


def test_the_draft_of_a_killed_process_with_the_same_number_is_in_nobodys_way(file: Path) -> None:
    file.parent.mkdir()
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text("half")
    WRITERS[file.name](file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_system_that_cannot_sync_a_directory_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    replace_file(tmp_path / "file", "text\n")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "text\n"
