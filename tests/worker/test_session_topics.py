"""Clients that were there before this worker change their sessions on topics of their own, and nobody else's."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker

PROJECT: dict[str, Any] = {
    "request": "{name}/user_input",
    "reply": "{name}/answers/{session}",
    "trust_payload_session": True,
    "default_session": "default",
    "format": "text",
    "fields": {"prompt": "message", "session_id": "sessionId"},
    "system_prompt": "You are the route's.",
    "reset_topic": "{name}/clear_history",
    "delete_topic": "{name}/delete_session",
    "system_prompt_topic": "{name}/template",
    "hint_topic": "{name}/hint/{session}",
    "session_topic": "{name}/session",
    "session_reply_topic": "{name}/session/response",
}


def project(name: str = "owo", **more: Any) -> dict[str, Any]:
    route = {
        key: value.replace("{name}", name) if isinstance(value, str) else value
        for key, value in (PROJECT | more).items()
    }
    return {f"routes__{name}__{key}": value for key, value in route.items()}


class Chat:
    """Clients of these projects, and what each call of the engine was given."""

    def __init__(self, bus: Bus, **settings: Any) -> None:
        self.bus = bus
        self.engine = ScriptedEngine()
        self.settings = settings
        self.worker = self.start()

    def start(self) -> WholeWorker:
        return self.bus.worker(self.engine, **self.settings)

    def say(self, topic: str, body: Any = b"") -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.bus.sender.publish(topic, payload)

    def heard(self, topic: str) -> list[str]:
        while self.bus.listener.pull(0.0) is not None:
            pass
        return [each.payload.decode() for each in self.bus.listener.deliveries if each.topic == topic]

    def ask(self, message: str, session: str = "s1", name: str = "owo") -> list[dict[str, Any]]:
        """Ask, wait for the answer, and give the messages that the engine got for it."""
        before = len(self.heard(f"{name}/answers/{session}"))
        self.say(f"{name}/user_input", {"sessionId": session, "message": message})
        eventually(lambda: len(self.heard(f"{name}/answers/{session}")) > before)
        return [dict(each) for each in self.engine.calls[-1].messages]

    def hint(self, words: str, session: str = "s1", name: str = "owo", count: int = 1) -> None:
        eventually(
            lambda: (
                self.heard(f"{name}/hint/{session}").count(json.dumps({"hint": words}, separators=(",", ":"))) == count
            )
        )

    def system_prompt(self, session: str = "s1", name: str = "owo") -> str:
        return str(self.ask("who are you?", session, name)[0]["content"])


def texts(messages: list[dict[str, Any]]) -> list[str]:
    return [str(each["content"]) for each in messages if each["role"] != "system"]


# --- one session -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "topic, body",
    [
        ("owo/clear_history/s1", b""),
        ("owo/clear_history", {"sessionId": "s1"}),
        ("owo/clear_history", {"target": "s1"}),
        ("owo/delete_session/s1", b""),
        ("owo/delete_session", {"session_id": "s1"}),
    ],
)
def test_a_session_is_forgotten_and_no_other(bus: Bus, topic: str, body: Any) -> None:
    chat = Chat(bus, **project(), **project("maze"))
    for session, name in (("s1", "owo"), ("s2", "owo"), ("s1", "maze")):
        chat.ask("remember this", session, name)
    chat.say(topic, body)
    assert texts(chat.ask("what?")) == ["what?"]
    assert texts(chat.ask("what?", "s2")) == ["remember this", "remember this", "what?"]
    assert texts(chat.ask("what?", "s1", "maze")) == ["remember this", "remember this", "what?"]
    if "clear" in topic:
        chat.hint("History cleared")
    else:
        assert chat.heard("owo/hint/s1") == []


@pytest.mark.parametrize(
    "topic, body",
    [
        ("owo/template/s1", {"template": "You are new."}),
        ("owo/template", {"template": {"content": "You are new."}, "session_id": "s1"}),
        ("owo/template", {"sessionId": "s1", "prompt_template": "You are new."}),
        ("owo/template/s1", b"You are new."),
    ],
)
def test_a_session_takes_a_new_system_prompt_and_begins_anew(bus: Bus, topic: str, body: Any) -> None:
    chat = Chat(bus, **project())
    chat.ask("remember this")
    chat.say(topic, body)
    asked = chat.ask("who are you?")
    assert [each["content"] for each in asked] == ["You are new.", "who are you?"]
    chat.hint("Template updated")
    assert chat.system_prompt("s2") == "You are the route's."


def test_a_new_system_prompt_may_leave_the_history(bus: Bus) -> None:
    chat = Chat(bus, **project())
    gate = Gate()
    chat.engine.play("I ", gate, "will")
    chat.say("owo/user_input", {"sessionId": "s1", "message": "remember this"})
    assert gate.reached.wait(10)
    chat.say("owo/template/s1", {"template": "You are new.", "reset": False})
    chat.hint("Template updated")
    gate.open()
    eventually(lambda: chat.heard("owo/answers/s1") == ["I will"])
    asked = chat.ask("who are you?")
    assert [each["content"] for each in asked] == ["You are new.", "remember this", "I will", "who are you?"]


def test_the_system_prompt_of_a_session_outlives_the_worker_and_a_reset_but_not_the_session(bus: Bus) -> None:
    chat = Chat(bus, **project())
    chat.say("owo/template/s1", {"template": "You are new."})
    chat.hint("Template updated")
    chat.worker.stop()
    chat.start()
    assert chat.system_prompt() == "You are new."
    chat.say("owo/clear_history/s1")
    chat.hint("History cleared")
    assert chat.system_prompt() == "You are new."
    chat.say("owo/delete_session/s1")
    assert chat.system_prompt() == "You are the route's."


def test_a_request_that_brings_its_own_system_prompt_goes_before_the_sessions(bus: Bus) -> None:
    chat = Chat(
        bus, **project(fields=PROJECT["fields"] | {"system_prompt": ["systemPrompt", "prompt_template.content"]})
    )
    chat.say("owo/template/s1", {"template": "You are new."})
    chat.say("owo/user_input", {"sessionId": "s1", "message": "x", "prompt_template": {"content": "You are mine."}})
    eventually(lambda: chat.heard("owo/answers/s1") == ["x"])
    assert chat.engine.calls[-1].messages[0]["content"] == "You are mine."


def test_a_reset_ends_what_runs_and_leaves_no_half_answer_behind(bus: Bus) -> None:
    chat = Chat(bus, **project())
    gate = Gate()
    chat.engine.play("half", gate)
    chat.say("owo/user_input", {"sessionId": "s1", "message": "go on and on"})
    assert gate.reached.wait(10)
    chat.say("owo/clear_history/s1")
    chat.hint("History cleared")
    eventually(lambda: len(chat.heard("owo/answers/s1")) == 1)
    assert "cancelled" in chat.heard("owo/answers/s1")[0]
    assert texts(chat.ask("what?")) == ["what?"]


@pytest.mark.parametrize("body", [{"template": 7}, b'{"template":', {}, {"template": "x", "reset": "no"}])
def test_what_cannot_be_understood_changes_nothing_and_says_so(bus: Bus, body: Any) -> None:
    chat = Chat(bus, **project())
    chat.ask("remember this")
    chat.say("owo/template/s1", body)
    eventually(lambda: len(chat.heard("owo/hint/s1")) == 1)
    assert "expected" in json.loads(chat.heard("owo/hint/s1")[0])["hint"] or "JSON" in chat.heard("owo/hint/s1")[0]
    assert len(texts(chat.ask("what?"))) == 3


# --- all sessions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", {}, {"target": "all"}, b"all"])
def test_all_sessions_of_a_project_are_left_alone_unless_the_route_allows_it(
    bus: Bus, body: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(bus, **project())
    chat.ask("remember this")
    for topic in ("owo/clear_history", "owo/delete_session"):
        chat.say(topic, body)
    chat.say("owo/clear_history/other")
    chat.hint("History cleared", "other")
    assert len(texts(chat.ask("what?"))) == 3
    assert "allow_all_sessions" in capsys.readouterr().out


def test_all_sessions_of_a_project_are_changed_in_pieces_and_no_other_projects(bus: Bus) -> None:
    chat = Chat(bus, **project(allow_all_sessions=True), **project("maze"))
    store = chat.worker.daemon.parts.store
    assert isinstance(store, SqliteStore)
    for number in range(40):
        # Every second one under a clock that was years ahead.
        store.set_system_prompt(("owo", f"s{number:02}"), "old", now=4e9 if number % 2 else 1.0, reset=True)
    store.set_system_prompt(("maze", "s1"), "old", now=1.0, reset=True)
    gate = Gate()
    chat.engine.play(gate)
    chat.say("owo/user_input", {"sessionId": "busy", "message": "go on and on"})
    assert gate.reached.wait(10)
    chat.say("owo/template", {"template": "You are new."})
    for number in range(40):
        chat.hint("Template updated", f"s{number:02}")
    chat.hint("Template updated", "busy")
    assert store.system_prompt(("owo", "s07")) == store.system_prompt(("owo", "busy")) == "You are new."
    assert store.system_prompt(("maze", "s1")) == "old"
    chat.say("owo/delete_session", {"target": "all"})
    eventually(lambda: store.sessions("owo", up_to=store.newest_session(), most=9) == ())
    assert chat.system_prompt("s07") == "You are the route's."
    assert store.system_prompt(("maze", "s1")) == "old"


# --- new sessions ------------------------------------------------------------------------------------------------------


def test_a_new_session_is_told_as_plain_text_and_each_time_another(bus: Bus) -> None:
    chat = Chat(bus, **project())
    for payload in (b"", b"hello", b"{"):
        chat.say("owo/session", payload)
    eventually(lambda: len(chat.heard("owo/session/response")) == 3)
    sessions = chat.heard("owo/session/response")
    assert len(set(sessions)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{32}", session) for session in sessions)
    assert texts(chat.ask("hello", sessions[0])) == ["hello"]


def test_new_sessions_and_changes_count_against_the_rate_of_the_project(bus: Bus) -> None:
    chat = Chat(bus, **project(), **project("maze"), limits__max_requests_per_minute=3)
    for _ in range(9):
        chat.say("owo/session")
    chat.say("owo/clear_history/s1")
    eventually(lambda: len(chat.heard("owo/hint/s1")) == 1)
    assert "minute" in chat.heard("owo/hint/s1")[0]
    assert len(chat.heard("owo/session/response")) == 3
    chat.say("maze/session")
    eventually(lambda: len(chat.heard("maze/session/response")) == 1)


# --- empty messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [b"", b" \n", b"\xef\xbb\xbf"])
def test_an_empty_message_resets_the_session_where_the_route_says_so(bus: Bus, empty: bytes) -> None:
    older: dict[str, Any] = {
        "request": "{name}/user_input/{session}",
        "trust_payload_session": False,
        "default_session": None,
        "empty_payload": "reset",
        "reset_topic": None,
    }
    settings = {
        key: value
        for key, value in project(**older).items()
        if value is not None and key.rpartition("__")[2] not in ("delete_topic", "system_prompt_topic")
    }
    chat = Chat(bus, **settings)
    for text in (b"remember this", empty, b"what?"):
        chat.say("owo/user_input/s1", text)
    eventually(lambda: len(chat.heard("owo/answers/s1")) == 2)
    chat.hint("History cleared")
    assert texts([dict(each) for each in chat.engine.calls[-1].messages]) == ["what?"]


def test_an_empty_message_is_a_mistake_where_the_route_says_so(bus: Bus) -> None:
    chat = Chat(bus, **project(empty_payload="error"))
    chat.say("owo/user_input")
    eventually(lambda: len(chat.heard("owo/answers/default")) == 1)
    assert "it is empty" in chat.heard("owo/answers/default")[0]


def test_an_empty_message_is_ignored_where_the_route_says_nothing(bus: Bus) -> None:
    chat = Chat(bus, **project())
    chat.ask("remember this", "default")
    chat.say("owo/user_input")
    assert len(texts(chat.ask("what?", "default"))) == 3
    assert len(chat.heard("owo/answers/default")) == 2


# --- a template for payloads ---------------------------------------------------------------------------------------------


def test_a_state_of_a_game_becomes_a_prompt_of_its_session(bus: Bus) -> None:
    template: dict[str, Any] = {
        "prompt_template": "{hero} sees {view}. What now?",
        "prompt_template_topic": "{name}/state",
        "prompt_defaults": {"hero": "The hero"},
    }
    chat = Chat(bus, **project(**template))
    chat.ask("Hello")
    chat.say("owo/state", {"sessionId": "s1", "view": {"exits": ["north"]}, "temperature": "cold"})
    eventually(lambda: len(chat.heard("owo/answers/s1")) == 2)
    assert chat.heard("owo/answers/s1")[1] == 'The hero sees {"exits":["north"]}. What now?'
    assert texts(chat.ask("and then?"))[2] == 'The hero sees {"exits":["north"]}. What now?'
    chat.say("owo/state", {"sessionId": "s1"})
    eventually(lambda: chat.heard("owo/answers/s1")[-1] == "view: expected a value; it is missing")
    chat.say("owo/state", b"just a text")
    eventually(lambda: "a JSON object with hero, view" in "".join(chat.heard("owo/answers/default")))


def test_a_state_that_waited_when_the_worker_died_is_told_after_the_restart(bus: Bus) -> None:
    key = EntryKey("owo", "s1", "r1")
    store = SqliteStore(bus.state / "state.db")
    store.open()
    entry = Entry(
        key=key,
        topic="owo/state",
        payload=b'{"sessionId":"s1","view":"a gate"}',
        digest="d",
        reply_topic="owo/answers/s1",
    )
    store.accept([entry])
    store.close()
    chat = Chat(bus, **project(prompt_template="You see {view}.", prompt_template_topic="{name}/state"))
    eventually(lambda: chat.heard("owo/answers/s1") == ["You see a gate."])


def test_no_bytes_on_these_topics_disturb_the_worker(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(9)
    template = {"prompt_template": "{hero} sees {view}.", "prompt_template_topic": "{name}/state"}
    chat = Chat(bus, **project(allow_all_sessions=True, allow_reply_topic=True, **template))
    topics = ["user_input", "state", "template", "template/s1", "clear_history", "delete_session/a/b", "session"]
    values: list[Any] = [
        None,
        True,
        -1,
        2**63,
        "",
        "all",
        "s1",
        "+/#",
        "\ud800",
        "x" * 20000,
        [],
        {"content": "x"},
        {"a": {}},
    ]
    names = [
        "sessionId",
        "message",
        "template",
        "reset",
        "target",
        "reply_topic",
        "client_id",
        "hero",
        "view",
        "prompt",
    ]
    for number in range(400):
        body = {chance.choice(names): chance.choice(values) for _ in range(chance.randint(0, 4))}
        payload = json.dumps(body).encode()
        if number % 3 == 0:
            cut = chance.randint(0, len(payload))
            payload = payload[:cut] + chance.randbytes(chance.randint(0, 6)) + payload[cut + 2 :]
        chat.say(f"owo/{chance.choice(topics)}", payload)
    chat.say("owo/user_input", {"sessionId": "last", "message": "are you well?"})
    eventually(lambda: chat.heard("owo/answers/last")[-1:] == ["are you well?"], 30.0)
    assert not re.search(r"intake.failed|client_work.failed|Traceback", capsys.readouterr().out)
