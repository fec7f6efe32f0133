"""What is told of file descriptors that run out."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.service.shortages import FEW_DESCRIPTORS, descriptors


@contextmanager
def _limit(descriptors: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _open() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("left", [-100, 0, 1, FEW_DESCRIPTORS - 1])
def test_few_file_descriptors_are_told_before_there_are_none(left: int) -> None:
    with _limit(max(3, _open() + left)):
        told = descriptors()
    assert "LimitNOFILE=" in told


def test_enough_file_descriptors_are_no_problem() -> None:
    with _limit(_open() + FEW_DESCRIPTORS + 5):
        assert descriptors() == ""


@pytest.mark.parametrize("number, told", [(errno.ENFILE, "fs.file-max"), (errno.EACCES, "")])
def test_a_machine_without_files_to_open_is_told_and_one_without_proc_is_not(
    monkeypatch: pytest.MonkeyPatch, number: int, told: str
) -> None:
    def fails(_: Path) -> Iterator[Path]:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "iterdir", fails)
    assert told in descriptors()
    assert bool(told) == bool(descriptors())
