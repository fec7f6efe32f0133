"""The worker process: opens its parts, serves until a signal, feeds the watchdog, and closes under one deadline."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import structlog

from llamacpp_mqtt_deploy.config.loading import Loaded
from llamacpp_mqtt_deploy.config.settings import MqttSettings, Settings
from llamacpp_mqtt_deploy.ports import (
    SERVING,
    Delivery,
    Engine,
    EngineInfo,
    Link,
    LinkInfo,
    Store,
    StoreAway,
    StoreError,
    StoreInUse,
)
from llamacpp_mqtt_deploy.service.assembly import Parts
from llamacpp_mqtt_deploy.service.idle_gpu import idle_gpu
from llamacpp_mqtt_deploy.service.opening_store import StoreOpening
from llamacpp_mqtt_deploy.service.reporting import status_line
from llamacpp_mqtt_deploy.service.shutdown import Shutdown
from llamacpp_mqtt_deploy.service.startup import AnotherWorkerError, Startup
from llamacpp_mqtt_deploy.service.systemd import Notifier, watchdog_interval_s
from llamacpp_mqtt_deploy.service.upkeep import Upkeep
from llamacpp_mqtt_deploy.service.watchdog import Watchdog
from llamacpp_mqtt_deploy.worker.deadlines import CHECK_EVERY_S
from llamacpp_mqtt_deploy.worker.message_log import TELL_EVERY_S

log = structlog.get_logger(__name__)

EXIT_CLEAN, EXIT_OTHER, EXIT_CONFIGURATION, EXIT_UNREACHABLE = 0, 1, 2, 3

# What `queued` says while the engine is in this state; everything else is an engine that went away.
_WAIT_REASONS = {"ready": "waiting", "starting": "loading", "loading": "loading", "asleep": "loading"}
# A filter that the broker refused is tried again: an operator mends the access list while we run.
_START_UP_AGAIN_S = 30.0
_PURGE_EVERY_S = 5.0
_SWEEP_EVERY_S = 1.0
_LOOK_AT_STORE_EVERY_S = _LOOK_AT_MACHINE_EVERY_S = 1.0
# A database that goes away between the store's opening and the recovery of its journal.
_RECOVER_AGAIN_S = 5.0
# More than from one look at what we wait for to the next, and enough for the rest of the start.
_EXTENDED_S = 30.0
# Last of all, so that they show the drain too; they wait for nothing but a disk that hangs.
_METRICS_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the main thread, from a callback or a signal handler."""

    kind: Literal["online", "lost", "engine", "signal", "reload", "reloaded", "start_up", "store", "short"]
    value: Any = None


class Ending(Exception):
    """The worker has to end, with this exit code; the text is for the log."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


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
        self._loaded = loaded
        self._notifier = notifier or Notifier()
        self._notes: queue.SimpleQueue[Note] = queue.SimpleQueue()
        self._signals = 0
        self._interrupted = threading.Event()
        self.parts = parts = Parts(
            loaded,
            link=link,
            engine=engine,
            store=store,
            on_engine_change=lambda info: self._notes.put(Note("engine", info)),
            on_reload=lambda: self._notes.put(Note("reloaded")),
        )
        self._startup = Startup(
            link=parts.link,
            topics=parts.topics,
            presence=parts.presence,
            recover=parts.recover,
            waiting=self._waits,
            pool=loaded.settings.pool.name,
        )
        self._watchdog = Watchdog(
            link=parts.link,
            loop=parts.loop,
            background=parts.background,
            client_work=parts.client_work,
            token_counts=parts.token_counts,
            intake=parts.intake,
            threads=parts.threads,
            in_force=parts.in_force,
            pool=parts.pool,
        )
        self.upkeep = Upkeep(parts, online=lambda: self._online)
        self._shutdown = Shutdown(
            parts=parts,
            notifier=self._notifier,
            feed=self._feed,
            interrupted=self._interrupted.is_set,
            filters=self._startup.shared_filters,
        )
        self._trouble_told: str | None = None
        self._started_at = time.monotonic()
        self._online = self._subscribed = False
        self.ready = False
        """Subscribed, and the engine answered: READY=1 was said."""

    @property
    def _settings(self) -> Settings:
        return self.parts.in_force.settings

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
            (log.error if code else log.info)("worker.ending", reason=str(ending), exit_code=code)
        except (StoreInUse, AnotherWorkerError) as problem:
            code = EXIT_UNREACHABLE
            log.error("worker.ending", reason=str(problem), exit_code=code)
        except StoreError as problem:
            code = EXIT_OTHER
            log.error("worker.ending", reason=str(problem), exit_code=code)
        except Exception:
            code = EXIT_OTHER
            log.exception("worker.failed", exit_code=code)
        try:
            self._shutdown.run(clean=code == EXIT_CLEAN, unreachable=code == EXIT_UNREACHABLE, online=self._online)
            log.info("worker.stopped", exit_code=code)
        except Exception:
            log.exception("worker.close_failed")
            code = code or EXIT_OTHER
        if self.parts.metrics is not None:
            self.parts.metrics.close(_METRICS_CLOSE_S)
        return code

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # a daemon inside another program (a test): its host calls `stop`
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

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
        parts, settings = self.parts, self._settings
        for warning in self._loaded.warnings:
            log.warning("configuration.doubtful", message=warning)
        log.info(
            "worker.starting",
            worker=settings.mqtt.worker_id,
            root=settings.mqtt.root,
            broker=_broker(settings.mqtt),
            engine=settings.engine.kind,
            configuration=str(self._loaded.file or "defaults"),
        )
        self._notifier.status("starting")
        self._started_at = time.monotonic()
        self._open_store()
        parts.ledger.reconcile(parts.registry)
        if parts.metrics is not None:  # not earlier: the store is ours, and so are the port and the file
            parts.metrics.start()
        try:
            parts.engine.open()
        except ValueError as problem:  # what will never work: a model file that is not there
            raise Ending(EXIT_CONFIGURATION, str(problem)) from problem
        parts.loop.start()
        parts.background.start()
        parts.client_work.start()
        parts.token_counts.start()
        parts.intake.start()
        parts.threads.ensure(settings.engine.slots or 1)
        if parts.pool is not None:
            parts.pool.start()
        parts.engine_watch.start()
        parts.link.open(
            will=parts.presence.will(),
            on_delivery=self._on_delivery,
            on_online=lambda info: self._notes.put(Note("online", info)),
            on_lost=lambda info: self._notes.put(Note("lost", info)),
        )
        every, in_background = parts.loop.every, parts.background.run
        every(lambda: CHECK_EVERY_S, parts.deadlines.check)
        every(lambda: _SWEEP_EVERY_S, lambda: in_background("sweep", parts.redelivery.sweep))
        every(lambda: _PURGE_EVERY_S, self.upkeep.purge_soon)
        every(lambda: _LOOK_AT_STORE_EVERY_S, lambda: in_background("store", self._look_at_store))
        every(lambda: _LOOK_AT_MACHINE_EVERY_S, lambda: in_background("machine", self._look_at_machine))
        every(lambda: TELL_EVERY_S, parts.message_log.tell)
        every(lambda: self._settings.status.every_s, self._renew)
        every(lambda: self._settings.status.health_every_s, self.upkeep.publish_health)

    def _open_store(self) -> None:
        if not StoreOpening(self.parts.store).run(self._waits_for_store):
            raise Ending(EXIT_CLEAN, "told to stop before the store was open")
        self._notifier.status("starting")

    def _waits_for_store(self, problem: BaseException | None) -> bool:
        """Whether to give up waiting for a database that is away, or for a disk that is full."""
        if problem is not None:
            self._notifier.status(f"waiting: {problem}")
            self._notifier.extend_timeout(int(_EXTENDED_S * 1e6))
        if isinstance(problem, StoreAway):
            self._check_limit(lambda: [f"the database: {problem}"])
        return self._signals > 0

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
            self._check_startup()
            self._feed()

    def _act(self, note: Note) -> None:
        match note.kind:
            case "online":
                self._online = True
                self._start_up()
            case "lost":
                self._online = self._subscribed = False
                self.parts.presence.disconnected()
                self.parts.discovery.disconnected()
                self._lost(note.value)
            case "engine":
                self._engine_changed(note.value)
            case "store":
                self._store_changed(note.value)
            case "short":
                self._shortage_changed(note.value)
            case "reload":
                if self.ready:
                    self._notifier.reloading()
                self.parts.operations.reload()
                if self.ready:
                    self._notifier.ready()
            case "reloaded":
                self._discover()
            case "start_up":
                if self._online and not self._subscribed:
                    self._start_up()
            case "signal":
                pass

    # --- the bus -------------------------------------------------------------------------------------------------------

    def _on_delivery(self, delivery: Delivery) -> bool:
        """The link's thread: sort the statuses of other workers out, put everything else into the inbox."""
        if self.parts.topics.is_status(delivery.topic):
            self.parts.presence.note(delivery)
            return True
        if self.parts.discovery.is_birth(delivery.topic):
            self.parts.discovery.note(delivery)
            return True
        return self.parts.intake.offer(delivery)

    def _start_up(self) -> None:
        again_s = _START_UP_AGAIN_S
        try:
            self._subscribed = self._startup.start_up()
        except StoreAway as problem:
            again_s = _RECOVER_AGAIN_S
            log.warning("store.waiting", reason=str(problem))
        except (ConnectionError, TimeoutError) as problem:
            # Lost again, or a broker that does not answer: the next connection brings another note.
            log.warning("link.greeting_failed", reason=str(problem))
        if self._startup.settled:
            self.parts.intake.begin_reading()
        if not self._subscribed:
            self.parts.loop.after(again_s, lambda: self._notes.put(Note("start_up")))
        self.upkeep.publish_health()
        if not self.parts.discovery.connected:
            self._discover()
        self._announce()

    def _discover(self) -> None:
        if self._online and self._startup.settled:
            self.parts.discovery.connect(lambda: self._waits("waiting for the broker to answer a subscription"))

    def _lost(self, info: LinkInfo) -> None:
        self._say()
        if info.state == "taken_over":
            raise AnotherWorkerError("another client took our client id; stopping instead of fighting for it")

    def _waits(self, why: str) -> bool:
        """The startup waits: stay alive meanwhile; True when it has to give up."""
        self._notifier.status(why)
        self._feed()
        return self._signals > 0

    def _renew(self) -> None:
        if self._online:
            self.parts.presence.renew()

    def _look_at_store(self) -> None:
        trouble = self.parts.store.trouble()
        if trouble != self.parts.presence.unwritable:
            self._notes.put(Note("store", trouble))

    def _store_changed(self, trouble: str) -> None:
        """The disk begins to refuse writes, or takes them again."""
        if trouble:
            log.error("store.troubled", problem=trouble)
        else:
            log.info("store.well_again")
        self.parts.presence.unwritable = trouble
        self._renew()
        self._say()

    def _look_at_machine(self) -> None:
        shortage = self.parts.shortages.problem()
        if shortage != self.parts.presence.short:
            self._notes.put(Note("short", shortage))

    def _shortage_changed(self, shortage: str) -> None:
        """File descriptors or memory run out, or there are enough again."""
        if shortage:
            log.error("worker.short", problem=shortage)
        else:
            log.info("worker.short_no_more")
        self.parts.presence.short = shortage
        self._renew()
        self._say()

    # --- the engine ----------------------------------------------------------------------------------------------------

    def _engine_changed(self, info: EngineInfo) -> None:
        registry = self.parts.registry
        registry.wait_reason = _WAIT_REASONS.get(info.state, "engine_restarting")
        if info.state != "unreachable":
            registry.engine_away_since = None
        elif registry.engine_away_since is None:
            registry.engine_away_since = time.monotonic()
        if info.state == "ready":
            if problem := idle_gpu(self._settings.engine, info):
                log.warning("engine.on_cpu", problem=problem)
            slots = self._settings.engine.slots or info.slots
            self.parts.registry.set_slots(slots)
            self.parts.registry.set_context(info.n_ctx)
            self.parts.threads.ensure(slots)
            self.parts.in_force.change(engine_models=info.models)
        self._renew()
        self.parts.discovery.refresh()
        self._announce()

    def _announce(self) -> None:
        """READY=1 once: when we are subscribed and the engine answers."""
        if not self.ready and self._subscribed and self.parts.engine.info().state in SERVING:
            self.ready = True
            self._notifier.ready()
            log.info(
                "worker.ready",
                requests=self.parts.topics.request_filters(),
                seconds=round(time.monotonic() - self._started_at, 3),
            )
        self._say()

    def _say(self) -> None:
        parts = self.parts
        self._notifier.status(
            status_line(
                state=parts.presence.state,
                problem=parts.presence.problem,
                engine=parts.engine.info(),
                link=parts.link.info(),
                registry=parts.registry,
            )
        )

    # --- watching ------------------------------------------------------------------------------------------------------

    def _check_startup(self) -> None:
        if not self.ready:
            self._check_limit(self._missing)

    def _missing(self) -> Sequence[str]:
        link, engine = self.parts.link.info(), self.parts.engine.info()
        return [
            *([] if self._subscribed else [f"the broker: {link.detail or self.parts.presence.problem or link.state}"]),
            *([] if engine.state in SERVING else [f"the engine: {engine.detail or engine.state}"]),
        ]

    def _check_limit(self, missing: Callable[[], Sequence[str]]) -> None:
        limit_s = self._settings.limits.startup_timeout_s
        if limit_s and time.monotonic() - self._started_at > limit_s:
            raise Ending(EXIT_UNREACHABLE, f"not ready after {limit_s:g} s, out of reach: {'; '.join(missing())}")

    def _feed(self) -> None:
        """Feed systemd's watchdog, unless one of its threads hangs."""
        trouble = self._watchdog.trouble()
        self.parts.measuring.hanging = trouble or ""
        if trouble is None:
            self._notifier.watchdog()
        elif trouble != self._trouble_told:
            log.error("watchdog.withheld", reason=trouble)
            self._notifier.status(f"not well: {trouble}")
        self._trouble_told = trouble


def _broker(mqtt: MqttSettings) -> str:
    """Where the broker is, with the port that is taken when none is set."""
    if mqtt.transport == "unix":
        return mqtt.host
    return f"{mqtt.host}:{mqtt.port or (8883 if mqtt.tls.enabled else 1883)}"


def run(loaded: Loaded) -> int:
    """Run a worker with this configuration until it is told to stop; returns the exit code of `lmd run`."""
    try:
        daemon = Daemon(loaded)
    except (ValueError, ImportError) as problem:
        # What no validation of single settings can see: topics that clash, an engine whose package is not installed.
        log.error("worker.ending", reason=str(problem), exit_code=EXIT_CONFIGURATION)
        return EXIT_CONFIGURATION
    return daemon.run()
