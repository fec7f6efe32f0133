"""Tells Home Assistant of this worker, where that is wanted, and takes back what this or an earlier life has told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from llamacpp_mqtt_deploy import __version__
from llamacpp_mqtt_deploy.config.settings import RouteSettings, Settings
from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.home_assistant import ABSENT, DEFAULT_PREFIX, DiscoveredWorker, discovery_message
from llamacpp_mqtt_deploy.core.routes import DEFAULT_ROUTE
from llamacpp_mqtt_deploy.durable_file import replace_file
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.ports import Delivery, EngineInfo, Link
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.policies import Policies

log = structlog.get_logger(__name__)

BIRTH_PAUSE_S = 1.0
"""Home Assistant has just started, and every device on the bus answers."""
MOST_OFTEN_S = 10.0
"""Between two answers to births: anybody who may publish there can send as many as he likes."""
AGAIN_S = 5.0
"""After a publish for which the outbox had no place."""
MOST_REMEMBERED = 16
_SUBSCRIBE_S = 10.0
_BIRTH = b"online"

PLAIN_ROUTE = RouteSettings()
_CHANGES_ASKING = ("request", "reply", "fields", "prompt_template", "format", "trust_payload_session")


def memory_of(settings: Settings) -> Path | None:
    """The file beside the state that names the topics at which something of ours may be retained; None without a state."""
    sessions = settings.sessions
    return None if sessions.store == "memory" else sessions.path.with_name(sessions.path.name + ".discovery")


def described(policies: Policies, topics: TopicMap, engine: EngineInfo) -> DiscoveredWorker:
    """This worker, as the message tells it."""
    settings = policies.settings
    return DiscoveredWorker(
        root=topics.root,
        worker_id=topics.worker_id,
        version=__version__,
        level=settings.home_assistant.level,
        models=policies.routes[DEFAULT_ROUTE].parse.models or engine.models,
        can_restart=engine.can_restart,
        can_unload=engine.can_unload,
        health_every_s=settings.status.health_every_s,
        can_ask=_is_plain(settings.routes.get(DEFAULT_ROUTE, PLAIN_ROUTE)),
    )


def _is_plain(route: RouteSettings) -> bool:
    """Whether a prompt in our own field, at our own topic, brings an event of the protocol."""
    return all(getattr(route, key) == getattr(PLAIN_ROUTE, key) for key in _CHANGES_ASKING)


class Remembered:
    """Topics at which the broker may keep something of ours, in a file where there is one."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._topics: list[str] | None = None

    def all(self) -> list[str]:
        if self._topics is None:
            self._topics = self._read()
        return list(self._topics)

    def add(self, topic: str) -> None:
        topics = self.all()
        if topic not in topics:
            self._keep([*topics, topic][-MOST_REMEMBERED:])

    def drop(self, topic: str) -> None:
        topics = self.all()
        if topic in topics:
            self._keep([other for other in topics if other != topic])

    def _read(self) -> list[str]:
        try:
            lines = self._file.read_text("utf-8").splitlines() if self._file is not None else []
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as problem:
            log.warning("discovery.not_remembered", file=str(self._file), why=str(problem))
            return []
        return [line for line in lines if line.endswith("/config")][:MOST_REMEMBERED]

    def _keep(self, topics: list[str]) -> None:
        self._topics = topics
        if self._file is None:
            return
        try:
            if not topics:
                self._file.unlink(missing_ok=True)
                return
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._file, "\n".join(topics) + "\n")
        except OSError as problem:
            log.warning("discovery.not_remembered", file=str(self._file), why=problem.strerror)


class Discovery:
    """Publishes the discovery message at each connection, at each birth of Home Assistant and whenever it changes.

    `connect` is called from the main thread, `note` from the link's, `refresh` from any; the rest runs in the background.
    """

    def __init__(
        self,
        *,
        link: Link,
        loop: IoLoop,
        background: Background,
        policies: Callable[[], Policies],
        topics: TopicMap,
        engine: Callable[[], EngineInfo],
        memory: Path | None,
    ) -> None:
        self._link = link
        self._loop = loop
        self._background = background
        self._policies = policies
        self._topics = topics
        self._engine = engine
        self._remembered = Remembered(memory)
        self._told: tuple[str, bytes] | None = None
        self.connected = False
        """This connection has been told already."""
        self._lock = threading.Lock()  # guards the two below
        self._answering = False
        self._answered_at = -MOST_OFTEN_S

    # --- when --------------------------------------------------------------------------------------------------------

    def connect(self, give_up: Callable[[], bool]) -> None:
        """A connection is up, or the settings have changed: listen for births and tell anew. Blocks until the broker has answered."""
        refused: Mapping[str, str]
        if self._policies().settings.home_assistant.discovery:
            try:
                filters = [(topic, 0) for topic in sorted(self._birth_topics())]
                refused = self._link.subscribe(filters, timeout_s=_SUBSCRIBE_S, give_up=give_up)
            except (ConnectionError, TimeoutError) as problem:
                log.warning("discovery.deaf", reason=str(problem))
                refused = {}
            for topic, reason in refused.items():
                log.warning("subscription.refused", filter=topic, reason=reason, message="births of Home Assistant")
        self.connected = True
        self._tell_again()

    def disconnected(self) -> None:
        self.connected = False

    def refresh(self) -> None:
        """The engine has changed: tell it if that changes the message."""
        self._background.run("discovery-change", self._tell)

    def is_birth(self, topic: str) -> bool:
        """Whether this is where Home Assistant says that it has started."""
        return topic.endswith("/status") and topic in self._birth_topics()

    def note(self, delivery: Delivery) -> None:
        """Something came on that topic, from whoever may publish there."""
        if delivery.payload != _BIRTH or not self._policies().settings.home_assistant.discovery:
            return
        now = time.monotonic()
        with self._lock:
            if self._answering:
                return
            self._answering = True
            pause_s = max(BIRTH_PAUSE_S, self._answered_at + MOST_OFTEN_S - now)
        self._loop.after(pause_s, self._answer)

    def _answer(self) -> None:
        with self._lock:
            self._answering = False
            self._answered_at = time.monotonic()
        self._tell_again()

    def _birth_topics(self) -> set[str]:
        # Home Assistant's own default stays its birth topic where only the discovery prefix was changed.
        return {f"{self._policies().settings.home_assistant.prefix}/status", f"{DEFAULT_PREFIX}/status"}

    def _tell_again(self) -> None:
        self._background.run("discovery", lambda: self._tell(again=True))

    # --- what, in the background -------------------------------------------------------------------------------------

    def _tell(self, *, again: bool = False) -> None:
        """Publish what is wanted and not told yet, or all of it again; take everything else back."""
        if not self.connected:
            return
        wanted = self._wanted()
        for topic in self._remembered.all():
            if wanted is None or topic != wanted[0]:
                self._take_back(topic)
        if wanted is None:
            self._told = None
        elif again or wanted != self._told:
            self._publish(*wanted)

    def _wanted(self) -> tuple[str, bytes] | None:
        settings = self._policies().settings.home_assistant
        if not settings.discovery:
            return None
        worker = described(self._policies(), self._topics, self._engine())
        message = discovery_message(worker)
        payload, limit = encode(message), self._link.max_payload_bytes()
        if limit is not None and len(payload) > limit:
            message["components"]["choose_model"] = ABSENT["choose_model"]  # the only part without a bound of its own
            payload = encode(message)
        if limit is not None and len(payload) > limit:
            log.error(
                "discovery.too_large",
                bytes=len(payload),
                limit=limit,
                message="the broker takes no message of this size; raise its maximum packet size for discovery",
            )
            return None
        return worker.topic(settings.prefix), payload

    def _publish(self, topic: str, payload: bytes) -> None:
        self._remembered.add(topic)
        self._told = topic, payload

        def done(well: bool) -> None:
            if not well:
                log.error(
                    "discovery.refused",
                    topic=topic,
                    message="the broker's access list must let this worker write there",
                )

        self._sent(self._link.publish(topic, payload, retain=True, on_done=done), topic)

    def _take_back(self, topic: str) -> None:
        def done(well: bool) -> None:
            if well:
                self._background.run(("discovery-forget", topic), lambda: self._forget(topic))
            else:
                log.warning("discovery.not_removed", topic=topic)

        self._sent(self._link.publish(topic, b"", retain=True, on_done=done), topic)

    def _forget(self, topic: str) -> None:
        if self._told is None or self._told[0] != topic:
            self._remembered.drop(topic)
            log.info("discovery.removed", topic=topic)

    def _sent(self, outcome: str, topic: str) -> None:
        if outcome == "full":
            self._loop.after(AGAIN_S, self._tell_again)
        elif outcome == "unfit":
            log.error("discovery.unfit", topic=topic, message="the broker takes no such topic or size")
