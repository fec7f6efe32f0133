"""Other names for models: what an alias stands for, and which aliases cannot be used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from llamacpp_mqtt_deploy.core.payloads import shown

DEFAULT_MODEL = "default"
"""What an alias stands for when it means the model of requests that name none."""

MAX_NAME_CHARS = 256
"""Longest name that the request field `model` may hold."""


def resolve(model: str, aliases: Mapping[str, str]) -> str | None:
    """The name that the engine knows; None for the model of requests that name none."""
    if model not in aliases:
        return model
    target = aliases[model]
    return None if target == DEFAULT_MODEL else target


def check_aliases(aliases: Mapping[str, str], *, models: Collection[str]) -> Iterator[str]:
    """Sentences about what is wrong with these aliases beside the configured names of models; none when all can be used.

    An alias may stand for a name that is not configured: an engine has names of its own, and tells them when it runs.
    """
    for alias, target in aliases.items():
        for name in (alias, target):
            if not 1 <= len(name) <= MAX_NAME_CHARS:
                yield f"{shown(name)} is no name for a model: expected 1 to {MAX_NAME_CHARS} characters"
        if alias == DEFAULT_MODEL:
            yield f"{shown(alias)} cannot be an alias: as a target it means the model of requests that name none"
        if alias in models:
            yield f"{shown(alias)} is the name of a model as well; a request could mean either, remove one of the two"
        if target in aliases:
            yield f"{shown(alias)} stands for {shown(target)}, which is an alias itself; name the model"
