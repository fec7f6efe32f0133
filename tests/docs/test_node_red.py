"""The flow for Node-RED can be imported, and its function nodes stream an answer, fill holes, cancel and tell errors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.requests import RequestPolicy, parse_control
from tests.docs.pages import ROOT
from tests.support.parsing import parse_request
from tests.support.services import require_program

FLOW = json.loads((ROOT / "docs" / "node-red.json").read_text("utf-8"))
WHOLE = "The sea says little, größer 🌊"
PIECES = ("The sea", " says", " little, ", "größer", " 🌊")


def writer() -> EventWriter:
    """The harness puts the request's own id in the place of this one."""
    return EventWriter(request_id="REQUEST-ID", session_id="nodered", max_bytes=100_000)


def answer(**end: Any) -> list[dict[str, Any]]:
    """queued, start, five chunks, done."""
    events = writer()
    encoded = [events.queued(position=1, reason="waiting"), events.start({"worker": "w", "created": 1})]
    for piece in PIECES:
        encoded += events.chunks("content", piece)
    encoded.append(events.done({"full_content": WHOLE, "finish_reason": "stop", "dropped_messages": 0} | end))
    return [orjson.loads(event) for event in encoded]


def without_its_text(done: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in done.items() if name != "full_content"} | {"content_omitted": True}


def run(*steps: dict[str, Any]) -> dict[str, Any]:
    """What the flow published and showed."""
    result = subprocess.run(
        [require_program("node"), str(Path(__file__).with_name("node_red.js"))],
        input=json.dumps({"flow": FLOW, "steps": steps}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


ASK = {"press": "ask"}


def streamed(outcome: dict[str, Any]) -> str:
    return "".join(piece["payload"] for piece in outcome["shown"].get("as it comes", []))


def test_the_flow_can_be_imported() -> None:
    nodes = {node["id"]: node for node in FLOW}
    assert len(nodes) == len(FLOW), "ids are unique"
    for node in FLOW:
        assert node["type"] in {"tab", "mqtt-broker", "inject", "function", "mqtt out", "mqtt in", "debug"}, (
            "core nodes"
        )
        assert node.get("z", "lmd-tab") == "lmd-tab"
        assert node.get("broker") in {None, "localhost", "lmd-broker"}
        assert all(target in nodes for wires in node.get("wires", []) for target in wires)
        if node["type"] == "function":
            assert len(node["wires"]) == node["outputs"]


def test_the_flow_publishes_a_request_that_is_one() -> None:
    outcome = run(ASK)
    (sent,) = outcome["published"]
    assert (sent["topic"], sent["qos"], sent["retain"]) == ("llm/request/nodered", "1", "false")
    request = parse_request(sent["payload"].encode(), policy=RequestPolicy())
    assert request is not None
    assert request.warnings == ()


def test_the_flow_streams_an_answer_and_passes_on_the_whole() -> None:
    events = answer()
    stranger = {**events[2], "request_id": "other"}
    twice = [event for event in events for _ in range(2)]
    outcome = run(ASK, {"receive": [stranger, *twice, *events]}, {"wait": 120})
    assert streamed(outcome) == WHOLE
    (whole,) = outcome["shown"]["answer"]
    assert (whole["payload"], whole["complete"], whole["finish_reason"]) == (WHOLE, True, "stop")
    assert len(outcome["published"]) == 1
    assert "error" not in outcome["shown"]


def test_the_flow_asks_again_after_a_hole_and_goes_on_from_the_snapshot() -> None:
    events = answer()
    snapshot = {"type": "snapshot", "request_id": "REQUEST-ID", "content": "".join(PIECES[:4]), "next_seq": 4}
    outcome = run(
        ASK,
        {"receive": [*events[:3], events[5]], "wait": 3},
        {"receive": [snapshot, events[6]], "wait": 10},
        {"receive": [without_its_text(events[7])]},
    )
    first, again = outcome["published"]
    assert first == again
    assert streamed(outcome) == WHOLE
    assert [whole["complete"] for whole in outcome["shown"]["answer"]] == [True]


def test_the_flow_asks_again_after_three_heartbeats_of_silence() -> None:
    assert len(run(ASK, {"wait": 44})["published"]) == 1
    outcome = run(ASK, {"wait": 46}, {"receive": answer()[-1:]})
    assert len(outcome["published"]) == 2
    assert outcome["published"][0] == outcome["published"][1]
    assert streamed(outcome) == WHOLE


def test_the_flow_says_when_an_answer_is_incomplete() -> None:
    events = answer()
    outcome = run(ASK, {"receive": [*events[:4], *events[5:7], without_its_text(events[7])]})
    (whole,) = outcome["shown"]["answer"]
    assert (whole["payload"], whole["complete"]) == ("The sea says", False)
    assert outcome["status"][-1] == "incomplete"
    omitted = {"type": "snapshot", "request_id": "REQUEST-ID", "content": "", "next_seq": 4, "content_omitted": True}
    outcome = run(ASK, {"receive": [*events[:3], events[5], omitted, events[6], without_its_text(events[7])]})
    assert [whole["complete"] for whole in outcome["shown"]["answer"]] == [False]


def test_the_stop_button_of_the_flow_cancels_the_running_answer() -> None:
    events = answer(full_content="The sea says", finish_reason="cancelled")
    outcome = run(ASK, {"receive": events[:4]}, {"press": "stop"}, {"receive": events[7:]}, {"press": "stop"})
    request, cancel = outcome["published"]
    assert cancel["topic"] == "llm/control/nodered"
    parse_control(cancel["payload"].encode())
    told = json.loads(cancel["payload"])
    assert told == {"action": "cancel", "request_id": json.loads(request["payload"])["request_id"]}
    (whole,) = outcome["shown"]["answer"]
    assert (whole["payload"], whole["finish_reason"]) == ("The sea says", "cancelled")


def test_the_flow_shows_an_error_with_the_text_so_far() -> None:
    events = writer()
    encoded = [events.start({"worker": "w", "created": 1}), *events.chunks("content", "The sea")]
    details = {"partial_content": "The sea"}
    encoded.append(events.error(code="engine_lost", message="the engine went away", retryable=True, details=details))
    outcome = run(ASK, {"receive": [orjson.loads(event) for event in encoded]}, {"wait": 120})
    (error,) = outcome["shown"]["error"]
    assert (error["payload"], error["text"]) == ("engine_lost: the engine went away", "The sea")
    assert "answer" not in outcome["shown"]
    assert len(outcome["published"]) == 1
