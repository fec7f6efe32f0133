"""The JSON Schema document of the protocol, and functions that validate a message against it.

`python -m llamacpp_mqtt_deploy.schema.document > docs/schema.json` writes the document. The models of events are not on the way
of a token: tests hold what the worker emits against them, and unknown fields are refused so that drift is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.json_schema import models_json_schema

from llamacpp_mqtt_deploy.core.fields import AdminFields, CountFields, RequestFields
from llamacpp_mqtt_deploy.schema.attribute_docs import described
from llamacpp_mqtt_deploy.schema.event_models import (
    Ack,
    Chunk,
    Done,
    Error,
    Ping,
    Progress,
    Queued,
    Rejected,
    ReplyEvent,
    Snapshot,
    Start,
)
from llamacpp_mqtt_deploy.schema.messages import AdminAck, Health, PoolStatus, Status

PROTOCOL = 1


class Request(RequestFields):
    """Published to a request topic. A null is as good as absent; unknown fields are named in `warnings`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
                for name in ("prompt", "messages", "tool_results")
            ],
            "examples": [
                {"request_id": "a1b2c3", "prompt": "Name three rivers."},
                {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.2, "stream": False},
            ],
        }
    )


class Control(CountFields):
    """Published to a control topic; the bare action as plain text will do."""


class Admin(AdminFields):
    """Published to a worker's admin topic; bare words will do (`log_level debug`)."""


_EVENT: TypeAdapter[Any] = TypeAdapter(ReplyEvent)
_EVENTS: tuple[type[BaseModel], ...] = (Queued, Start, Progress, Chunk, Ping, Snapshot, Done, Error, Rejected, Ack)
_MESSAGES: tuple[type[BaseModel], ...] = (Request, Control, Admin, *_EVENTS, AdminAck, Status, Health, PoolStatus)


def validate_event(event: Mapping[str, Any]) -> BaseModel:
    """An event of a reply topic, acks included, as its model. Raises pydantic.ValidationError."""
    checked: BaseModel = _EVENT.validate_python(dict(event))
    return checked


def validate_admin_ack(message: Mapping[str, Any]) -> AdminAck:
    """A message of the admin reply topic. Raises pydantic.ValidationError."""
    return AdminAck.model_validate(message)


def validate_status(message: Mapping[str, Any]) -> Status:
    """A message of the status topic. Raises pydantic.ValidationError."""
    return Status.model_validate(message)


def validate_pool(message: Mapping[str, Any]) -> PoolStatus:
    """A message of a pool's topic. Raises pydantic.ValidationError."""
    return PoolStatus.model_validate(message)


def validate_health(message: Mapping[str, Any]) -> Health:
    """A message of the health topic. Raises pydantic.ValidationError."""
    return Health.model_validate(message)


def schema() -> dict[str, Any]:
    """One JSON Schema document (draft 2020-12) with each message of the protocol under `$defs`."""
    _, document = models_json_schema([(model, "validation") for model in _MESSAGES])
    definitions = _tidied(described(document, _MESSAGES)["$defs"])
    definitions["ReplyEvent"] = {
        "title": "ReplyEvent",
        "description": "Anything that comes on a reply topic; ignore types and fields that you do not know.",
        "oneOf": [{"$ref": f"#/$defs/{event.__name__}"} for event in _EVENTS],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llamacpp-mqtt-deploy wire protocol",
        "description": f"Version {PROTOCOL}. Validate a message against its own definition, such as #/$defs/Request.",
        "$defs": dict(sorted(definitions.items())),
    }


def _tidied(value: Any) -> Any:
    # pydantic gives each field a title made of its name, and a default of null to what may be absent: noise for a reader.
    if isinstance(value, list):
        return [_tidied(item) for item in value]
    if not isinstance(value, dict):
        return value
    tidy = {key: _tidied(item) for key, item in value.items() if not (key == "default" and item is None)}
    properties = tidy.get("properties")
    if isinstance(properties, dict):
        for field in properties.values():
            field.pop("title", None)
    return tidy


def schema_text() -> str:
    """The document as it stands in docs/schema.json."""
    return orjson.dumps(schema(), option=orjson.OPT_INDENT_2).decode() + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")  # noqa: T201 - a document on stdout is what this is for
