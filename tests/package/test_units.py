"""The systemd units: how exposed they are, that systemd understands them, and that they agree with the program."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.commands.options import WRONG_CONFIGURATION
from llamacpp_mqtt_deploy.config import credentials, loading
from llamacpp_mqtt_deploy.config.settings import GatewaySettings, LimitsSettings, default_state_path
from llamacpp_mqtt_deploy.gateway.serving import AFTER_THE_DRAIN_S, IDLE_CONNECTIONS
from tests.support.services import require_program

FOLDER = Path(__file__).parents[2] / "systemd"
DAEMON = FOLDER / "llamacpp-mqtt-deploy.service"
SERVER = FOLDER / "llama-server.service"
GATEWAY = FOLDER / "llamacpp-mqtt-gateway.service"
DROP_INS = sorted((FOLDER / "drop-ins").glob("*.conf"))


def values(unit: Path) -> Mapping[str, list[str]]:
    """Directive -> its values, continuation lines joined."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().replace("\\\n", " ").splitlines():
        if re.match(r"[A-Za-z]+=", line):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value.strip())
    return found


def one(unit: Path, name: str) -> str:
    (value,) = values(unit)[name]
    return value


def seconds(text: str) -> float:
    units = {"": 1, "s": 1, "min": 60}
    match = re.fullmatch(r"(\d+)(s|min|)", text)
    assert match, text
    return float(match[1]) * units[match[2]]


def installed(folder: Path, unit: Path, *drop_ins: Path) -> Path:
    """A copy whose programs and documents exist here, with drop-ins where systemd looks for them."""
    text = re.sub(r"(?m)^(Exec\w+=)\S+", r"\1/bin/true", unit.read_text())
    copy = folder / unit.name
    copy.write_text(re.sub(r"(?m)^Documentation=file:.*\n", "", text))
    beside = folder / f"{unit.name}.d"
    beside.mkdir(exist_ok=True)
    for drop_in in drop_ins:
        (beside / drop_in.name).write_text(drop_in.read_text())
    return copy


def exposure(unit: Path) -> float:
    analyze = require_program("systemd-analyze")
    result = subprocess.run(
        [analyze, "security", "--offline=yes", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    match = re.search(r"Overall exposure level for \S+: ([\d.]+)", result.stdout)
    assert match, result.stderr
    return float(match[1])


@pytest.mark.parametrize(
    "unit,drop_ins,most",
    [
        (DAEMON, (), 1.1),
        (DAEMON, ("local-only.conf",), 0.9),
        (DAEMON, ("metrics.conf",), 1.1),
        (DAEMON, ("engine-inside.conf", "gpu.conf"), 1.5),
        (DAEMON, ("engine-inside.conf", "jetson.conf"), 1.6),
        (GATEWAY, (), 1.1),
        (SERVER, (), 0.5),
        (SERVER, ("gpu.conf",), 0.6),
        (SERVER, ("jetson.conf",), 0.7),
    ],
)
def test_a_unit_is_no_more_exposed_than_promised(
    tmp_path: Path, unit: Path, drop_ins: tuple[str, ...], most: float
) -> None:
    assert exposure(installed(tmp_path, unit, *(FOLDER / "drop-ins" / name for name in drop_ins))) <= most


@pytest.mark.parametrize("drop_in", [None, *DROP_INS], ids=lambda path: path.stem if path else "alone")
@pytest.mark.parametrize("unit", [DAEMON, SERVER, GATEWAY], ids=lambda path: path.stem)
def test_systemd_understands_every_line(tmp_path: Path, unit: Path, drop_in: Path | None) -> None:
    analyze = require_program("systemd-analyze")
    copy = installed(tmp_path, unit, *([drop_in] if drop_in else []))
    result = subprocess.run(
        [analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    # Restart back-off came with 254, and the drop-in says so; 252 names the keys and goes on.
    complaints = [
        line for line in result.stderr.splitlines() if "RestartSteps" not in line and "RestartMaxDelaySec" not in line
    ]
    assert complaints == []
    assert result.returncode == 0


def test_only_the_drop_in_for_newer_systemd_uses_what_debian_12_lacks() -> None:
    for file in [DAEMON, SERVER, GATEWAY, *DROP_INS]:
        newer = {"RestartSteps", "RestartMaxDelaySec", "OpenFile", "MemoryPressureWatch", "ImportCredential"} & set(
            values(file)
        )
        assert not newer or file.stem == "newer-systemd"
        assert "notify-reload" not in values(file).get("Type", [])


def test_systemd_waits_longer_than_the_daemon_drains() -> None:
    # Ten seconds for what follows the drain: the last acknowledgements, `offline`, the engine.
    assert seconds(one(DAEMON, "TimeoutStopSec")) >= LimitsSettings().drain_timeout_s + 10
    assert seconds(one(GATEWAY, "TimeoutStopSec")) >= GatewaySettings().drain_timeout_s + AFTER_THE_DRAIN_S + 10


def test_the_server_has_time_for_its_next_ping() -> None:
    ping = re.search(r"--sse-ping-interval (\d+)", one(SERVER, "ExecStart"))
    assert ping
    assert seconds(one(SERVER, "TimeoutStopSec")) > int(ping[1]) + 5


def test_a_wrong_configuration_stays_down_and_everything_else_comes_back() -> None:
    for unit in (DAEMON, GATEWAY):
        assert one(unit, "RestartPreventExitStatus").split() == [str(WRONG_CONFIGURATION)]
    for unit in (DAEMON, SERVER, GATEWAY):
        assert one(unit, "Restart") == "always"
        assert one(unit, "StartLimitIntervalSec") == "0"


def test_waiting_for_the_broker_is_no_failed_start() -> None:
    for unit in (DAEMON, GATEWAY):
        assert one(unit, "Type") == "notify"
        assert one(unit, "TimeoutStartSec") == "infinity"
    assert LimitsSettings().startup_timeout_s == 0


def test_a_hang_ends_with_stacks_in_the_journal_and_no_core() -> None:
    assert one(DAEMON, "WatchdogSignal") == "SIGABRT"
    assert "PYTHONFAULTHANDLER=1" in values(DAEMON)["Environment"]
    assert one(DAEMON, "LimitCORE") == one(SERVER, "LimitCORE") == "0"


def test_the_state_lies_where_the_daemon_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    name = one(DAEMON, "StateDirectory")
    monkeypatch.setenv("STATE_DIRECTORY", f"/var/lib/{name}")  # as systemd sets it
    assert default_state_path() == Path(f"/var/lib/{name}/state.db")
    assert one(DAEMON, "StateDirectoryMode") == "0700"


def test_credentials_have_the_names_that_the_daemon_reads_and_may_be_missing() -> None:
    loaded = {value.split(":")[0] for value in values(DAEMON)["LoadCredential"]}
    assert loaded == {credentials.MQTT_PASSWORD, credentials.ENGINE_API_KEY}
    # Not empty: 252 calls `SetCredential=ID:` a syntax error.
    assert set(values(DAEMON)["SetCredential"]) == {f"{name}:\\n" for name in loaded}


def test_the_unit_reads_the_file_that_the_program_looks_for() -> None:
    assert f"LMD_CONFIG={loading.SYSTEM_FILE}" in values(DAEMON)["Environment"]


def test_the_two_units_meet_at_one_socket_and_one_group() -> None:
    socket_path = "/run/llama-server/llama.sock"
    assert f"--host {socket_path}" in one(SERVER, "ExecStart")
    assert one(SERVER, "ExecStartPre").endswith(f"rm -f {socket_path}")
    assert one(SERVER, "RuntimeDirectory") == "llama-server"
    assert one(SERVER, "Group") == one(DAEMON, "Group")
    # Group needs to write in order to connect, and to enter the folder.
    assert int(one(SERVER, "UMask"), 8) & 0o070 == 0
    assert int(one(SERVER, "RuntimeDirectoryMode"), 8) & 0o010
    assert f'engine.url = "unix://{socket_path}"' in SERVER.read_text()


def test_the_gateway_may_bind_its_own_port_alone_and_has_a_user_of_its_own() -> None:
    assert one(GATEWAY, "SocketBindAllow") == f"tcp:{GatewaySettings().port}"
    assert one(GATEWAY, "SocketBindDeny") == "any"
    assert len({one(unit, "User") for unit in (DAEMON, SERVER, GATEWAY)}) == 3
    assert {value.split(":")[0] for value in values(GATEWAY)["LoadCredential"]} == {credentials.MQTT_PASSWORD}
    files = {value.split(":")[1] for unit in (DAEMON, GATEWAY) for value in values(unit)["LoadCredential"]}
    assert len(files) == len(values(DAEMON)["LoadCredential"]) + 1
    assert int(one(GATEWAY, "LimitNOFILE")) > GatewaySettings().max_streams + IDLE_CONNECTIONS + 100


def test_the_server_can_reach_nothing() -> None:
    assert one(SERVER, "PrivateNetwork") == "yes"
    assert one(SERVER, "RestrictAddressFamilies") == "AF_UNIX"


def test_every_value_of_the_server_can_be_set_in_its_environment_file() -> None:
    used = set(re.findall(r"\$\{?(LLAMA_\w+)", one(SERVER, "ExecStart")))
    given = set(re.findall(r"(?m)^(LLAMA_\w+)=", (FOLDER.parent / "config" / "llama-server.env").read_text()))
    defaults = {value.split("=")[0] for value in values(SERVER)["Environment"]}
    assert used == given
    assert used - defaults == {"LLAMA_MODEL"}


def test_the_users_of_the_units_are_made() -> None:
    text = (FOLDER / "llamacpp-mqtt-deploy.sysusers").read_text()
    for unit in (DAEMON, SERVER, GATEWAY):
        assert re.search(rf"(?m)^u {one(unit, 'User')} ", text)
    sysusers = require_program("systemd-sysusers")
    result = subprocess.run(
        [sysusers, "--dry-run", str(FOLDER / "llamacpp-mqtt-deploy.sysusers")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_the_drop_in_for_metrics_opens_the_port_of_the_documentation_and_nothing_more() -> None:
    drop_in = FOLDER / "drop-ins" / "metrics.conf"
    page = (FOLDER.parent / "docs" / "metrics.md").read_text("utf-8")
    port = re.search(r'listen = "127\.0\.0\.1:(\d+)"', page)
    assert port
    assert values(drop_in) == {
        "SocketBindAllow": [f"tcp:{port[1]}"],
        "RuntimeDirectoryMode": ["0710"],
        "ReadWritePaths": ["-/var/lib/prometheus/node-exporter"],
    }
    assert 'textfile = "/var/lib/prometheus/node-exporter/' in page
    assert f"unix:///run/{one(DAEMON, 'RuntimeDirectory')}/" in page
