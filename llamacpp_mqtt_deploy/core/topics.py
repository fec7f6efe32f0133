"""The map of the bus: a topic becomes an address (kind, route, session, reply topic), and configured topics are checked once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from llamacpp_mqtt_deploy.core.errors import BadRequest

DEFAULT_ROUTE = "default"
SESSION_FIELD = "{session}"

MAX_TOPIC_BYTES = 200
"""Longest topic that is read or written, in bytes; brokers and small clients stop well below the 65535 of MQTT 4.7.3."""

SESSION_LEVELS = (1, 2)
"""A session path is `{name}` or `{user}/{name}`."""

# No anchors: always used with fullmatch, because `$` lets "abc\n" through and one such topic in a publish makes the broker
# close the connection after every reconnect.
LEVEL = r"[A-Za-z0-9_.-]{1,64}"
SESSION = rf"{LEVEL}(?:/{LEVEL})?"
_LEVEL = re.compile(LEVEL)
_SESSION = re.compile(SESSION)

AddressKind = Literal["request", "control", "admin"]


def is_level(text: str) -> bool:
    """Whether `text` may be one level of a session path, a worker id or a root."""
    return _LEVEL.fullmatch(text) is not None


def is_session(text: str) -> bool:
    """Whether `text` is a session path: one or two levels."""
    return _SESSION.fullmatch(text) is not None


# --- filters ---------------------------------------------------------------------------------------------------------


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


# --- templates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTopics:
    """The topics of one route as templates; `{session}` stands for a session path, always as a level of its own."""

    name: str
    request: str
    reply: str
    control: str | None = None
    trust_payload_session: bool = False


def route_topics(
    *,
    root: str,
    name: str,
    request: str | None = None,
    reply: str | None = None,
    control: str | None = None,
    trust_payload_session: bool = False,
) -> RouteTopics:
    """The topics of a configured route, with those left out filled in.

    `default` has `{root}/request/{session}`, `{root}/reply/{session}` and `{root}/control/{session}`. Any other route lives
    below the root under its own name, `{root}/{name}/request/{session}` and so on, so that two workers with different roots
    never share a topic by accident. A route whose session comes from the payload gets `{root}/{name}/request` and no
    control topic.
    """
    base = root if name == DEFAULT_ROUTE else f"{root}/{name}"
    if request is None:
        request = f"{base}/request" if trust_payload_session else f"{base}/request/{SESSION_FIELD}"
    if reply is None:
        reply = f"{base}/reply/{SESSION_FIELD}"
    if control is None and not trust_payload_session:
        control = f"{base}/control/{SESSION_FIELD}"
    return RouteTopics(
        name=name, request=request, reply=reply, control=control, trust_payload_session=trust_payload_session
    )


@dataclass(frozen=True, slots=True)
class _Template:
    """A topic template cut at its `{session}`; `head` and `tail` are levels, `open` is false without `{session}`."""

    head: tuple[str, ...]
    tail: tuple[str, ...]
    open: bool

    @classmethod
    def cut(cls, text: str) -> _Template:
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


# --- addresses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a message came from and where its answers go.

    `session` and `reply_topic` are None for a request whose session is still in its payload: `TopicMap.with_session`
    completes it. `first_level` is what rate limits, quotas and fair turns count by: the first level of the session path,
    which the broker's access list binds to a user, or `route:NAME` where the session comes from the payload and anybody
    can make up as many as he likes. For `admin`, `route` and `first_level` are empty and `reply_topic` is the admin reply
    topic.
    """

    kind: AddressKind
    route: str
    session: str | None
    reply_topic: str | None
    first_level: str


@dataclass(frozen=True, slots=True)
class _Compiled:
    topics: RouteTopics
    request: _Template
    reply: _Template
    control: _Template | None


@dataclass(frozen=True)
class TopicMap:
    """All topics of one worker. `routes` are those of `route_topics`; `default` is added when it is not among them.

    Raises ValueError when `check_routes` finds a fault: a map that would answer itself cannot be made.
    """

    root: str
    worker_id: str
    routes: tuple[RouteTopics, ...] = ()
    _compiled: Mapping[str, _Compiled] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        faults = check_routes(root=self.root, worker_id=self.worker_id, routes=self.routes)
        if faults:
            raise ValueError("; ".join(faults))
        routes = _with_default(self.root, self.routes)
        object.__setattr__(self, "routes", routes)
        compiled = {
            route.name: _Compiled(
                route,
                _Template.cut(route.request),
                _Template.cut(route.reply),
                None if route.control is None else _Template.cut(route.control),
            )
            for route in routes
        }
        object.__setattr__(self, "_compiled", compiled)

    @property
    def admin_topic(self) -> str:
        return f"{self.root}/admin/{self.worker_id}"

    @property
    def admin_reply_topic(self) -> str:
        return f"{self.root}/admin-reply/{self.worker_id}"

    @property
    def status_topic(self) -> str:
        return f"{self.root}/status/{self.worker_id}"

    @property
    def status_filter(self) -> str:
        return f"{self.root}/status/+"

    @property
    def health_topic(self) -> str:
        return f"{self.root}/health/{self.worker_id}"

    def request_filters(self) -> list[str]:
        """What to subscribe to for requests; no two of them match the same topic."""
        return [name for route in self._compiled.values() for name in route.request.filters()]

    def control_filters(self) -> list[str]:
        """What to subscribe to for control messages; `admin_topic` is not among them."""
        return [name for route in self._compiled.values() if route.control for name in route.control.filters()]

    def address(self, topic: str) -> Address | None:
        """The address of a received message; None when no route owns the topic or its session path breaks the rules."""
        if topic == self.admin_topic:
            return Address(kind="admin", route="", session=None, reply_topic=self.admin_reply_topic, first_level="")
        if len(topic.encode("utf-8", "surrogatepass")) > MAX_TOPIC_BYTES:
            return None
        levels = topic.split("/")
        for route in self._compiled.values():
            session = route.request.read(levels)
            if session is not None:
                return self._request_address(route, session)
            session = route.control.read(levels) if route.control else None
            if session:
                return _complete("control", route, session)
        return None

    def with_session(self, route: str, session: str | None) -> Address:
        """The address of a request of `route` whose session stands in its payload.

        Raises BadRequest when it is no session path, or too long for the route's reply topic.
        """
        compiled = self._compiled[route]
        if session is None or not is_session(session):
            expected = "one or two levels of letters, digits, _ . and -, each at most 64 characters, joined by /"
            raise BadRequest(f"session_id: expected {expected}", fields={"session_id": expected})
        address = _complete("request", compiled, session)
        if address is None:
            expected = f"shorter: the reply topic must not be longer than {MAX_TOPIC_BYTES} bytes"
            raise BadRequest(f"session_id: expected {expected}", fields={"session_id": expected})
        return address

    def _request_address(self, route: _Compiled, session: str) -> Address | None:
        if session:
            return _complete("request", route, session)
        return Address(
            kind="request",
            route=route.topics.name,
            session=None,
            reply_topic=None,
            first_level=f"route:{route.topics.name}",
        )


def _complete(kind: AddressKind, route: _Compiled, session: str) -> Address | None:
    reply = route.reply.fill(session)
    if len(reply.encode()) > MAX_TOPIC_BYTES:
        return None
    # A session path holds no `:`, so a route cannot be mistaken for a user.
    first = f"route:{route.topics.name}" if route.topics.trust_payload_session else session.split("/", maxsplit=1)[0]
    return Address(kind=kind, route=route.topics.name, session=session, reply_topic=reply, first_level=first)


def _with_default(root: str, routes: Sequence[RouteTopics]) -> tuple[RouteTopics, ...]:
    if any(route.name == DEFAULT_ROUTE for route in routes):
        return tuple(routes)
    return (route_topics(root=root, name=DEFAULT_ROUTE), *routes)


# --- checks ----------------------------------------------------------------------------------------------------------


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
    uses = list(_uses(root, _with_default(root, routes)))
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
    given = (("request", route.request), ("reply", route.reply), ("control", route.control))
    for key, template in given:
        if template is not None:
            yield from (f'{where}.{key} "{_shown(template)}" {fault}' for fault in _template_faults(template))
    has_session = SESSION_FIELD in route.request.split("/")
    if SESSION_FIELD not in route.reply.split("/"):
        yield f"{where}.reply needs a level {SESSION_FIELD}: without it every client reads every answer"
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


def _template_faults(template: str) -> Iterator[str]:
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
    if len("/".join(rest).encode("utf-8", "surrogatepass")) + 1 > room:
        yield f"is too long: a topic may have {MAX_TOPIC_BYTES} bytes, 64 of them for the session"


def _uses(root: str, routes: Iterable[RouteTopics]) -> Iterator[_Use]:
    for route in routes:
        for key, template, reads in (
            ("request", route.request, True),
            ("control", route.control, True),
            ("reply", route.reply, False),
        ):
            if template is not None:
                filters = tuple(_Template.cut(template).filters())
                yield _Use(f"routes.{route.name}.{key}", template, filters, reads)
    # Of all workers, not only of this one: an answer on another worker's admin topic would be an order to it.
    yield _Use("the admin topic", f"{root}/admin/{{worker}}", (f"{root}/admin/+",), True)
    for kind in ("admin-reply", "status", "health"):
        yield _Use(f"the {kind} topic", f"{root}/{kind}/{{worker}}", (f"{root}/{kind}/+",), False)


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
