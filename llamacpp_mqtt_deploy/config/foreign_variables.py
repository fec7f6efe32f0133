"""Environment variables of programs that this worker takes over from: named with ours, since silence would mislead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

# Names that speak of a model or a broker; whoever sets one means this worker or its predecessor.
_SPECIFIC: Mapping[str, str] = {
    "LLM_SERVER_URL": "engine.url",
    "LLM_API_KEY": "engine.api_key",
    "LLM_MODEL": "engine.model",
    "LLM_TIMEOUT": "generation.timeout_s",
    "LLM_TEMPERATURE": "generation.temperature",
    "LLM_TOP_P": "generation.top_p",
    "LLM_MAX_TOKENS": "generation.max_tokens",
    "LLM_SYSTEM_PROMPT": "generation.system_prompt",
    "MQTT_BROKER_HOST": "mqtt.host",
    "MQTT_BROKER_PORT": "mqtt.port",
    "MQTT_USERNAME": "mqtt.username",
    "MQTT_PASSWORD": "mqtt.password",
    "AGENT_MODEL": "engine.model",
}
# Names that any program may use; told only beside one of the others.
_COMMON: Mapping[str, str] = {
    "STREAM_TIMEOUT": "engine.chunk_timeout_s",
    "BUFFER_SIZE": "streaming.coalesce_max_chars",
    "LOG_LEVEL": "logging.level",
}
# Names without a counterpart, and why there is none.
_NEEDLESS: Mapping[str, str] = {
    "LLM_COMM_MODE": "answers always stream over MQTT",
}


def hints(environ: Mapping[str, str], *, given: Callable[[str], bool], variable: Callable[[str], str]) -> Iterator[str]:
    """A sentence for each such variable, without its value: it may be a password.

    `given` says whether the user set a key of ours, which settles the matter; `variable` gives the name of ours.
    """
    named = {name for name, value in environ.items() if value}
    specific = named & (_SPECIFIC.keys() | _NEEDLESS.keys())
    told = dict(_SPECIFIC) | (dict(_COMMON) if specific else {})
    for name in sorted(named & told.keys()):
        if not given(told[name]):
            yield f"{name} is set but not read; ours is {variable(told[name])}"
    yield from (f"{name} is set but not read: {_NEEDLESS[name]}" for name in sorted(named & _NEEDLESS.keys()))
