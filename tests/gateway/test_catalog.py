"""Which worker a request is for, and which models are listed, from what the workers say of themselves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.errors import ModelNotFound, ShuttingDown
from llamacpp_mqtt_deploy.gateway.catalog import Catalog
from llamacpp_mqtt_deploy.gateway.key_ring import Owner
from llamacpp_mqtt_deploy.gateway.problems import BrokerAway, NobodyServes

ANYONE = Owner(name="anyone", level="web")


class Told:
    """What a bus client would know."""

    def __init__(self, **workers: Mapping[str, Any]) -> None:
        self.connected = True
        self.status_readable = True
        self.health: dict[str, Mapping[str, Any]] = {}
        self.heard: dict[str, float] = {}
        self._workers = workers

    def workers(self) -> dict[str, Mapping[str, Any]]:
        # Renewed at this moment: the arguments of a test may be minutes old when it runs.
        return {
            name: {**told, "ts": time.time() - told["age_s"]} if "age_s" in told else told
            for name, told in self._workers.items()
        }

    def heard_at(self) -> dict[str, float]:
        return self.heard

    def loads(self) -> dict[str, Mapping[str, Any]]:
        return self.health


def online(*models: str, **fields: Any) -> dict[str, Any]:
    return {"state": "online", "models": list(models), "age_s": 0.0, "every_s": 10.0} | fields


def test_of_several_workers_one_that_serves_the_model_is_picked() -> None:
    catalog = Catalog(Told(a=online("small"), b=online("large"), c=online()))
    found = catalog.pick("large")
    assert found is not None
    assert found.worker in ("b", "c")  # one without a list may serve anything
    assert [catalog.pick("small").worker for _ in range(2)] == ["a", "a"]  # type: ignore[union-attr]


def test_of_several_that_fit_the_least_loaded_is_picked() -> None:
    told = Told(a=online("m"), b=online("m"), c=online("m"))
    told.health = {
        "a": {"slots": {"busy": 2, "total": 2}, "queue": 1},
        "b": {"slots": {"busy": 2, "total": 4}, "queue": 0},
        "c": {"slots": {"busy": 1, "total": 1}, "queue": 0},
    }
    assert Catalog(told).pick("m").worker == "b"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "workers,model,error",
    [
        ({}, None, NobodyServes),
        ({"a": {"state": "offline"}}, None, NobodyServes),
        ({"a": online("m", age_s=3600)}, None, NobodyServes),
        ({"a": {"state": "draining"}}, None, ShuttingDown),
        ({"a": online("m")}, "n", ModelNotFound),
        ({"a": online("m", models="m")}, None, None),
        ({"a": {"state": "online", "ts": "x", "models": [1, None, "m"], "n_ctx": "x"}}, "m", None),
    ],
)
def test_who_cannot_be_asked_is_told_by_name(
    workers: dict[str, dict[str, Any]], model: str | None, error: type[Exception] | None
) -> None:
    catalog = Catalog(Told(**workers))
    if error is None:
        assert catalog.pick(model) is not None
        assert catalog.served(ANYONE)
        return
    with pytest.raises(error):
        catalog.pick(model)


def test_without_a_broker_and_without_a_readable_status_the_answers_differ() -> None:
    told = Told()
    told.connected = False
    with pytest.raises(BrokerAway):
        Catalog(told).pick(None)
    told.connected, told.status_readable = True, False
    assert Catalog(told).pick("anything") is None


def test_models_are_listed_once_and_only_those_that_the_key_may_name() -> None:
    able = {"tools": True, "vision": False, "thinking": True}
    told = Told(a=online("m", "n", n_ctx=4096, capabilities=able), b=online("n", "o"))
    catalog = Catalog(told)
    listed = catalog.served(ANYONE)
    assert [model.name for model in listed] == ["m", "n", "o"]
    assert (listed[0].context_tokens, listed[0].tools, listed[0].vision) == (4096, True, False)
    assert [model.name for model in catalog.served(Owner(name="a", level="a", models=("n",)))] == ["n"]
    assert catalog.find(ANYONE, "default").name == "m"
    with pytest.raises(ModelNotFound):
        catalog.find(Owner(name="a", level="a", models=("n",)), "m")


def test_a_worker_that_is_heard_is_there_whatever_its_clock_says() -> None:
    told = Told(a=online("m", age_s=3600))
    with pytest.raises(NobodyServes):
        Catalog(told).pick("m")
    told.heard["a"] = time.monotonic()
    assert Catalog(told).pick("m") is not None
    told.heard["a"] = time.monotonic() - 3600  # its own clock may say what it likes
    with pytest.raises(NobodyServes):
        Catalog(told).pick("m")
    ahead = Told(a=online("m", age_s=-3600))
    ahead.heard["a"] = time.monotonic() - 3600
    with pytest.raises(NobodyServes):
        Catalog(ahead).pick("m")


def test_a_key_for_the_workers_own_model_sees_it_under_the_name_that_it_may_use() -> None:
    owner = Owner(name="a", level="a", models=("default",))
    catalog = Catalog(Told(a=online("m", "n", n_ctx=4096), b=online("o")))
    assert [(model.name, model.context_tokens) for model in catalog.served(owner)] == [("default", 4096)]
    assert catalog.find(owner, "default").name == "default"
    both = Owner(name="a", level="a", models=("default", "n"))
    assert [model.name for model in catalog.served(both)] == ["default", "n"]
    named = Owner(name="a", level="a", models=("default", "m"))
    assert [model.name for model in catalog.served(named)] == ["m", "default"]
