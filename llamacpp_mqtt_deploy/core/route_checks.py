"""What is wrong with the topics of the configured routes: overlaps, replies that would be read again, unfit templates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from llamacpp_mqtt_deploy.core.routes import (
    DEFAULT_ROUTE,
    ID_FIELDS,
    MAX_TOPIC_BYTES,
    SESSION_FIELD,
    ReplyTemplate,
    RouteTopics,
    SessionTopic,
    TopicTemplate,
    is_level,
    is_session,
    route_topics,
    with_default,
)
from llamacpp_mqtt_deploy.core.topics import filters_overlap


@dataclass(frozen=True, slots=True)
class _Use:
    """One set of topics and what it is for."""

    what: str
    topic: str
    filters: tuple[str, ...]
    reads: bool


def check_routes(*, root: str, worker_id: str, routes: Sequence[RouteTopics]) -> list[str]:
    """Sentences about what is wrong with these topics; empty when they can be served."""
    faults = [
        f'mqtt.{key} is "{_shown(value)}": expected 1 to 64 of the characters A-Z a-z 0-9 _ . -'
        for key, value in (("root", root), ("worker_id", worker_id))
        if not is_level(value)
    ]
    names = [route.name for route in routes]
    faults += [f"route {name} is configured twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for route in routes:
        faults += _check_templates(root, route)
    if faults:
        return faults
    uses = list(_uses(root, with_default(root, routes)))
    return [fault for one, other in combinations(uses, 2) if (fault := _clash(one, other))]


def _check_templates(root: str, route: RouteTopics) -> Iterator[str]:
    where = f"routes.{route.name}"
    if not is_level(route.name):
        yield f'"{_shown(route.name)}" is no name for a route: expected 1 to 64 of the characters A-Z a-z 0-9 _ . -'
        return
    if route.name == DEFAULT_ROUTE and route != route_topics(root=root, name=DEFAULT_ROUTE):
        # Clients, access lists and dashboards find a worker by these topics; an application gets a route of its own.
        yield f"{where}: its topics are fixed; add another route for other topics or payload sessions"
        return
    for key, template in (
        ("request", route.request),
        ("prompt_template_topic", route.prompt_template_topic),
        ("control", route.control),
    ):
        if template is not None:
            yield from (f'{where}.{key} "{_shown(template)}" {fault}' for fault in _template_faults(template))
    yield from (f'{where}.reply "{_shown(route.reply)}" {fault}' for fault in _reply_faults(route))
    yield from _session_topic_faults(where, route)
    if route.prompt_template_topic is not None:
        named = SESSION_FIELD in route.prompt_template_topic.split("/")
        if named == route.trust_payload_session:
            yield (
                f"{where}.prompt_template_topic must {'hold no' if named else 'hold'} {SESSION_FIELD}, as its request "
                f"{'topic holds none' if named else 'topic does'}"
            )
    has_session = SESSION_FIELD in route.request.split("/")
    if SESSION_FIELD not in route.reply.split("/"):
        yield f"{where}.reply needs a level {SESSION_FIELD}: without it every client reads every answer"
    if route.default_session is not None:
        if not is_session(route.default_session):
            yield f'{where}.default_session "{_shown(route.default_session)}" is no session path'
        if not route.trust_payload_session:
            yield f"{where}.default_session: the topic names the session here; it needs trust_payload_session = true"
    if route.trust_payload_session:
        if has_session:
            yield (
                f"{where}.request names the session with {SESSION_FIELD}, and trust_payload_session takes it from the "
                "payload: remove one of the two"
            )
        if route.control is not None:
            yield (
                f"{where}.control: a route with trust_payload_session has no control topic, as anybody could cancel and "
                "delete with it"
            )
    else:
        if not has_session:
            yield (
                f"{where}.request needs a level {SESSION_FIELD}, or trust_payload_session = true when clients name the "
                "session in the payload (whoever may publish there can then read and steer every session of the route)"
            )
        if route.control is not None and SESSION_FIELD not in route.control.split("/"):
            yield f"{where}.control needs a level {SESSION_FIELD}"


def _session_topic_faults(where: str, route: RouteTopics) -> Iterator[str]:
    topics = route.session_topics()
    hint, asked, told = route.hint_topic, route.session_topic, route.session_reply_topic
    plain = {"hint_topic": hint, "session_topic": asked, "session_reply_topic": told}
    for key, topic in (topics | {key: topic for key, topic in plain.items() if topic is not None}).items():
        yield from (f'{where}.{key} "{_shown(topic)}" {fault}' for fault in _template_faults(topic))
        named = SESSION_FIELD in topic.split("/")
        if key in topics and not named and not route.trust_payload_session:
            yield f"{where}.{key} needs a level {SESSION_FIELD}: anybody could name anybody's session in the payload"
        if key in ("session_topic", "session_reply_topic") and named:
            yield f"{where}.{key} can hold no {SESSION_FIELD}: who asks for a session has none"
    if hint is not None and SESSION_FIELD not in hint.split("/"):
        yield f"{where}.hint_topic needs a level {SESSION_FIELD}"
    if (asked is None) != (told is None):
        yield f"{where}: session_topic and session_reply_topic go together"


def _reply_faults(route: RouteTopics) -> Iterator[str]:
    levels = route.reply.split("/")
    while levels and levels[-1] in ID_FIELDS:
        del levels[-1]
    ids = route.reply.split("/")[len(levels) :]
    if any(level in ID_FIELDS for level in levels) or len(set(ids)) < len(ids):
        yield f"may hold {' and '.join(ID_FIELDS)} only at its end, each once"
    rest = "/".join(level for level in levels if level not in ID_FIELDS)
    yield from _template_faults(rest, ids=len(ids))
    template = TopicTemplate.cut(rest)
    if route.allow_reply_topic and (not template.head or template.tail):
        yield (
            f"does not go with allow_reply_topic: that lets clients name a topic below what stands before {SESSION_FIELD}, "
            f"so it has to begin with a level and to have none of its own after {SESSION_FIELD}"
        )


def _template_faults(template: str, *, ids: int = 0) -> Iterator[str]:
    if not template:
        yield "is empty"
        return
    if any(ord(c) < 0x20 or 0x7F <= ord(c) <= 0x9F or 0xD800 <= ord(c) <= 0xDFFF or ord(c) == 0xFEFF for c in template):
        # A broker closes the connection for such a topic, and again after each reconnect.
        yield "holds a control character or half of a surrogate pair"
    if "+" in template or "#" in template:
        yield f"holds a wildcard: write {SESSION_FIELD} where the session stands"
    if template.startswith("$"):
        yield "begins with $, which belongs to the broker"
    levels = template.split("/")
    if "" in levels:
        yield "has an empty level"
    rest = [level for level in levels if level != SESSION_FIELD]
    if len(levels) - len(rest) > 1:
        yield f"has {SESSION_FIELD} more than once"
    if any("{" in level or "}" in level for level in rest):
        yield f"may hold nothing in braces but {SESSION_FIELD} as a level of its own"
    room = MAX_TOPIC_BYTES - 64 if len(rest) < len(levels) else MAX_TOPIC_BYTES
    # Ids are mostly UUIDs.
    if len("/".join(rest).encode("utf-8", "surrogatepass")) + 1 > room - 37 * ids:
        yield f"is too long: a topic may have {MAX_TOPIC_BYTES} bytes, 64 of them for the session"


def _uses(root: str, routes: Iterable[RouteTopics]) -> Iterator[_Use]:
    for route in routes:
        for key, template, reads in (
            ("request", route.request, True),
            ("prompt_template_topic", route.prompt_template_topic, True),
            ("control", route.control, True),
            ("reply", route.reply, False),
        ):
            if template is not None:
                filters = TopicTemplate.cut(template).filters() if reads else _reply(route).filters()
                yield _Use(f"routes.{route.name}.{key}", template, tuple(filters), reads)
        for key, topic in route.session_topics().items():
            yield _Use(f"routes.{route.name}.{key}", topic, tuple(SessionTopic.cut(topic).filters()), True)
        for key, reads in (("hint_topic", False), ("session_topic", True), ("session_reply_topic", False)):
            topic = getattr(route, key)
            if topic is not None:
                yield _Use(f"routes.{route.name}.{key}", topic, tuple(TopicTemplate.cut(topic).filters()), reads)
    # Of all workers, not only of this one: an answer on another worker's admin topic would be an order to it.
    yield _Use("the admin topic", f"{root}/admin/{{worker}}", (f"{root}/admin/+",), True)
    for kind in ("admin-reply", "status", "health"):
        yield _Use(f"the {kind} topic", f"{root}/{kind}/{{worker}}", (f"{root}/{kind}/+",), False)


def _reply(route: RouteTopics) -> ReplyTemplate:
    return ReplyTemplate.cut(route.reply, free=route.allow_reply_topic)


def _clash(one: _Use, other: _Use) -> str | None:
    if not any(filters_overlap(mine, yours) for mine in one.filters for yours in other.filters):
        return None
    both = f"{one.what} ({one.topic}) and {other.what} ({other.topic}) match the same topics"
    match one.reads, other.reads:
        case True, True:
            return f"{both}: a message would run twice"
        case False, False:
            return f"{both}: answers to different clients would mix"
        case _:
            return f"{both}: the worker would read its own messages"


def _shown(text: str) -> str:
    return text[:80].encode("unicode_escape").decode("ascii")
