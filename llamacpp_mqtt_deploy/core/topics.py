"""MQTT topics and filters: what may be published and subscribed, which filter takes which topic, which filters overlap."""

from __future__ import annotations

from functools import lru_cache

MQTT_TOPIC_BYTES = 65535
"""A length prefix of two bytes (MQTT 5 section 1.5.4)."""

MAX_LEVELS = 200
"""mosquitto 2.0 disconnects whoever publishes to more than 200 levels (TOPIC_HIERARCHY_LIMIT)."""


def owner_levels(root: str) -> int:
    """How many levels of a topic name its client: `{root}/request/{first level}` and the like, which an access list gives to one."""
    return root.count("/") + 3


def _text_fault(text: str) -> str | None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "it holds a lone surrogate, which UTF-8 cannot carry"
    if size > MQTT_TOPIC_BYTES:
        return f"it has {size} bytes, more than {MQTT_TOPIC_BYTES}"
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


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT filter matches a topic (MQTT 5, section 4.7)."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    # MQTT 4.7.2: a wildcard in the first level matches no topic that begins with `$`.
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for number, level in enumerate(wanted):
        if level == "#":
            return True
        if number >= len(levels) or level not in ("+", levels[number]):
            return False
    return len(wanted) == len(levels)


def filters_overlap(one: str, other: str) -> bool:
    """Whether some topic is matched by both MQTT filters; a topic without wildcards is a filter too."""
    left, right = one.split("/"), other.split("/")
    for mine, yours in ((left[0], right[0]), (right[0], left[0])):
        if mine in ("+", "#") and yours.startswith("$"):
            return False
    for mine, yours in zip(left, right, strict=False):
        if "#" in (mine, yours):
            return True
        if mine != yours and "+" not in (mine, yours):
            return False
    if len(left) == len(right):
        return True
    longer, shared = (left, len(right)) if len(left) > len(right) else (right, len(left))
    # `a/#` matches `a` as well.
    return longer[shared] == "#" and len(longer) == shared + 1
