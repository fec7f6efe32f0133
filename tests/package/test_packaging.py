"""The package: what is in the wheel, what it declares, and that the pins cover it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llamacpp_mqtt_deploy import __version__

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves build/ and an egg-info in the folder it builds from."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(
        ROOT / "llamacpp_mqtt_deploy", source / "llamacpp_mqtt_deploy", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    (source / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "lmd.1", source / "docs")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "out"), str(source)],
        check=True,
        capture_output=True,
        timeout=110,
    )
    (built,) = (source / "out").glob("*.whl")
    return built


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_the_code_its_types_the_demo_model_and_the_chat_page_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "llamacpp_mqtt_deploy").rglob("*")
        if path.suffix in {".py", ".typed", ".gguf"} or "page" in path.parts
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "llamacpp_mqtt_deploy/demo_model/demo.gguf" in expected
    assert "llamacpp_mqtt_deploy/gateway/page/vendored/marked.LICENSE" in expected
    assert expected <= names
    assert {name.split("/")[0] for name in names} == {
        "llamacpp_mqtt_deploy",
        f"llamacpp_mqtt_deploy-{__version__}.dist-info",
        f"llamacpp_mqtt_deploy-{__version__}.data",
    }
    data = {name for name in names if name.split("/")[0].endswith(".data")}
    assert data == {f"llamacpp_mqtt_deploy-{__version__}.data/data/share/man/man1/lmd.1"}


def test_the_wheel_runs_by_both_of_its_names(wheel: Path, tmp_path: Path) -> None:
    # Without --ignore-installed pip would remove the checkout's own installation first.
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed", "--prefix", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, capture_output=True, timeout=60
    )
    (library,) = tmp_path.rglob("site-packages")
    assert (tmp_path / "share/man/man1/lmd.1").read_text() == (ROOT / "docs/lmd.1").read_text()
    for name in ("lmd", "llamacpp-mqtt-deploy"):
        # -P: not the checkout that the test runs in, but what was installed.
        command = [sys.executable, "-P", str(tmp_path / "bin" / name), "--version"]
        result = subprocess.run(
            command, env={"PYTHONPATH": str(library)}, capture_output=True, text=True, timeout=60, check=True
        )
        assert result.stdout == f"llamacpp-mqtt-deploy, version {__version__}\n"


def test_the_metadata_names_version_licence_and_python(wheel: Path) -> None:
    found = metadata(wheel)
    assert (found["Name"], found["Version"], found["License-Expression"]) == (
        "llamacpp-mqtt-deploy",
        __version__,
        "MIT",
    )
    assert found["Requires-Python"] == ">=3.11"
    assert set(found.get_all("Provides-Extra", [])) == {
        "inprocess",
        "managed",
        "demo",
        "gateway",
        "metrics",
        "postgres",
        "top",
        "dev",
    }


def requirements() -> list[Requirement]:
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]


def test_every_requirement_is_pinned_by_the_constraints_within_its_bounds() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line) for line in lines), "exact pins only"
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} does not fit {requirement.specifier}"


def test_the_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_has_a_lower_bound() -> None:
    assert [str(r) for r in requirements() if not r.specifier and not r.name.startswith("types-")] == []
