"""Asks a server what it is: its dialect, slots, context, models and abilities."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import orjson

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.completions import clean
from llamacpp_mqtt_deploy.core.counts import count
from llamacpp_mqtt_deploy.engines.server.devices import backend_of_metrics, backend_of_ollama
from llamacpp_mqtt_deploy.engines.server.dialects import Dialect, template_thinks
from llamacpp_mqtt_deploy.engines.server.failures import Broken, ConnectFailed, NoAnswer, Silent
from llamacpp_mqtt_deploy.engines.server.http import HttpExchange
from llamacpp_mqtt_deploy.ports import EngineInfo, EngineState

T = TypeVar("T")

ANSWER_WITHIN_S = 3.0
"""A server that is alive answers these questions at once, also while it generates."""
MAX_MODELS = 100
MAX_SLOTS = 256
"""As many as `engine.slots` may be: each gets a thread, whatever a server says of itself."""


class NotDescribed(Exception):
    """The server does not say what it is yet; `state` and the text tell why."""

    def __init__(self, state: EngineState, text: str) -> None:
        super().__init__(text)
        self.state = state
        self.text = text


@dataclass(frozen=True, slots=True)
class Description:
    """What a server is: its dialect, what goes into the status, and how its model marks a prompt."""

    dialect: Dialect
    info: EngineInfo
    marks: PromptMarks | None = None
    """None when the server does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMarks:
    """What a loaded model's prompts are made with; another one, or another process, has others."""

    templates: str
    strings: frozenset[str]
    """Texts of tokens that the server names by itself."""
    load: tuple[str, ...]
    """Tells one load of a model from another."""


def describe(
    settings: EngineSettings,
    *,
    kind: str,
    shown: str,
    exchange: Callable[[], HttpExchange],
    known: Description | None = None,
) -> Description:
    """Ask the server. What cannot change while it keeps its model is taken from `known`. Raises `NotDescribed`."""
    try:
        if settings.dialect != "openai":
            status, props = _get(exchange, "/props")
            _refuse_key(status)
            if _loading(status, props):
                raise NotDescribed("loading", f"The server at {shown} loads its model.")
            if status == 200 and ("default_generation_settings" in props or "total_slots" in props):
                return _llamacpp(settings, kind, props, exchange, known)
            if status >= 500:
                raise NotDescribed("unreachable", f"The server at {shown} answers HTTP {status}. Look into its log.")
            if settings.dialect == "llamacpp":
                raise NotDescribed(
                    "failed",
                    f"What answers at {shown} is not llama.cpp's server (HTTP {status} for /props). Check engine.url, "
                    "or set engine.dialect to openai.",
                )
        status, listed = _get(exchange, "/v1/models")
    except ConnectFailed as error:
        raise NotDescribed(
            "unreachable", f"No connection to {shown}: {error}. Start the server, or set engine.url."
        ) from error
    except (NoAnswer, Broken, Silent, ValueError) as error:
        raise NotDescribed("unreachable", f"The server at {shown} does not answer as it should: {error}.") from error
    _refuse_key(status)
    if status >= 500 or status == 429:
        raise NotDescribed("unreachable", f"The server at {shown} answers HTTP {status}. Look into its log.")
    info = _openai_info(settings, kind, listed)
    if _is_ollama(listed):
        backend, on_gpu = backend_of_ollama(_aside(exchange, "/api/ps", {}), next(iter(info.models), None))
        info = replace(info, backend=backend, gpu_layers=on_gpu)
    return Description("openai", info)


def _get(exchange: Callable[[], HttpExchange], path: str) -> tuple[int, Mapping[str, Any]]:
    with exchange() as asked:
        asked.send("GET", path, timeout_s=ANSWER_WITHIN_S)
        content = asked.read_all(timeout_s=ANSWER_WITHIN_S)
        try:
            document = orjson.loads(content)
        except orjson.JSONDecodeError:
            document = {}
        return asked.status, document if isinstance(document, dict) else {}


def _aside(exchange: Callable[[], HttpExchange], path: str, otherwise: T) -> T:
    """A document that is good to have, or `otherwise`: text where that is text, else a JSON object."""
    with contextlib.suppress(ConnectFailed, NoAnswer, Broken, Silent, ValueError), exchange() as asked:
        asked.send("GET", path, timeout_s=ANSWER_WITHIN_S)
        content = asked.read_all(timeout_s=ANSWER_WITHIN_S)
        document = content.decode("utf-8", "replace") if isinstance(otherwise, str) else orjson.loads(content)
        if asked.status == 200 and isinstance(document, type(otherwise)):
            return document
    return otherwise


def _is_ollama(listed: Mapping[str, Any]) -> bool:
    data = listed.get("data")
    first = data[0] if isinstance(data, list) and data else None
    return isinstance(first, dict) and first.get("owned_by") == "library"


def _refuse_key(status: int) -> None:
    if status in (401, 403):
        raise NotDescribed(
            "failed",
            f"The server refuses the worker's API key (HTTP {status}). Set engine.api_key_file to the right one.",
        )


def _loading(status: int, document: Mapping[str, Any]) -> bool:
    error = document.get("error")
    return status == 503 and isinstance(error, dict) and error.get("type") == "unavailable_error"


def _llamacpp(
    settings: EngineSettings,
    kind: str,
    props: Mapping[str, Any],
    exchange: Callable[[], HttpExchange],
    known: Description | None,
) -> Description:
    info, marks = _llamacpp_info(settings, kind, props), _marks(props)
    if known is not None and known.marks is not None and known.marks.load == marks.load:
        # Asked once: reading them begins new averages for whoever else watches the server's metrics.
        return Description("llamacpp", replace(info, backend=known.info.backend), marks)
    if props.get("endpoint_metrics") is True:
        info = replace(info, backend=backend_of_metrics(_aside(exchange, "/metrics", "")))
    return Description("llamacpp", info, marks)


def _llamacpp_info(settings: EngineSettings, kind: str, props: Mapping[str, Any]) -> EngineInfo:
    slots = min(count(props.get("total_slots")) or 1, MAX_SLOTS)
    n_ctx = count(_section(props, "default_generation_settings").get("n_ctx")) or None
    if settings.context_tokens is not None:
        n_ctx = min(settings.context_tokens, n_ctx or settings.context_tokens)
    caps = _section(props, "chat_template_caps")
    template = str(props.get("chat_template") or "")
    alias = str(props.get("model_alias") or "") or str(props.get("model_path") or "").rpartition("/")[2]
    return EngineInfo(
        state="ready",
        kind=kind,
        models=_models(settings) or ((clean(alias),) if alias else ()),
        n_ctx=n_ctx,
        slots=min(settings.slots or slots, slots),
        # Servers before `chat_template_caps` say nothing; they answer 500 themselves when a template cannot.
        tools=bool(caps.get("supports_tools", True)),
        vision=_section(props, "modalities").get("vision") is True,
        thinking=template_thinks(template),
        json_schema=True,
    )


def _marks(props: Mapping[str, Any]) -> PromptMarks:
    def told(name: str) -> str:
        return str(props.get(name) or "")

    # `media_marker` is where the server puts an image into a prompt, and differs from process to process.
    names = ("bos_token", "eos_token", "media_marker")
    templates = told("chat_template") + told("chat_template_tool_use")
    return PromptMarks(
        templates=templates,
        strings=frozenset(filter(None, map(told, names))),
        load=(templates, *map(told, (*names, "model_path", "build_info"))),
    )


def _openai_info(settings: EngineSettings, kind: str, listed: Mapping[str, Any]) -> EngineInfo:
    data = listed.get("data")
    entries = data[:MAX_MODELS] if isinstance(data, list) else []
    names = tuple(clean(entry["id"]) for entry in entries if isinstance(entry, dict) and entry.get("id"))
    return EngineInfo(
        state="ready",
        kind=kind,
        models=_models(settings) or names,
        n_ctx=settings.context_tokens,
        slots=settings.slots or 1,
        # The API does not tell what a model can; the server refuses what it cannot.
        tools=True,
        vision=True,
        json_schema=True,
    )


def _models(settings: EngineSettings) -> tuple[str, ...]:
    first = (settings.model,) if settings.model else ()
    return tuple(dict.fromkeys(first + settings.models))


def _section(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, dict) else {}
