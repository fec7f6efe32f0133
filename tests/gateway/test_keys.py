"""The keys file and the commands that write it."""

from __future__ import annotations

import hashlib
import stat
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from llamacpp_mqtt_deploy.cli import main
from llamacpp_mqtt_deploy.core.errors import RateLimited
from llamacpp_mqtt_deploy.gateway.key_ring import KeyRing, KeysFileError, Owner
from llamacpp_mqtt_deploy.gateway.problems import Forbidden, Unauthorized


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMD_GATEWAY__KEYS_FILE", str(tmp_path / "keys.toml"))
    monkeypatch.setenv("LMD_CONFIG", "/dev/null")
    return tmp_path / "keys.toml"


def lmd(*words: str, fails: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(main, ["gateway", "key", *words])
    assert result.exit_code == fails, result.output
    return result.stdout.strip(), result.stderr


def test_a_key_is_shown_once_and_only_its_hash_is_kept(file: Path) -> None:
    made, _ = lmd("add", "alice", "--level", "team", "--rate", "60", "--model", "default", "--priority", "batch")
    text = file.read_text()
    assert made not in text
    assert made.removeprefix("lmd-") not in text
    assert len(made) > 40
    assert tomllib.loads(text)["alice"] == {
        "sha256": hashlib.sha256(made.encode()).hexdigest(),
        "level": "team",
        "max_priority": "batch",
        "requests_per_minute": 60,
        "models": ["default"],
    }
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ring = KeyRing(file)
    ring.load()
    assert ring.owner(made) == Owner(
        name="alice", level="team", max_priority="batch", requests_per_minute=60, models=("default",)
    )


def test_keys_are_listed_replaced_and_removed(file: Path) -> None:
    first, _ = lmd("add", "alice")
    lmd("add", "bob")
    _, complaint = lmd("add", "alice", fails=2)
    assert "--replace" in complaint
    second, _ = lmd("add", "alice", "--replace")
    assert first != second
    listed, _ = lmd("list")
    assert [line.split()[0] for line in listed.splitlines()] == ["alice", "bob"]
    assert second not in listed
    lmd("remove", "alice")
    assert list(tomllib.loads(file.read_text())) == ["bob"]
    lmd("remove", "alice", fails=2)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a.b", "ü", "x" * 65, "a\nb", '"'])
def test_a_name_that_cannot_be_a_topic_level_is_refused(file: Path, name: str) -> None:
    lmd("add", name, fails=2)
    assert not file.exists()


@pytest.mark.parametrize(
    "text,complaint",
    [
        ("no toml [", "not valid TOML"),
        ("[a]\nsha256 = 'short'\nlevel = 'a'\n", "sha256"),
        (f"[a]\nsha256 = '{'0' * 64}'\nlevel = 'a/b'\n", "level"),
        (f"[a]\nsha256 = '{'0' * 64}'\nlevel = 'a'\nmax_prio = 'normal'\n", "max_prio"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_its_place(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(KeysFileError, match=complaint):
        KeyRing(file).load()


def test_a_wrong_key_and_a_missing_one_are_refused(file: Path) -> None:
    made, _ = lmd("add", "alice")
    ring = KeyRing(file)
    ring.load()
    for wrong in (None, "", made[:-1], made + "x", "x" * 1_000_000, "\ud800"):
        with pytest.raises(Unauthorized):
            ring.owner(wrong)


def test_a_file_that_could_not_be_read_is_read_again_though_it_looks_the_same(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.gateway.key_ring.LOOK_EVERY_S", 0.0)
    alice, _ = lmd("add", "alice")
    bob, _ = lmd("add", "bob")
    ring = KeyRing(file)
    ring.load()
    lmd("remove", "alice")

    def unreadable(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Path, "open", unreadable)
        assert ring.owner(alice).name == "alice"
        assert "Permission denied" in ring.problem
    with pytest.raises(Unauthorized):
        ring.owner(alice)
    assert ring.owner(bob).name == "bob"
    assert ring.problem == ""


def test_a_key_that_is_gone_takes_nothing(file: Path) -> None:
    made, _ = lmd("add", "alice")
    ring = KeyRing(file)
    ring.load()
    alice = ring.owner(made)
    lmd("remove", "alice")
    ring.load()
    with pytest.raises(Unauthorized):
        ring.take(alice)


def test_lanes_and_models_are_held_to_the_key(file: Path) -> None:
    batch = Owner(name="a", level="a", max_priority="batch", models=("small",))
    assert [batch.lane(wish) for wish in (None, "interactive", "normal", "batch")] == ["batch"] * 4
    assert batch.model(None) == "small"
    with pytest.raises(Forbidden):
        batch.model("large")
    normal = Owner(name="a", level="a")
    assert [normal.lane(wish) for wish in (None, "interactive", "batch")] == [None, "normal", "batch"]
    assert normal.model("large") == "large"


def test_the_rate_outlives_a_change_of_another_key(file: Path) -> None:
    made, _ = lmd("add", "alice", "--rate", "1")
    ring = KeyRing(file)
    ring.load()
    ring.take(ring.owner(made))
    lmd("add", "bob")
    ring.load()
    with pytest.raises(RateLimited):
        ring.take(ring.owner(made))


def test_without_keys_only_a_loopback_address_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMD_CONFIG", "/dev/null")
    result = CliRunner().invoke(main, ["gateway", "--set", "gateway.host=0.0.0.0"])
    assert result.exit_code == 2
    assert "[gateway] host" in result.stderr
    assert "lmd gateway key add" in result.stderr


def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setenv("LMD_CONFIG", "/dev/null")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(main, ["gateway", "--set", f"gateway.port={taken.getsockname()[1]}"])
    assert result.exit_code == 1
    assert "cannot listen" in result.stderr
