"""The names that web backends import, against a real mosquitto and a worker that the test plays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from llamacpp_mqtt_deploy.client import AnswerError, BusClient
from llamacpp_mqtt_deploy.client.llm_client import LLMClient, SessionManager
from tests.client.worker import PlayedWorker
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "count one two"}]


def test_chunks_come_as_they_are_generated_and_only_what_was_asked_for_goes_out(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port) as worker, BusClient("127.0.0.1", broker.port) as bus:
        client = LLMClient(bus)
        assert list(client.generate_stream(messages=MESSAGES, temperature=0.7)) == ["count", " one", " two"]
        assert client.generate(MESSAGES, max_tokens=5, model="small") == "count one two"
    first, second = (json.loads(payload) for _, payload in worker.requests)
    assert set(first) == {"request_id", "messages", "temperature"}
    assert (second["model"], second["max_tokens"]) == ("small", 5)


def test_tools_go_along_with_their_choice(broker: Mosquitto) -> None:
    tools = [{"type": "function", "function": {"name": "get_time"}}]
    with PlayedWorker(broker.port) as worker, BusClient("127.0.0.1", broker.port) as bus:
        list(LLMClient(bus).generate_stream(MESSAGES, tools=tools))
    request = json.loads(worker.requests[0][1])
    assert (request["tools"], request["tool_choice"]) == (tools, "auto")


def test_leaving_the_iteration_cancels_on_the_worker(broker: Mosquitto) -> None:
    def hang(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="chunk", seq=0, content="partial")

    with PlayedWorker(broker.port, play=hang) as worker, BusClient("127.0.0.1", broker.port) as bus:
        stream = LLMClient(bus).generate_stream(MESSAGES)
        assert next(stream) == "partial"
        stream.close()  # type: ignore[attr-defined]
        eventually(lambda: worker.controls)
    assert worker.controls[0][1]["action"] == "cancel"


def test_an_error_of_the_worker_is_raised_and_never_looks_like_an_answer(broker: Mosquitto) -> None:
    def refuse(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="error", seq=0, final=True, code="busy", message="Full.", retryable=True)

    with (
        PlayedWorker(broker.port, play=refuse),
        BusClient("127.0.0.1", broker.port) as bus,
        pytest.raises(AnswerError, match="busy"),
    ):
        list(LLMClient(bus).generate_stream(MESSAGES))


def test_a_session_is_the_workers_whatever_a_backend_calls_it(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port) as worker, BusClient("127.0.0.1", broker.port) as bus:
        sessions = SessionManager(LLMClient(bus))
        for name in ("user1-abc123", 7, "a name / with signs"):
            assert (
                "".join(sessions.process_message_stream(name, "hello there", system_prompt="Be kind.")) == "hello there"
            )
        assert sessions.process_message("user1-abc123", "again") == "again"
        sessions.clear_session("user1-abc123")
        first = bus.session.partition("/")[0]
    paths = [session for session, _ in worker.requests]
    assert paths[:2] == [f"{first}/user1-abc123", f"{first}/7"]
    assert paths[2].startswith(f"{first}/s-")
    assert paths[3] == paths[0]
    assert worker.controls[0] == (paths[0], worker.controls[0][1])
    assert worker.controls[0][1]["action"] == "reset"


def test_the_client_of_the_process_is_made_once_from_the_configuration(broker: Mosquitto) -> None:
    script = """
from llamacpp_mqtt_deploy.client.llm_client import get_llm_client, get_session_manager
assert get_llm_client() is get_llm_client()
print("".join(get_llm_client().generate_stream([{"role": "user", "content": "from the environment"}])))
print("".join(get_session_manager().process_message_stream("s", "of a session")))
"""
    environment = os.environ | {
        "LMD_MQTT__PORT": str(broker.port),
        "LMD_MQTT__HOST": "127.0.0.1",
        "LMD_CONFIG": os.devnull,
    }
    with PlayedWorker(broker.port):
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env=environment
        )
    assert result.stdout == "from the environment\nof a session\n"
