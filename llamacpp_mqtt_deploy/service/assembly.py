"""Builds a worker: every part of it, joined to the others, nothing started yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from llamacpp_mqtt_deploy import __version__, logs
from llamacpp_mqtt_deploy.config.credentials import database_password, engine_key_reader, mqtt_password
from llamacpp_mqtt_deploy.config.loading import Loaded
from llamacpp_mqtt_deploy.config.settings import MetricsSettings, Settings
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.pool_ports import Member, SharedJournal
from llamacpp_mqtt_deploy.ports import SERVING, Engine, EngineInfo, Link, Store
from llamacpp_mqtt_deploy.service.admin import AdminReplies, Operations
from llamacpp_mqtt_deploy.service.discovery import Discovery, memory_of
from llamacpp_mqtt_deploy.service.enginewatch import EngineWatch
from llamacpp_mqtt_deploy.service.identity import client_id, mark
from llamacpp_mqtt_deploy.service.ledger_report import LedgerReport
from llamacpp_mqtt_deploy.service.measuring import Measuring
from llamacpp_mqtt_deploy.service.presence import Presence
from llamacpp_mqtt_deploy.service.reporting import HealthReport, status_fields
from llamacpp_mqtt_deploy.service.shortages import Shortages
from llamacpp_mqtt_deploy.worker.acknowledging import Acknowledger
from llamacpp_mqtt_deploy.worker.admitting import LocalAdmission
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.client_work import ClientWork
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.control import Controls
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.deadlines import Deadlines
from llamacpp_mqtt_deploy.worker.generation import Generation
from llamacpp_mqtt_deploy.worker.intake import Intake
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.jobs import JobRegistry
from llamacpp_mqtt_deploy.worker.journal_clock import JournalClock
from llamacpp_mqtt_deploy.worker.journal_marks import JournalMarks
from llamacpp_mqtt_deploy.worker.journaled import JournaledRequests
from llamacpp_mqtt_deploy.worker.message_log import MessageLog
from llamacpp_mqtt_deploy.worker.policies import InForce, level_limits, max_incoming_bytes, queue_limits, topic_map
from llamacpp_mqtt_deploy.worker.pooled.pool import Pool
from llamacpp_mqtt_deploy.worker.prompting import PromptBuilder
from llamacpp_mqtt_deploy.worker.recovery import Recovery
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from llamacpp_mqtt_deploy.worker.refusals import Refusals
from llamacpp_mqtt_deploy.worker.route_renderings import RouteRenderings
from llamacpp_mqtt_deploy.worker.session_topics import SessionTopics
from llamacpp_mqtt_deploy.worker.threads import GenerationThreads
from llamacpp_mqtt_deploy.worker.token_counts import TokenCounts

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.metrics.publishing import Metrics
    from llamacpp_mqtt_deploy.metrics.readings import Readings


class Parts:
    """What a worker consists of. Adapters may be given instead of being chosen by the configuration.

    `on_engine_change` runs in the engine watch's thread, `on_reload` in that of whoever reloads.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        link: Link | None,
        engine: Engine | None,
        store: Store | None,
        on_engine_change: Callable[[EngineInfo], None],
        on_reload: Callable[[], object],
    ) -> None:
        settings = loaded.settings
        self.in_force = in_force = InForce(settings)
        self.topics = topics = topic_map(settings)
        self.store = store = store or make_store(settings)
        self.loop = loop = IoLoop()
        self.engine = engine = engine or make_engine(settings, loop)
        self.link = link = link or make_link(settings, loop, lambda: max_incoming_bytes(in_force.settings))
        self.clock = clock = JournalClock()
        self.background = Background()
        self.client_work = ClientWork()
        self.counters = Counters()
        self.message_log = MessageLog()
        limits = settings.limits
        self.registry = JobRegistry(
            limits=queue_limits(settings),
            aging_s=limits.aging_s,
            max_requests_per_minute=limits.max_requests_per_minute,
            slots=settings.engine.slots or 1,
            levels=level_limits(settings),
        )
        renderings = RouteRenderings(in_force.policies)
        self.redelivery = Redelivery(
            outbox=link,
            store=store,
            max_event_bytes=self.max_event_bytes,
            new_rendering=renderings.of,
            tells_unstored=settings.pool.name is None,
        )
        marks = JournalMarks(store)
        self.completion = Completion(
            store=store,
            marks=marks,
            registry=self.registry,
            counters=self.counters,
            redelivery=self.redelivery,
            log_content=lambda: in_force.settings.logging.log_content,
            now=clock.now,
        )
        maker = JobMaker(
            outbox=link,
            loop=self.loop,
            policies=in_force.policies,
            max_event_bytes=self.max_event_bytes,
            active_streams=self.registry.running,
            new_rendering=renderings.of,
        )
        requests = JournaledRequests(
            store=store,
            maker=maker,
            topics=topics,
            policies=in_force.policies,
            redelivery=self.redelivery,
            now=clock.now,
        )
        answers = Answers(link, max_event_bytes=self.max_event_bytes)
        refusals = Refusals(
            answers=answers,
            store=store,
            registry=self.registry,
            counters=self.counters,
            max_event_bytes=self.max_event_bytes,
            message_log=self.message_log,
            new_rendering=renderings.of,
        )
        acknowledger = Acknowledger(link)
        self.pool: Pool | None = None
        if settings.pool.name is not None:
            self.pool = Pool(
                journal=_shared(store),
                outbox=link,
                registry=self.registry,
                requests=requests,
                completion=self.completion,
                counters=self.counters,
                redelivery=self.redelivery,
                background=self.background,
                acknowledger=acknowledger,
                refusals=refusals,
                cancel=lambda job: controls.cancel(job),  # noqa: PLW0108  made below
                describe=self._member,
                engine_ready=lambda: engine.info().state in SERVING,
                models=in_force.own_models,
                know_models=in_force.know_pool_models,
                limits=lambda: queue_limits(in_force.settings),
                aging_s=lambda: in_force.settings.limits.aging_s,
                heartbeat_s=lambda: in_force.settings.streaming.heartbeat_s,
                silent=lambda route: renderings.has_format(route) or in_force.policies().routes[route].mode == "off",
                lease_s=settings.pool.lease_s,
                now=clock.now,
            )
        prompts = PromptBuilder(engine=engine, store=store, policies=in_force.policies)
        self.token_counts = TokenCounts(engine=engine, prompts=prompts, policies=in_force.policies, loop=loop)
        controls = Controls(
            answers=answers,
            link=link,
            store=store,
            registry=self.registry,
            completion=self.completion,
            work=self.client_work,
            counts=self.token_counts,
            redelivery=self.redelivery,
            state=self._ping_state,
            expose_history=lambda: in_force.settings.sessions.expose_history,
            max_event_bytes=self.max_event_bytes,
            message_log=self.message_log,
            tells=lambda route: not renderings.has_format(route),
            pool=None if self.pool is None else self.pool.sessions,
        )
        self.presence = Presence(
            mark=mark(client_id(settings)),
            topics=topics,
            outbox=link,
            every_s=lambda: in_force.settings.status.every_s,
            details=self._status_fields,
            pool=settings.pool.name,
        )
        self.operations = Operations(
            loaded=loaded,
            in_force=in_force,
            registry=self.registry,
            controls=controls,
            presence=self.presence,
            engine=engine,
            on_reload=on_reload,
        )
        self.ledger = LedgerReport(
            store=store,
            limits=lambda: level_limits(in_force.settings),
            max_event_bytes=self.max_event_bytes,
            now=clock.now,
        )
        admin = AdminReplies(
            answers=answers,
            topics=topics,
            operations=self.operations,
            ledger=self.ledger,
            max_event_bytes=self.max_event_bytes,
        )
        self.intake = Intake(
            topics=topics,
            answers=answers,
            refusals=refusals,
            admission=self.pool.admission
            if self.pool is not None
            else LocalAdmission(
                acknowledger=acknowledger,
                refusals=refusals,
                store=store,
                registry=self.registry,
                maker=maker,
                cancel=controls.cancel,
                completion=self.completion,
                counters=self.counters,
                redelivery=self.redelivery,
                background=self.background,
                now=clock.now,
            ),
            controls=controls,
            session_topics=SessionTopics(
                topics=topics,
                answers=answers,
                link=link,
                store=store,
                registry=self.registry,
                controls=controls,
                work=self.client_work,
                policies=in_force.policies,
                message_log=self.message_log,
                now=clock.now,
            ),
            admin=admin.handle,
            counters=self.counters,
            policies=in_force.policies,
            message_log=self.message_log,
            inbox_messages=settings.mqtt.inbox_messages,
            expect=engine.expect,
        )
        if self.pool is not None:
            self.pool.admission.beat = self.intake.beat
            self.pool.sessions.beat = self.client_work.beat
        self.recovery = Recovery(
            store=store,
            registry=self.registry,
            requests=requests,
            max_starts=lambda: in_force.settings.limits.max_starts,
            now=clock.now,
        )
        self.threads = GenerationThreads(
            registry=self.registry,
            generation=Generation(
                engine=engine,
                marks=marks,
                registry=self.registry,
                completion=self.completion,
                loop=self.loop,
                background=self.background,
                prompts=prompts,
                policies=in_force.policies,
                worker_id=settings.mqtt.worker_id,
            ),
        )
        self.deadlines = Deadlines(
            registry=self.registry,
            end=lambda job: self.background.run(("limit", job.key), lambda: self.completion.stopped(job)),
            heartbeat_s=lambda: in_force.settings.streaming.heartbeat_s,
            unavailable_after_s=lambda: in_force.settings.engine.unavailable_after_s,
        )
        self.health = HealthReport(worker_id=settings.mqtt.worker_id, registry=self.registry, counters=self.counters)
        self.shortages = Shortages(counters=self.counters, engine=engine.info)
        self.discovery = Discovery(
            link=link,
            loop=self.loop,
            background=self.background,
            policies=in_force.policies,
            topics=topics,
            engine=engine.info,
            memory=memory_of(settings),
        )
        self.engine_watch = EngineWatch(engine, on_engine_change)
        self.measuring = Measuring(
            settings=lambda: in_force.settings,
            registry=self.registry,
            counters=self.counters,
            engine=engine.info,
            engine_watch=self.engine_watch,
            link=link.info,
            store=store,
            presence=self.presence,
        )
        self.metrics = make_metrics(settings.metrics, self.measuring.read)

    def max_event_bytes(self) -> int:
        """The largest event: ours, or what the broker takes."""
        broker = self.link.max_payload_bytes()
        limit = self.in_force.settings.limits.max_event_bytes
        return limit if broker is None else max(1024, min(limit, broker))

    def recover(self) -> None:
        """Take up what an earlier life has left: it is in this worker's journal, or the pool gives it to whoever is there."""
        if self.pool is None:
            self.recovery.run()
        else:
            self.pool.join()

    def _member(self) -> Member:
        return Member(
            worker_id=self.in_force.settings.mqtt.worker_id,
            instance=self.presence.instance,
            slots=self.registry.load().slots,
            models=self.in_force.own_models(),
            version=__version__,
            draining=self.presence.state == "draining",
        )

    def _ping_state(self) -> Mapping[str, Any]:
        return {
            "state": self.presence.state,
            "worker": self.in_force.settings.mqtt.worker_id,
            "engine": self.engine.info().state,
            "queue": self.registry.load().queued,
        }

    def _status_fields(self) -> Mapping[str, Any]:
        return status_fields(
            policies=self.in_force.policies(),
            topics=self.topics,
            engine=self.engine.info(),
            slots=self.registry.load().slots,
            max_event_bytes=self.max_event_bytes(),
        )


# --- adapters; the libraries of each are imported only when it is chosen ---


def make_engine(settings: Settings, loop: IoLoop) -> Engine:
    """The engine that `engine.kind` names."""
    engine = settings.engine
    match engine.kind:
        case "server":
            from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine

            read_key = engine_key_reader(settings)
            return ServerEngine(engine, loop=loop, read_key=lambda: _hidden(read_key()))
        case "managed":
            from llamacpp_mqtt_deploy.engines.managed.managed_engine import ManagedEngine

            return ManagedEngine(engine, loop=loop)
        case "inprocess":
            from llamacpp_mqtt_deploy.engines.inprocess.inprocess_engine import InprocessEngine

            return InprocessEngine(engine)


def make_store(settings: Settings) -> Store:
    """The store that `sessions.store` names."""
    if settings.sessions.store == "postgres":
        from llamacpp_mqtt_deploy.stores.postgres import aside_file, database_of, required

        with required():
            from llamacpp_mqtt_deploy.stores.postgres.postgres_store import PostgresStore
            from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal

        database = database_of(settings, lambda: _hidden(database_password(settings)))
        if settings.pool.name is not None:
            return SharedPostgresJournal(database, lease_s=settings.pool.lease_s, aside=aside_file(settings))
        return PostgresStore(database, aside=aside_file(settings))
    from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore

    return SqliteStore(settings.sessions.path if settings.sessions.store == "sqlite" else None)


def _shared(store: Store) -> SharedJournal:
    """The journal of a pool; `consistency` sees to it that a pool has one."""
    if not hasattr(store, "join"):
        raise ValueError('pool.name needs sessions.store = "postgres": the workers of a pool share their journal')
    return cast("SharedJournal", store)


def make_link(settings: Settings, loop: IoLoop, max_payload_bytes: Callable[[], int]) -> Link:
    """The link to the broker of `[mqtt]`, which cuts longer payloads than those."""
    from llamacpp_mqtt_deploy.mqtt.link import MqttLink

    mqtt = settings.mqtt
    if settings.pool.name is not None:
        # A broker keeps what comes for an absent member of the group too, where no other would ever see it.
        mqtt = mqtt.model_copy(update={"session_expiry_s": 0})
    return MqttLink(
        mqtt,
        client_id=client_id(settings),
        password=lambda: _hidden(mqtt_password(settings)),
        max_incoming_bytes=max_payload_bytes,
        loop=loop,
    )


def make_metrics(settings: MetricsSettings, read: Callable[[], Readings]) -> Metrics | None:
    """What `[metrics]` asks for; None, and nothing imported, when it asks for nothing. Raises ImportError with what to do."""
    if settings.listen is None and settings.textfile is None:
        return None
    try:
        from llamacpp_mqtt_deploy.metrics.publishing import Metrics
    except ModuleNotFoundError as error:
        raise ImportError(
            f"[metrics] needs the Python package {error.name!r}: pip install 'llamacpp-mqtt-deploy[metrics]', or remove the section"
        ) from error
    return Metrics(settings, read)


def _hidden(secret: str | None) -> str | None:
    """A secret that may have been renewed on disk since the log was told what to hide."""
    if secret is not None:
        logs.hide(secret)
    return secret
