"""The corpus of hostile schemas against a real llama.cpp server: what ends it is refused, what is accepted leaves it alive."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.core.errors import EngineLost
from llamacpp_mqtt_deploy.core.json_schema_limits import reference_fault
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.stopping import StopSignal
from tests.support.hostile_schemas import ACCEPTED, KILLERS, REFUSED
from tests.support.llama_server import LlamaServer
from tests.support.whole_worker import bus_in


def _bodies(schema: dict[str, Any]) -> list[dict[str, Any]]:
    basic = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return [
        basic | {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}},
        basic | {"tools": [tool], "tool_choice": "required"},
    ]


def _status(server: LlamaServer, body: dict[str, Any]) -> int | None:
    """The status of the answer; None when the server ended without one."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (http.client.RemoteDisconnected, ConnectionError):
        return None
    finally:
        connection.close()


@pytest.mark.parametrize("name", ACCEPTED)
def test_no_accepted_schema_ends_the_server(llama_server: LlamaServer, name: str) -> None:
    assert reference_fault(ACCEPTED[name]) is None
    for body in _bodies(ACCEPTED[name]):
        assert _status(llama_server, body) in (200, 400, 500)
        assert llama_server.get("/health")[0] == 200


@pytest.mark.parametrize("name", KILLERS)
def test_what_ends_the_server_is_refused(start_llama_server: Callable[..., LlamaServer], name: str) -> None:
    assert reference_fault(KILLERS[name]) is not None
    for body in _bodies(KILLERS[name]):
        assert _status(start_llama_server(), body) is None


def test_a_call_that_ends_the_server_is_sent_once(start_llama_server: Callable[..., LlamaServer]) -> None:
    server = start_llama_server()
    engine = ServerEngine(EngineSettings(url=server.url, unavailable_after_s=30))
    schema = next(iter(KILLERS.values()))
    call = EngineCall(
        messages=[{"role": "user", "content": "Hello"}],
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        once=True,
    )
    waits: list[str] = []
    with pytest.raises(EngineLost):
        list(engine.stream(call, stop=StopSignal(), on_wait=waits.append))
    assert waits == [], "it waits for no other server to end"


def test_who_streams_beside_a_flood_of_hostile_schemas_notices_nothing(
    llama_server: LlamaServer, tmp_path: Path
) -> None:
    with bus_in(tmp_path) as bus:
        bus.worker(ServerEngine(EngineSettings(url=llama_server.url)), limits__queue_size=200)
        bus.ask("Tell me a story", request_id="story", session="neighbour/chat", max_tokens=2000)
        bus.listener.until(type="chunk", request_id="story")
        sent = []
        for number, (name, schema) in enumerate({**REFUSED, **ACCEPTED}.items()):
            for kind, body in enumerate(_bodies(schema)):
                sent.append((f"a{number}-{kind}", name in REFUSED))
                bus.ask("Hello", request_id=sent[-1][0], session=f"attacker/{number}", new=True, **_request(body))
        for request_id, refused in sent:
            end = bus.listener.terminal(request_id, 60)
            assert end.get("code") == "bad_request" if refused else end.get("code") != "engine_lost", end
        assert bus.listener.terminal("story", 60)["type"] == "done"
        bus.listener.read("story")
        bus.ask("And then?", request_id="more", session="neighbour/chat", max_tokens=5)
        assert bus.listener.terminal("more")["type"] == "done"
    assert llama_server.get("/health")[0] == 200


def _request(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != "messages"}
