"""Room on the disk for the ends of requests: kept as long as there is any, let go of when it is needed."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.stores.reserve import Reserve

SIZE = 8192


def test_room_is_kept_until_it_is_given_up(tmp_path: Path) -> None:
    file = tmp_path / "reserve"
    reserve = Reserve(file, size=SIZE)
    assert reserve.there()
    assert file.stat().st_size == SIZE
    assert reserve.give_up()
    assert file.stat().st_size == 0
    assert not reserve.give_up()
    assert not reserve.there(), "what it was given up for comes first"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_there_is_no_room_and_none_is_held_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file = tmp_path / "reserve"

    def half_of_it(fd: int, _: int, size: int) -> None:
        os.ftruncate(fd, size // 2)
        raise OSError(number, "full")

    monkeypatch.setattr(os, "posix_fallocate", half_of_it)
    assert not Reserve(file, size=SIZE).there()
    assert file.stat().st_size == 0


def test_a_file_system_that_cannot_keep_room_does_not_stop_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no such thing here")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    assert Reserve(tmp_path / "reserve", size=SIZE).there()


def test_one_mebibyte_is_kept_where_nothing_else_is_said(tmp_path: Path) -> None:
    assert Reserve(tmp_path / "reserve").there()
    assert (tmp_path / "reserve").stat().st_size == 1024 * 1024


def test_a_file_of_holes_is_filled(tmp_path: Path) -> None:
    file = tmp_path / "reserve"
    with file.open("wb") as sparse:
        sparse.truncate(SIZE)
    assert file.stat().st_blocks == 0
    assert Reserve(file, size=SIZE).there()
    assert file.stat().st_blocks * 512 >= SIZE


def test_room_that_is_there_already_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "reserve"
    assert Reserve(file, size=SIZE).there()

    def unexpected(*_: int) -> None:
        raise AssertionError

    monkeypatch.setattr(os, "posix_fallocate", unexpected)
    assert Reserve(file, size=SIZE).there()


def test_room_is_looked_for_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("llamacpp_mqtt_deploy.stores.reserve.time.monotonic", lambda: now[0])
    file = tmp_path / "reserve"
    reserve = Reserve(file, size=SIZE)
    assert reserve.there()
    assert reserve.give_up()
    now[0] = 100.9
    assert not reserve.there()
    now[0] = 101.0
    assert reserve.there()
    assert file.stat().st_size == SIZE
    assert reserve.give_up()
    file.unlink()
    assert not reserve.give_up(), "nothing to give up"


@pytest.mark.parametrize("number, there", [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EROFS, True)])
def test_a_file_that_cannot_be_made_is_missed_only_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, there: bool
) -> None:
    def failing(*_: object) -> int:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "open", failing)
    assert Reserve(tmp_path / "reserve", size=SIZE).there() is there


def test_a_look_leaves_no_file_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert Reserve(tmp_path / "reserve", size=SIZE).there()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_room_that_somebody_has_removed_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: passed[0])
    file = tmp_path / "reserve"
    reserve = Reserve(file, size=SIZE)
    assert reserve.there()
    file.unlink()
    assert reserve.there()
    assert not file.exists(), "looked for once a second"
    passed[0] += 1.0
    assert reserve.there()
    assert file.stat().st_size == SIZE
