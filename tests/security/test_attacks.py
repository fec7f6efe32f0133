"""A worker behind the shipped access list, and bob, who has a password of his own and wants what is alice's."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.service.watcher import Watcher, check_stream
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.shipped_broker import ShippedBroker

pytestmark = [pytest.mark.broker, pytest.mark.engine]

USERS = ("llm-worker", "llm-operator", "alice", "bob")


@dataclass
class Scene:
    """All tests of this file share it; each uses request ids and sessions of its own."""

    port: int
    worker: DaemonProcess
    alice: Watcher
    bob: Watcher
    operator: Watcher

    def alice_is_served(self, request_id: str) -> None:
        """Alice asks, and is answered as if nothing was."""
        begun = time.monotonic()
        self.alice.ask("alice/calm", "still there?", request_id=request_id, max_tokens=3)
        assert self.alice.terminal(request_id)["type"] == "done"
        check_stream(self.alice.of(request_id))
        first = self.alice.first(request_id=request_id)
        assert first.at - begun < 1.0
        assert len(self.worker.log("link.online")) == 1

    def bobs_answer(self, request_id: str, payload: bytes, **properties: Any) -> dict[str, Any]:
        """The first answer to a request of bob's with this payload, that has this request id."""
        self.bob.publish("llm/request/bob/x", payload, **properties)
        return self.bob.first(request_id=request_id).event

    def bobs_refusal(self, payload: bytes, **properties: Any) -> dict[str, Any]:
        """The error that the worker sends for this payload, whose request id cannot be read."""
        since = self.bob.count()
        self.bob.publish("llm/request/bob/x", payload, **properties)
        return self.bob.first(since=since, _topic="llm/reply/bob/x", type="error").event


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, llama_server: LlamaServer) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    (folder / "password").write_text("llm-worker-password\n")
    (folder / "password").chmod(0o600)
    broker_folder = tmp_path_factory.mktemp("broker")
    with ShippedBroker(broker_folder, USERS) as broker:
        settings = {
            "mqtt__port": broker.port,
            "mqtt__username": "llm-worker",
            "mqtt__password_file": str(folder / "password"),
            "engine__url": llama_server.url,
            "sessions__expose_history": True,
        }
        worker = DaemonProcess(folder / "w1", settings).start()
        worker.wait_ready()

        def person(name: str, *filters: str) -> Watcher:
            return Watcher(broker.port, username=name, password=f"{name}-password", filters=filters)

        people = (
            person("alice", "llm/reply/alice/#", "llm/status/#"),
            person("bob", "#"),
            person("llm-operator", "llm/admin-reply/#"),
        )
        yield Scene(broker.port, worker, *people)
        for one in people:
            one.close()
        code = worker.stop()
        worker.close()
        worker.check_log()
        for one in people:
            one.check()
        assert code == 0


@pytest.fixture(autouse=True)
def bob_saw_only_what_is_his(scene: Scene) -> Iterator[None]:
    yield
    topics = {seen.topic for seen in scene.bob.seen()}
    assert {topic for topic in topics if not topic.startswith(("llm/reply/bob", "llm/status/", "llm/health/"))} == set()


# --- another's requests and sessions -------------------------------------------------------------------------------------


def test_anothers_request_id_brings_neither_his_answer_nor_his_stream(scene: Scene) -> None:
    payload = scene.alice.ask("alice/id", "a secret of alice's", request_id="shared-id", max_tokens=30)
    scene.bob.publish("llm/request/bob/id", payload)
    mine = scene.alice.terminal("shared-id")
    his = scene.bob.terminal("shared-id")
    assert mine["type"] == "done"
    assert (his["session_id"], mine["session_id"]) == ("bob/id", "alice/id")
    # Sent again after the end: what is stored is each one's own, whoever was first.
    scene.bob.publish("llm/request/bob/other", payload)
    other = scene.bob.first(request_id="shared-id", final=True, session_id="bob/other").event
    assert other["type"] in ("done", "error")
    assert all(event["session_id"].startswith("bob/") for event in scene.bob.of("shared-id"))
    check_stream(scene.alice.of("shared-id"))


def test_anothers_request_cannot_be_cancelled_by_its_id(scene: Scene) -> None:
    scene.alice.ask("alice/cancel", "count", request_id="long", max_tokens=400)
    scene.alice.first(request_id="long", type="chunk")
    for session in ("bob", "bob/cancel", "bob/alice"):
        scene.bob.control(session, "cancel", request_id="long", transaction=f"c-{session}", session_id="alice/cancel")
        scene.bob.first(transaction=f"c-{session}")
    assert scene.alice.terminal("long", 60)["finish_reason"] != "cancelled"


@pytest.mark.parametrize("action", ["history", "reset", "delete"])
def test_a_session_that_is_named_in_the_payload_is_not_the_one_that_is_meant(scene: Scene, action: str) -> None:
    scene.alice.ask("alice/mine", f"before {action}", request_id=f"mine-{action}", max_tokens=3)
    scene.alice.terminal(f"mine-{action}")
    names = {"session_id": "alice/mine", "session": "alice/mine", "topic": "llm/reply/alice/mine"}
    body = {"action": action, "transaction": f"h-{action}"} | names
    scene.bob.publish("llm/control/bob/mine", json.dumps(body).encode())
    ack = scene.bob.first(transaction=f"h-{action}").event
    assert "before" not in json.dumps(ack)
    scene.alice.control("alice/mine", "history", transaction=f"a-{action}")
    told = scene.alice.first(transaction=f"a-{action}").event
    assert f"before {action}" in [message["content"] for message in told["messages"]]


def test_a_request_that_names_anothers_session_runs_in_ones_own(scene: Scene) -> None:
    body = {"prompt": "hello", "session_id": "alice/chat", "reply_to": "llm/reply/alice/chat", "max_tokens": 2}
    event = scene.bobs_answer("named", json.dumps(body | {"request_id": "named"}).encode())
    assert event["session_id"] == "bob/x"
    assert scene.bob.terminal("named")["session_id"] == "bob/x"
    assert scene.alice.of("named") == []


@pytest.mark.parametrize(
    "path",
    ["bob/../alice", "bob//alice", "bob/", "bob/x/y", "bob/a b", "bob/$SYS", "bob/ä", "bob/" + "s" * 65],
)
def test_a_path_that_is_no_session_leads_nowhere(scene: Scene, path: str) -> None:
    scene.bob.publish(f"llm/request/{path}", b'{"prompt":"x","request_id":"nowhere"}').wait_for_publish(10)
    scene.bob.publish(f"llm/control/{path}", b'{"action":"ping","transaction":"nowhere"}').wait_for_publish(10)
    scene.alice_is_served(f"path-{abs(hash(path))}")
    assert [seen.topic for seen in scene.bob.seen() if b"nowhere" in seen.payload] == []


@pytest.mark.parametrize(
    "topic",
    [
        "llm/reply/alice/chat",
        "llm/reply/bob",
        "llm/request/bob/x",
        "llm/admin/w1",
        "$CONTROL/dynamic-security/v1",
        "home/door",
    ],
)
def test_a_response_topic_that_is_not_the_sessions_own_is_refused(scene: Scene, topic: str) -> None:
    name = f"rt-{topic.replace('/', '.').replace('$', '')}"
    payload = json.dumps({"prompt": "x", "request_id": name, "max_tokens": 2}).encode()
    event = scene.bobs_answer(name, payload, ResponseTopic=topic)
    assert (event["type"], event["code"]) == ("rejected", "reply_topic_forbidden")


# --- identifiers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_id",
    ["", "a\nb", "a\n", "a\x00", "\x1b[2J", "../../etc/passwd", "a/b", "#", "$SYS", "ä", "\u202e", "x" * 65, 7, ["a"]],
)
def test_an_identifier_that_could_steer_something_is_refused_and_not_repeated(scene: Scene, request_id: Any) -> None:
    refusal = scene.bobs_refusal(json.dumps({"prompt": "x", "request_id": request_id}).encode())
    assert refusal["code"] == "bad_request"
    assert "request_id" in json.dumps(refusal["fields"])
    assert refusal["request_id"] != request_id


@pytest.mark.parametrize("size", [65, 1000, 65_535])
def test_correlation_data_of_any_size_costs_neither_the_answer_nor_the_connection(scene: Scene, size: int) -> None:
    payload = json.dumps({"prompt": "x", "request_id": f"corr{size}", "max_tokens": 2}).encode()
    scene.bob.publish("llm/request/bob/x", payload, CorrelationData=b"\xff" * size)
    scene.bob.terminal(f"corr{size}")
    seen = [each for each in scene.bob.seen() if each.event.get("request_id") == f"corr{size}"]
    assert {each.correlation for each in seen} == {None}, (
        "over 64 bytes is not mirrored: it would multiply with each event"
    )
    scene.alice_is_served(f"after-corr{size}")


# --- bombs ---------------------------------------------------------------------------------------------------------------

_DEEP = 60_000
BOMBS: dict[str, bytes] = {
    "arrays-deep": b'{"prompt":"x","metadata":' + b"[" * _DEEP + b"]" * _DEEP + b"}",
    "objects-deep": b'{"prompt":"x","metadata":' + b'{"a":' * _DEEP + b"1" + b"}" * _DEEP + b"}",
    "never-closed": b'{"prompt":"x","metadata":' + b"[" * _DEEP,
    "digits": b'{"prompt":"x","max_tokens":' + b"9" * 500_000 + b"}",
    "exponent": b'{"prompt":"x","temperature":1e999999999}',
    "infinity": b'{"prompt":"x","timeout_s":Infinity}',
    "not-a-number": b'{"prompt":"x","top_p":NaN}',
    "doubled-keys": b'{"prompt":"a","prompt":"b"}',
    "doubled-keys-inside": b'{"prompt":"a","metadata":{"k":1,"k":2}}',
    "many-keys": b'{"prompt":"x","metadata":{' + b",".join(b'"k%d":0' % n for n in range(60_000)) + b"}}",
    "many-messages": b'{"messages":[' + b",".join([b'{"role":"user","content":""}'] * 30_000) + b"]}",
    "many-stops": b'{"prompt":"x","stop":[' + b",".join(b'"%d"' % n for n in range(90_000)) + b"]}",
    "many-biases": b'{"prompt":"x","logit_bias":{' + b",".join(b'"%d":1' % n for n in range(80_000)) + b"}}",
    "long-metadata": b'{"prompt":"x","metadata":{"k":"' + b"y" * 900_000 + b'"}}',
    "escapes": b'{"prompt":"x","metadata":{"k":"' + b"\\u0041" * 150_000 + b'"}}',
    "lone-surrogate": b'{"prompt":"\\ud800"}',
    "bad-utf8": b'{"prompt":"\xff\xfe"}',
    "schema-cycle": (
        b'{"prompt":"x","response_format":{"type":"json_schema","json_schema":{"schema":'
        b'{"$defs":{"a":{"allOf":[{"$ref":"#/$defs/a"}]}},"$ref":"#/$defs/a"}}}}'
    ),
    "too-large": b'{"prompt":"' + b"z" * (1024 * 1024) + b'"}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_of_json_is_refused_at_once_and_hurts_nobody(scene: Scene, name: str) -> None:
    before = scene.worker.rss_bytes()
    begun = time.monotonic()
    refusal = scene.bobs_refusal(BOMBS[name])
    assert refusal["code"] in ("bad_request", "payload_too_large"), refusal
    assert refusal["final"] is True
    assert time.monotonic() - begun < 5.0
    assert len(json.dumps(refusal)) < 5_000, "a refusal does not repeat what was sent"
    scene.alice_is_served(f"after-{name}")
    assert scene.worker.rss_bytes() - before < 80 * 2**20


def test_a_pattern_that_makes_other_matchers_hang_stalls_nobody(scene: Scene) -> None:
    schema = {"type": "string", "pattern": "^" + "(a+)+" * 100 + "$"}
    body = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}, "max_tokens": 20}
    scene.bob.ask("bob/pattern", "x", request_id="pattern", **body)
    scene.alice_is_served("beside-pattern")
    assert scene.bob.terminal("pattern")["type"] in ("done", "error")
    scene.alice_is_served("after-pattern")


@pytest.mark.parametrize("name", ["arrays-deep", "digits", "doubled-keys", "bad-utf8", "long-metadata"])
def test_a_bomb_on_the_control_topic_is_answered_and_hurts_nobody(scene: Scene, name: str) -> None:
    since = scene.bob.count()
    scene.bob.publish("llm/control/bob/x", BOMBS[name].replace(b'"prompt"', b'"action"'))
    ack = scene.bob.first(since=since, type="ack").event
    assert ack["status"] == "error"
    scene.alice_is_served(f"after-control-{name}")


@pytest.mark.parametrize("name", ["arrays-deep", "digits", "doubled-keys", "bad-utf8", "long-metadata"])
def test_an_operator_who_slips_gets_an_error_and_nothing_happens(scene: Scene, name: str) -> None:
    since = scene.operator.count()
    scene.operator.publish("llm/admin/w1", BOMBS[name].replace(b'"prompt"', b'"action"'))
    assert scene.operator.first(since=since, _topic="llm/admin-reply/w1").event["status"] == "error"
    scene.alice_is_served(f"after-admin-{name}")


# --- the engine as a way out ---------------------------------------------------------------------------------------------


@pytest.fixture
def web_server() -> Iterator[tuple[str, list[str]]]:
    """An address inside the network that a client cannot reach himself, and who asked for something there."""
    asked: list[str] = []

    class Inside(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Inside) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join(5)


Address = Callable[[str], str]
ADDRESSES: dict[str, Address] = {
    "plain": lambda url: f"{url}/steal.png",
    "upper case": lambda url: f"{url}/steal.png".replace("http", "HTTP"),
    "blank in front": lambda url: f" {url}/steal.png",
    "user and host": lambda url: f"{url}/steal.png".replace("//", "//data:image@"),
    "without a scheme": lambda url: f"{url}/steal.png".removeprefix("http:"),
    "data that goes on": lambda url: f"data:image/png;base64,AAAA\r\n{url}/steal.png",
    "a drawing that loads": lambda url: f"data:image/svg+xml;base64,{url}",
    "a page": lambda url: f"data:text/html,<img src={url}/steal.png>",
    "a file": lambda url: "file:///etc/passwd",
    "gopher": lambda url: url.replace("http", "gopher"),
    "a list": lambda url: [f"{url}/steal.png"],  # type: ignore[return-value,dict-item]
}


@pytest.mark.parametrize("how", ADDRESSES)
def test_an_address_in_a_message_is_fetched_by_nobody(
    scene: Scene, web_server: tuple[str, list[str]], how: str
) -> None:
    url, asked = web_server
    address = ADDRESSES[how](url)
    for part in (
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "image_url", "image_url": address},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "uri": address}, "url": address},
        {"type": "input_image", "image_url": address},
        {"type": "input_audio", "input_audio": {"data": address, "format": "wav", "url": address}},
        {"type": "video_url", "video_url": {"url": address}},
        {"type": "file", "file": {"file_data": address}},
    ):
        refusal = scene.bobs_refusal(json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode())
        assert refusal["code"] in ("bad_request", "unsupported"), (part, refusal)
    # As text it is text.
    scene.bob.ask("bob/x", f"look at {address}", request_id=f"text-{abs(hash(how))}", max_tokens=2)
    assert scene.bob.terminal(f"text-{abs(hash(how))}")["type"] == "done"
    assert asked == []


def test_fields_that_steer_the_engine_never_reach_it(scene: Scene) -> None:
    fields = {
        "id_slot": 0,
        "lora": [{"id": 0, "scale": 9}],
        "n_predict": 5000,
        "cache_prompt": False,
        "grammar": 'root ::= "owned"',
        "chat_template": "owned",
        "chat_template_kwargs": {"x": 1},
        "url": "http://127.0.0.1:1/",
        "slot_save_path": "/tmp/x",
    }
    body = {"prompt": "hello", "request_id": "steer", "max_tokens": 4} | fields
    scene.bob.publish("llm/request/bob/x", json.dumps(body).encode())
    end = scene.bob.terminal("steer")
    assert end["type"] == "done"
    assert end["usage"]["completion_tokens"] <= 4
    assert "owned" not in end["full_content"]
    assert any("id_slot" in warning for warning in end["warnings"])


# --- the log and terminals -----------------------------------------------------------------------------------------------

ESCAPES = '\x1b[2J\x1b]0;owned\x07\x9b31m\r\n{"event":"forged"}\u2028\u202e'


def test_no_escape_sequence_of_a_client_reaches_the_log(scene: Scene, tmp_path: Path) -> None:
    payloads = [
        json.dumps({"prompt": ESCAPES, "request_id": "esc", "max_tokens": 2}),
        json.dumps({"prompt": "x", ESCAPES: 1, "request_id": "esc2", "max_tokens": 2}),
        json.dumps({"prompt": "x", "model": ESCAPES, "request_id": "esc3"}),
        json.dumps({"prompt": "x", "priority": ESCAPES, "request_id": "esc4"}),
        f"{{{ESCAPES}",
    ]
    for payload in payloads:
        scene.bob.publish("llm/request/bob/x", payload.encode())
    scene.bob.publish("llm/control/bob/x", json.dumps({"action": ESCAPES, "transaction": "t"}).encode())
    scene.operator.publish("llm/admin/w1", json.dumps({"action": ESCAPES, "level": ESCAPES}).encode())
    for name in ("esc", "esc2", "esc3", "esc4"):
        scene.bob.terminal(name)
    scene.alice_is_served("after-escapes")
    text = scene.worker.log_text()
    assert not [each for each in "\x1b\x07\x9b\r\u2028\u202e" if each in text]
    assert scene.worker.log("forged") == []


# --- the operator --------------------------------------------------------------------------------------------------------


def test_what_a_user_sends_as_an_operator_changes_nothing(scene: Scene) -> None:
    for topic in ("llm/admin/w1", "llm/admin", "llm/admin-reply/w1"):
        scene.bob.publish(topic, b'{"action":"drain"}').wait_for_publish(10)
    for name in ("drain", "cancel_all", "restart_engine", "reload"):
        scene.bob.control("bob/x", name, transaction=f"as-operator-{name}")
        assert scene.bob.first(transaction=f"as-operator-{name}").event["status"] == "error"
    scene.alice_is_served("after-drain")
    assert {seen.event["state"] for seen in scene.alice.seen() if seen.topic == "llm/status/w1"} == {"online"}


def test_the_operators_answers_hold_no_prompt_and_no_secret(scene: Scene) -> None:
    scene.alice.ask("alice/private", "my diary", request_id="private", max_tokens=2)
    scene.alice.terminal("private")
    for number, action in enumerate(("log_level debug", "reload", "resume", "log_level info", "restart_engine")):
        name, _, level = action.partition(" ")
        fields = {"level": level} if level else {}
        scene.operator.admin("w1", name, transaction=f"op{number}", **fields)
        scene.operator.first(transaction=f"op{number}")
    told = b"".join(seen.payload for seen in scene.operator.seen())
    assert not [word for word in (b"diary", b"llm-worker-password") if word in told]
    assert not [word for word in ("my diary", "llm-worker-password") if word in scene.worker.log_text()]
