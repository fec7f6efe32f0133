"""The topics of a route as templates, and session paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_ROUTE = "default"
SESSION_FIELD = "{session}"
ID_FIELDS = ("{client_id}", "{request_id}")
"""May stand at the end of a reply topic: what the payload holds under these names, each one level."""

MAX_TOPIC_BYTES = 200
"""Longest topic that is read or written, in bytes; brokers and small clients stop well below the 65535 of MQTT 4.7.3."""

SESSION_LEVELS = (1, 2)
"""A session path is `{name}` or `{user}/{name}`."""

MOST_REPLY_LEVELS = SESSION_LEVELS[-1] + len(ID_FIELDS)
"""Levels that a client may name below the beginning of its route's reply topics: session path, client and request."""

# No anchors: always used with fullmatch, because `$` lets "abc\n" through and one such topic in a publish makes the broker
# close the connection after every reconnect.
LEVEL = r"[A-Za-z0-9_.-]{1,64}"
SESSION = rf"{LEVEL}(?:/{LEVEL})?"
_LEVEL = re.compile(LEVEL)
_SESSION = re.compile(SESSION)


def is_level(text: str) -> bool:
    """Whether `text` may be one level of a session path, a worker id or a root."""
    return _LEVEL.fullmatch(text) is not None


def is_session(text: str) -> bool:
    """Whether `text` is a session path: one or two levels."""
    return _SESSION.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTopics:
    """The topics of one route as templates; `{session}` stands for a session path, always as a level of its own.

    `reply` may end with `{client_id}` and `{request_id}`. With `allow_reply_topic` a payload may name the reply topic itself, below
    what stands before `{session}` in `reply`. `default_session` is that of payloads that name none.

    `prompt_template_topic` is a second request topic, for payloads that the route's template makes prompts of.
    `reset_topic`, `delete_topic` and `system_prompt_topic` take what clients want of a session (`SessionTopic`), `hint_topic` tells
    what came of it. A message on `session_topic` is answered with a new session on `session_reply_topic`.
    """

    name: str
    request: str
    reply: str
    control: str | None = None
    trust_payload_session: bool = False
    allow_reply_topic: bool = False
    default_session: str | None = None
    prompt_template_topic: str | None = None
    reset_topic: str | None = None
    delete_topic: str | None = None
    system_prompt_topic: str | None = None
    hint_topic: str | None = None
    session_topic: str | None = None
    session_reply_topic: str | None = None

    def session_topics(self) -> dict[str, str]:
        """The topics on which clients change a session, by the setting's name."""
        found = {key: getattr(self, key) for key in ("reset_topic", "delete_topic", "system_prompt_topic")}
        return {key: topic for key, topic in found.items() if topic is not None}


def route_topics(
    *,
    root: str,
    name: str,
    request: str | None = None,
    reply: str | None = None,
    control: str | None = None,
    trust_payload_session: bool = False,
    **more: Any,
) -> RouteTopics:
    """The topics of a configured route, with those left out filled in.

    `default` has `{root}/request/{session}`, `{root}/reply/{session}` and `{root}/control/{session}`. Any other route is
    below the root under its own name, `{root}/{name}/request/{session}` and so on, so that two workers with different roots
    never share a topic by accident. A route whose session comes from the payload gets `{root}/{name}/request` and no
    control topic. `more` are those of `RouteTopics` that have no default.
    """
    base = root if name == DEFAULT_ROUTE else f"{root}/{name}"
    if request is None:
        request = f"{base}/request" if trust_payload_session else f"{base}/request/{SESSION_FIELD}"
    if reply is None:
        reply = f"{base}/reply/{SESSION_FIELD}"
    if control is None and not trust_payload_session:
        control = f"{base}/control/{SESSION_FIELD}"
    return RouteTopics(
        name=name, request=request, reply=reply, control=control, trust_payload_session=trust_payload_session, **more
    )


@dataclass(frozen=True, slots=True)
class TopicTemplate:
    """A topic template cut at its `{session}`; `head` and `tail` are levels, `open` is false without `{session}`."""

    head: tuple[str, ...]
    tail: tuple[str, ...]
    open: bool

    @classmethod
    def cut(cls, text: str) -> TopicTemplate:
        levels = text.split("/")
        if SESSION_FIELD not in levels:
            return cls(tuple(levels), (), False)
        at = levels.index(SESSION_FIELD)
        return cls(tuple(levels[:at]), tuple(levels[at + 1 :]), True)

    def filters(self) -> list[str]:
        if not self.open:
            return ["/".join(self.head)]
        return ["/".join((*self.head, *["+"] * count, *self.tail)) for count in SESSION_LEVELS]

    def fill(self, session: str) -> str:
        return "/".join((*self.head, session, *self.tail)) if self.open else "/".join(self.head)

    def read(self, levels: Sequence[str]) -> str | None:
        """The session path in a topic; None when the topic does not fit, "" when the template has no `{session}`."""
        if not self.open:
            return "" if tuple(levels) == self.head else None
        first, last = len(self.head), len(levels) - len(self.tail)
        if last - first not in SESSION_LEVELS:
            return None
        if tuple(levels[:first]) != self.head or tuple(levels[last:]) != self.tail:
            return None
        session = levels[first:last]
        return "/".join(session) if all(map(is_level, session)) else None


@dataclass(frozen=True, slots=True)
class SessionTopic:
    """A topic on which clients change a session: with `{session}`, or without, where the session stands in the payload or is put
    behind the topic."""

    template: TopicTemplate

    @classmethod
    def cut(cls, text: str) -> SessionTopic:
        return cls(TopicTemplate.cut(text))

    def filters(self) -> list[str]:
        if self.template.open:
            return self.template.filters()
        return ["/".join((*self.template.head, *["+"] * count)) for count in (0, *SESSION_LEVELS)]

    def read(self, levels: Sequence[str]) -> str | None:
        """The session path in a topic; None when the topic does not fit, "" when it names no session."""
        template = self.template
        if not template.open and len(levels) > len(template.head):
            template = TopicTemplate(template.head, (), open=True)
        return template.read(levels)


@dataclass(frozen=True, slots=True)
class ReplyTemplate:
    """A template of reply topics: what `TopicTemplate` has, and ids of the payload behind it.

    `free`: clients may name the topic themselves, below `session.head`.
    """

    session: TopicTemplate
    ids: tuple[str, ...]
    free: bool

    @classmethod
    def cut(cls, text: str, *, free: bool = False) -> ReplyTemplate:
        levels = text.split("/")
        end = len(levels)
        while end and levels[end - 1] in ID_FIELDS:
            end -= 1
        names = tuple(level.strip("{}") for level in levels[end:])
        return cls(TopicTemplate.cut("/".join(levels[:end])), names, free)

    @property
    def by_session(self) -> bool:
        """Whether the session alone tells the topic."""
        return not (self.ids or self.free)

    def filters(self) -> list[str]:
        """Filters for all topics that may come of it."""
        found = [
            "/".join((known, *["+"] * more)) for known in self.session.filters() for more in range(len(self.ids) + 1)
        ]
        if self.free:
            found += ["/".join((*self.session.head, *["+"] * count)) for count in range(1, MOST_REPLY_LEVELS + 1)]
        return list(dict.fromkeys(found))

    def fill(self, session: str, ids: Mapping[str, str | None]) -> str:
        """The topic; it ends before the first id that is not there."""
        known: list[str] = []
        for name in self.ids:
            value = ids.get(name)
            if value is None:
                break
            known.append(value)
        return "/".join((self.session.fill(session), *known))

    def takes(self, topic: str, session: str, *, any_session: bool) -> bool:
        """Whether a client of this session may name this topic; `any_session` where it may name any session, too."""
        below = topic.split("/")
        first = len(self.session.head)
        wanted = () if any_session else tuple(session.split("/"))
        found = tuple(below[first:])
        return (
            self.free
            and tuple(below[:first]) == self.session.head
            and 1 <= len(found) <= MOST_REPLY_LEVELS
            and all(map(is_level, found))
            and found[: len(wanted)] == wanted
        )


def with_default(root: str, routes: Sequence[RouteTopics]) -> tuple[RouteTopics, ...]:
    """The routes, with `default` first when it is not among them."""
    if any(route.name == DEFAULT_ROUTE for route in routes):
        return tuple(routes)
    return (route_topics(root=root, name=DEFAULT_ROUTE), *routes)
