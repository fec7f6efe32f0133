"""`lmd check` against real brokers and a real engine: what works, what does not, and that it disturbs nobody."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from llamacpp_mqtt_deploy.core.home_assistant import DiscoveredWorker
from tests.client.terminal import lmd
from tests.client.worker import ACCESS_LIST, PASSWORDS, PlayedWorker
from tests.support.amqtt_broker import AmqttBroker
from tests.support.certificates import Authority
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

Start = Callable[..., Mosquitto]
Rows = dict[str, tuple[str, str]]


def check(environment: Mapping[str, str], *arguments: str, **settings: object) -> tuple[int, Rows]:
    """The exit code and name -> (verdict, text and advice); without `engine__url` no engine is there, whatever runs here."""
    settings = {"engine__url": f"http://127.0.0.1:{free_port()}"} | settings
    flags = [part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    result = lmd("check", "--json", *flags, *arguments, environment=environment)
    assert result.stdout, result.stderr
    told = json.loads(result.stdout)
    assert told["ok"] == (result.returncode == 0)
    return result.returncode, {
        row["name"]: (row["verdict"], f"{row['text']} -> {row['advice']}") for row in told["findings"]
    }


def retained(port: int, username: str | None = None) -> list[str]:
    """The topics that the broker keeps a message for."""
    topics: list[str] = []
    client = paho.Client(CallbackAPIVersion.VERSION2)
    if username:
        client.username_pw_set(username, PASSWORDS[username])
    client.on_message = lambda _c, _u, message: topics.append(message.topic)
    done: list[int] = []
    client.on_subscribe = lambda *_: done.append(1)
    client.connect("127.0.0.1", port)
    client.loop_start()
    eventually(client.is_connected)
    client.subscribe("llm/#", 1)
    eventually(lambda: done)
    # A second answered subscription comes behind the retained messages of the first.
    client.subscribe("lmd-fence", 1)
    eventually(lambda: len(done) == 2)
    client.disconnect()
    client.loop_stop()
    return topics


@pytest.fixture
def password_files(tmp_path: Path) -> dict[str, str]:
    files = {}
    for name, password in PASSWORDS.items():
        path = tmp_path / f"{name}.password"
        path.write_text(password)
        path.chmod(0o600)
        files[name] = str(path)
    return files


@pytest.mark.engine
def test_everything_works_and_nothing_is_left_behind(
    guarded: Mosquitto, llama_server: LlamaServer, environment: dict[str, str], password_files: dict[str, str]
) -> None:
    code, rows = check(
        environment,
        "--client-username",
        "alice",
        "--client-password-file",
        password_files["alice"],
        mqtt__host="127.0.0.1",
        mqtt__port=guarded.port,
        mqtt__username="worker",
        mqtt__password_file=password_files["worker"],
        mqtt__worker_id="kitchen",
        engine__url=llama_server.url,
    )
    assert code == 0, rows
    assert {name: verdict for name, (verdict, _) in rows.items() if verdict != "ok"} == {}
    for name in (
        "worker.request.read",
        "worker.control.read",
        "worker.reply.write",
        "worker.status.write",
        "client.reply.read",
    ):
        assert "arrived" in rows[name][1], rows[name]
    assert "one token in" in rows["engine.generate"][1]
    assert "8192 tokens for each of 4 slots" in rows["engine.context"][1]
    assert retained(guarded.port, "worker") == []
    assert not [name for name in rows if name.startswith("home-assistant")]  # nobody has asked for it


@pytest.mark.parametrize(
    "protocol,line,finding,verdict",
    [
        ("5", "topic read llm/request/#", "worker.request.read", "FAIL"),
        ("5", "topic write llm/reply/#", "worker.reply.write", "FAIL"),
        ("5", "topic readwrite llm/status/#", "worker.status.write", "FAIL"),
        ("5", "pattern write llm/request/%u/#", "client.request.write", "FAIL"),
        ("5", "pattern read llm/reply/%u/#", "client.reply.read", "FAIL"),
        ("3.1.1", "topic readwrite llm/status/#", "worker.status.write", "warn"),
        ("3.1.1", "pattern write llm/request/%u/#", "client.request.write", "FAIL"),
    ],
)
def test_a_missing_permission_is_found_by_doing(
    start_mosquitto: Start,
    environment: dict[str, str],
    password_files: dict[str, str],
    protocol: str,
    line: str,
    finding: str,
    verdict: str,
) -> None:
    assert line in ACCESS_LIST
    broker = start_mosquitto(users=PASSWORDS, acl=ACCESS_LIST.replace(line, ""))
    code, rows = check(
        environment,
        "--no-generate",
        "--client-username",
        "alice",
        "--client-password-file",
        password_files["alice"],
        mqtt__host="127.0.0.1",
        mqtt__port=broker.port,
        mqtt__protocol=protocol,
        mqtt__username="worker",
        mqtt__password_file=password_files["worker"],
    )
    assert code == 1  # there is no engine either
    assert rows[finding][0] == verdict, rows


def test_a_live_worker_is_not_disturbed(broker: Mosquitto, environment: dict[str, str]) -> None:
    def status(worker: PlayedWorker) -> None:
        worker.status(instance="a", ts=time.time(), every_s=10, host="box", engine={"state": "ready"})

    with PlayedWorker(broker.port) as worker:
        status(worker)
        code, rows = check(
            environment,
            mqtt__host="127.0.0.1",
            mqtt__port=broker.port,
            mqtt__worker_id="played",
            engine__kind="managed",
            engine__model_path="/nowhere/model.gguf",
        )
        assert all(payload == b"" for _, payload in worker.requests)
        assert {control["action"] for _, control in worker.controls} == {"ping"}
        assert retained(broker.port) == ["llm/status/played"]
    assert code == 1
    assert rows["bus.workers"] == ("ok", "worker played is online on box -> ")
    assert rows["engine.reachable"][0] == "ok"
    assert rows["engine.file"][0] == "FAIL"
    assert "No such file" in rows["engine.file"][1]
    assert rows["client.isolation"][0] == "warn"  # an anonymous broker binds nobody


def test_another_worker_on_the_same_root_is_found(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port) as worker:
        worker.status(instance="a", ts=time.time(), every_s=10, host="attic")
        _, rows = check(environment, mqtt__host="127.0.0.1", mqtt__port=broker.port, mqtt__worker_id="kitchen")
        assert rows["bus.workers"][0] == "FAIL"
        assert "played on attic" in rows["bus.workers"][1]
        worker.status(instance="a", ts=time.time() - 3600, every_s=10, host="attic")
        _, rows = check(environment, mqtt__host="127.0.0.1", mqtt__port=broker.port, mqtt__worker_id="kitchen")
        assert rows["bus.stale"][0] == "warn"
        assert rows["bus.workers"][0] == "ok"


def test_the_workers_of_a_pool_are_not_in_each_others_way(broker: Mosquitto, environment: dict[str, str]) -> None:
    settings = {
        "mqtt__host": "127.0.0.1",
        "mqtt__port": broker.port,
        "mqtt__worker_id": "kitchen",
        "sessions__store": "postgres",
        "sessions__url": "postgresql://lmd@127.0.0.1:1/lmd",
    }
    with PlayedWorker(broker.port) as worker:
        worker.status(instance="a", ts=time.time(), every_s=10, host="attic", pool="house")
        _, rows = check(environment, **settings, pool__name="house")
        assert rows["bus.workers"] == ("ok", "online in pool house: played on attic -> ")
        assert rows["pool.share"][0] == "ok"
        assert rows["pool.status.write"][0] == "ok"
        assert retained(broker.port) == ["llm/status/played"]
        _, rows = check(environment, **settings, pool__name="garden")
        assert rows["bus.workers"][0] == "FAIL"
        _, rows = check(environment, **settings)
        assert rows["bus.workers"][0] == "FAIL"
        assert "pool.share" not in rows


def test_a_broker_without_shared_subscriptions_is_no_place_for_a_pool(
    amqtt_broker: AmqttBroker, environment: dict[str, str]
) -> None:
    _, rows = check(
        environment,
        mqtt__host="127.0.0.1",
        mqtt__port=amqtt_broker.port,
        sessions__store="postgres",
        sessions__url="postgresql://lmd@127.0.0.1:1/lmd",
        pool__name="house",
    )
    assert rows["pool.share"][0] == "FAIL"
    assert "shared subscriptions" in rows["pool.share"][1]


def test_tls_is_looked_at_step_by_step(
    start_mosquitto: Start, authority: Authority, environment: dict[str, str]
) -> None:
    broker = start_mosquitto(tls=(authority.ca_file, *authority.issue("localhost")))
    settings: dict[str, Any] = {"mqtt__host": "127.0.0.1", "mqtt__port": broker.tls_port, "mqtt__tls__enabled": "true"}
    _, rows = check(environment, **settings, mqtt__tls__ca_file=authority.ca_file)
    assert rows["broker.tls"] == ("ok", "TLSv1.3, certificate verified -> ")
    assert rows["broker.certificate"][0] == "warn"  # a certificate of one day
    assert rows["broker.login"][0] == "ok"
    code, rows = check(environment, **settings)
    assert code == 1
    assert "ca_file" in rows["broker.tls"][1]
    assert rows["broker.login"][0] == "skip"


def test_a_wrong_password_a_closed_port_and_a_wrong_name_are_told_apart(
    guarded: Mosquitto, environment: dict[str, str]
) -> None:
    environment |= {"LMD_MQTT__USERNAME": "worker", "LMD_MQTT__PASSWORD": "wr0ng"}
    code, rows = check(environment, mqtt__host="127.0.0.1", mqtt__port=guarded.port)
    assert code == 1
    assert rows["broker.login"][0] == "FAIL"
    assert "wr0ng" not in str(rows)
    _, rows = check(environment, mqtt__host="127.0.0.1", mqtt__port=free_port())
    assert "nothing listens" in rows["broker.port"][1]
    _, rows = check(environment, mqtt__host="broker.invalid")
    assert "does not resolve" in rows["broker.name"][1]


def test_a_wrong_configuration_is_the_first_and_only_finding(environment: dict[str, str]) -> None:
    code, rows = check(environment, mqtt__hots="x")
    assert code == 1
    assert list(rows) == ["config.valid"]
    assert "did you mean host" in rows["config.valid"][1]


def test_a_store_that_cannot_be_written_is_found(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, rows = check(environment, mqtt__port=free_port(), sessions__path=tmp_path / "file" / "state.db")
    assert rows["store.path"][0] == "FAIL"


def test_on_a_pipe_each_finding_is_a_plain_line(environment: dict[str, str]) -> None:
    result = lmd("check", "--set", f"mqtt.port={free_port()}", "--set", "mqtt.host=127.0.0.1", environment=environment)
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 1
    assert any(line.startswith("ok   broker.name ") for line in lines)
    assert any(line.startswith("FAIL broker.port ") and " -> start the broker" in line for line in lines)
    assert b"\x1b" not in result.stdout


@pytest.mark.parametrize("command", [["check"], ["ask", "hi"], ["run"]], ids=lambda command: str(command[0]))
def test_a_password_that_is_not_utf_8_is_told_under_its_name(command: list[str], environment: dict[str, str]) -> None:
    environment |= {"LMD_MQTT__USERNAME": "u", "LMD_MQTT__PASSWORD": "p\udce4ss"}
    result = lmd(*command, "--set", f"mqtt.port={free_port()}", environment=environment)
    assert result.returncode == (1 if command == ["check"] else 2)
    told = (result.stdout + result.stderr).decode()
    assert "[mqtt] password: is not UTF-8 text" in told
    assert "Traceback" not in told


def test_the_login_of_a_client_that_cannot_be_sent_is_wrong_usage(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes(b"a\x00b\n")
    flags = ["--client-username", "u", "--client-password-file", str(tmp_path / "password")]
    result = lmd("check", *flags, environment=environment)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"--client-password-file: holds a line break or another control character" in result.stderr


def test_a_secret_that_a_finding_quotes_is_masked(environment: dict[str, str]) -> None:
    environment |= {"LMD_MQTT__USERNAME": "u", "LMD_MQTT__PASSWORD": "sesame-opens"}
    for form in ([], ["--json"]):
        result = lmd("check", *form, "--set", "mqtt.host=sesame-opens.invalid", environment=environment)
        assert b"********.invalid" in result.stdout
        assert b"sesame" not in result.stdout + result.stderr


def test_an_engine_that_is_down_is_told_with_one_piece_of_advice(environment: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = lmd("check", "--set", f"engine.url={url}", "--set", f"mqtt.port={free_port()}", environment=environment)
    [line] = [line for line in result.stdout.decode().splitlines() if "engine.reachable" in line]
    assert line.startswith("FAIL ")
    assert url in line
    assert line.lower().count("start the server") == 1
    assert line.count("engine.url") == 1


@pytest.mark.parametrize(
    "protocol,line,verdict,words",
    [
        ("5", "topic readwrite homeassistant/device/#", "ok", "arrived"),
        ("5", "", "FAIL", "Not authorized"),
        ("3.1.1", "", "warn", "nobody could see whether it arrived"),
    ],
)
def test_the_right_to_tell_home_assistant_is_tried_where_it_is_needed(
    start_mosquitto: Start,
    environment: dict[str, str],
    password_files: dict[str, str],
    protocol: str,
    line: str,
    verdict: str,
    words: str,
) -> None:
    mine = "user worker\n"
    assert mine in ACCESS_LIST
    broker = start_mosquitto(users=PASSWORDS, acl=ACCESS_LIST.replace(mine, f"{mine}{line}\n"))
    settings: dict[str, object] = {
        "mqtt__host": "127.0.0.1",
        "mqtt__port": broker.port,
        "mqtt__protocol": protocol,
        "mqtt__username": "worker",
        "mqtt__password_file": password_files["worker"],
        "mqtt__worker_id": "kitchen",
    }
    _, rows = check(environment, "--no-generate", home_assistant__discovery="true", **settings)
    assert rows["home-assistant.write"][0] == verdict
    assert words in rows["home-assistant.write"][1]
    assert rows["home-assistant.birth"][0] == "ok"


def test_a_device_that_home_assistant_knows_is_left_as_it_is(broker: Mosquitto, environment: dict[str, str]) -> None:
    settings: dict[str, object] = {
        "mqtt__host": "127.0.0.1",
        "mqtt__port": broker.port,
        "mqtt__worker_id": "attic",
        "home_assistant__discovery": "true",
    }
    worker = DiscoveredWorker(
        root="llm", worker_id="attic", version="1", level="ha", models=(), can_restart=True, can_unload=True, health_every_s=30
    )  # fmt: skip
    messages: list[tuple[bytes, bool]] = []
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_message = lambda _c, _u, message: messages.append((bytes(message.payload), message.retain))
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    try:
        eventually(client.is_connected)
        client.publish(worker.topic("homeassistant"), b'{"told": 1}', qos=1, retain=True).wait_for_publish(10)
        client.subscribe(worker.topic("homeassistant"), 1)
        eventually(lambda: messages)
        _, rows = check(environment, "--no-generate", **settings)
        assert rows["home-assistant.write"][0] == "ok"
        eventually(lambda: len(messages) == 2)
        assert {payload for payload, _ in messages} == {b'{"told": 1}'}
    finally:
        client.publish(worker.topic("homeassistant"), b"", qos=1, retain=True).wait_for_publish(10)
        client.disconnect()
        client.loop_stop()
