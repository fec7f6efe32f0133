"""The server in the xllamacpp wheel as a program of its own, and shared libraries that a machine lacks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.checking.engine import check_engine
from llamacpp_mqtt_deploy.config.settings import EngineSettings, ManagedSettings
from llamacpp_mqtt_deploy.core.shared_libraries import lacking_library
from llamacpp_mqtt_deploy.engines.inprocess import native
from llamacpp_mqtt_deploy.engines.managed import wheel_server
from llamacpp_mqtt_deploy.engines.managed.managed_engine import ManagedEngine
from llamacpp_mqtt_deploy.stopping import Deadline, StopSignal
from tests.support.waiting import eventually

COMMAND = (sys.executable, "-P", wheel_server.__file__)
# What the dynamic loader says (glibc 2.36), as CPython hands it on.
NO_LIBGOMP = "libgomp.so.1: cannot open shared object file: No such file or directory"
SAID = "the library libgomp.so.1 is missing; on Debian and Ubuntu: sudo apt-get install libgomp1"


@contextmanager
def serving(model: Path, socket: Path, log: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """The wheel's server as systemd starts it: with nothing to read."""
    command = [*COMMAND, "--model", str(model), "--host", str(socket), "--ctx-size", "512", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def stand_in(folder: Path, name: str, error: str) -> str:
    """A PYTHONPATH on which this module exists and raises this error when it is imported."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(f"raise {error}\n")
    return str(folder)


@pytest.mark.engine
def test_under_systemd_the_server_runs_until_it_is_told_to_end(tiny_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    log = tmp_path / "log"
    with serving(tiny_gguf, tmp_path / "llama.sock", log) as process:
        eventually(lambda: " listens on " in log.read_text() or process.poll() is not None, 30)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.terminate()
        process.wait(10)


@pytest.mark.engine
def test_the_server_ends_when_the_pipe_of_its_parent_is_closed(tiny_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    command = [*COMMAND, "--model", str(tiny_gguf), "--host", str(tmp_path / "llama.sock"), "--ctx-size", "512"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


def test_a_model_without_a_name_is_called_by_its_file() -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    assert wheel_server.configure(xllamacpp, ["-m", "/var/lib/llama-models/qwen.gguf"]).model_alias == {"qwen.gguf"}
    assert wheel_server.configure(xllamacpp, ["-m", "/a/b.gguf", "-a", "chat"]).model_alias == {"chat"}


@pytest.mark.parametrize(
    "text, sentence",
    [
        (f"ImportError: {NO_LIBGOMP}", SAID),
        (f"/opt/llama-server: error while loading shared libraries: {NO_LIBGOMP}", SAID),
        (
            "Failed to load shared library 'libllama.so': libcudart.so.12: cannot open shared object file",
            "the library libcudart.so.12 is missing; it comes with NVIDIA's CUDA runtime",
        ),
        (
            "libcuda.so.1: cannot open shared object file: No such file or directory",
            "the library libcuda.so.1 is missing; it comes with NVIDIA's driver",
        ),
        (
            "libstrange.so.7: cannot open shared object file: No such file or directory",
            "the library libstrange.so.7 is missing; `apt-file search libstrange.so.7` names its package on Debian and Ubuntu",
        ),
        (
            "/lib/aarch64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by /opt/x/xllamacpp.abi3.so)",
            "it was built for a newer system (GLIBC_2.38) than this one",
        ),
        (
            "/lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by x)",
            "it was built for a newer system (GLIBCXX_3.4.32) than this one",
        ),
    ],
)
def test_what_the_loader_says_becomes_a_sentence_with_the_package(text: str, sentence: str) -> None:
    assert lacking_library(text) == sentence


@pytest.mark.parametrize("text", ["", "No module named 'xllamacpp'", "model.gguf: cannot open file", "/x/y.so: is odd"])
def test_what_is_no_missing_library_is_not_called_one(text: str) -> None:
    assert lacking_library(text) is None


def test_the_wheels_server_names_the_missing_library_and_its_package(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": stand_in(tmp_path / "lib", "xllamacpp", f"ImportError({NO_LIBGOMP!r})")}
    ended = subprocess.run(
        [*COMMAND, "-m", "x.gguf"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == wheel_server.LOAD_ERROR
    assert ended.stderr == f"E wheel_server: the xllamacpp package cannot be loaded: {NO_LIBGOMP}: {SAID}\n"


def test_a_managed_engine_without_libgomp_says_what_to_install(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", stand_in(tmp_path / "lib", "xllamacpp", f"ImportError({NO_LIBGOMP!r})"))
    monkeypatch.setattr("shutil.which", lambda *_names, **_where: None)
    engine = ManagedEngine(EngineSettings(kind="managed", model_path=tiny_gguf))
    try:
        engine.open()
        eventually(lambda: engine.info().state == "failed", 30)
        assert engine.info().detail == f"The server cannot be started: {SAID}. `restart_engine` tries at once."
    finally:
        engine.close(Deadline(1))


def test_a_llama_server_without_a_library_says_what_to_install(tiny_gguf: Path, tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.write_text(f'#!/bin/sh\necho "$0: error while loading shared libraries: {NO_LIBGOMP}" >&2\nexit 127\n')
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    settings = EngineSettings(kind="managed", model_path=tiny_gguf, managed=ManagedSettings(binary=binary))
    engine = ManagedEngine(settings)
    try:
        engine.open()
        assert not engine.wait_ready(StopSignal(), 0.1)
        eventually(lambda: engine.info().state == "failed", 30)
        assert SAID in engine.info().detail
        assert "says no flags" not in engine.info().detail
    finally:
        engine.close(Deadline(1))


def test_lmd_check_finds_the_missing_library(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", stand_in(tmp_path / "lib", "xllamacpp", f"ImportError({NO_LIBGOMP!r})"))
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setattr("shutil.which", lambda *_names, **_where: None)
    settings = EngineSettings(kind="managed", model_path=tiny_gguf)
    findings = {finding.name: finding for finding in check_engine(settings, generate=False, running=None)}
    assert (findings["engine.binary"].verdict, findings["engine.binary"].text) == (
        "FAIL",
        f"the xllamacpp package cannot be loaded: {SAID}",
    )


def test_lmd_check_loads_the_package_that_it_praises(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("shutil.which", lambda *_names, **_where: None)
    settings = EngineSettings(kind="managed", model_path=tiny_gguf)
    findings = {finding.name: finding for finding in check_engine(settings, generate=False, running=None)}
    assert (findings["engine.binary"].verdict, findings["engine.binary"].text) == ("ok", "the xllamacpp package")


@pytest.mark.parametrize(
    "error", [f"ImportError({NO_LIBGOMP!r})", f"OSError({NO_LIBGOMP!r})", f"RuntimeError({NO_LIBGOMP!r})"]
)
def test_the_model_inside_the_worker_names_the_missing_library(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(stand_in(tmp_path / "lib", "llama_cpp", error))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.delitem(sys.modules, "llama_cpp.llama_cpp", raising=False)
    with pytest.raises(native.NotInstalled) as caught:
        native.Library()
    assert str(caught.value) == f"llama-cpp-python is installed and its library does not load: {SAID}."
