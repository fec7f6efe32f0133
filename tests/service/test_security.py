"""Who may do what: client certificates, passwords from files, and the access list that we ship, with a worker at work."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import check_stream
from tests.support.certificates import Authority
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]

SECRET = "sesame-opens-89f1c"
ACL = Path(__file__).parents[2] / "config" / "mosquitto.acl"
PEOPLE = {"llm-worker": SECRET, "llm-operator": "operator-pass", "alice": "alice-pass", "bob": "bob-pass"}


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_worker_with_a_client_certificate_serves_over_tls(
    protocol: str,
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
    authority: Authority,
) -> None:
    server_cert, server_key = authority.issue(f"broker-{protocol}")
    cert, key = authority.issue(f"worker-{protocol}", client=True)
    broker = start_mosquitto(tls=(authority.ca_file, server_cert, server_key), client_certificates=True)
    worker = start_worker(
        broker.tls_port,
        llama_server.url,
        mqtt__protocol=protocol,
        mqtt__tls__enabled=True,
        mqtt__tls__ca_file=str(authority.ca_file),
        mqtt__tls__cert_file=str(cert),
        mqtt__tls__key_file=str(key),
    )
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    context.load_cert_chain(cert, key)
    watcher = watch(broker.tls_port, version=protocol, tls=context)
    for number in range(8):
        watcher.ask(f"s{number}", "tell me", request_id=f"r{number}", max_tokens=50)
    for number in range(8):
        watcher.terminal(f"r{number}")
        assert check_stream(watcher.of(f"r{number}"))["type"] == "done"
    assert worker.stop() == 0
    watcher.first(_topic="llm/status/w1", state="offline", reason="stopped")


def test_a_broker_with_a_certificate_of_another_authority_gets_no_password(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    authority: Authority,
    tmp_path: Path,
) -> None:
    stranger = Authority(tmp_path / "stranger", "Another Authority")
    cert, key = stranger.issue("broker")
    broker = start_mosquitto(tls=(stranger.ca_file, cert, key))
    worker = start_worker(
        broker.tls_port,
        llama_server.url,
        ready=False,
        mqtt__username="llm-worker",
        mqtt__password=SECRET,
        mqtt__tls__enabled=True,
        mqtt__tls__ca_file=str(authority.ca_file),
        limits__startup_timeout_s=2,
    )
    assert worker.wait(20) == 3
    why = worker.log("link.refused")[0]["why"]
    assert "certificate" in why.lower()
    assert SECRET not in worker.log_text()


def test_with_the_shipped_access_list_nobody_reads_or_asks_in_anothers_name(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
    tmp_path: Path,
) -> None:
    broker = start_mosquitto(users=PEOPLE, acl=ACL.read_text())
    password_file = tmp_path / "password"
    password_file.write_text(f"{SECRET}\n")
    password_file.chmod(0o600)
    worker = start_worker(
        broker.port, llama_server.url, mqtt__username="llm-worker", mqtt__password_file=str(password_file)
    )
    everything = ["llm/reply/#", "llm/request/#", "llm/control/#", "llm/admin/#", "llm/admin-reply/#"]
    alice = watch(broker.port, username="alice", password="alice-pass", filters=["llm/reply/alice/#", "llm/status/#"])
    bob = watch(broker.port, username="bob", password="bob-pass", filters=everything)
    alice.first(_topic="llm/status/w1", state="online")

    alice.ask("alice/chat", "for me alone", request_id="a1", max_tokens=20)
    assert alice.terminal("a1")["type"] == "done"
    check_stream(alice.of("a1"))

    # bob asks, cancels and resets as alice, and drains as an operator.
    bob.ask("alice/chat", "as alice", request_id="b1", max_tokens=5)
    bob.control("alice/chat", "reset", transaction="b2")
    bob.admin("w1", "drain", transaction="b3")
    bob.ask("bob/chat", "as myself", request_id="b4", max_tokens=5)
    assert bob.terminal("b4")["type"] == "done"
    assert {seen.topic for seen in bob.seen()} == {"llm/reply/bob/chat"}
    alice.control("alice/chat", "history", transaction="a2")
    history = alice.first(transaction="a2").event["messages"]
    assert [message["content"] for message in history if message["role"] == "user"] == ["for me alone"]
    assert not any(seen.event.get("transaction") in ("b2", "b3") for seen in alice.seen())
    eventually(lambda: len(worker.log("request.finished")) >= 2)
    assert len(worker.log("request.finished")) == 2

    operator = watch(broker.port, username="llm-operator", password="operator-pass", filters=["llm/admin-reply/#"])
    operator.admin("w1", "log_level", level="debug", transaction="o1")
    assert operator.first(transaction="o1").event["status"] == "ok"

    # Whoever steals the worker's password can still write only to its own topics.
    verdicts: dict[int, bool] = {}
    thief = watch(broker.port, username="llm-worker", password=SECRET, filters=["llm/request/#"])
    thief.client.on_publish = lambda client, userdata, mid, reason, properties: verdicts.update(
        {mid: reason.is_failure}
    )
    wanted = {}
    for topic in ("home/door/set", "llm/request/alice/chat", "llm/admin/w1", "$SYS/x", "llm/control/alice/chat"):
        wanted[thief.publish(topic, b"{}").mid] = topic
    eventually(lambda: len(verdicts) == len(wanted))
    assert {wanted[mid] for mid, refused in verdicts.items() if not refused} == set()

    assert SECRET not in worker.log_text()
    for name in ("cmdline", "environ"):
        with contextlib.suppress(PermissionError):  # a worker's environment is nobody's business but root's
            assert SECRET.encode() not in Path(f"/proc/{worker.process.pid}/{name}").read_bytes()
    assert worker.stop() == 0


def test_a_wrong_password_is_told_and_never_shown(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer
) -> None:
    broker = start_mosquitto(users={"llm-worker": "right"})
    worker = start_worker(
        broker.port,
        llama_server.url,
        ready=False,
        mqtt__username="llm-worker",
        mqtt__password=SECRET,
        limits__startup_timeout_s=2,
    )
    assert worker.wait(20) == 3
    assert "mqtt.password" in worker.log("link.refused")[0]["why"] or "password" in worker.log("link.refused")[0]["why"]
    ending = worker.log("worker.ending")[0]
    assert ending["exit_code"] == 3
    assert SECRET not in worker.log_text()


def test_a_reply_topic_of_the_clients_choice_is_refused(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    start_worker(broker.port, llama_server.url)
    watcher = watch(broker.port, filters=["#"])
    watcher.publish("llm/request/a", b'{"prompt":"x","request_id":"r1"}', ResponseTopic="home/door/set")
    rejected = watcher.first(type="rejected", request_id="r1").event
    assert rejected["code"] == "reply_topic_forbidden"
    watcher.publish(
        "llm/request/a",
        b'{"prompt":"x","request_id":"r2","max_tokens":3}',
        ResponseTopic="llm/reply/a",
        CorrelationData=b"\x00\xffdata",
    )
    watcher.terminal("r2")
    seen = watcher.first(request_id="r2", final=True)
    assert seen.correlation == b"\x00\xffdata"
    assert {each.topic.split("/")[0] for each in watcher.seen()} == {"llm"}
    assert paho.MQTT_ERR_SUCCESS == 0
