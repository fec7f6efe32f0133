"""Builds the worker, opens it, watches over it and closes it: the only file that knows every other."""

from __future__ import annotations

import hashlib
import queue
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import structlog
from pydantic import SecretStr

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.admin import AdminDesk, Levers
from llamacpp_mqtt_deploy.composing import Composer
from llamacpp_mqtt_deploy.controls import Controls
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.topics import topic_matches
from llamacpp_mqtt_deploy.deliveries import Deliveries
from llamacpp_mqtt_deploy.endings import Endings
from llamacpp_mqtt_deploy.enginewatch import EngineWatch
from llamacpp_mqtt_deploy.generation import Generation
from llamacpp_mqtt_deploy.intake import Intake, JobMaker
from llamacpp_mqtt_deploy.jobs import JobBook
from llamacpp_mqtt_deploy.loading import ConfigurationError, Loaded, engine_api_key, load, mqtt_password
from llamacpp_mqtt_deploy.policies import Policies, topic_map
from llamacpp_mqtt_deploy.ports import Delivery, Engine, EngineInfo, Link, LinkInfo, Store, StoreError, StoreInUse
from llamacpp_mqtt_deploy.presence import LIVE_RENEWALS, Presence, Seen
from llamacpp_mqtt_deploy.recovery import Recovery
from llamacpp_mqtt_deploy.reloading import reload
from llamacpp_mqtt_deploy.reporting import HealthReport, status_fields, status_line
from llamacpp_mqtt_deploy.rounds import ROUND_S, Rounds
from llamacpp_mqtt_deploy.settings import MqttSettings, Settings
from llamacpp_mqtt_deploy.stopping import Deadline
from llamacpp_mqtt_deploy.systemd import Notifier, watchdog_interval_s
from llamacpp_mqtt_deploy.tally import Tally
from llamacpp_mqtt_deploy.timers import Timers
from llamacpp_mqtt_deploy.workers import Workers

log = structlog.get_logger(__name__)

EXIT_CLEAN, EXIT_OTHER, EXIT_CONFIGURATION, EXIT_UNREACHABLE = 0, 1, 2, 3

_SUBSCRIBE_TIMEOUT_S = 10.0
# A filter that the broker refused is tried again: an operator mends the access list while we run.
_RESUBSCRIBE_EVERY_S = 30.0
_PURGE_EVERY_S = 30.0
_SWEEP_EVERY_S = 1.0
# After the drain: for terminal events to be written, acknowledged by the broker, and threads to end.
_CLOSE_S = 5.0
# A thread that has not come round for this long is dead or hung; systemd's watchdog then does its work.
_SILENT_THREAD_S = 20.0
# With another instance under our own worker id: whoever holds the client id pushes the other off within its first,
# shortest reconnect pause.
_TWIN_SETTLES_S = 3.0


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the main thread, from a callback or a signal handler."""

    kind: Literal["online", "lost", "engine", "signal", "reload", "resubscribe"]
    value: Any = None


class Ending(Exception):
    """The worker has to end, with this exit code; the text is for the log."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def client_id(settings: MqttSettings) -> str:
    """Stable over restarts, and another one for each root: `lmd-{hash of root}-{worker_id}`."""
    return f"lmd-{hashlib.sha256(settings.root.encode()).hexdigest()[:8]}-{settings.worker_id}"


def make_engine(settings: Settings) -> Engine:
    """The engine that `engine.kind` names; each kind's libraries are imported only when it is chosen."""
    key = engine_api_key(settings)
    engine = settings.engine.model_copy(update={"api_key": SecretStr(key) if key else None, "api_key_file": None})
    match engine.kind:
        case "server":
            from llamacpp_mqtt_deploy.engines.server import ServerEngine

            return ServerEngine(engine)
        case "managed":
            from llamacpp_mqtt_deploy.engines.managed import ManagedEngine

            return ManagedEngine(engine)
        case "inprocess":
            from llamacpp_mqtt_deploy.engines.inprocess import InprocessEngine

            return InprocessEngine(engine)


def make_store(settings: Settings) -> Store:
    if settings.sessions.store == "memory":
        from llamacpp_mqtt_deploy.stores.memory import MemoryStore

        return MemoryStore()
    from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore

    return SqliteStore(settings.sessions.path)


def make_link(settings: Settings) -> Link:
    from llamacpp_mqtt_deploy.mqtt.link import MqttLink

    return MqttLink(settings.mqtt, client_id=client_id(settings.mqtt), password=mqtt_password(settings))


class Daemon:
    """One worker. `run` blocks until a signal or an ending, and gives the exit code."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        link: Link | None = None,
        engine: Engine | None = None,
        store: Store | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        settings = loaded.settings
        self._loaded = loaded
        self._policies = Policies.of(settings)
        self._topics = topic_map(settings)
        self._store = store or make_store(settings)
        self._engine = engine or make_engine(settings)
        self._link = link or make_link(settings)
        self._notifier = notifier or Notifier()
        self._notes: queue.SimpleQueue[Note] = queue.SimpleQueue()
        self._signals = 0
        self._interrupted = threading.Event()
        self._trouble_told: str | None = None
        self._started_at = time.monotonic()
        self._online = self._subscribed = self._ready = self._recovered = False
        self._timers = Timers()
        self._tally = Tally()
        limits = settings.limits
        self._book = JobBook(
            queue_size=limits.queue_size,
            session_queue=limits.session_queue,
            aging_s=limits.aging_s,
            max_requests_per_minute=limits.max_requests_per_minute,
            slots=settings.engine.slots or 1,
        )
        self._deliveries = Deliveries(outbox=self._link, store=self._store, has_room=self._outbox_has_room)
        self._endings = Endings(
            store=self._store,
            book=self._book,
            tally=self._tally,
            deliveries=self._deliveries,
            log_content=lambda: self._settings.logging.log_content,
        )
        self._maker = JobMaker(
            outbox=self._link,
            timers=self._timers,
            policies=lambda: self._policies,
            max_event_bytes=self._max_event_bytes,
        )
        self._controls = Controls(
            outbox=self._link,
            store=self._store,
            book=self._book,
            endings=self._endings,
            state=self._ping_state,
            expose_history=lambda: self._settings.sessions.expose_history,
            max_event_bytes=self._max_event_bytes,
        )
        self._admin = AdminDesk(
            outbox=self._link,
            topics=self._topics,
            levers=Levers(
                cancel_all=self._cancel_all,
                drain=self._drain_on_request,
                resume=self._resume,
                reload=self._reload,
                restart_engine=self._engine.restart,
                log_level=logs.set_level,
            ),
        )
        self._intake = Intake(
            topics=self._topics,
            outbox=self._link,
            store=self._store,
            book=self._book,
            maker=self._maker,
            controls=self._controls,
            admin=self._admin.handle,
            endings=self._endings,
            tally=self._tally,
            policies=lambda: self._policies,
            deliveries=self._deliveries,
            inbox_messages=settings.mqtt.inbox_messages,
        )
        self._workers = Workers(
            book=self._book,
            generation=Generation(
                engine=self._engine,
                store=self._store,
                book=self._book,
                endings=self._endings,
                timers=self._timers,
                composer=Composer(engine=self._engine, store=self._store, policies=lambda: self._policies),
                policies=lambda: self._policies,
                worker_id=settings.mqtt.worker_id,
            ),
        )
        self._rounds = Rounds(
            book=self._book, endings=self._endings, heartbeat_s=lambda: self._settings.streaming.heartbeat_s
        )
        self._presence = Presence(
            topics=self._topics,
            outbox=self._link,
            every_s=lambda: self._settings.status.every_s,
            details=self._status_fields,
        )
        self._health = HealthReport(worker_id=settings.mqtt.worker_id, book=self._book, tally=self._tally)
        self._engine_watch = EngineWatch(self._engine, lambda info: self._notes.put(Note("engine", info)))

    @property
    def _settings(self) -> Settings:
        return self._policies.settings

    # --- the life ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Open, serve until the end, close; never raises."""
        code = EXIT_CLEAN
        self._catch_signals()
        try:
            self._open()
            self._serve()
        except Ending as ending:
            code = ending.code
            log.error("worker.ending", reason=str(ending), exit_code=code)
        except StoreInUse as problem:
            code = EXIT_UNREACHABLE
            log.error("worker.ending", reason=str(problem), exit_code=code)
        except StoreError as problem:
            code = EXIT_OTHER
            log.error("worker.ending", reason=str(problem), exit_code=code)
        except Exception:
            code = EXIT_OTHER
            log.exception("worker.failed", exit_code=code)
        try:
            self._close(code)
        except Exception:
            log.exception("worker.close_failed")
            code = code or EXIT_OTHER
        return code

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # a daemon inside another program (a test): its host calls `stop`
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._notes.put(Note("reload"))
        else:
            self.stop()

    def stop(self) -> None:
        """Begin to close; a second call closes at once. May be called from a signal handler and from any thread."""
        self._signals += 1
        if self._signals > 1:
            self._interrupted.set()
        self._notes.put(Note("signal"))

    def _open(self) -> None:
        settings = self._settings
        for warning in self._loaded.warnings:
            log.warning("configuration.doubtful", message=warning)
        log.info(
            "worker.starting",
            worker=settings.mqtt.worker_id,
            root=settings.mqtt.root,
            broker=f"{settings.mqtt.host}:{settings.mqtt.port}" if settings.mqtt.port else settings.mqtt.host,
            engine=settings.engine.kind,
            configuration=str(self._loaded.file or "defaults"),
        )
        self._notifier.status("starting")
        self._started_at = time.monotonic()
        self._store.open()
        self._engine.open()
        self._timers.start()
        self._intake.start()
        self._workers.ensure(settings.engine.slots or 1)
        self._engine_watch.start()
        self._link.open(
            will=self._presence.will(),
            on_delivery=self._on_delivery,
            on_online=lambda info: self._notes.put(Note("online", info)),
            on_lost=lambda info: self._notes.put(Note("lost", info)),
        )
        self._timers.every(lambda: ROUND_S, self._rounds.go)
        self._timers.every(lambda: _SWEEP_EVERY_S, self._deliveries.sweep)
        self._timers.every(lambda: _PURGE_EVERY_S, self._purge)
        self._timers.every(lambda: self._settings.status.every_s, self._renew)
        self._timers.every(lambda: self._settings.status.health_every_s, self._publish_health)

    def _serve(self) -> None:
        """The main thread's loop: notes of what happened, and the watchdog in between."""
        interval_s = watchdog_interval_s()
        beat_s = min(1.0, interval_s) if interval_s else 1.0
        while True:
            try:
                note = self._notes.get(timeout=beat_s)
            except queue.Empty:
                note = None
            if self._signals:
                return
            if note is not None:
                self._act(note)
            self._watch()

    def _act(self, note: Note) -> None:
        match note.kind:
            case "online":
                self._greet()
            case "lost":
                self._online = self._subscribed = False
                self._check_refusal(note.value)
            case "engine":
                self._engine_changed(note.value)
            case "reload":
                self._notifier.reloading()
                self._reload()
                if self._ready:
                    self._notifier.ready()
            case "resubscribe":
                if self._online and not self._subscribed:
                    self._greet()  # all of it: the first try may have failed before what was left was taken up
            case "signal":
                pass

    # --- the bus -------------------------------------------------------------------------------------------------------

    def _on_delivery(self, delivery: Delivery) -> bool:
        """The link's thread: sort statuses of other workers out, put everything else into the inbox."""
        if topic_matches(self._topics.status_filter, delivery.topic):
            self._presence.note(delivery)
            return True
        return self._intake.offer(delivery)

    def _greet(self) -> None:
        """A connection stands: look who else is there, take up what was left, subscribe, say `online`."""
        self._online = True
        try:
            self._look_for_rivals(first=not self._recovered)
            if not self._recovered:
                Recovery(
                    store=self._store,
                    book=self._book,
                    maker=self._maker,
                    topics=self._topics,
                    policies=lambda: self._policies,
                    deliveries=self._deliveries,
                ).run()
                self._recovered = True
            self._subscribe()
        except (ConnectionError, TimeoutError) as problem:
            # Lost again, or a broker that does not answer: the next connection brings another note.
            log.warning("link.greeting_failed", reason=str(problem))
            self._timers.after(_RESUBSCRIBE_EVERY_S, lambda: self._notes.put(Note("resubscribe")))

    def _look_for_rivals(self, *, first: bool) -> None:
        """Refuse to serve a root that another worker serves (protocol, section 1)."""
        # Twice: what is retained comes before the second SUBACK, on every broker that we know.
        look = [(self._topics.status_filter, 0)]
        refused = self._link.subscribe(look, timeout_s=_SUBSCRIBE_TIMEOUT_S, retained=True)
        refused = refused or self._link.subscribe(look, timeout_s=_SUBSCRIBE_TIMEOUT_S, retained=True)
        if refused:
            log.warning("presence.blind", refused=dict(refused), message="cannot see whether another worker is here")
            return
        if not first:
            twin = self._presence.twin()
            if twin is not None:
                raise Ending(
                    EXIT_UNREACHABLE, f"pushed off our client id by {twin.told()}; stopping instead of fighting"
                )
            return
        for rival in self._presence.rivals():
            self._settle(rival)

    def _settle(self, rival: Seen) -> None:
        """Wait until another worker's status turns out to be alive, or stale; raises Ending when it is alive."""
        own = rival.worker == self._topics.worker_id
        wait_s = rival.stale_in_s(time.monotonic(), time.time())
        deadline = Deadline(min(wait_s, _TWIN_SETTLES_S) if own else wait_s)
        log.warning("presence.rival_suspected", rival=rival.told(), waiting_s=round(deadline.remaining_s(), 1))
        self._notifier.status(f"waiting to see whether {rival.told()} is alive")
        while not deadline.passed() and not self._signals:
            seen = next((other for other in self._presence.rivals() if other.worker == rival.worker), None)
            if seen is None:
                return
            if seen.live or (own and self._link.info().state != "online"):
                raise Ending(
                    EXIT_UNREACHABLE,
                    f"{seen.told()} serves the root {self._settings.mqtt.root!r} already: stop it, or give this worker "
                    "another mqtt.root",
                )
            self._presence.wait_for_news(min(1.0, deadline.remaining_s()))
            self._feed()

    def _subscribe(self) -> None:
        filters = [*self._topics.request_filters(), *self._topics.control_filters(), self._topics.admin_topic]
        refused = self._link.subscribe([(name, 1) for name in filters], timeout_s=_SUBSCRIBE_TIMEOUT_S)
        for name, reason in refused.items():
            log.error(
                "subscription.refused",
                filter=name,
                reason=reason,
                message=f"the broker's access list must let this worker read {name}; tried again in "
                f"{_RESUBSCRIBE_EVERY_S:g} s",
            )
        self._subscribed = not refused
        if refused:
            self._timers.after(_RESUBSCRIBE_EVERY_S, lambda: self._notes.put(Note("resubscribe")))
        if len(refused) < len(filters):
            self._presence.publish()
            self._publish_health()
        self._announce()

    def _check_refusal(self, info: LinkInfo) -> None:
        self._say()
        if info.state == "taken_over":
            raise Ending(EXIT_UNREACHABLE, "another client took our client id; stopping instead of fighting for it")

    def _renew(self) -> None:
        if self._online and self._recovered:
            self._presence.publish()

    def _publish_health(self) -> None:
        if self._online and self._recovered:
            every_s = self._settings.status.health_every_s
            fields = self._health.fields(engine=self._engine.info(), link=self._link.info(), every_s=every_s)
            self._link.publish(
                self._topics.health_topic, encode(fields), retain=True, expiry_s=int(LIVE_RENEWALS * every_s) + 1
            )

    # --- the engine ----------------------------------------------------------------------------------------------------

    def _engine_changed(self, info: EngineInfo) -> None:
        slots = self._settings.engine.slots or info.slots
        if info.state == "ready":
            self._book.set_slots(slots)
            self._workers.ensure(slots)
            self._policies = Policies.of(self._settings, engine_models=info.models)
        self._renew()
        self._announce()

    def _announce(self) -> None:
        """READY=1 once: when we are subscribed and the engine answers."""
        if not self._ready and self._subscribed and self._engine.info().state == "ready":
            self._ready = True
            self._notifier.ready()
            log.info(
                "worker.ready",
                requests=self._topics.request_filters(),
                seconds=round(time.monotonic() - self._started_at, 3),
            )
        self._say()

    def _say(self) -> None:
        self._notifier.status(
            status_line(state=self._presence.state, engine=self._engine.info(), link=self._link.info(), book=self._book)
        )

    # --- watching ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        limit_s = self._settings.limits.startup_timeout_s
        if limit_s and not self._ready and time.monotonic() - self._started_at > limit_s:
            link, engine = self._link.info(), self._engine.info()
            missing = [
                *([] if self._subscribed else [f"the broker: {link.detail or link.state}"]),
                *([] if engine.state == "ready" else [f"the engine: {engine.detail or engine.state}"]),
            ]
            raise Ending(EXIT_UNREACHABLE, f"not ready after {limit_s:g} s, out of reach: {'; '.join(missing)}")
        self._feed()

    def _feed(self) -> None:
        """Feed systemd's watchdog, unless something inside has stopped moving."""
        trouble = self._trouble()
        if trouble is None:
            self._notifier.watchdog()
            self._trouble_told = None
        elif trouble != self._trouble_told:
            self._trouble_told = trouble
            log.error("watchdog.hungry", reason=trouble)
            self._notifier.status(f"not well: {trouble}")

    def _trouble(self) -> str | None:
        now = time.monotonic()
        link = self._link.info()
        if link.state == "dead":
            return "the network thread died"
        silent_s = LIVE_RENEWALS * self._settings.status.every_s + self._settings.mqtt.keepalive_s
        if (
            link.state == "online"
            and link.unacknowledged
            and link.last_puback_at is not None
            and now - link.last_puback_at > silent_s
        ):
            return f"the broker has acknowledged nothing for {silent_s:g} s"
        for name, beat_at in (("timers", self._timers.beat_at), ("intake", self._intake.beat_at)):
            if now - beat_at > _SILENT_THREAD_S:
                return f"the {name} thread hangs"
        stuck = self._workers.stuck()
        if stuck:
            return f"the engine does not let go of request {stuck[0].key.request_id}"
        return None

    # --- what clients and operators ask ----------------------------------------------------------------------------------

    def _max_event_bytes(self) -> int:
        broker = self._link.info().max_payload_bytes
        limit = self._settings.limits.max_event_bytes
        return limit if broker is None else max(1024, min(limit, broker))

    def _outbox_has_room(self) -> bool:
        link = self._link.info()
        return not self._signals and link.state == "online" and link.unacknowledged < self._settings.mqtt.outbox_messages

    def _ping_state(self) -> Mapping[str, Any]:
        return {
            "state": self._presence.state,
            "worker": self._settings.mqtt.worker_id,
            "engine": self._engine.info().state,
            "queue": self._book.load().queued,
        }

    def _status_fields(self) -> Mapping[str, Any]:
        return status_fields(
            policies=self._policies,
            topics=self._topics,
            engine=self._engine.info(),
            slots=self._book.load().slots,
            max_event_bytes=self._max_event_bytes(),
        )

    def _cancel_all(self) -> int:
        return sum(map(self._controls.cancel, self._book.all()))

    def _drain_on_request(self) -> None:
        self._book.drain()
        self._presence.state = "draining"
        self._renew()

    def _resume(self) -> None:
        self._book.resume()
        self._presence.state = "online"
        self._renew()

    def _reload(self) -> Mapping[str, Any]:
        """Read the configuration again; a wrong one changes nothing."""
        try:
            loaded = load(self._loaded.file, self._loaded.overrides)
        except ConfigurationError as problem:
            log.error("configuration.refused", problems=list(problem.problems))
            return {"status": "error", "code": "bad_request", "message": "; ".join(problem.problems)[:2000]}
        found = reload(self._settings, loaded.settings)
        settings = found.settings
        self._policies = Policies.of(settings, engine_models=self._engine.info().models)
        self._book.set_limits(
            queue_size=settings.limits.queue_size,
            session_queue=settings.limits.session_queue,
            aging_s=settings.limits.aging_s,
            max_requests_per_minute=settings.limits.max_requests_per_minute,
        )
        if "logging.level" in found.changed:
            logs.set_level(settings.logging.level)
        log.warning("configuration.reloaded", changed=list(found.changed), needs_restart=list(found.needs_restart))
        self._renew()
        return {"changed": list(found.changed), "needs_restart": list(found.needs_restart)}

    def _purge(self) -> None:
        sessions, limits = self._settings.sessions, self._settings.limits
        try:
            self._store.purge(
                now=time.time(),
                remember_s=limits.remember_s,
                ttl_s=sessions.ttl_s,
                max_sessions=sessions.max_sessions,
            )
        except StoreError as problem:
            log.error("journal.failed", step="purge", problem=str(problem))

    # --- the end -------------------------------------------------------------------------------------------------------

    def _close(self, code: int) -> None:
        """Stop under one deadline: refuse, let finish, stop what is left, flush, say goodbye."""
        self._notifier.stopping()
        drain_s = self._settings.limits.drain_timeout_s if code == EXIT_CLEAN else 0.0
        log.info("worker.draining", running=self._book.load().busy, queued=self._book.load().queued, seconds=drain_s)
        self._notifier.extend_timeout(int((drain_s + 2 * _CLOSE_S) * 1e6))
        self._book.pause()
        self._presence.state = "draining"
        self._renew()
        self._drain(Deadline(drain_s))
        end = Deadline(_CLOSE_S)
        for job in self._book.all():
            if job.phase != "queued" or self._settings.sessions.store == "memory":
                job.stop.set("shutting_down")
            if job.phase == "queued" and job.stop.is_set():
                self._endings.stopped(job)
        self._book.wait_until_idle(end.remaining_s() / 2)
        for job in self._book.all():
            if job.phase not in ("queued", "ended"):  # its engine did not let go
                job.stop.set("shutting_down")
                self._endings.stopped(job)
        self._intake.close(end.remaining_s())
        self._link.flush(end)
        self._deliveries.last_call()
        farewell = self._presence.farewell() if self._recovered and self._may_say_goodbye(code) else None
        self._link.close(Deadline(max(1.0, end.remaining_s())), farewell=farewell)
        self._deliveries.sweep()
        self._engine_watch.close(1.0)
        self._engine.close(Deadline(max(1.0, end.remaining_s())))
        self._workers.close(1.0)
        self._timers.close()
        self._store.close()
        self._notifier.status("stopped")
        log.info("worker.stopped", exit_code=code)

    def _may_say_goodbye(self, code: int) -> bool:
        """Not when another instance took over our place: its `online` stands under our status topic."""
        return code != EXIT_UNREACHABLE or self._presence.twin() is None

    def _drain(self, deadline: Deadline) -> None:
        while not deadline.passed() and not self._interrupted.is_set():
            if self._book.wait_until_idle(min(0.2, deadline.remaining_s())):
                return
            self._feed()


def run(loaded: Loaded) -> int:
    """Run a worker with this configuration until it is told to stop; returns the exit code of `lmd run`."""
    try:
        daemon = Daemon(loaded)
    except (ValueError, ImportError) as problem:
        # What no validation of single settings can see: topics that clash, an engine whose package is not installed.
        log.error("worker.ending", reason=str(problem), exit_code=EXIT_CONFIGURATION)
        return EXIT_CONFIGURATION
    return daemon.run()
