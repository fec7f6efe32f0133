"""The discovery message by which Home Assistant knows a worker as a device, with entities that live on its status and health."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

MOST_OPTIONS = 100
"""Models that can be chosen from a list; nobody reads a longer one, and a message has to hold it."""
EXPIRES_RENEWALS = 3
"""An entity is unavailable when so many health messages did not come."""

DEFAULT_PREFIX = "homeassistant"
PROJECT = "llamacpp-mqtt-deploy"

ABSENT: Mapping[str, Mapping[str, Any]] = {
    "restart_engine": {"platform": "button"},
    "unload": {"platform": "button"},
    "keep_awake": {"platform": "switch"},
    "choose_model": {"platform": "select"},
    "ask": {"platform": "notify"},
    "answer": {"platform": "sensor"},
}
"""What not every worker has. Home Assistant keeps an entity that a later message leaves out; its platform alone takes it away."""

# What Home Assistant renders. A status may be the will, which has little in it, or empty, when somebody has removed it.
_STATUS = "{% set s = value_json | default({}) %}{% set engine = s.engine | default({}) %}"
_STATE = (
    _STATUS + "{{ 'asleep' if s.state == 'online' and engine.state == 'asleep' else s.state | default('offline') }}"
)
_AVAILABLE = _STATUS + "{{ 'offline' if s.state | default('offline') == 'offline' else 'online' }}"
_CONNECTED = _STATUS + "{{ 'OFF' if s.state | default('offline') == 'offline' else 'ON' }}"
_ACCEPTS = _STATUS + "{{ 'ON' if s.state == 'online' else 'OFF' }}"
_AWAKE = _STATUS + "{{ 'ON' if engine.keep_awake | default(false) else 'OFF' }}"
# `None` is Home Assistant's word for an unknown state; a select calls any other word than its options an error.
_MODEL = _STATUS + "{{ s.model | default(none) }}"
_PROBLEM = _STATUS + (
    "{{ 'ON' if s.problem is defined or engine.state in ('restarting', 'unreachable', 'failed')"
    " or (engine.state == 'ready' and engine.detail is defined) else 'OFF' }}"
)
_REASONS = _STATUS + "{{ {'problem': s.problem | default(none), 'engine': engine.detail | default(none)} | tojson }}"

# A state holds 255 characters, so it is the first sentence, and the whole answer is an attribute. What is no end of an answer
# changes nothing.
_ENDS = "{% if value_json.type in ('done', 'error') %}"
_OLD = "{% set old = this.attributes if this is defined and this.attributes is defined else {} %}"
_SENTENCE = (
    _ENDS
    + "{% if value_json.type == 'error' %}{% set text = value_json.message %}"
    + "{% else %}{% set text = value_json.full_content | default('The answer is too long for one message.') %}{% endif %}"
    + r"{% set text = text | trim | replace('\n', ' ') | replace('. ', '.\n') | replace('! ', '!\n') | replace('? ', '?\n') %}"
    + r"{{ text.split('\n')[0][:255] or none }}"
    + "{% else %}{{ this.state if this is defined and this.state not in ('unknown', 'unavailable') else none }}{% endif %}"
)
_ANSWER = (
    _ENDS
    + "{{ {'answer': value_json.full_content | default(none),"
    + " 'error': value_json.code | default(none), 'finish_reason': value_json.finish_reason | default(none),"
    + " 'request_id': value_json.request_id} | tojson }}"
    + "{% else %}"
    + _OLD
    + "{{ {'answer': old.answer | default(none), 'error': old.error | default(none),"
    + " 'finish_reason': old.finish_reason | default(none), 'request_id': old.request_id | default(none)} | tojson }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveredWorker:
    """What the message tells of a worker. `level` is the first topic level of what Home Assistant asks."""

    root: str
    worker_id: str
    version: str
    level: str
    models: tuple[str, ...]
    can_restart: bool
    can_unload: bool
    health_every_s: float
    can_ask: bool = True
    """The default route reads and writes what this project's own clients do."""

    @property
    def object_id(self) -> str:
        """Of the worker id and the root, never of the machine: it stays when the worker moves, and no two workers share it."""
        readable = re.sub(r"[^A-Za-z0-9_-]", "_", self.worker_id)
        return f"lmd_{readable}_{hashlib.sha256(f'{self.root}/{self.worker_id}'.encode()).hexdigest()[:8]}"

    def topic(self, prefix: str) -> str:
        """Where the message is retained."""
        return f"{prefix}/device/{self.object_id}/config"


def discovery_message(worker: DiscoveredWorker) -> dict[str, Any]:
    """The message of one device with all its entities, in the keys that Home Assistant documents."""
    status = f"{worker.root}/status/{worker.worker_id}"
    components = {
        **_of_status(status),
        **_of_health(f"{worker.root}/health/{worker.worker_id}", worker),
        **_orders(worker, f"{worker.root}/admin/{worker.worker_id}", status),
        **(_questions(worker) if worker.can_ask else {}),
    }
    for key, component in components.items():
        component["unique_id"] = f"{worker.object_id}_{key}"
    return {
        "device": {
            "identifiers": [worker.object_id],
            "name": f"LLM {worker.worker_id}",
            "model": PROJECT,
            "sw_version": worker.version,
        },
        "origin": {"name": PROJECT, "sw_version": worker.version},
        "availability": [{"topic": status, "value_template": _AVAILABLE}],
        "qos": 1,
        "components": {**ABSENT, **components},
    }


def _of_status(topic: str) -> dict[str, dict[str, Any]]:
    return {
        "state": _sensor(
            "State",
            topic,
            _STATE,
            device_class="enum",
            options=["online", "asleep", "draining", "offline"],
            availability=[],
        ),
        "model": _sensor("Model", topic, _MODEL),
        "connection": _binary("Connection", topic, _CONNECTED, device_class="connectivity", availability=[])
        | {"entity_category": "diagnostic"},
        "problem": _binary("Problem", topic, _PROBLEM, device_class="problem")
        | {"entity_category": "diagnostic", "json_attributes_topic": topic, "json_attributes_template": _REASONS},
    }


def _of_health(topic: str, worker: DiscoveredWorker) -> dict[str, dict[str, Any]]:
    now: Mapping[str, Any] = {"state_class": "measurement"}
    total: Mapping[str, Any] = {"state_class": "total_increasing"}
    components = {
        "queue": _sensor("Queue", topic, "{{ value_json.queue }}", unit_of_measurement="requests", **now),
        "slots_busy": _sensor("Slots busy", topic, "{{ value_json.slots.busy }}", unit_of_measurement="slots", **now),
        "speed": _sensor("Speed", topic, "{{ value_json.tokens_per_second }}", unit_of_measurement="tok/s", **now),
        "first_token": _sensor(
            "First token",
            topic,
            "{{ value_json.first_token_ms | default(none) }}",
            device_class="duration",
            unit_of_measurement="ms",
            **now,
        ),
        "requests": _sensor(
            "Requests", topic, "{{ value_json.requests.accepted }}", unit_of_measurement="requests", **total
        ),
        "tokens": _sensor(
            "Tokens",
            topic,
            "{{ value_json.tokens.prompt + value_json.tokens.completion }}",
            unit_of_measurement="tokens",
            **total,
        ),
        "errors": _sensor(
            "Errors", topic, "{{ value_json.errors.values() | sum }}", unit_of_measurement="errors", **total
        ),
        "uptime": _sensor(
            "Uptime",
            topic,
            "{{ value_json.uptime_s | int }}",
            device_class="duration",
            unit_of_measurement="s",
            entity_category="diagnostic",
        ),
        "running": _binary(
            "Running", topic, "{{ 'ON' if value_json.slots.busy > 0 else 'OFF' }}", device_class="running"
        ),
    }
    for component in components.values():
        component["expire_after"] = int(EXPIRES_RENEWALS * worker.health_every_s) + 1
    return components


def _orders(worker: DiscoveredWorker, topic: str, status: str) -> dict[str, dict[str, Any]]:
    """What acts, over the worker's admin topic."""
    components = {
        "cancel_all": _button("Cancel all", topic, "cancel_all"),
        "accept": _switch("Accept requests", topic, status, _ACCEPTS, on=_order("resume"), off=_order("drain")),
    }
    if worker.can_restart:
        components["restart_engine"] = _button("Restart engine", topic, "restart_engine")
    if worker.can_unload:
        components["unload"] = _button("Unload", topic, "unload")
        components["keep_awake"] = _switch(
            "Keep awake", topic, status, _AWAKE, on=_order("keep_awake"), off=_order("keep_awake", seconds=0)
        )
    if len(worker.models) > 1:
        components["choose_model"] = {
            "platform": "select",
            "name": "Model of requests",
            "entity_category": "config",
            "options": list(worker.models[:MOST_OPTIONS]),
            "state_topic": status,
            "value_template": _MODEL,
            "command_topic": topic,
            "command_template": "{{ {'action': 'model', 'model': value} | tojson }}",
        }
    return components


def _questions(worker: DiscoveredWorker) -> dict[str, dict[str, Any]]:
    """A prompt goes out as a notification, its answer comes back as a sensor."""
    reply = f"{worker.root}/reply/{worker.level}"
    return {
        "ask": {
            "platform": "notify",
            "name": "Ask",
            "command_topic": f"{worker.root}/request/{worker.level}",
            "command_template": "{{ {'prompt': value, 'stream': false} | tojson }}",
        },
        "answer": _sensor("Last answer", reply, _SENTENCE)
        | {"json_attributes_topic": reply, "json_attributes_template": _ANSWER},
    }


def _sensor(name: str, topic: str, template: str, **further: Any) -> dict[str, Any]:
    return {"platform": "sensor", "name": name, "state_topic": topic, "value_template": template, **further}


def _binary(name: str, topic: str, template: str, **further: Any) -> dict[str, Any]:
    return {"platform": "binary_sensor", "name": name, "state_topic": topic, "value_template": template, **further}


def _button(name: str, topic: str, action: str) -> dict[str, Any]:
    return {
        "platform": "button",
        "name": name,
        "entity_category": "config",
        "command_topic": topic,
        "payload_press": _order(action),
    }


def _switch(name: str, topic: str, status: str, template: str, *, on: str, off: str) -> dict[str, Any]:
    return {
        "platform": "switch",
        "name": name,
        "entity_category": "config",
        "state_topic": status,
        "value_template": template,
        "state_on": "ON",
        "state_off": "OFF",
        "command_topic": topic,
        "payload_on": on,
        "payload_off": off,
    }


def _order(action: str, **fields: Any) -> str:
    return orjson.dumps({"action": action, **fields}).decode()
