"""Clients that were there before this worker, played as they are, at a real broker with the configuration of the recipes."""

from __future__ import annotations

import json
import queue
import threading
import tomllib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.docs.pages import ROOT, blocks
from tests.service.conftest import StartWorker
from tests.support.live_worker import LiveWorker
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker]


def recipe(route: str) -> dict[str, Any]:
    """The settings of this route as the recipes show them."""
    found = [block.text for block in blocks(ROOT / "docs" / "recipes.md") if block.text.startswith(f"[routes.{route}]")]
    table: dict[str, Any] = tomllib.loads(found[0])["routes"][route]
    return {f"routes__{route}__{key}": value for key, value in table.items()}


def as_text(settings: dict[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}


def as_tables(settings: dict[str, Any]) -> dict[str, Any]:
    """For a configuration file: a table is several keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= {f"{key}__{name}": below for name, below in value.items()} if isinstance(value, dict) else {key: value}
    return found


# --- the clients -------------------------------------------------------------------------------------------------------


class PahoClient:
    """What the clients below have in common: connect, subscribe, wait for what comes."""

    def __init__(self, port: int, *filters: str, qos: int = 1, protocol: int = 4) -> None:
        self.heard: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.qos = qos
        self._subscribed = threading.Event()
        self.mqtt = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"old-{uuid.uuid4().hex}",
            protocol=MQTTProtocolVersion(protocol),
        )
        self.mqtt.on_connect = lambda client, *_: client.subscribe([(each, qos) for each in filters])
        self.mqtt.on_subscribe = lambda *_: self._subscribed.set()
        self.mqtt.on_message = lambda _client, _data, message: self.on_message(message)
        self.mqtt.connect("127.0.0.1", port)
        self.mqtt.loop_start()
        assert self._subscribed.wait(10)

    def on_message(self, message: paho.MQTTMessage) -> None:
        assert not message.retain
        self.heard.put((message.topic, message.payload.decode("utf-8")))

    def send(self, topic: str, payload: Any) -> None:
        data = payload if isinstance(payload, str) else json.dumps(payload)
        self.mqtt.publish(topic, data, qos=self.qos)

    def next(self, timeout_s: float = 20.0) -> tuple[str, str]:
        try:
            return self.heard.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError("nothing came") from None

    def nothing_more(self) -> None:
        assert self.heard.empty(), self.heard.get_nowait()

    def close(self) -> None:
        self.mqtt.disconnect()
        self.mqtt.loop_stop()


class GameClient(PahoClient):
    """Plays one session: asks with `sessionId` and `message`, shows what comes on its own topic, and hints beside it."""

    def __init__(self, port: int, session: str, project: str = "owogpt") -> None:
        self.session, self.project = session, project
        super().__init__(port, f"{project}/assistant_response/{session}", f"{project}/hint/{session}")

    def ask(self, message: str, **more: Any) -> str:
        self.send(f"{self.project}/user_input", {"sessionId": self.session, "message": message, **more})
        topic, text = self.next()
        assert topic == f"{self.project}/assistant_response/{self.session}"
        return text

    def hint(self) -> str:
        topic, text = self.next()
        assert topic == f"{self.project}/hint/{self.session}"
        told = json.loads(text)
        assert set(told) == {"hint"}
        return str(told["hint"])


class PortalBackend(PahoClient):
    """Listens to all answers of its project, and knows whose each is by the last level of its topic."""

    def __init__(self, port: int, project: str = "owogpt") -> None:
        self.project = project
        self.client_id = uuid.uuid4().hex
        self.pending: dict[str, queue.SimpleQueue[str]] = {}
        super().__init__(port, f"{project}/assistant_response/#")

    def on_message(self, message: paho.MQTTMessage) -> None:
        levels = message.topic.split("/")
        request_id = levels[-1] if len(levels) >= 5 else None
        text = message.payload.decode("utf-8")
        try:
            told = json.loads(text)
            text = told.get("response") or told.get("content") or told.get("hint") or ""
            request_id = told.get("requestId") or request_id
        except (ValueError, AttributeError):
            pass
        if request_id in self.pending:
            self.pending[request_id].put(text)

    def begin(self, message: str, session: str, **more: Any) -> str:
        request_id = uuid.uuid4().hex
        self.pending[request_id] = queue.SimpleQueue()
        body = {
            "sessionId": session,
            "message": message,
            "clientId": self.client_id,
            "requestId": request_id,
            "replyTopic": f"{self.project}/assistant_response/{session}/{self.client_id}/{request_id}",
            "temperature": 0.7,
            "topP": 0.9,
            "maxTokens": 200,
        }
        self.send(f"{self.project}/user_input", body | more)
        return request_id

    def answer(self, request_id: str) -> str:
        return self.pending[request_id].get(timeout=20)


class OlderClient(PahoClient):
    """Asks for a session, then sends the plain prompt under it; all at QoS 0."""

    def __init__(self, port: int) -> None:
        super().__init__(port, "llama/session/response", "llama/assistant_response/+", qos=0)
        self.send("llama/session", "hello")
        topic, self.session = self.next()
        assert topic == "llama/session/response"

    def ask(self, prompt: str) -> str:
        self.send(f"llama/user_input/{self.session}", prompt)
        topic, text = self.next()
        assert topic == f"llama/assistant_response/{self.session}"
        return text


Connect = Callable[..., Any]


@pytest.fixture
def connect(mosquitto: Mosquitto) -> Iterator[Connect]:
    clients: list[PahoClient] = []

    def made(kind: type[PahoClient], *arguments: Any) -> PahoClient:
        clients.append(kind(mosquitto.port, *arguments))
        return clients[-1]

    yield made
    for client in clients:
        client.close()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def project(mosquitto: Mosquitto, tmp_path: Path, engine: ScriptedEngine) -> Iterator[LiveWorker]:
    # Names of its own at a broker that is shared.
    settings = recipe("owogpt") | recipe("llama") | {"mqtt__root": f"old-{uuid.uuid4().hex[:8]}"}
    worker = LiveWorker(mosquitto.port, tmp_path, engine, **as_text(settings))
    with worker:
        yield worker


# --- the first family --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("project")
def test_a_game_reads_whole_answers_as_plain_text_and_keeps_its_conversation(
    connect: Connect, engine: ScriptedEngine
) -> None:
    ada, bob = connect(GameClient, "ada"), connect(GameClient, "bob")
    assert (
        ada.ask("go north, w\u00e4hle 'quickly'", temperature=0.5, topP=0.9, maxTokens=50)
        == "go north, w\u00e4hle 'quickly'"
    )
    assert bob.ask("go south") == "go south"
    assert ada.ask("and now?") == "and now?"
    assert [each["content"] for each in engine.calls[-1].messages][-3:] == [
        "go north, w\u00e4hle 'quickly'",
        "go north, w\u00e4hle 'quickly'",
        "and now?",
    ]
    assert ada.ask("x", maxTokens="many") == "maxTokens: expected a whole number of at least 1"
    assert engine.calls[0].sampling["max_tokens"] == 50
    for client in (ada, bob):
        client.nothing_more()


@pytest.mark.usefixtures("project")
def test_what_is_not_json_is_the_message_of_the_default_session(connect: Connect) -> None:
    everybody = connect(GameClient, "default")
    everybody.send("owogpt/user_input", "just a text")
    assert everybody.next() == ("owogpt/assistant_response/default", "just a text")
    everybody.send("owogpt/user_input", {"message": "without a session"})
    assert everybody.next() == ("owogpt/assistant_response/default", "without a session")


@pytest.mark.usefixtures("project")
def test_a_web_backend_gets_each_answer_under_the_id_of_its_request(connect: Connect, engine: ScriptedEngine) -> None:
    portal, watcher = connect(PortalBackend), connect(GameClient, "s1")
    first, second = Gate(), Gate()
    engine.play("the first", first)
    engine.play("the second", second)
    one = portal.begin("one", "s1")
    assert first.reached.wait(10)  # who comes first gets the first script
    two = portal.begin("two", "s2", prompt_template={"content": "Be kind."})
    assert second.reached.wait(10)
    second.open()
    assert portal.answer(two) == "the second"
    first.open()
    assert portal.answer(one) == "the first"
    assert engine.calls[1].messages[0] == {"role": "system", "content": "Be kind."}
    failed = portal.begin("x", "s1", temperature=99)
    assert portal.answer(failed) == "temperature: expected a number from 0 to 5"
    astray = connect(GameClient, "s3")
    portal.begin("x", "s3", replyTopic="owogpt/user_input")
    assert astray.next() == (
        "owogpt/assistant_response/s3",
        "replyTopic: expected a topic below owogpt/assistant_response/ of at most 200 bytes",
    )
    watcher.nothing_more()  # what named its reply topic is told there alone


@pytest.mark.usefixtures("project")
def test_sessions_are_instructed_cleared_and_deleted_on_topics_of_their_own(
    connect: Connect, engine: ScriptedEngine
) -> None:
    def given() -> list[str]:
        return [str(each["content"]) for each in engine.calls[-1].messages]

    ada = connect(GameClient, "ada")
    ada.ask("remember this")
    ada.send("owogpt/template", {"session_id": "ada", "template": {"content": "You are an owl."}})
    assert ada.hint() == "Template updated"
    ada.ask("who are you?")
    assert given() == ["You are an owl.", "who are you?"]
    ada.send("owogpt/clear_history/ada", {})
    assert ada.hint() == "History cleared"
    ada.ask("what was that?")
    assert given() == ["You are an owl.", "what was that?"]
    ada.send("owogpt/delete_session", {"sessionId": "ada"})
    ada.ask("and now?")
    assert given() == ["and now?"]
    ada.send("owogpt/clear_history", {"target": "all"})
    ada.ask("is it still there?")
    assert given() == ["and now?", "and now?", "is it still there?"]


@pytest.mark.usefixtures("project")
def test_signs_of_life_of_these_clients_are_no_concern_of_the_worker(
    connect: Connect, capsys: pytest.CaptureFixture[str]
) -> None:
    ada = connect(GameClient, "ada")
    ada.send("owogpt/status", {"clientId": "c1", "status": "online", "ts": 1})
    ada.send("owogpt/heartbeat/c1", {"ts": 1})
    assert ada.ask("hello") == "hello"
    assert "message.ignored" not in capsys.readouterr().out


# --- the older family --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("project")
def test_older_clients_get_a_session_ask_in_plain_text_and_begin_anew_with_nothing(
    connect: Connect, engine: ScriptedEngine
) -> None:
    client = connect(OlderClient)
    assert len(client.session) == 32
    assert client.ask("hello there") == "hello there"
    assert client.ask("go on") == "go on"
    assert [each["content"] for each in engine.calls[-1].messages] == ["hello there", "hello there", "go on"]
    client.send(f"llama/user_input/{client.session}", "")
    assert client.ask("afresh") == "afresh"
    assert [each["content"] for each in engine.calls[-1].messages] == ["afresh"]
    client.nothing_more()


# --- MQTT 5 and crashes ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("project")
def test_a_text_says_that_it_is_one_to_clients_of_mqtt_5(mosquitto: Mosquitto) -> None:
    seen: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class Five(PahoClient):
        def on_message(self, message: paho.MQTTMessage) -> None:
            seen.put(message.properties)

    five = Five(mosquitto.port, "owogpt/assistant_response/five", protocol=5)
    five.send("owogpt/user_input", {"sessionId": "five", "message": "x"})
    assert seen.get(timeout=20).ContentType == "text/plain; charset=utf-8"
    five.send("owogpt/user_input", {"sessionId": "five", "message": 7})
    assert seen.get(timeout=20).ContentType == "text/plain; charset=utf-8"
    five.close()


@pytest.mark.engine
def test_a_worker_that_is_killed_in_mid_answer_tells_each_client_one_end(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    start_llama_server: Callable[..., LlamaServer],
) -> None:
    broker = start_mosquitto()
    server = start_llama_server(slots=4)
    tokens = {"request": "tokens/in/{session}", "reply": "tokens/out/{session}", "format": "tokens"}
    settings = as_tables(recipe("owogpt")) | {f"routes__tokens__{key}": value for key, value in tokens.items()}
    first = start_worker(broker.port, server.url, **settings)
    text = PahoClient(broker.port, "owogpt/assistant_response/#")
    stream = PahoClient(broker.port, "tokens/out/s1")
    long = {"message": "go on and on", "maxTokens": 400, "requestId": "r1"}
    text.send("owogpt/user_input", {"sessionId": "s1", **long})
    stream.send("tokens/in/s1", {"prompt": "go on and on", "max_tokens": 4000, "request_id": "r2"})
    assert list(json.loads(stream.next()[1])) == ["token"]
    eventually(lambda: server.busy_slots() == 2)
    first.kill()
    text.nothing_more()
    second = start_worker(broker.port, server.url, **settings)
    topic, whole = text.next()
    assert topic == "owogpt/assistant_response/s1"
    assert len(whole) > 100
    assert not whole.startswith("{")
    told = [json.loads(stream.next()[1])]
    while "type" not in told[-1]:
        told.append(json.loads(stream.next()[1]))
    assert (told[-1]["type"], told[-1]["token"]) == ("error", "")
    assert "died in the middle" in told[-1]["error"]
    # Sent again it is answered from the journal; a third life has nothing left to tell.
    text.send("owogpt/user_input", {"sessionId": "s1", **long})
    assert text.next() == (topic, whole)
    second.stop()
    third = start_worker(broker.port, server.url, **settings)
    assert not third.log("journal.recovered")
    for client in (text, stream):
        client.nothing_more()
        client.close()
