"""Room on the disk for the ends of requests: kept as long as there is any, let go of when it is needed."""

from __future__ import annotations

import errno
import os
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
