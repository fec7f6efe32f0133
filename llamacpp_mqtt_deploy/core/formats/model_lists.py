"""The lists of models as OpenAI, Anthropic and Ollama tell them, from what the workers say in their status."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llamacpp_mqtt_deploy.core.formats.framing import json_line
from llamacpp_mqtt_deploy.core.formats.rendering import HttpReply, utc_text

if TYPE_CHECKING:
    from datetime import datetime

OLLAMA_VERSION = "0.13.0"
"""The state of Ollama's API that is spoken here; editors refuse to work with one that calls itself older than they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that requests may name. `since` is when its worker said so first."""

    name: str
    since: datetime
    context_tokens: int | None = None
    tools: bool = False
    vision: bool = False
    thinking: bool = False


# --- OpenAI ----------------------------------------------------------------------------------------------------------


def openai_model(model: ServedModel) -> HttpReply:
    """The answer of `/v1/models/{model}`."""
    return HttpReply(status=200, body=json_line(_openai(model)))


def openai_models(models: Sequence[ServedModel]) -> HttpReply:
    """The answer of `/v1/models`."""
    return HttpReply(status=200, body=json_line({"object": "list", "data": [_openai(model) for model in models]}))


def _openai(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.since.timestamp()),
        "owned_by": "llamacpp-mqtt-deploy",
    }


# --- Anthropic -------------------------------------------------------------------------------------------------------


def anthropic_model(model: ServedModel) -> HttpReply:
    """The answer of `/v1/models/{model}` to a request with the header `anthropic-version`."""
    return HttpReply(status=200, body=json_line(_anthropic(model)))


def anthropic_models(models: Sequence[ServedModel]) -> HttpReply:
    """The answer of `/v1/models` to a request with the header `anthropic-version`."""
    data = [_anthropic(model) for model in models]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return HttpReply(status=200, body=json_line({"data": data, "has_more": False, "first_id": first, "last_id": last}))


def _anthropic(model: ServedModel) -> dict[str, Any]:
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": utc_text(model.since),
        "lifecycle": "active",
        "max_input_tokens": model.context_tokens,
    }


# --- Ollama ----------------------------------------------------------------------------------------------------------


def ollama_tags(models: Sequence[ServedModel]) -> HttpReply:
    """The answer of `/api/tags`."""
    listed = [_ollama(model) | {"modified_at": utc_text(model.since)} for model in models]
    return HttpReply(status=200, body=json_line({"models": listed}))


def ollama_running(models: Sequence[ServedModel], *, expires: datetime) -> HttpReply:
    """The answer of `/api/ps`; `expires` is when a model that nobody asks would be put away."""
    listed = [
        _ollama(model) | {"expires_at": utc_text(expires), "size_vram": 0, "context_length": model.context_tokens or 0}
        for model in models
    ]
    return HttpReply(status=200, body=json_line({"models": listed}))


def ollama_show(model: ServedModel) -> HttpReply:
    """The answer of `/api/show`; clients read what a model can do from `capabilities`, and its context from `model_info`."""
    able = {"tools": model.tools, "vision": model.vision, "thinking": model.thinking}
    info: dict[str, Any] = {"general.architecture": "llama", "general.basename": model.name}
    if model.context_tokens is not None:
        info["llama.context_length"] = model.context_tokens
    shown = {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _DETAILS,
        "model_info": info,
        "capabilities": ["completion", *[name for name, can in able.items() if can]],
        "modified_at": utc_text(model.since),
    }
    return HttpReply(status=200, body=json_line(shown))


def ollama_version() -> HttpReply:
    """The answer of `/api/version`."""
    return HttpReply(status=200, body=json_line({"version": OLLAMA_VERSION}))


_DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "",
    "quantization_level": "",
}


def _ollama(model: ServedModel) -> dict[str, Any]:
    # A worker tells no size and no digest of its files; clients want some value, and the same one each time.
    digest = hashlib.sha256(model.name.encode("utf-8", "replace")).hexdigest()
    return {"name": model.name, "model": model.name, "size": 0, "digest": digest, "details": _DETAILS}
