"""What the workers say of themselves: which are there, which models they serve, which of them a request is for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from llamacpp_mqtt_deploy.core.errors import ModelNotFound, ShuttingDown
from llamacpp_mqtt_deploy.core.formats.asked import OWN_MODEL
from llamacpp_mqtt_deploy.core.formats.model_lists import ServedModel
from llamacpp_mqtt_deploy.gateway.key_ring import Owner
from llamacpp_mqtt_deploy.gateway.problems import COME_BACK_S, BrokerAway, NobodyServes

LIVE_RENEWALS = 3
"""A status older than this many of its own `every_s` is not live; as the workers judge each other."""
MOST_MODELS = 1000


class WorkersSeen(Protocol):
    """What the catalog asks a bus client."""

    @property
    def connected(self) -> bool: ...

    @property
    def status_readable(self) -> bool: ...

    def workers(self) -> dict[str, Mapping[str, Any]]: ...

    def heard_at(self) -> dict[str, float]: ...

    def loads(self) -> dict[str, Mapping[str, Any]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One worker that takes requests."""

    worker: str
    models: tuple[str, ...]
    load: float
    """Requests that run or wait, for each slot."""
    status: Mapping[str, Any]


class Catalog:
    """Reads the retained status and health of the workers under a root."""

    def __init__(self, bus: WorkersSeen) -> None:
        self._bus = bus
        self._first_told: dict[str, datetime] = {}

    def pick(self, model: str | None) -> Server | None:
        """The worker for a request: one that serves the model, the least loaded of several. None where the broker does not let
        the status be read. Raises BrokerAway, NobodyServes, ShuttingDown and ModelNotFound."""
        if not self._bus.connected:
            raise BrokerAway("The connection to the broker is lost; it is being restored.", retry_after_s=COME_BACK_S)
        if not self._bus.status_readable:
            return None
        servers = self.servers()
        if not servers:
            if any(status.get("state") == "draining" for status in self._bus.workers().values()):
                raise ShuttingDown("The worker is draining and takes no new requests.", retry_after_s=COME_BACK_S)
            raise NobodyServes("No worker is online.", retry_after_s=COME_BACK_S)
        fitting = [server for server in servers if model is None or not server.models or model in server.models]
        if not fitting:
            raise ModelNotFound(
                f"The model {model!r} is not served here.", fields={"model": "a name that /v1/models lists"}
            )
        return min(fitting, key=lambda server: server.load)

    def servers(self) -> list[Server]:
        """The workers that take requests."""
        loads, heard_at, now = self._bus.loads(), self._bus.heard_at(), time.monotonic()
        return [
            Server(worker=worker, models=_models(status), load=_load(loads.get(worker, {})), status=status)
            for worker, status in self._bus.workers().items()
            if status.get("state") == "online" and is_live(status, _age_s(status, heard_at.get(worker), now))
        ]

    def served(self, owner: Owner) -> list[ServedModel]:
        """The models that this owner may name, each once, the worker's own first."""
        found: dict[str, ServedModel] = {}
        for server in self.servers():
            names = server.models or (OWN_MODEL,)
            if not owner.may_name(names[0]):
                names = (OWN_MODEL, *names[1:])  # the same model, by the name that this owner may know it by
            for name in names[:MOST_MODELS]:
                if name not in found and owner.may_name(name):
                    found[name] = self._served(name, server.status)
        return list(found.values())

    def find(self, owner: Owner, name: str) -> ServedModel:
        """The model of this name; `default` is the first one. Raises ModelNotFound."""
        models = self.served(owner)
        for model in models:
            if name in (model.name, OWN_MODEL):
                return model
        raise ModelNotFound(f"The model {name!r} is not served here.", fields={"model": "a name that /v1/models lists"})

    def own_model(self, server: Server | None) -> str:
        """What answers call the worker's own model."""
        return server.models[0] if server is not None and server.models else OWN_MODEL

    def _served(self, name: str, status: Mapping[str, Any]) -> ServedModel:
        if len(self._first_told) > MOST_MODELS:
            self._first_told.clear()
        since = self._first_told.setdefault(name, datetime.now(UTC))
        able = status.get("capabilities")
        capabilities: Mapping[str, Any] = able if isinstance(able, Mapping) else {}
        context = status.get("n_ctx")
        return ServedModel(
            name=name,
            since=since,
            context_tokens=context if isinstance(context, int) else None,
            tools=capabilities.get("tools") is True,
            vision=capabilities.get("vision") is True,
            thinking=capabilities.get("thinking") is True,
        )


def is_live(status: Mapping[str, Any], age_s: float | None) -> bool:
    """Whether a status that says `online` was renewed lately. One without a time is believed."""
    every_s = status.get("every_s")
    return age_s is None or not isinstance(every_s, int | float) or age_s < max(LIVE_RENEWALS * every_s, 300.0)


def _age_s(status: Mapping[str, Any], heard_at: float | None, now: float) -> float | None:
    """Seconds since the worker said it: by our own clock where we heard it say so. Of what the broker had kept only the worker's
    clock tells, and clocks may differ by minutes."""
    if heard_at is not None:
        return now - heard_at
    ts = status.get("ts")
    return time.time() - ts if isinstance(ts, int | float) else None


def _models(status: Mapping[str, Any]) -> tuple[str, ...]:
    told = status.get("models")
    return tuple(name for name in told if isinstance(name, str)) if isinstance(told, list) else ()


def _load(health: Mapping[str, Any]) -> float:
    slots = health.get("slots")
    slots = slots if isinstance(slots, Mapping) else {}
    busy, total, queue = slots.get("busy"), slots.get("total"), health.get("queue")
    numbers = [value if isinstance(value, int) else 0 for value in (busy, queue)]
    return sum(numbers) / max(1, total if isinstance(total, int) else 1)
