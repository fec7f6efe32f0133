"""What of a changed configuration can come into force while the worker runs, and what needs a restart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamacpp_mqtt_deploy.config.configured_routes import TOPIC_KEYS
from llamacpp_mqtt_deploy.config.settings import Settings

# Sections that are read for each request, timer or line of the log. Everything else is built in at the start: the
# connection, the engine, the store, the topics.
_LIVE_SECTIONS = frozenset({"generation", "streaming", "limits", "status", "home_assistant", "logging"})
_LIVE_KEYS = frozenset(
    {
        "sessions.ttl_s",
        "sessions.max_sessions",
        "sessions.history_tokens",
        "sessions.expose_history",
        "engine.chunk_timeout_s",
        "engine.model",
        "engine.models",
        "engine.aliases",
    }
)
_BUILT_IN_KEYS = frozenset({"logging.format", "limits.startup_timeout_s"})


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The settings to use from now on, the keys that changed in them, and those that wait for a restart."""

    settings: Settings
    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]


def is_live(path: Sequence[str]) -> bool:
    """Whether a change of this key (`("routes", "maze", "model")`) comes into force without a restart."""
    section, key = path[0], path[-1]
    if section == "levels":
        return True
    if section == "routes":
        return key not in TOPIC_KEYS
    name = ".".join(path)
    return name not in _BUILT_IN_KEYS and (section in _LIVE_SECTIONS or name in _LIVE_KEYS)


def reload(old: Settings, new: Settings) -> Reloaded:
    """Take from `new` what can change while the worker runs, and keep the rest of `old`."""
    changed: list[str] = []
    waiting: list[str] = []
    merged: dict[str, Any] = {}
    for section in type(old).model_fields:
        if section == "routes":
            merged[section] = _routes(old, new, changed, waiting)
            continue
        if section == "levels":
            merged[section] = _levels(old, new, changed)
            continue
        if section == "gateway":  # another program's
            continue
        mine, theirs = getattr(old, section), getattr(new, section)
        update = {}
        for key in type(mine).model_fields:
            if getattr(mine, key) == getattr(theirs, key):
                continue
            if is_live((section, key)):
                update[key] = getattr(theirs, key)
                changed.append(f"{section}.{key}")
            else:
                waiting.append(f"{section}.{key}")
        merged[section] = mine.model_copy(update=update)
    return Reloaded(old.model_copy(update=merged), tuple(changed), tuple(waiting))


def _levels(old: Settings, new: Settings, changed: list[str]) -> dict[str, Any]:
    names = sorted({*old.levels, *new.levels})
    changed += [f"levels.{name}" for name in names if old.levels.get(name) != new.levels.get(name)]
    return dict(new.levels)


def _routes(old: Settings, new: Settings, changed: list[str], waiting: list[str]) -> dict[str, Any]:
    """Routes that stay may change in all but their topics; new and removed ones need new subscriptions."""
    routes = dict(old.routes)
    for name in sorted({*old.routes, *new.routes}):
        mine, theirs = old.routes.get(name), new.routes.get(name)
        if mine is None or theirs is None:
            waiting.append(f"routes.{name}")
            continue
        different = [key for key in type(mine).model_fields if getattr(mine, key) != getattr(theirs, key)]
        live = [key for key in different if is_live(("routes", name, key))]
        waiting += [f"routes.{name}.{key}" for key in different if key not in live]
        changed += [f"routes.{name}.{key}" for key in live]
        if live:
            topics = {key: getattr(mine, key) for key in TOPIC_KEYS}
            routes[name] = theirs.model_copy(update=topics)
    return routes
