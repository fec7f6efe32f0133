"""The settings that apply to a request: those of its route over those of the worker; compiled once for each configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from llamacpp_mqtt_deploy.config.configured_routes import configured_routes
from llamacpp_mqtt_deploy.config.settings import EmptyPayload, Lane, RouteSettings, Settings, StreamingMode
from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.core.deltas import SAMPLING_FIELDS
from llamacpp_mqtt_deploy.core.names import REPLY_FIELDS
from llamacpp_mqtt_deploy.core.prompt_templates import PromptTemplate
from llamacpp_mqtt_deploy.core.requests import Generate, RequestPolicy
from llamacpp_mqtt_deploy.core.routes import DEFAULT_ROUTE, ReplyTemplate
from llamacpp_mqtt_deploy.core.session_changes import MAX_CHANGE_BYTES
from llamacpp_mqtt_deploy.core.spending import LevelLimits

_PLAIN_ROUTE = RouteSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePolicy:
    """What applies to the requests of one route; `parse` is for reading them, the rest for generating."""

    name: str
    parse: RequestPolicy
    by_lane: Mapping[Lane, RequestPolicy]
    """The same for first levels that have a highest lane of their own."""
    mode: StreamingMode
    format: str
    answer_fields: Mapping[str, str]
    """What clients call the fields of an answer in the format `json`."""
    empty_payload: EmptyPayload
    allow_all_sessions: bool
    keeps_system_prompts: bool
    """Sessions may have a system prompt of their own."""
    system_prompt: str | None
    sampling: Mapping[str, Any]
    thinking: bool | None
    thinking_budget: int | None
    tools: tuple[Mapping[str, Any], ...]
    model: str | None


@dataclass(frozen=True, slots=True)
class Policies:
    """All routes of one configuration; replaced as a whole by a reload."""

    settings: Settings
    routes: Mapping[str, RoutePolicy]

    @classmethod
    def of(cls, settings: Settings, *, engine_models: tuple[str, ...] = ()) -> Policies:
        """`engine_models` are the names that the engine gives itself; requests may use them as well."""
        names = [DEFAULT_ROUTE, *(name for name in settings.routes if name != DEFAULT_ROUTE)]
        return cls(
            settings,
            {name: _route(settings, name, settings.routes.get(name, _PLAIN_ROUTE), engine_models) for name in names},
        )

    def parse_for(self, route: str, first_level: str) -> RequestPolicy:
        """What the requests of this first level may ask for on this route: a lane of its own stands above the route's."""
        policy = self.routes[route]
        level = self.settings.levels.get(first_level)
        return policy.parse if level is None or level.max_priority is None else policy.by_lane[level.max_priority]

    def longest_answer(self, route: str, request: Generate) -> int:
        """Most tokens that this request can be answered."""
        most = self.settings.limits.max_tokens
        wanted = request.sampling.get("max_tokens", self.routes[route].sampling.get("max_tokens"))
        return most if wanted is None else min(most, wanted)


class InForce:
    """The configuration in force, for everybody who reads it for each request; replaced as a whole."""

    def __init__(self, settings: Settings) -> None:
        self._engine_models: tuple[str, ...] = ()
        self._pool_models: tuple[str, ...] = ()
        self._policies = Policies.of(settings)

    def policies(self) -> Policies:
        return self._policies

    @property
    def settings(self) -> Settings:
        return self._policies.settings

    def change(self, *, settings: Settings | None = None, engine_models: tuple[str, ...]) -> None:
        """Other settings (a reload), or other models (the engine said what it serves)."""
        self._engine_models = engine_models
        self._renew(settings or self.settings)

    def know_pool_models(self, names: tuple[str, ...]) -> None:
        """What any worker of the pool serves may be asked of each of them."""
        if names != self._pool_models:
            self._pool_models = names
            self._renew(self.settings)

    def own_models(self) -> tuple[str, ...]:
        """Every name that a request may ask this worker for."""
        engine = self.settings.engine
        names = (engine.model, *engine.models, *self._engine_models, *engine.aliases)
        return tuple(dict.fromkeys(name for name in names if name))

    def _renew(self, settings: Settings) -> None:
        self._policies = Policies.of(settings, engine_models=(*self._engine_models, *self._pool_models))


def queue_limits(settings: Settings) -> QueueLimits:
    """What may wait for a slot."""
    limits = settings.limits
    return QueueLimits(
        queue_size=limits.queue_size,
        session_queue=limits.session_queue,
        max_bytes=limits.max_queue_mib * 1024 * 1024,
        share=limits.queue_share,
    )


def max_incoming_bytes(settings: Settings) -> int:
    """Longest payload that any message to a worker may have: those of all other kinds are shorter."""
    return max(settings.limits.max_request_bytes, MAX_CHANGE_BYTES)


def level_limits(settings: Settings) -> LevelLimits:
    """What first topic levels may use."""
    own = settings.levels
    return LevelLimits(
        tokens_per_day=settings.limits.tokens_per_day,
        own_tokens_per_day={
            name: level.tokens_per_day for name, level in own.items() if level.tokens_per_day is not None
        },
        own_requests_per_minute={
            name: level.max_requests_per_minute
            for name, level in own.items()
            if level.max_requests_per_minute is not None
        },
    )


def topic_map(settings: Settings) -> TopicMap:
    """The topics of this configuration; raises ValueError with a sentence for each fault."""
    return TopicMap(
        root=settings.mqtt.root, worker_id=settings.mqtt.worker_id, routes=tuple(configured_routes(settings))
    )


def _route(settings: Settings, name: str, route: RouteSettings, engine_models: tuple[str, ...]) -> RoutePolicy:
    limits, generation, engine = settings.limits, settings.generation, settings.engine
    sampling: dict[str, Any] = {}
    for field in SAMPLING_FIELDS:
        for level in (generation, route):
            value = getattr(level, field, None)
            if value is not None:
                sampling[field] = list(value) if isinstance(value, tuple) else value
    models = tuple(dict.fromkeys(m for m in (engine.model, *engine.models, route.model, *engine_models) if m))
    timeout_s = route.timeout_s or generation.timeout_s
    parse = RequestPolicy(
        max_request_bytes=limits.max_request_bytes,
        max_tokens=limits.max_tokens,
        max_timeout_s=limits.max_timeout_s,
        default_timeout_s=min(timeout_s, limits.max_timeout_s),
        fields=dict(route.fields),
        reply_fields=_reply_fields(route),
        default_session=route.default_session,
        prompt_template=_prompt_template(route),
        templates_requests=route.prompt_template_topic is None,
        allow_system_prompt=route.allow_system_prompt,
        allow_messages=route.allow_messages,
        allow_tools=route.allow_tools,
        trust_payload_session=route.trust_payload_session,
        models=models or None,
        aliases=dict(engine.aliases),
        tool_names=tuple(tool["function"]["name"] for tool in route.tools),
        default_priority=route.default_priority,
        max_priority=route.max_priority,
    )
    return RoutePolicy(
        name=name,
        parse=parse,
        by_lane={lane: replace(parse, max_priority=lane) for lane in get_args(Lane)},
        mode=route.mode or settings.streaming.mode,
        format=route.format,
        answer_fields=route.answer_fields,
        empty_payload=route.empty_payload,
        allow_all_sessions=route.allow_all_sessions,
        keeps_system_prompts=route.system_prompt_topic is not None,
        system_prompt=route.system_prompt if route.system_prompt is not None else generation.system_prompt,
        sampling=sampling,
        thinking=route.thinking if route.thinking is not None else generation.thinking,
        thinking_budget=route.thinking_budget if route.thinking_budget is not None else generation.thinking_budget,
        tools=route.tools,
        model=route.model or engine.model,
    )


def _prompt_template(route: RouteSettings) -> PromptTemplate | None:
    if route.prompt_template is None:
        return None
    return PromptTemplate(
        text=route.prompt_template,
        defaults=dict(route.prompt_defaults),
        field_chars=route.prompt_field_chars,
        chars=route.prompt_chars,
    )


def _reply_fields(route: RouteSettings) -> tuple[str, ...]:
    """What a payload of this route may hold beside the fields of a request."""
    ids = ReplyTemplate.cut(route.reply or "").ids
    return tuple(name for name in ids if name in REPLY_FIELDS) + (("reply_topic",) if route.allow_reply_topic else ())
