"""What applies to a request: what its route says, else what the worker says."""

from __future__ import annotations

from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.worker.policies import InForce, Policies, RoutePolicy, queue_limits, topic_map

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def _route(route: dict[str, Any] | None = None, **sections: Any) -> RoutePolicy:
    settings = Settings(routes={} if route is None else {"default": route}, **sections)
    return Policies.of(settings).routes["default"]


def test_a_route_takes_what_the_worker_says_where_it_says_nothing() -> None:
    worker = {"system_prompt": "Be brief.", "thinking": True, "thinking_budget": 9, "temperature": 0.5, "timeout_s": 20}
    policy = _route(generation=worker, streaming={"mode": "simulated"}, engine={"model": "m"})
    assert (policy.system_prompt, policy.thinking, policy.thinking_budget) == ("Be brief.", True, 9)
    assert policy.sampling == {"temperature": 0.5, "max_tokens": 1024}
    assert (policy.mode, policy.model, policy.parse.default_timeout_s) == ("simulated", "m", 20.0)


def test_what_a_route_says_wins_also_when_it_says_no_or_nothing_at_all() -> None:
    worker = {"system_prompt": "Be brief.", "thinking": True, "thinking_budget": 9, "temperature": 0.5, "timeout_s": 20}
    route = {"system_prompt": "", "thinking": False, "thinking_budget": 0, "temperature": 0.0, "timeout_s": 5}
    policy = _route(
        route | {"mode": "off", "model": "own", "stop": ["a", "b"], "tools": [TOOL]},
        generation=worker,
        engine={"model": "m"},
    )
    assert (policy.system_prompt, policy.thinking, policy.thinking_budget) == ("", False, 0)
    assert policy.sampling == {"temperature": 0.0, "max_tokens": 1024, "stop": ["a", "b"]}
    assert (policy.mode, policy.model, policy.parse.default_timeout_s) == ("off", "own", 5.0)
    assert (policy.tools, policy.parse.tool_names) == ((TOOL,), ("look",))


def test_no_request_gets_more_time_by_default_than_it_may_ask_for() -> None:
    policy = _route(generation={"timeout_s": 500}, limits={"max_timeout_s": 60})
    assert (policy.parse.default_timeout_s, policy.parse.max_timeout_s) == (60.0, 60.0)


def test_requests_may_name_the_models_of_the_settings_and_of_the_engine_each_once() -> None:
    settings = Settings(
        engine={"model": "a", "models": ["b", "a"], "aliases": {"gpt": "a"}}, routes={"default": {"model": "c"}}
    )
    parse = Policies.of(settings, engine_models=("d", "b")).routes["default"].parse
    assert parse.models == ("a", "b", "c", "d")
    assert parse.aliases == {"gpt": "a"}
    assert _route().parse.models is None, "an engine that names none decides for itself"


def test_what_a_route_forbids_is_forbidden_and_everything_else_is_not() -> None:
    names = ("allow_system_prompt", "allow_messages", "allow_tools")
    for forbidden in names:
        parse = _route({forbidden: False}).parse
        assert [getattr(parse, name) for name in names] == [name != forbidden for name in names]


def test_lanes_and_limits_reach_the_reading_of_a_request() -> None:
    parse = _route(
        {"default_priority": "batch", "max_priority": "interactive", "fields": {"prompt": "message"}},
        limits={"max_tokens": 77, "max_request_bytes": 512},
    ).parse
    assert (parse.default_priority, parse.max_priority) == ("batch", "interactive")
    assert (parse.max_tokens, parse.max_request_bytes, dict(parse.fields)) == (77, 512, {"prompt": "message"})


def test_the_default_route_is_there_beside_those_of_the_settings() -> None:
    settings = Settings(routes={"maze": {"request": "maze/{session}", "reply": "maze-reply/{session}"}})
    assert list(Policies.of(settings).routes) == ["default", "maze"]
    assert [policy.name for policy in Policies.of(settings).routes.values()] == ["default", "maze"]
    topics = topic_map(settings)
    address = topics.address("maze/ada")
    assert address is not None
    assert (address.route, address.reply_topic) == ("maze", "maze-reply/ada")
    assert topics.address("llm/request/ada") is not None


def test_the_queue_has_the_bounds_of_the_settings() -> None:
    limits = {"queue_size": 7, "session_queue": 3, "max_queue_mib": 2, "queue_share": 0.25}
    queue = queue_limits(Settings(limits=limits))
    assert (queue.queue_size, queue.session_queue, queue.max_bytes, queue.share) == (7, 3, 2 * 1024 * 1024, 0.25)


@pytest.mark.parametrize("reloaded", [True, False])
def test_a_reload_changes_the_settings_and_a_word_of_the_engine_only_the_models(reloaded: bool) -> None:
    in_force = InForce(Settings(engine={"model": "a"}))
    other = Settings(engine={"model": "b"})
    in_force.change(settings=other if reloaded else None, engine_models=("e",))
    wanted = "b" if reloaded else "a"
    assert in_force.settings.engine.model == wanted
    assert in_force.policies().routes["default"].parse.models == (wanted, "e")
