"""The file for node-exporter: whole at every moment, never through a link, told once when it cannot be written."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.metrics import textfile
from llamacpp_mqtt_deploy.metrics.textfile import TextFile
from tests.support.waiting import eventually


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lmd.prom"
    texts = [letter * 200_000 for letter in (b"a", b"b")]
    turns = iter(range(10**9))
    file = TextFile(path, lambda: texts[next(turns) % 2])
    file.write()
    seen, stop = set(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            file.write()

    writing = threading.Thread(target=write)
    writing.start()
    for _ in range(300):
        seen.add(path.read_bytes())
    stop.set()
    writing.join()
    assert seen <= set(texts)


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in (".lmd.prom.new", "lmd.prom"):
        (tmp_path / name).symlink_to(precious)
    TextFile(tmp_path / "lmd.prom", lambda: b"new").write()
    assert precious.read_text() == "precious"
    assert (tmp_path / "lmd.prom").read_bytes() == b"new"
    assert not (tmp_path / "lmd.prom").is_symlink()


def test_others_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        TextFile(tmp_path / "lmd.prom", lambda: b"new").write()
    finally:
        os.umask(before)
    assert (tmp_path / "lmd.prom").stat().st_mode & 0o777 == 0o644


def test_a_folder_that_is_missing_is_told_once_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "EVERY_S", 0.02)
    path = tmp_path / "later" / "lmd.prom"
    asked: list[int] = []

    def text() -> bytes:
        asked.append(1)
        return b"text"

    with capture_logs() as lines:
        file = TextFile(path, text)
        file.start()
        eventually(lambda: len(asked) > 3)
        path.parent.mkdir()
        eventually(path.exists)
        file.close(5.0)
    assert [line["event"] for line in lines] == ["metrics.textfile_failed", "metrics.textfile_written_again"]
    assert not path.exists()
