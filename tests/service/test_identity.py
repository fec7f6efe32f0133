"""The client id: nobody can guess it, and it stays over restarts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.service import identity
from llamacpp_mqtt_deploy.service.identity import client_id


def _settings(path: Path, **more: str) -> Settings:
    overrides = {"sessions.path": str(path), "mqtt.worker_id": "w1"} | {
        k.replace("__", "."): v for k, v in more.items()
    }
    return load(None, overrides, environ={}).settings


def test_a_client_id_is_kept_with_the_state_and_is_another_one_for_each_state(tmp_path: Path) -> None:
    first = client_id(_settings(tmp_path / "a" / "state.db"))
    assert client_id(_settings(tmp_path / "a" / "state.db")) == first
    assert client_id(_settings(tmp_path / "b" / "state.db")) != first
    assert client_id(_settings(tmp_path / "a" / "state.db", mqtt__root="other")) != first
    assert first.startswith("lmd-")
    assert first.rpartition("-")[0].endswith("-w1")
    kept = tmp_path / "a" / "state.db.client"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["state.db.client"]


@pytest.mark.parametrize("damage", [b"", b"\xff\x00", b"abc", b"z" * 16])
def test_a_damaged_file_is_written_anew(tmp_path: Path, damage: bytes) -> None:
    kept = tmp_path / "state.db.client"
    kept.write_bytes(damage)
    first = client_id(_settings(tmp_path / "state.db"))
    assert len(first.rpartition("-")[2]) == 16
    assert client_id(_settings(tmp_path / "state.db")) == first


def test_a_worker_without_a_state_keeps_its_client_id_as_long_as_it_stays_on_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = tmp_path / "machine-id"
    monkeypatch.setattr(identity, "_MACHINE_ID", machine)
    settings = _settings(tmp_path / "none" / "state.db", sessions__store="memory")
    assert client_id(settings) != client_id(settings), "nothing is there that stays"
    machine.write_text("0123456789abcdef0123456789abcdef\n")
    assert client_id(settings) == client_id(settings)
    assert not (tmp_path / "none").exists()


def test_a_directory_that_cannot_be_written_does_not_keep_a_worker_from_having_a_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    assert client_id(_settings(tmp_path / "file" / "state.db")).startswith("lmd-")
