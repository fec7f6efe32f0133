"""The Debian package on machines of each release that were booted for it: installed, asked, upgraded, removed, purged.

`make test-deb` builds the packages and runs this file; the tests of a release follow one another on one machine, in this order.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from distribution.booted_machine import BootedMachine
from distribution.debian_root import RELEASES, CannotBuild, kept, layered, own_architecture
from llamacpp_mqtt_deploy import __version__
from tests.support.waiting import eventually

PACKAGE = "llamacpp-mqtt-deploy"
UNITS = ("llama-server", "llamacpp-mqtt-deploy", "llamacpp-mqtt-gateway")
INSTALL = "apt-get install -y -o Dpkg::Use-Pty=0"
WANTED = os.environ.get("LMD_TEST_DEB", "").split()
"""Releases; `make test-deb` sets it."""
CHANGED = "# of the new package\n"
OUR_FILES = (
    "find / -xdev \\( -path /proc -o -path /sys -o -path /var/log -o -path /var/cache/apt -o -path /root \\) -prune -o"
)


@dataclass
class Trial:
    """A booted machine and the package for it."""

    machine: BootedMachine
    release: str
    folder: Path
    """The machine's /root/packages."""
    began_at: float = 0.0

    def run(self, script: str, **wishes: object) -> str:
        return self.machine.run(script, **wishes).stdout  # type: ignore[arg-type]

    def states(self, question: str) -> list[str]:
        return self.machine.run(f"systemctl {question} {' '.join(UNITS)}", check=False).stdout.split()

    def ask(self, prompt: str, session: str = "demo") -> dict[str, object]:
        """Publish it as a user does, and read until the terminal event."""
        said = self.run(
            f"timeout 30 mosquitto_sub -q 1 -t llm/reply/{session} > /tmp/answer & pid=$!; sleep 0.5;"
            f"mosquitto_pub -q 1 -t llm/request/{session} -m '{prompt}';"
            "for i in $(seq 300); do if grep -q '\"final\":true' /tmp/answer; then break; fi; sleep 0.1; done;"
            "kill $pid; cat /tmp/answer"
        )
        last = json.loads(said.strip().splitlines()[-1])
        assert last["final"], said
        return dict(last)

    def package(self, version: str, *, config_line: str = "") -> str:
        """The package again as a later version; with this line in the configuration that it brings."""
        (built,) = self.folder.glob(f"{PACKAGE}_*.deb")
        tree = self.folder.parent / f"as-{version}"
        subprocess.run(["dpkg-deb", "--raw-extract", built, tree], check=True, capture_output=True)
        control = tree / "DEBIAN/control"
        control.write_text(
            "".join(
                f"Version: {version}\n" if line.startswith("Version:") else line
                for line in control.read_text().splitlines(keepends=True)
            )
        )
        if config_line:
            config = tree / "etc/llamacpp-mqtt-deploy/config.toml"
            config.write_text(config.read_text() + config_line)
        made = self.folder / f"later_{version}.deb"
        subprocess.run(["dpkg-deb", "-Zgzip", "-z1", "--build", tree, made], check=True, capture_output=True)
        return self.carry(made)

    def carry(self, package: Path) -> str:
        """Put a file onto the running machine; its path there. Through a pipe: an overlay's layers may not change under it."""
        there = f"/root/{package.name}"
        leader = self.machine.leader
        with package.open("rb") as file:
            subprocess.run(
                ["nsenter", f"--target={leader}", "--mount", "--root", "--wdns=/", "/bin/sh", "-c", f"cat > {there}"],
                stdin=file,
                check=True,
                cwd="/",
            )
        return there


@pytest.fixture(scope="module", params=list(RELEASES))
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    release = request.param
    if release not in WANTED:
        pytest.skip("packages are built and tried by `make test-deb`")
    version, architecture = RELEASES[release], own_architecture()
    dist = Path(os.environ["LMD_DIST"])
    (deb,) = dist.glob(f"{PACKAGE}_*~deb{version}u1_{architecture}.deb")
    folder = tmp_path_factory.mktemp(release) / "packages"
    folder.mkdir()
    (folder / deb.name).write_bytes(deb.read_bytes())
    with ExitStack() as stack:
        try:
            bare = kept(release, architecture, "bare", ())
            root = stack.enter_context(layered(bare, f"{release}-{architecture}-trial"))
            (root.upper / "root").mkdir()
            (root.upper / "root" / "package.deb").write_bytes(deb.read_bytes())
            # apt's part of the network ends here: everything else happens on a machine that has none.
            root.run(f"apt-get -qq update && {INSTALL} --download-only /root/package.deb mosquitto-clients")
            machine = stack.enter_context(BootedMachine(root))
        except CannotBuild as error:
            pytest.fail(str(error))
        yield Trial(machine, release, folder)


def test_apt_installs_it_without_any_other_network_and_starts_nothing(trial: Trial) -> None:
    trial.began_at = time.monotonic()
    trial.run(f"{INSTALL} /root/package.deb mosquitto-clients")
    print(f"\n{trial.release}: apt install took {time.monotonic() - trial.began_at:.1f} s")
    assert trial.states("is-enabled") == ["disabled"] * 3
    assert trial.states("is-active") == ["inactive"] * 3
    assert trial.run("dpkg --verify llamacpp-mqtt-deploy") == ""
    assert trial.run("du -sm /opt/llamacpp-mqtt-deploy | cut -f1").strip().isdigit()


def test_the_tool_is_there_with_its_manual_and_completion(trial: Trial) -> None:
    assert trial.run("lmd --version") == f"{PACKAGE}, version {__version__}\n"
    assert "lmd run" in trial.run("zcat /usr/share/man/man1/lmd.1.gz | sed 's/\\\\//g'")
    trial.run(
        "bash -n /usr/share/bash-completion/completions/lmd; test -s /usr/share/fish/vendor_completions.d/lmd.fish"
    )
    trial.run(
        "for name in config.toml gateway.toml; do LMD_CONFIG=/etc/llamacpp-mqtt-deploy/$name lmd config >/dev/null; done"
    )


def test_one_command_later_the_first_question_is_answered(trial: Trial) -> None:
    trial.run("timeout 60 systemctl enable --now llama-server llamacpp-mqtt-deploy", timeout_s=90)
    done = trial.ask("Count from 1 to 5")
    print(f"\n{trial.release}: from apt install to the answer {time.monotonic() - trial.began_at:.1f} s")
    assert (done["type"], done["full_content"]) == ("done", "1, 2, 3, 4, 5.")
    assert trial.states("is-active") == ["active", "active", "inactive"]


def test_the_services_run_as_users_of_their_own_in_their_sandboxes(trial: Trial) -> None:
    for unit, user in zip(UNITS[:2], ("llama-server", "llamacpp-mqtt-deploy"), strict=True):
        pid = trial.run(f"systemctl show --property=MainPID --value {unit}").strip()
        assert trial.run(f"stat --format=%U /proc/{pid}").strip() == user
        status = trial.run(f"cat /proc/{pid}/status")
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        assert "CapEff:\t0000000000000000" in status
    assert trial.run("stat --format='%U %a' /var/lib/llamacpp-mqtt-deploy").strip() == "llamacpp-mqtt-deploy 700"
    # PrivateNetwork: not even this container's loopback is the model server's.
    assert trial.run("readlink /proc/$(systemctl show --property=MainPID --value llama-server)/ns/net") != trial.run(
        "readlink /proc/1/ns/net"
    )


def test_the_gateway_answers_over_http(trial: Trial) -> None:
    trial.run("timeout 60 systemctl enable --now llamacpp-mqtt-gateway", timeout_s=90)
    program = (
        "import json, urllib.request as u; "
        'b = json.dumps({"model": "default", "messages": [{"role": "user", "content": "Count from 1 to 5"}]}).encode(); '
        'r = u.Request("http://127.0.0.1:8089/v1/chat/completions", b, {"Content-Type": "application/json"}); '
        'print(json.load(u.urlopen(r, timeout=30))["choices"][0]["message"]["content"])'
    )
    assert trial.run(f"python3 -c '{program}'").strip() == "1, 2, 3, 4, 5."


def test_lmd_check_finds_nothing_that_fails(trial: Trial) -> None:
    found = trial.run("lmd check --json", check=False)
    verdicts = {line["name"]: line["verdict"] for line in json.loads(found)["findings"]}
    assert verdicts
    # The state is the service's own: root may open it, and is told so.
    assert [name for name, verdict in verdicts.items() if verdict == "FAIL"] == [], found


def test_a_missing_libgomp_is_told_in_the_journal(trial: Trial) -> None:
    (library,) = trial.run("ldconfig -p | sed -n 's/.*libgomp.so.1 .*=> //p'").split()
    trial.run(f"mv $(readlink -f {library}) /root/hidden; systemctl restart llama-server")
    said = "the library libgomp.so.1 is missing; on Debian and Ubuntu: sudo apt-get install libgomp1"
    eventually(lambda: said in trial.run("journalctl --unit=llama-server --no-pager"), 30, every_s=0.5)
    trial.run(f"mv /root/hidden $(readlink -f {library}); systemctl restart llama-server")
    eventually(
        lambda: "engine ready" in trial.run("systemctl show --property=StatusText llamacpp-mqtt-deploy"),
        60,
        every_s=0.5,
    )


def test_an_upgrade_keeps_sessions_and_an_edited_configuration_and_runs_the_new_version(trial: Trial) -> None:
    trial.ask("My name is Ada.", "ada")
    trial.run("echo '# edited here' >> /etc/llamacpp-mqtt-deploy/config.toml")
    before = trial.run("systemctl show --property=MainPID --value llamacpp-mqtt-deploy")
    # The same configuration in the new package: no question is asked.
    trial.run(f"{INSTALL} {trial.package('99.1-1')}", timeout_s=200)
    assert trial.run("dpkg-query -W -f '${Version} ${Status}' llamacpp-mqtt-deploy") == "99.1-1 install ok installed"
    eventually(lambda: trial.states("is-active") == ["active"] * 3, 60, every_s=0.5)
    assert trial.run("systemctl show --property=MainPID --value llamacpp-mqtt-deploy") != before
    assert "# edited here" in trial.run("cat /etc/llamacpp-mqtt-deploy/config.toml")
    assert trial.ask("What is my name?", "ada")["full_content"] == "Your name is Ada."


def test_a_changed_default_does_not_overwrite_an_edited_configuration(trial: Trial) -> None:
    package = trial.package("99.2-1", config_line=CHANGED)
    trial.run(f"{INSTALL} -o Dpkg::Options::=--force-confold {package}", timeout_s=200)
    text = trial.run("cat /etc/llamacpp-mqtt-deploy/config.toml")
    assert "# edited here" in text
    assert "# of the new package" not in text
    assert "# of the new package" in trial.run("cat /etc/llamacpp-mqtt-deploy/config.toml.dpkg-dist")


def test_an_upgrade_does_not_wait_for_a_broker_that_is_away(trial: Trial) -> None:
    trial.run("systemctl stop mosquitto")
    began_at = time.monotonic()
    trial.run(f"{INSTALL} --reinstall {trial.package('99.3-1', config_line=CHANGED)}", timeout_s=200)
    assert time.monotonic() - began_at < 100
    assert trial.run("systemctl is-active llamacpp-mqtt-deploy", check=False).strip() == "activating"
    trial.run("systemctl start mosquitto")
    eventually(lambda: trial.states("is-active") == ["active"] * 3, 60, every_s=0.5)
    assert trial.ask("What is my name?", "ada")["full_content"] == "Your name is Ada."


def test_removing_it_stops_everything_and_keeps_state_and_configuration(trial: Trial) -> None:
    trial.run("touch /var/lib/llama-models/mine.gguf; echo secret > /etc/llamacpp-mqtt-deploy/gateway-keys.toml")
    trial.run("apt-get remove -y llamacpp-mqtt-deploy", timeout_s=200)
    assert trial.states("is-active") == ["inactive"] * 3
    assert trial.run("find /proc -maxdepth 1 -user llamacpp-mqtt-deploy -o -maxdepth 1 -user llama-server") == ""
    assert trial.run("ls -d /opt/llamacpp-mqtt-deploy /usr/bin/lmd 2>/dev/null || true") == ""
    trial.run("test -s /var/lib/llamacpp-mqtt-deploy/state.db; grep -q edited /etc/llamacpp-mqtt-deploy/config.toml")


def test_installed_again_it_goes_on_where_it_was(trial: Trial) -> None:
    trial.run(f"{INSTALL} -o Dpkg::Options::=--force-confold /root/package.deb", timeout_s=200)
    assert trial.states("is-enabled") == ["enabled"] * 3, "what the administrator had enabled"
    trial.run("timeout 60 systemctl start llama-server llamacpp-mqtt-deploy", timeout_s=90)
    assert trial.ask("What is my name?", "ada")["full_content"] == "Your name is Ada."


def test_a_purge_leaves_nothing_but_users_and_models(trial: Trial) -> None:
    trial.run("apt-get purge -y llamacpp-mqtt-deploy", timeout_s=200)
    names = "\\( -name '*llamacpp*' -o -name '*llama-server*' -o -name 'lmd*' \\) -print"
    assert trial.run(f"{OUR_FILES} {names}").split() == []
    assert trial.run("find /var/lib/llama-models").split() == [
        "/var/lib/llama-models",
        "/var/lib/llama-models/mine.gguf",
    ]
    assert trial.run("dpkg --audit") == ""
    assert trial.run("systemctl --failed --no-legend") == ""


def test_an_environment_that_was_made_by_hand_is_not_mixed_with_the_packages(trial: Trial) -> None:
    trial.run("mkdir -p /opt/llamacpp-mqtt-deploy; echo made by hand > /opt/llamacpp-mqtt-deploy/pyvenv.cfg")
    refused = trial.machine.run(f"{INSTALL} /root/package.deb", check=False)
    assert refused.returncode != 0
    assert "holds an environment that was installed by hand" in refused.stdout
    assert trial.run("cat /opt/llamacpp-mqtt-deploy/*") == "made by hand\n"
