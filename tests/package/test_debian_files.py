"""What the Debian package is made of, without building it: its files agree with the units, the program and one another.

`make test-deb` builds it and tries it on booted machines.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from distribution import debian_root, release_files
from distribution.debian_root import RELEASES, CannotBuild
from llamacpp_mqtt_deploy import __version__
from llamacpp_mqtt_deploy.config import loading
from tests.package.test_units import DAEMON, GATEWAY, SERVER, one, values

ROOT = Path(__file__).parents[2]
DEBIAN = ROOT / "debian"
NAME = "llamacpp-mqtt-deploy"
SCRIPTS = [*sorted(DEBIAN.glob(f"{NAME}.p*[tm]")), DEBIAN / "bin/llama-server"]
RULES = (DEBIAN / "rules").read_text()
UNITS = {"llama-server", "llamacpp-mqtt-deploy", "llamacpp-mqtt-gateway"}


def listed(kind: str) -> list[list[str]]:
    return [line.split() for line in (DEBIAN / f"{NAME}.{kind}").read_text().splitlines()]


def control() -> tuple[dict[str, str], dict[str, str]]:
    source, package = (DEBIAN / "control").read_text().strip().split("\n\n")
    return dict(Parser().parsestr(source)), dict(Parser().parsestr(package))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_maintainers_scripts_are_shell_that_stops_at_errors(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True, timeout=20)
    assert re.search(r"(?m)^set -e$", script.read_text())
    if script.parent == DEBIAN:
        assert script.read_text().count("\n#DEBHELPER#\n") == 1
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=sh", script], check=True, timeout=60)


def test_control_names_what_is_needed_and_leaves_the_rest_to_the_libraries() -> None:
    source, package = control()
    assert package["Package"] == source["Source"] == NAME
    needed = package["Depends"].split(", ")
    # ${shlibs:Depends} names libgomp1 and libstdc++6 from the libraries in the wheels.
    assert {"${misc:Depends}", "${shlibs:Depends}", "${python3:Depends}", "ca-certificates"} == set(needed)
    assert package["Recommends"] == "mosquitto"
    assert re.search(r"(?m)^ \S", (DEBIAN / "control").read_text()), "a description"


def test_the_changelog_is_of_this_version() -> None:
    head = (DEBIAN / "changelog").read_text().splitlines()[0]
    assert re.fullmatch(rf"{NAME} \({re.escape(__version__)}-\d+\) unstable; urgency=\w+", head)


def test_every_file_that_the_package_takes_exists() -> None:
    sources = [words[0] for kind in ("install", "examples", "docs", "manpages") for words in listed(kind)]
    assert [source for source in sources if not list(ROOT.glob(source))] == []


def test_the_units_find_their_programs_and_files_in_the_package() -> None:
    prefix = "/opt/llamacpp-mqtt-deploy"
    assert f"PREFIX := {prefix}\n" in RULES
    for unit in (DAEMON, GATEWAY):
        assert one(unit, "ExecStart").startswith(f"{prefix}/bin/llamacpp-mqtt-deploy ")
    # The one unit that is changed on the way: the server is the package's.
    before, after = re.search(r"s\|\^ExecStart=(\S+?)\|ExecStart=(\S+?)\|' systemd/llama-server", RULES).groups()  # type: ignore[union-attr]
    assert one(SERVER, "ExecStart").startswith(before)
    assert after == "$(PREFIX)/bin/llama-server"
    packed = {f"/etc/llamacpp-mqtt-deploy/{path.name}" for path in (DEBIAN / "etc").iterdir()}
    read = {
        value.partition("=")[2]
        for unit in (DAEMON, GATEWAY)
        for value in values(unit)["Environment"]
        if "CONFIG" in value
    }
    assert read | {one(SERVER, "EnvironmentFile")} == packed
    assert ["debian/etc/*", "etc/llamacpp-mqtt-deploy"] in listed("install")


def test_every_unit_is_stopped_restarted_and_purged() -> None:
    for script, form in (
        ("postinst", r"([\w-]+)\.service"),
        ("prerm", r"([\w-]+)\.service"),
        ("postrm", r"for unit in (.+); do"),
    ):
        found = re.findall(form, (DEBIAN / f"{NAME}.{script}").read_text())
        assert set(" ".join(found).split()) == UNITS, script


def test_an_upgrade_is_bounded_in_time_and_a_first_installation_starts_nothing() -> None:
    assert re.search(
        r'\[ -n "\$2" \]; then\n\s+timeout \d+ deb-systemd-invoke try-restart',
        (DEBIAN / f"{NAME}.postinst").read_text(),
    )
    assert "dh_installsystemd --no-enable --no-start" in RULES


def test_the_packaged_configurations_are_valid_and_name_the_packages_own_server() -> None:
    worker = loading.load(DEBIAN / "etc/config.toml", environ={}).settings
    assert worker.engine.url == "unix:///run/llama-server/llama.sock"
    loading.load(DEBIAN / "etc/gateway.toml", environ={})
    given = (DEBIAN / "etc/llama-server.env").read_text()
    names = re.findall(r"(?m)^(LLAMA_\w+)=", given)
    assert names == re.findall(r"(?m)^(LLAMA_\w+)=", (ROOT / "config/llama-server.env").read_text())
    assert "LLAMA_MODEL=/usr/share/llamacpp-mqtt-deploy/demo.gguf\n" in given


def test_every_extra_is_in_the_package_or_is_known_to_be_left_out() -> None:
    (bundled,) = re.findall(r"(?m)^EXTRAS := (\S+)$", RULES)
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    # Compiled for each machine; a second broker; libpq and OpenSSL that Debian does not mend; the tools of development.
    assert set(bundled.split(",")) | {"inprocess", "demo", "postgres", "dev"} == extras


def environment(folder: Path, name: str, licence: str | None) -> Path:
    """An environment that holds one package with this text of a licence."""
    info = folder / f"{name}-1.0.dist-info"
    (info / "licenses").mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: MIT\n")
    record = f"{name}.py,,\n{info.name}/METADATA,,\n"
    if licence is not None:
        (info / "licenses/LICENSE").write_text(licence)
        record += f"{info.name}/licenses/LICENSE,,\n"
    (info / "RECORD").write_text(record)
    return folder


def licences(site: Path) -> subprocess.CompletedProcess[str]:
    command = ["python3", str(DEBIAN / "bundled_licences.py"), str(site), str(DEBIAN / "copyright")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_copyright_file_holds_the_licence_of_every_bundled_package(tmp_path: Path) -> None:
    apache = "Apache License\nVersion 2.0, January 2004\n\nmany words\nof your accepting any such warranty or additional liability.\n"
    environment(tmp_path, "gadget", "MIT License\n\nCopyright (c) 2020 Ann Other\n\nPermission is granted\n")
    environment(tmp_path, "widget", f"{apache}\nCopyright 2019 Bo Third\n")
    made = licences(tmp_path)
    assert made.returncode == 0, made.stderr
    text = made.stdout
    assert "Copyright: 2020 Ann Other\nLicense: gadget\n MIT License\n .\n Copyright (c) 2020 Ann Other\n" in text
    assert "Copyright: 2019 Bo Third\n" in text
    assert "many words" not in text
    assert "/usr/share/common-licenses/Apache-2.0" in text
    assert "@FILE" not in text
    assert "MarkedJS" in text
    assert "The ggml authors" in text
    assert all(stanza.startswith(("Format:", "Files:", "License:")) for stanza in text.strip().split("\n\n"))


def test_a_package_without_a_text_of_its_licence_stops_the_build(tmp_path: Path) -> None:
    made = licences(environment(tmp_path, "mute", None))
    assert made.returncode != 0
    assert "mute 1.0 brings no text of its licence (MIT)" in made.stderr


@pytest.mark.parametrize(
    "name, text",
    [
        ("debian.sources", "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm\n"),
        ("old.list", "# a line\ndeb [signed-by=/usr/share/keyrings/x.gpg] http://mirror.test/debian bookworm main\n"),
        ("older.list", "deb http://mirror.test/debian bookworm main\n"),
    ],
)
def test_the_mirror_is_the_one_of_this_machine(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "a.sources").write_text("Types: deb\nURIs: http://else.test/node\nSuites: x\n")
    (tmp_path / "sources.list.d" / name).write_text(text)
    monkeypatch.setattr(debian_root, "_SOURCES", tmp_path)
    assert debian_root.mirror() == "http://mirror.test/debian"


def test_without_a_mirror_it_is_said_where_one_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_root, "_SOURCES", tmp_path)
    with pytest.raises(CannotBuild, match=r"name no mirror of Debian .* /etc/apt/sources.list.d"):
        debian_root.mirror()


def made_release(folder: Path, *, member: str = "llamacpp_mqtt_deploy/cli.py") -> None:
    with zipfile.ZipFile(folder / f"llamacpp_mqtt_deploy-{__version__}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, "")
    shutil.make_archive(str(folder / f"llamacpp_mqtt_deploy-{__version__}"), "gztar", ROOT, "LICENSE")
    for number in RELEASES.values():
        package = f"llamacpp-mqtt-deploy_{__version__}-1~deb{number}u1_{debian_root.own_architecture()}.deb"
        (folder / package).write_bytes(b"!<arch>")


def test_a_release_is_listed_with_its_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_release(tmp_path)
    release_files.main(tmp_path)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True, timeout=20)
    assert len((tmp_path / "SHA256SUMS").read_text().splitlines()) == 4
    assert "~deb13u1" in capsys.readouterr().out


def test_a_release_that_lacks_a_package_or_holds_tests_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="missing"):
        release_files.main(tmp_path)
    made_release(tmp_path, member="llamacpp_mqtt_deploy/tests/test_cli.py")
    with pytest.raises(SystemExit, match="holds tests"):
        release_files.main(tmp_path)
