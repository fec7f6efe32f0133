"""The shipped broker configuration attacked by a user, alice, who wants what is bob's, the worker's or the operator's."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.shipped_broker import REFUSED, Person, ShippedBroker, leave_a_will

pytestmark = pytest.mark.broker

# The last ones are names that an operator should not give, and that mosquitto lets him give.
ODD_USERS = ("+", "al+ce", "alice/#")
USERS = ("llm-worker", "llm-operator", "alice", "bob", *ODD_USERS)

Join = Callable[..., Person]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with ShippedBroker(tmp_path_factory.mktemp("broker"), USERS) as broker:
        yield broker.port


@pytest.fixture
def join(port: int) -> Iterator[Join]:
    people: list[Person] = []

    def connect(name: str, *, at: int = port, **wishes: object) -> Person:
        people.append(Person(name, at, **wishes))  # type: ignore[arg-type]
        return people[-1]

    yield connect
    for person in people:
        person.close()


def _everybody_works(worker: Person, bob: Person, operator: Person) -> None:
    """One message on every topic that is not alice's."""
    for person, topic in (
        (bob, "llm/request/bob/kitchen"),
        (bob, "llm/control/bob/kitchen"),
        (worker, "llm/reply/bob/kitchen"),
        (worker, "llm/reply/bob"),
        (operator, "llm/admin/w1"),
        (worker, "llm/admin-reply/w1"),
    ):
        assert person.publish(topic, b"not for alice") != REFUSED


@pytest.mark.parametrize(
    "topic_filter",
    [
        "#",
        "+/#",
        "+/+/+/+",
        "/#",
        "llm/#",
        "llm/+/bob/#",
        "llm/+/+/kitchen",
        "llm/reply/#",
        "llm/reply/bob",
        "llm/reply/bob/kitchen",
        "llm/request/#",
        "llm/control/#",
        "llm/admin/#",
        "llm/admin-reply/#",
        "$share/alice/llm/reply/bob/#",
        "$share/bob/#",
        "$SYS/#",
        "$CONTROL/#",
        "$CONTROL/dynamic-security/v1/response",
    ],
)
def test_no_subscription_brings_what_is_anothers(join: Join, topic_filter: str) -> None:
    alice, bob, worker, operator = (join(name) for name in ("alice", "bob", "llm-worker", "llm-operator"))
    alice.subscribe(topic_filter)
    alice.subscribe("llm/reply/alice/last")
    _everybody_works(worker, bob, operator)
    worker.publish("llm/reply/alice/last", b"last")
    assert [topic for topic, _ in alice.read_until(b"last") if topic != "llm/reply/alice/last"] == []


@pytest.mark.parametrize(
    "topic",
    [
        "llm/request/bob/kitchen",
        "llm/request/bob",
        "llm/request",
        "llm/request/alicex/kitchen",
        "llm/request/ALICE/kitchen",
        "llm/request//alice",
        "/llm/request/alice",
        "llm/control/bob/kitchen",
        "llm/reply/bob/kitchen",
        "llm/reply/alice/kitchen",
        "llm/admin/w1",
        "llm/admin-reply/w1",
        "llm/status/w1",
        "llm/health/w1",
        "$CONTROL/dynamic-security/v1",
        "$SYS/broker/clients/connected",
        "$share/g/llm/request/bob/kitchen",
    ],
)
def test_no_topic_of_anothers_takes_a_message_nor_a_will(join: Join, port: int, topic: str) -> None:
    everybody = [join(name) for name in ("bob", "llm-worker", "llm-operator")]
    for person in everybody:
        for topic_filter in ("#", "$SYS/broker/clients/connected", "$CONTROL/#"):
            person.subscribe(topic_filter)
    alice = join("alice")
    assert alice.publish(topic, b"alice was here") == REFUSED

    leave_a_will(port, "alice", topic, b"alice was here")
    # mosquitto sees lost connections in turn: the second will comes after the first.
    leave_a_will(port, "alice", "llm/request/alice/end", b"alice is gone")
    worker = everybody[1]
    seen = [worker.inbox.get(timeout=10)]
    while seen[-1][0] != "llm/request/alice/end":
        seen.append(worker.inbox.get(timeout=10))
    for person in everybody:
        seen += list(person.inbox.queue)
    assert [payload for found, payload in seen if found == topic or payload == b"alice was here"] == []


def test_whoever_takes_anothers_client_id_gets_nothing_of_his_session(join: Join) -> None:
    """She puts him off and gets his place, but what waited there for him is not delivered to her."""
    bob = join("bob", client_id="bobs-phone", keeps_session=True)
    bob.subscribe("llm/reply/bob/#")
    bob.vanish()
    worker = join("llm-worker")
    worker.publish("llm/reply/bob/kitchen", b"while he was away")
    alice = join("alice", client_id="bobs-phone", keeps_session=True)
    alice.subscribe("llm/reply/alice/#")
    worker.publish("llm/reply/bob/kitchen", b"while she is there")
    worker.publish("llm/reply/alice/last", b"last")
    assert alice.read_until(b"last") == []


@pytest.mark.parametrize("name", ODD_USERS)
def test_a_user_name_with_a_wildcard_opens_nothing(join: Join, name: str) -> None:
    alice, worker, odd = join("alice"), join("llm-worker"), join(name)
    worker.subscribe("llm/request/#")
    odd.subscribe("#")
    worker.publish("llm/reply/alice/kitchen", b"for alice")
    worker.publish("llm/reply/bob/kitchen", b"for bob")
    for topic in ("llm/request/alice/kitchen", "llm/request/bob/kitchen", "llm/request/x"):
        assert odd.publish(topic, b"forged") == REFUSED
    alice.publish("llm/request/alice/last", b"last")
    assert worker.read_until(b"last") == []
    # What the broker sent her it sent before it acknowledged what she published.
    assert list(odd.inbox.queue) == []


def test_the_operator_reads_no_prompt_and_no_answer_and_answers_for_nobody(join: Join) -> None:
    operator, bob, worker = join("llm-operator"), join("bob"), join("llm-worker")
    operator.subscribe("#")
    bob.publish("llm/request/bob/kitchen", b"a prompt")
    worker.publish("llm/reply/bob/kitchen", b"an answer")
    for topic in ("llm/reply/bob/kitchen", "llm/request/bob/kitchen", "llm/control/bob/kitchen", "llm/status/w1"):
        assert operator.publish(topic) == REFUSED
    worker.publish("llm/admin-reply/w1", b"last")
    assert operator.read_until(b"last") == []


def test_a_worker_whose_password_was_stolen_cannot_ask_order_or_switch_a_lamp(join: Join) -> None:
    thief = join("llm-worker")
    for topic in ("llm/request/bob/kitchen", "llm/control/bob/kitchen", "llm/admin/w1", "home/lamp/set", "$CONTROL/x"):
        assert thief.publish(topic) == REFUSED


# --- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_port(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[int]:
    cert, key = authority.issue("broker")
    folder = tmp_path_factory.mktemp("tls")
    with ShippedBroker(folder, USERS, tls=(authority.ca_file, cert, key)) as broker:
        yield broker.tls_port


def _trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.ca_file))


def _taken(port: int, context: ssl.SSLContext) -> bool:
    """Whether a CONNECT over this connection is answered at all."""
    hello = b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04test"
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as plain, context.wrap_socket(plain) as wire:
            wire.sendall(hello)
            return bool(wire.recv(4))
    except OSError:  # ssl.SSLError is one
        return False


def _without_checks(authority: Authority) -> ssl.SSLContext:
    context = _trusting(authority)
    context.check_hostname = False
    return context


def test_without_a_client_certificate_nobody_comes_in(tls_port: int, authority: Authority) -> None:
    assert not _taken(tls_port, _without_checks(authority))


@pytest.mark.parametrize("fault", ["another authority", "expired", "a server's"])
def test_with_a_bad_client_certificate_nobody_comes_in(
    fault: str, tls_port: int, authority: Authority, tmp_path: Path
) -> None:
    issuer = Authority(tmp_path, "Another Authority") if fault == "another authority" else authority
    cert, key = issuer.issue(f"bob-{fault[:2]}", client=fault != "a server's", expired=fault == "expired")
    context = _without_checks(authority)
    context.load_cert_chain(cert, key)
    assert not _taken(tls_port, context)


def test_the_tls_port_speaks_nothing_older_than_tls_1_2_and_no_plain_mqtt(tls_port: int, authority: Authority) -> None:
    old = _without_checks(authority)
    old.load_cert_chain(*authority.issue("old", client=True))
    assert _taken(tls_port, old)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match=r"TLSv1 "):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match=r"TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    assert not _taken(tls_port, old)
    with socket.create_connection(("127.0.0.1", tls_port), 5) as plain:
        plain.sendall(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04test")
        plain.settimeout(5)
        try:
            answer = plain.recv(64)
        except ConnectionError:
            answer = b""
    assert not answer.startswith(b"\x20")  # no CONNACK


def test_a_certificate_is_who_one_is_whatever_user_name_one_gives(
    join: Join, tls_port: int, authority: Authority
) -> None:
    context = _without_checks(authority)
    context.load_cert_chain(*authority.issue("alice", client=True))
    liar = join("llm-worker", at=tls_port, tls=context)
    assert liar.connack[0] == "Success"
    assert liar.publish("llm/reply/bob/kitchen") == REFUSED
    assert liar.publish("llm/request/bob/kitchen") == REFUSED
    assert liar.publish("llm/request/alice/kitchen") != REFUSED
