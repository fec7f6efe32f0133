"""A topic becomes an address: kind of message, route, session path, reply topic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.names import FieldNames
from llamacpp_mqtt_deploy.core.route_checks import check_routes
from llamacpp_mqtt_deploy.core.routes import (
    MAX_TOPIC_BYTES,
    ReplyTemplate,
    RouteTopics,
    SessionTopic,
    TopicTemplate,
    is_level,
    is_session,
    with_default,
)

SessionChange = Literal["reset", "delete", "system_prompt"]
AddressKind = Literal["request", "control", "admin", "new_session"] | SessionChange


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a message came from and where its answers go.

    `session` and `reply_topic` are None for a request whose session is still in its payload: `TopicMap.with_payload`
    completes it; so they are for a change of sessions that its payload names. For `new_session` the reply topic is the one that all
    new sessions are told on. `first_level` is what rate limits, quotas and fair turns count by: the first level of the session path,
    which the broker's access list binds to a user, or `route:NAME` where the session comes from the payload and anybody
    can make up as many as he likes. `templated`: the payload is for the route's prompt template. For `admin`, `route` and `first_level` are empty and `reply_topic` is the admin reply
    topic.
    """

    kind: AddressKind
    route: str
    session: str | None
    reply_topic: str | None
    first_level: str
    templated: bool = False


@dataclass(frozen=True, slots=True)
class _Compiled:
    topics: RouteTopics
    request: TopicTemplate
    templated: TopicTemplate | None
    reply: ReplyTemplate
    control: TopicTemplate | None
    changes: Mapping[SessionChange, SessionTopic]


_CHANGES: Mapping[str, SessionChange] = {
    "reset_topic": "reset",
    "delete_topic": "delete",
    "system_prompt_topic": "system_prompt",
}


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
        routes = with_default(self.root, self.routes)
        object.__setattr__(self, "routes", routes)
        compiled = {
            route.name: _Compiled(
                route,
                TopicTemplate.cut(route.request),
                None if route.prompt_template_topic is None else TopicTemplate.cut(route.prompt_template_topic),
                ReplyTemplate.cut(route.reply, free=route.allow_reply_topic),
                None if route.control is None else TopicTemplate.cut(route.control),
                {_CHANGES[key]: SessionTopic.cut(topic) for key, topic in route.session_topics().items()},
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

    def is_status(self, topic: str) -> bool:
        """Whether `status_filter` matches this topic."""
        return topic.rpartition("/")[0] == f"{self.root}/status"

    def request_filters(self) -> list[str]:
        """What to subscribe to for requests; no two of them match the same topic."""
        return [
            name
            for route in self._compiled.values()
            for template in (route.request, route.templated)
            if template is not None
            for name in template.filters()
        ]

    @property
    def pool_filter(self) -> str:
        """Where pools tell how they are."""
        return f"{self.root}/pool/+"

    def pool_topic(self, pool: str) -> str:
        return f"{self.root}/pool/{pool}"

    def control_filters(self) -> list[str]:
        """What to subscribe to for control messages, and for all else that clients send beside requests; `admin_topic` is not
        among them."""
        found: list[str] = []
        for route in self._compiled.values():
            found += route.control.filters() if route.control else []
            for template in route.changes.values():
                found += template.filters()
            found += [route.topics.session_topic] if route.topics.session_topic else []
        return found

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
            other = self._other_address(route, topic, levels)
            if other is not None:
                return other
        return None

    def hint_topic(self, route: str, session: str) -> str | None:
        """Where clients of this session hear what came of a change; None where the route has no such topic."""
        template = self._compiled[route].topics.hint_topic
        topic = None if template is None else TopicTemplate.cut(template).fill(session)
        return None if topic is None or len(topic.encode()) > MAX_TOPIC_BYTES else topic

    def _other_address(self, route: _Compiled, topic: str, levels: list[str]) -> Address | None:
        session = None if route.templated is None else route.templated.read(levels)
        if session is not None:
            address = self._request_address(route, session)
            return None if address is None else replace(address, templated=True)
        for kind, template in route.changes.items():
            session = template.read(levels)
            if session:
                return _complete(kind, route, session)
            if session is not None:
                return _of_route(kind, route, None)
        if topic == route.topics.session_topic:
            return _of_route("new_session", route, route.topics.session_reply_topic)
        return None

    def with_payload(self, address: Address, body: Mapping[str, Any], names: FieldNames) -> Address:
        """The address of a request whose payload was read: the session where it stands in it, and the reply topic where ids of the
        payload belong to that, or it names one. `names` are those of the route.

        Raises BadRequest, with the fields at fault, for what cannot be a part of a topic.
        """
        route = self._compiled[address.route]
        if address.session is None:
            session = body.get("session_id", route.topics.default_session)
            found = self.with_session(address.route, session, field_name=names.of("session_id"))
            address = replace(found, templated=address.templated)
        if route.reply.by_session:
            return address
        assert address.session is not None
        named = body.get("reply_topic") if route.reply.free else None
        if named is not None:
            if not isinstance(named, str) or not self._may_name(route, named, address.session):
                below = "/".join(route.reply.session.head)
                raise _bad(names.of("reply_topic"), f"a topic below {below}/ of at most {MAX_TOPIC_BYTES} bytes")
            return replace(address, reply_topic=named)
        ids = {name: body.get(name) for name in route.reply.ids}
        for name, value in ids.items():
            if value is not None and not (isinstance(value, str) and is_level(value)):
                raise _bad(names.of(name), "1 to 64 letters, digits, _ . or -")
        topic = route.reply.fill(address.session, ids)
        if len(topic.encode()) > MAX_TOPIC_BYTES:
            raise _bad(names.of(route.reply.ids[-1]), f"shorter: {_TOO_LONG}")
        return replace(address, reply_topic=topic)

    def with_ids(self, address: Address, ids: Mapping[str, Any]) -> Address:
        """The same for the answer to a request that is refused: what cannot be a part of a topic is passed over."""
        route = self._compiled[address.route]
        if address.session is None:
            session = ids.get("session_id", route.topics.default_session)
            found = self.find_session(address.route, session) if isinstance(session, str) else None
            if found is None:
                return address
            address = found
        if route.reply.by_session:
            return address
        assert address.session is not None
        named = ids.get("reply_topic")
        if isinstance(named, str) and self._may_name(route, named, address.session):
            return replace(address, reply_topic=named)
        levels = {name: value for name, value in ids.items() if isinstance(value, str) and is_level(value)}
        topic = route.reply.fill(address.session, levels)
        return replace(address, reply_topic=topic) if len(topic.encode()) <= MAX_TOPIC_BYTES else address

    @staticmethod
    def _may_name(route: _Compiled, topic: str, session: str) -> bool:
        if len(topic.encode("utf-8", "surrogatepass")) > MAX_TOPIC_BYTES:
            return False
        return route.reply.takes(topic, session, any_session=route.topics.trust_payload_session)

    def with_session(self, route: str, session: Any, *, field_name: str = "session_id") -> Address:
        """The address of a request of `route` whose session stands in its payload, in the field of this name.

        Raises BadRequest when it is no session path, or too long for the route's reply topic.
        """
        address = self.find_session(route, session) if isinstance(session, str) else None
        if address is not None:
            return address
        if not isinstance(session, str) or not is_session(session):
            raise _bad(
                field_name, "one or two levels of letters, digits, _ . and -, each at most 64 characters, joined by /"
            )
        raise _bad(field_name, f"shorter: {_TOO_LONG}")

    def find_session(self, route: str, session: str) -> Address | None:
        """The same for an answer to a request that is refused anyway; None when there is no such address."""
        return _complete("request", self._compiled[route], session) if is_session(session) else None

    def _request_address(self, route: _Compiled, session: str) -> Address | None:
        if session:
            return _complete("request", route, session)
        return _of_route("request", route, None)


def _of_route(kind: AddressKind, route: _Compiled, reply_topic: str | None) -> Address:
    """Of a message whose topic names no session."""
    name = route.topics.name
    return Address(kind=kind, route=name, session=None, reply_topic=reply_topic, first_level=f"route:{name}")


_TOO_LONG = f"the reply topic must not be longer than {MAX_TOPIC_BYTES} bytes"


def _bad(name: str, expected: str) -> BadRequest:
    return BadRequest(f"{name}: expected {expected}", fields={name: expected})


def _complete(kind: AddressKind, route: _Compiled, session: str) -> Address | None:
    reply = route.reply.fill(session, {})
    if len(reply.encode()) > MAX_TOPIC_BYTES:
        return None
    # A session path holds no `:`, so a route cannot be mistaken for a user.
    first = f"route:{route.topics.name}" if route.topics.trust_payload_session else session.partition("/")[0]
    return Address(kind=kind, route=route.topics.name, session=session, reply_topic=reply, first_level=first)
