"""Topics as the wire sees them: what may be published, what may be subscribed, and which filter takes which topic."""

from __future__ import annotations

from functools import lru_cache

MAX_TOPIC_BYTES = 65535
"""A length prefix of two bytes (MQTT 5 section 1.5.4)."""

MAX_LEVELS = 200
"""mosquitto 2.0 disconnects whoever publishes to more than 200 levels (TOPIC_HIERARCHY_LIMIT)."""


def _text_fault(text: str) -> str | None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "it holds a lone surrogate, which UTF-8 cannot carry"
    if size > MAX_TOPIC_BYTES:
        return f"it has {size} bytes, more than {MAX_TOPIC_BYTES}"
    if text.count("/") >= MAX_LEVELS:
        return f"it has more than {MAX_LEVELS} levels"
    for character in text:
        if character < " " or "\x7f" <= character <= "\x9f":
            return f"it holds the control character U+{ord(character):04X}"
        # MQTT 5 section 1.5.4: a receiver may disconnect on a non-character.
        if "\ufdd0" <= character <= "\ufdef" or ord(character) & 0xFFFE == 0xFFFE:
            return f"it holds the non-character U+{ord(character):04X}"
    return None


@lru_cache(maxsize=4096)
def topic_fault(topic: str) -> str | None:
    """Say why no broker would take a publish to this topic; None when it is fit.

    paho checks wildcards and length only. A broker disconnects on the rest, and a QoS 1 publish is sent again after each
    reconnect: one unfit topic would loop for ever. `$` topics belong to the broker (`$CONTROL` administers it).
    """
    if not topic:
        return "it is empty"
    if topic.startswith("$"):
        return "topics that begin with $ belong to the broker"
    if "+" in topic or "#" in topic:
        return "it holds a wildcard"
    return _text_fault(topic)


def filter_fault(topic_filter: str) -> str | None:
    """Say why this topic filter is not legal; None when it is (MQTT 5 section 4.7.1)."""
    if not topic_filter:
        return "it is empty"
    levels = topic_filter.split("/")
    for position, level in enumerate(levels):
        if "#" in level and (level != "#" or position != len(levels) - 1):
            return "# must stand alone, at the end"
        if "+" in level and level != "+":
            return "+ must stand alone in its level"
    return _text_fault(topic_filter)


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a subscription to the filter receives the topic (MQTT 5 section 4.7)."""
    if topic_filter == topic:
        return True
    wanted, found = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for position, level in enumerate(wanted):
        if level == "#":
            return True
        if position >= len(found) or level not in ("+", found[position]):
            return False
    return len(wanted) == len(found)
