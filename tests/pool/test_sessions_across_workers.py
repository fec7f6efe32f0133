"""Topics of routes that change sessions, in a pool: whichever worker is told, the session is changed wherever it is, and once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.pool.fleet import Fleet, PooledWorker, fleet_on
from tests.pool.route_clients import RouteClients
from tests.support.mosquitto import Mosquitto
from tests.support.postgres_server import PostgresServer
from tests.support.waiting import eventually

PROJECT: dict[str, Any] = {
    "request": "{base}/ask",
    "reply": "{base}/answers/{session}",
    "trust_payload_session": True,
    "default_session": "default",
    "allow_reply_topic": True,
    "allow_all_sessions": True,
    "empty_payload": "reset",
    "format": "text",
    "fields": {"prompt": "message", "session_id": "sessionId", "request_id": "requestId", "reply_topic": "replyTopic"},
    "system_prompt": "You are the route's.",
    "reset_topic": "{base}/clear",
    "delete_topic": "{base}/delete",
    "system_prompt_topic": "{base}/template",
    "hint_topic": "{base}/hint/{session}",
    "session_topic": "{base}/session",
    "session_reply_topic": "{base}/session/response",
}
CLEARED, UPDATED = b'{"hint":"History cleared"}', b'{"hint":"Template updated"}'


class Project:
    """Two workers, and clients of the project `owo`. Messages go to one worker and the other in turn."""

    def __init__(self, fleet: Fleet, clients: RouteClients) -> None:
        self.fleet, self.clients = fleet, clients
        settings = clients.route("owo", **PROJECT)
        self.workers = [fleet.worker(engine=ScriptedEngine(slots=2), **settings) for _ in range(2)]

    def say(self, topic: str, body: Any = b"") -> None:
        self.clients.say(topic, body)

    def begin(self, message: str, session: str = "s1", **more: Any) -> None:
        self.say("ask", {"sessionId": session, "message": message} | more)

    def ask(self, message: str, session: str = "s1") -> list[str]:
        """Ask, wait for the answer, and give what an engine got for it."""
        before = len(self.clients.heard(f"answers/{session}"))
        calls = {worker.name: len(worker.engine.calls) for worker in self.workers}
        self.begin(message, session)
        self.clients.wait_for(before + 1, f"answers/{session}")
        (ran,) = [worker for worker in self.workers if len(worker.engine.calls) > calls[worker.name]]
        return [str(each["content"]) for each in ran.engine.calls[-1].messages]

    def hear(self, hint: bytes, count: int, session: str = "s1") -> None:
        """So many of this hint, and no other."""
        assert self.clients.wait_for(count, f"hint/{session}") == [hint] * count

    def hold(self, session: str, *said: str) -> tuple[PooledWorker, Gate]:
        """Begin an answer that stands in the middle; which worker writes it."""
        gate = Gate()
        before = {worker.name: len(worker.engine.calls) for worker in self.workers}
        for worker in self.workers:
            worker.engine.play("half ", gate, "and half")
        self.begin("go on and on", session)
        assert gate.reached.wait(10)
        (ran,) = [worker for worker in self.workers if len(worker.engine.calls) > before[worker.name]]
        for worker in self.workers:
            worker.engine._played.clear()
        return ran, gate


@pytest.fixture
def project(mosquitto: Mosquitto, postgres: PostgresServer) -> Iterator[Project]:
    with fleet_on(mosquitto, postgres.url) as fleet:
        clients = RouteClients(mosquitto, fleet)
        yield Project(fleet, clients)
        clients.close()


def test_a_session_is_forgotten_whichever_worker_is_told_so(project: Project) -> None:
    for number, topic in enumerate(["clear/s1", "clear/s1", "delete/s1", "delete/s1"], start=1):
        for session in ("s1", "s2"):
            project.ask(f"remember {number}", session)
        project.say(topic)
        if topic.startswith("clear"):
            project.hear(CLEARED, number)
        else:
            eventually(partial(_is_gone, project, "s1"))
        assert project.ask("what?") == ["You are the route's.", "what?"]
    assert [text for text in project.ask("what?", "s2") if text.startswith("remember")] == [
        text for number in range(1, 5) for text in (f"remember {number}",) * 2
    ]
    project.say("ask", b"")  # resets the session of those who name none
    project.hear(CLEARED, 1, "default")


def _is_gone(project: Project, session: str) -> bool:
    store: Any = project.workers[0].daemon.parts.store
    return session not in [name for _, name in store.sessions("owo", up_to=store.newest_session(), most=9)]


def test_a_reset_ends_an_answer_that_another_worker_writes_and_leaves_nothing_of_it(project: Project) -> None:
    for count in range(1, 5):  # some of them are told to the worker that writes the answer, some to the other one
        _, gate = project.hold("s1")
        project.say("clear", {"sessionId": "s1"})
        answers = project.clients.wait_for(2 * count - 1, "answers/s1")
        assert b"cancel" in answers[-1]
        project.hear(CLEARED, count)
        gate.open()
        assert project.ask("what?") == ["You are the route's.", "what?"]
    assert project.clients.heard("answers/s1")[1::2] == [b"what?"] * 4


def test_a_system_prompt_holds_at_all_workers_whichever_took_it(project: Project) -> None:
    for count in range(1, 5):
        project.say("template/s1", {"template": f"You are number {count}."})
        project.hear(UPDATED, count)
        for turn in range(2):
            assert project.ask(f"who are you? {turn}")[0] == f"You are number {count}."
        assert project.ask("and you?", "s2")[0] == "You are the route's."
    project.say("delete/s1")
    eventually(lambda: _is_gone(project, "s1"))
    assert project.ask("who are you?") == ["You are the route's.", "who are you?"]


def test_each_new_session_is_told_once(project: Project) -> None:
    for _ in range(6):
        project.say("session", b"hello")
    sessions = project.clients.wait_for(6, "session/response")
    assert project.ask("hello", sessions[0].decode()) == ["You are the route's.", "hello"]
    assert len(set(project.clients.heard("session/response"))) == len(project.clients.heard("session/response")) == 6


def test_answers_go_where_their_payloads_say_whichever_worker_writes_them(project: Project) -> None:
    base = project.clients.base
    for number in range(6):
        place = f"answers/s{number}/web/r{number}"
        project.begin(f"question {number}", f"s{number}", requestId=f"r{number}", replyTopic=f"{base}/{place}")
    for number in range(6):
        assert project.clients.wait_for(1, f"answers/s{number}/web/r{number}") == [f"question {number}".encode()]
    project.begin("to somebody else", "s9", replyTopic=f"{base}/elsewhere/s9")
    (refusal,) = project.clients.wait_for(1, "answers/s9")
    assert b"replyTopic" in refusal
    assert "elsewhere/s9" not in project.clients.topics()


def _refuse(*_args: Any, **_fields: Any) -> None:
    raise StoreError("The database refuses this.")


def test_all_sessions_are_changed_also_those_that_another_worker_has_only_begun(project: Project) -> None:
    for session in ("s1", "s2"):
        project.ask("remember this", session)
    held = [project.hold(f"new{number}") for number in range(4)]  # all slots of both workers
    project.begin("wait", "waiting")
    store: Any = project.workers[0].daemon.parts.store
    eventually(lambda: store.load().queued["normal"] == 1)
    project.say("template", {"template": "You are new.", "session_id": "all"})
    begun = [f"new{number}" for number in range(4)]
    for session in ("s1", "s2", *begun, "waiting"):
        project.hear(UPDATED, 1, session)
    for session in begun:
        assert b"cancel" in project.clients.wait_for(1, f"answers/{session}")[0]
    project.clients.wait_for(1, "answers/waiting")  # it was ended, or had the slot of one that was
    for _, gate in held:
        gate.open()
    for session in ("s1", "s2", *begun, "waiting"):
        assert project.ask("who are you?", session) == ["You are new.", "who are you?"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"running_in": lambda _session: 1}, b"has not ended yet"),
        ({"cancel": _refuse}, b"cannot be read or written"),
    ],
)
def test_a_session_that_could_not_be_changed_hears_why(
    project: Project, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: bytes
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.pooled.pooled_sessions._ENDED_WITHIN_S", 0.1)
    project.ask("remember this")
    for worker in project.workers:
        for name, instead in change.items():
            monkeypatch.setattr(worker.daemon.parts.store, name, instead)
    project.say("clear/s1")
    (hint,) = project.clients.wait_for(1, "hint/s1")
    assert words in hint


# --- a route of its own that speaks the protocol -------------------------------------------------------------------------


def test_a_route_with_topics_of_its_own_has_its_controls_at_all_workers(
    mosquitto: Mosquitto, postgres: PostgresServer
) -> None:
    with fleet_on(mosquitto, postgres.url) as fleet:
        clients = RouteClients(mosquitto, fleet)
        try:
            maze = clients.route(
                "maze",
                request="{base}/ask/{session}",
                reply="{base}/say/{session}",
                control="{base}/do/{session}",
            )
            workers = [fleet.worker(engine=ScriptedEngine(slots=1), **maze) for _ in range(2)]
            _controls_of_a_route(clients, workers)
        finally:
            clients.close()


def _controls_of_a_route(clients: RouteClients, workers: list[PooledWorker]) -> None:
    def acks(action: str, **wanted: Any) -> list[dict[str, Any]]:
        events = [json.loads(payload) for payload in clients.heard("say/ada")]
        found = [event for event in events if event["type"] == "ack" and event["action"] == action]
        return [event for event in found if wanted.items() <= event.items()]

    def ends() -> list[dict[str, Any]]:
        return [event for event in map(json.loads, clients.heard("say/ada")) if event.get("final")]

    for round_ in range(1, 3):
        clients.say("ask/ada", {"prompt": "one two"})
        eventually(partial(lambda number: len(ends()) == number, 2 * round_ - 1))
        gate = Gate()
        for worker in workers:
            worker.engine.play("half ", gate, "and half")
        clients.say("ask/ada", {"prompt": "go on", "request_id": f"long{round_}"})
        assert gate.reached.wait(10)
        clients.say("do/ada", {"action": "cancel", "request_id": f"long{round_}"})
        eventually(partial(lambda number: len(ends()) == number, 2 * round_))
        assert ends()[-1]["finish_reason"] == "cancelled"
        gate.open()
        for worker in workers:
            worker.engine._played.clear()
        for number in range(2):
            clients.say("do/ada", {"action": "history", "transaction": f"h{round_}{number}"})
            eventually(partial(lambda name: acks("history", transaction=name), f"h{round_}{number}"))
            (ack,) = acks("history", transaction=f"h{round_}{number}")
            assert [m["content"] for m in ack["messages"]][:2] == ["one two", "one two"]
        action = ("reset", "delete")[round_ - 1]
        clients.say("do/ada", {"action": action, "transaction": action})
        eventually(partial(acks, action, transaction=action, status="ok"))
        clients.say("do/ada", {"action": "history", "transaction": f"after{round_}"})
        eventually(partial(acks, "history", transaction=f"after{round_}"))
        assert acks("history", transaction=f"after{round_}")[0]["messages"] == []
    assert all(event["session_id"] == "ada" for event in ends())
