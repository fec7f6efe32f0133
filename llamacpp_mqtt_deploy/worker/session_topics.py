"""What clients ask for on topics of a route beside requests and controls: a new session, a reset, a new system prompt."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

import structlog

from llamacpp_mqtt_deploy.core.addresses import Address, SessionChange, TopicMap
from llamacpp_mqtt_deploy.core.errors import BadRequest, Busy, RequestError, Unsupported
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.formats.rendering import PLAIN_TEXT
from llamacpp_mqtt_deploy.core.session_changes import WantedChange, read_change
from llamacpp_mqtt_deploy.ports import Link, SessionPrompts, Store, StoreError
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.client_work import ClientWork
from llamacpp_mqtt_deploy.worker.control import Controls
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.journal_clock import wall
from llamacpp_mqtt_deploy.worker.message_log import MessageLog
from llamacpp_mqtt_deploy.worker.policies import Policies, RoutePolicy
from llamacpp_mqtt_deploy.worker.refusals import Received

log = structlog.get_logger(__name__)

CHANGES: tuple[str, ...] = get_args(SessionChange)

# Between two such pieces it is the turn of other clients: each session is a commit of its own.
_SESSIONS_AT_ONCE = 16

_SESSION_BYTES = 16
"""Of random: nobody finds the session of somebody else by trying."""

_HINTS = {"reset": "History cleared", "system_prompt": "Template updated"}
"""What clients that were there before this worker are used to read; a session that is gone hears nothing."""


class SessionTopics:
    """Called by the intake's thread; what may wait for the disk is left to `work`."""

    def __init__(
        self,
        *,
        topics: TopicMap,
        answers: Answers,
        link: Link,
        store: Store,
        registry: JobRegistry,
        controls: Controls,
        work: ClientWork,
        policies: Callable[[], Policies],
        message_log: MessageLog,
        now: Callable[[], float] = wall,
    ) -> None:
        self._topics = topics
        self._answers = answers
        self._link = link
        self._store = store
        self._registry = registry
        self._controls = controls
        self._work = work
        self._policies = policies
        self._log = message_log
        self._now = now
        self._lock = threading.Lock()
        self._whole_routes: set[str] = set()
        """Routes of which all sessions are being changed."""

    def handle(self, message: Received, address: Address) -> None:
        """Do what the message asks for, or say in the log (and to a session that is known, in a hint) why not."""
        kind = "reset" if address.kind == "request" else address.kind
        try:
            self._registry.count_control(address.first_level)
            if kind == "new_session":
                self._begin_session(message, address)
            else:
                self._change(self._wanted(message, address), address)
        except RequestError as problem:
            self._refused(message, address.session, kind, problem)

    # --- new sessions --------------------------------------------------------------------------------------------------

    def _begin_session(self, message: Received, address: Address) -> None:
        assert address.reply_topic is not None
        session = secrets.token_hex(_SESSION_BYTES)
        self._answers.publish(
            address.reply_topic, session.encode(), correlation=message.correlation, content_type=PLAIN_TEXT
        )

    # --- changes -------------------------------------------------------------------------------------------------------

    def _wanted(self, message: Received, address: Address) -> WantedChange:
        policy = self._policies().routes[address.route]
        if address.kind == "request":
            # An empty message; the topic, or the route, says of which session.
            session = address.session or policy.parse.default_session
            if session is None:
                words = "a session: this route has no default_session"
                raise BadRequest(f"payload: expected {words}", fields={"payload": words})
            return WantedChange(kind="reset", session=session)
        assert address.kind in CHANGES
        wanted = read_change(
            address.kind,  # type: ignore[arg-type]
            message.delivery.payload,
            session=address.session,
            names=policy.parse.names,
            left_out=message.delivery.left_out,
        )
        if wanted.session is None:
            self._check_all(policy)
        if wanted.kind == "system_prompt" or wanted.session is None:
            self._prompts()
        return wanted

    @staticmethod
    def _check_all(policy: RoutePolicy) -> None:
        if not policy.allow_all_sessions:
            message = f"this would change every session of the route; routes.{policy.name}.allow_all_sessions does not allow it"
            raise Unsupported(message)

    def _prompts(self) -> SessionPrompts:
        if isinstance(self._store, SessionPrompts):
            return self._store
        raise Unsupported("the store of this worker keeps no system prompts of sessions and cannot list them")

    def _change(self, wanted: WantedChange, address: Address) -> None:
        if wanted.session is None:
            self._change_all(wanted, address)
            return
        self._controls.change_soon(
            (address.route, wanted.session),
            address.first_level,
            partial(self._change_one, wanted, address.route, wanted.session),
            after=lambda: None,
            failed=partial(self._could_not, address.route, wanted.session),
            cancels=wanted.reset,
        )

    def _change_one(self, wanted: WantedChange, route: str, session: str, _cancelled: int) -> None:
        """In the thread of `work`."""
        key = (route, session)
        try:
            if wanted.kind == "reset":
                self._store.reset(key)
            elif wanted.kind == "delete":
                self._store.delete(key)
            else:
                self._prompts().set_system_prompt(key, wanted.system_prompt, now=self._now(), reset=wanted.reset)
        except StoreError as problem:
            log.error("journal.failed", step=wanted.kind, problem=str(problem), session=session)
            self._could_not(route, session, problem)
            return
        self._log.info("session.changed", f"route:{route}", route=route, session=session, change=wanted.kind)
        if wanted.kind in _HINTS:
            self._hint(route, session, _HINTS[wanted.kind])

    def _change_all(self, wanted: WantedChange, address: Address) -> None:
        """All sessions that are there now, some at a time."""
        with self._lock:
            if address.route in self._whole_routes:
                raise Busy("all sessions of this route are being changed already", retry_after_s=10.0)
            self._whole_routes.add(address.route)
        jobs = [job for job in self._registry.all() if job.key.route == address.route]
        begun = sorted({job.key.session for job in jobs})
        change = _WholeRoute(wanted, address, begun, asked_at=time.monotonic())
        if not self._work.run(address.first_level, partial(self._go_on, change)):
            self._end_all(change)
            raise Busy("too many of your controls wait already; send this one again", retry_after_s=1.0)

    def _go_on(self, change: _WholeRoute) -> None:
        """In the thread of `work`: a few sessions, and the others after whoever waits now."""
        try:
            # Without a place for the rest there are too many who wait, and they wait for this, too.
            while self._next_sessions(change):
                if self._work.run(change.address.first_level, partial(self._go_on, change)):
                    return
        except BaseException:
            self._end_all(change)
            raise
        self._end_all(change)

    def _next_sessions(self, change: _WholeRoute) -> bool:
        """Change some; False when there are no more."""
        try:
            if change.elsewhere is None:
                age_s = time.monotonic() - change.asked_at
                change.elsewhere = self._controls.begun_elsewhere(change.address.route, age_s=age_s)
            sessions = change.next(self._prompts())
        except StoreError as problem:
            log.error("journal.failed", step=change.wanted.kind, problem=str(problem), route=change.address.route)
            return False
        for session in sessions:
            self._controls.change_now(
                (change.address.route, session),
                partial(self._change_one, change.wanted, change.address.route, session),
                failed=partial(self._could_not, change.address.route, session),
                cancels=change.wanted.reset,
            )
        return bool(sessions)

    def _end_all(self, change: _WholeRoute) -> None:
        with self._lock:
            self._whole_routes.discard(change.address.route)

    # --- what is said --------------------------------------------------------------------------------------------------

    def _refused(self, message: Received, session: str | None, kind: str, problem: RequestError) -> None:
        self._log.warning(
            "session.unchanged",
            message.first_level,
            topic=message.shown_topic(),
            change=kind,
            code=problem.code,
            message=problem.message,
        )
        assert message.address is not None
        if session is not None:
            self._hint(message.address.route, session, problem.message)

    def _could_not(self, route: str, session: str, problem: RequestError | StoreError) -> None:
        told = isinstance(problem, RequestError)  # the other's words are for the operator
        self._hint(route, session, str(problem) if told else "The worker's state cannot be read or written.")

    def _hint(self, route: str, session: str, words: str) -> None:
        """Tell the session's clients. At QoS 0: whoever is not there needs it no more, and no one waits for it."""
        topic = self._topics.hint_topic(route, session)
        if topic is not None:
            self._link.publish(topic, encode({"hint": words}), qos=0, share="answer")


class _WholeRoute:
    """A change of all sessions of a route, and how far it has come."""

    def __init__(self, wanted: WantedChange, address: Address, begun: list[str], *, asked_at: float) -> None:
        self.wanted = wanted
        self.address = address
        self.asked_at = asked_at
        self.elsewhere: Sequence[str] | None = None
        """Those that other workers of a pool have begun; None until the database was asked."""
        self._begun = begun
        """Sessions with requests under way: the store may not know them yet."""
        self._up_to: int | None = None
        """The number of the newest session that is still to be changed; None until its first turn."""

    def next(self, store: SessionPrompts) -> list[str]:
        """The next sessions; none when all were changed."""
        if self._up_to is None:
            self._up_to = store.newest_session()
        if self.elsewhere:
            self._begun = sorted({*self._begun, *self.elsewhere})
            self.elsewhere = ()
        if self._begun:
            taken, self._begun = self._begun[:_SESSIONS_AT_ONCE], self._begun[_SESSIONS_AT_ONCE:]
            return taken
        found = store.sessions(self.address.route, up_to=self._up_to, most=_SESSIONS_AT_ONCE)
        if found:
            self._up_to = found[-1][0] - 1
        return [name for _, name in found]
