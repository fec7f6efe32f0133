"""Builds a worker: every part of it, joined to the others, nothing started yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.admin import AdminDesk, Levers
from llamacpp_mqtt_deploy.choosing import make_engine, make_link, make_store
from llamacpp_mqtt_deploy.composing import Composer
from llamacpp_mqtt_deploy.controls import Controls
from llamacpp_mqtt_deploy.deliveries import Deliveries
from llamacpp_mqtt_deploy.endings import Endings
from llamacpp_mqtt_deploy.enginewatch import EngineWatch
from llamacpp_mqtt_deploy.generation import Generation
from llamacpp_mqtt_deploy.intake import Intake, JobMaker
from llamacpp_mqtt_deploy.jobs import JobBook
from llamacpp_mqtt_deploy.loading import Loaded
from llamacpp_mqtt_deploy.operations import Operations
from llamacpp_mqtt_deploy.policies import InForce, topic_map
from llamacpp_mqtt_deploy.ports import Engine, EngineInfo, Link, Store
from llamacpp_mqtt_deploy.presence import Presence
from llamacpp_mqtt_deploy.recovery import Recovery
from llamacpp_mqtt_deploy.reporting import HealthReport, status_fields
from llamacpp_mqtt_deploy.rounds import Rounds
from llamacpp_mqtt_deploy.tally import Tally
from llamacpp_mqtt_deploy.timers import Timers
from llamacpp_mqtt_deploy.workers import Workers


class Parts:
    """What a worker consists of. Members of the families may be given instead of being chosen by the configuration.

    `on_engine_change` runs in the engine watch's thread; `is_closing` says that the link's outbox is about to close.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        link: Link | None,
        engine: Engine | None,
        store: Store | None,
        on_engine_change: Callable[[EngineInfo], None],
        is_closing: Callable[[], bool],
    ) -> None:
        settings = loaded.settings
        self.in_force = in_force = InForce(settings)
        self.topics = topics = topic_map(settings)
        self.store = store = store or make_store(settings)
        self.engine = engine = engine or make_engine(settings)
        self.link = link = link or make_link(settings)
        self._is_closing = is_closing
        self.timers = Timers()
        self.tally = Tally()
        limits = settings.limits
        self.book = JobBook(
            queue_size=limits.queue_size,
            session_queue=limits.session_queue,
            aging_s=limits.aging_s,
            max_requests_per_minute=limits.max_requests_per_minute,
            slots=settings.engine.slots or 1,
        )
        self.deliveries = Deliveries(outbox=link, store=store, has_room=self._outbox_has_room)
        self.endings = Endings(
            store=store,
            book=self.book,
            tally=self.tally,
            deliveries=self.deliveries,
            log_content=lambda: in_force.settings.logging.log_content,
        )
        maker = JobMaker(
            outbox=link,
            timers=self.timers,
            policies=in_force.policies,
            max_event_bytes=self.max_event_bytes,
            crowd=self.book.running,
        )
        controls = Controls(
            outbox=link,
            store=store,
            book=self.book,
            endings=self.endings,
            state=self._ping_state,
            expose_history=lambda: in_force.settings.sessions.expose_history,
            max_event_bytes=self.max_event_bytes,
        )
        self.presence = Presence(
            topics=topics,
            outbox=link,
            every_s=lambda: in_force.settings.status.every_s,
            details=self._status_fields,
        )
        self.operations = Operations(
            loaded=loaded, in_force=in_force, book=self.book, controls=controls, presence=self.presence, engine=engine
        )
        desk = AdminDesk(
            outbox=link,
            topics=topics,
            levers=Levers(
                cancel_all=self.operations.cancel_all,
                drain=self.operations.drain,
                resume=self.operations.resume,
                reload=self.operations.reload,
                restart_engine=engine.restart,
                log_level=logs.set_level,
            ),
        )
        self.intake = Intake(
            topics=topics,
            outbox=link,
            store=store,
            book=self.book,
            maker=maker,
            controls=controls,
            admin=desk.handle,
            endings=self.endings,
            tally=self.tally,
            policies=in_force.policies,
            deliveries=self.deliveries,
            inbox_messages=settings.mqtt.inbox_messages,
        )
        self.recovery = Recovery(
            store=store,
            book=self.book,
            maker=maker,
            topics=topics,
            policies=in_force.policies,
            deliveries=self.deliveries,
        )
        self.workers = Workers(
            book=self.book,
            generation=Generation(
                engine=engine,
                store=store,
                book=self.book,
                endings=self.endings,
                timers=self.timers,
                composer=Composer(engine=engine, store=store, policies=in_force.policies),
                policies=in_force.policies,
                worker_id=settings.mqtt.worker_id,
            ),
        )
        self.rounds = Rounds(
            book=self.book, endings=self.endings, heartbeat_s=lambda: in_force.settings.streaming.heartbeat_s
        )
        self.health = HealthReport(worker_id=settings.mqtt.worker_id, book=self.book, tally=self.tally)
        self.engine_watch = EngineWatch(engine, on_engine_change)

    def max_event_bytes(self) -> int:
        """The largest event: ours, or what the broker takes."""
        broker = self.link.info().max_payload_bytes
        limit = self.in_force.settings.limits.max_event_bytes
        return limit if broker is None else max(1024, min(limit, broker))

    def _outbox_has_room(self) -> bool:
        # Half full already counts as full: nothing fills the other half between this look and a publish.
        link, limit = self.link.info(), self.in_force.settings.mqtt.outbox_messages
        return not self._is_closing() and link.state == "online" and link.unacknowledged < limit // 2

    def _ping_state(self) -> Mapping[str, Any]:
        return {
            "state": self.presence.state,
            "worker": self.in_force.settings.mqtt.worker_id,
            "engine": self.engine.info().state,
            "queue": self.book.load().queued,
        }

    def _status_fields(self) -> Mapping[str, Any]:
        return status_fields(
            policies=self.in_force.policies(),
            topics=self.topics,
            engine=self.engine.info(),
            slots=self.book.load().slots,
            max_event_bytes=self.max_event_bytes(),
        )
