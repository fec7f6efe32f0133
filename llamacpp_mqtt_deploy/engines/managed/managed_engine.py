"""The engine that the worker starts itself: a llama.cpp server as a child process, supervised, restarted when it fails."""

from __future__ import annotations

import errno
import math
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import structlog
from pydantic import SecretStr

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished
from llamacpp_mqtt_deploy.core.errors import EngineUnavailable, ShuttingDown
from llamacpp_mqtt_deploy.engines.managed import launching
from llamacpp_mqtt_deploy.engines.managed.attending import Attendant, Interrupt
from llamacpp_mqtt_deploy.engines.managed.child import Child, oom_kills
from llamacpp_mqtt_deploy.engines.managed.idleness import Idleness
from llamacpp_mqtt_deploy.engines.managed.launching import CannotLaunch, Endpoint
from llamacpp_mqtt_deploy.engines.managed.privatedir import PrivateDir
from llamacpp_mqtt_deploy.engines.managed.serverlog import ServerLog
from llamacpp_mqtt_deploy.engines.managed.stalling import Vigilance
from llamacpp_mqtt_deploy.engines.managed.verdicts import End, Verdict, Verdicts, Wish
from llamacpp_mqtt_deploy.engines.managed.watching import Life, Watcher
from llamacpp_mqtt_deploy.engines.server import dialects
from llamacpp_mqtt_deploy.engines.server.line import ServerAddress
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.ports import EngineInfo, EngineState, Unloaded
from llamacpp_mqtt_deploy.stopping import Deadline, StopSignal

log = structlog.get_logger(__name__)

KILL_AFTER_S = 3.0
MAX_DETAIL_CHARS = 600
_LACKING = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
STUCK_MARGIN_S = 10.0
"""Beyond `chunk_timeout_s`, so that the requests in front of a hang have ended before the server does."""


class ManagedEngine:
    """See `ports.Engine`. Two threads live from `open` to `close`: one owns the process, one looks how it is."""

    def __init__(
        self, settings: EngineSettings, *, vigilance: Vigilance | None = None, loop: IoLoop | None = None
    ) -> None:
        key = secrets.token_urlsafe(32)
        self._settings = settings.model_copy(
            update={"dialect": "llamacpp", "api_key": SecretStr(key), "api_key_file": None, "ca_file": None}
        )
        self._key = key
        self._loop = loop
        self._program: launching.Program | None = None
        self._directory: PrivateDir | None = None
        # Guards what follows, for arithmetic only; notified at each change of the phase.
        self._changed = threading.Condition()
        self._phase: EngineState = "starting"
        self._detail = "The server was not started yet."
        self._life: Life | None = None
        self._inner: ServerEngine | None = None
        self._known = EngineInfo(
            state="starting",
            kind="managed",
            slots=settings.slots or launching.default_slots(),
            models=tuple(dict.fromkeys(((settings.model,) if settings.model else ()) + settings.models)),
            n_ctx=settings.context_tokens,
            can_restart=True,
            can_unload=True,
        )
        self._closing = StopSignal()
        self._hurry = False  # start now, without the rest of the pause
        self._verdicts = Verdicts()
        self._idleness = Idleness(settings.managed.sleep_after_s)
        self._endpoint: Endpoint | None = None
        self._arguments: list[str] | None = None
        self._interrupt: Interrupt | None = None  # of the supervisor's waiting
        self._kill_after_s = KILL_AFTER_S
        self._supervisor = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)
        self._watcher = Watcher(
            vigilance=vigilance or Vigilance(stuck_after_s=settings.chunk_timeout_s + STUCK_MARGIN_S),
            life=lambda: self._life,
            changed=self._changed,
            closing=self._closing,
            on_ready=self._became_ready,
            on_hung=self._hung,
        )

    # --- the interface ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Find the server and begin to start it. Raises ValueError when there is none, or no model that can be read."""
        launching.check(self._settings)
        self._program = launching.find_program(self._settings)
        try:
            self._directory = PrivateDir()
        except OSError as error:
            raise ValueError(
                f"no private directory for the server's socket can be made: {error}; set RUNTIME_DIRECTORY or TMPDIR"
            ) from error
        self._interrupt = Interrupt()
        self._supervisor.start()
        self._watcher.thread.start()

    def wait_ready(self, stop: StopSignal, timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else Deadline(timeout_s)
        forget = stop.on_stop(self._notify)
        try:
            with self._changed:
                while self._phase not in ("ready", "asleep", "closed") and not stop.is_set():
                    if deadline is not None and deadline.passed():
                        return False
                    self._changed.wait(None if deadline is None else deadline.remaining_s())
                return self._phase in ("ready", "asleep")
        finally:
            forget()

    def info(self) -> EngineInfo:
        now = time.monotonic()
        with self._changed:
            phase, detail, inner = self._phase, self._detail, self._inner
            known = replace(self._known, problem=self._verdicts.problem(now), kept_awake=self._idleness.kept_awake(now))
        if phase != "ready" or inner is None:
            return replace(known, state=phase, detail=detail)
        return _told(inner.info(), known)

    def probe(self) -> EngineInfo:
        with self._changed:
            inner = self._inner if self._phase == "ready" else None
        if inner is not None:
            inner.probe()
        return self.info()

    def restart(self) -> bool:
        """Start the server anew; running generations end with `engine_lost`. False once the engine is closed."""
        with self._changed:
            if self._closing.is_set():
                return False
            log.info("llama_server.restart_asked")
            self._verdicts.forgive()
            self._hurry = True
            if self._phase == "asleep":
                self._rouse()
            elif self._life is None:
                self._enter("restarting", "The server is started anew, as was asked for.")
            self._end(self._life, "restart", "a restart was asked for")
        self._wake()
        return True

    def unload(self) -> Unloaded:
        with self._changed:
            if self._phase == "asleep":
                return "done"
            if self._phase != "ready":
                return "away"
            if self._idleness.users:
                return "busy"
            self._idleness.keep_awake(0, time.monotonic())
            self._end(self._life, "sleep", "it was asked to let the model go")
        self._wake()
        return "done"

    def keep_awake(self, seconds: float | None) -> bool:
        with self._changed:
            self._idleness.keep_awake(seconds, time.monotonic())
            if self._phase == "asleep" and seconds != 0:
                self._rouse()
        self._wake()  # the time until it may sleep has changed
        return True

    def close(self, deadline: Deadline) -> None:
        with self._changed:
            first = self._closing.set("shutting_down")
            self._phase, self._detail = "closed", ""
            inner = self._inner
            # Half of the time for its own way of ending, so that the rest is enough to kill and reap it.
            self._kill_after_s = min(KILL_AFTER_S, deadline.remaining_s() / 2)
            self._end(self._life, "close", "the worker ends")
            self._changed.notify_all()
        if inner is not None:
            # First: the server ends in 50 ms when its streams are gone, and waits for them otherwise.
            inner.close(deadline)
        self._wake()
        for thread in (self._supervisor, self._watcher.thread):
            if thread.is_alive():
                thread.join(max(0.1, deadline.remaining_s()))
        if self._supervisor.is_alive():
            log.error("llama_server.not_ended", problem="its thread does not end; the process is killed")
            with self._changed:
                life = self._life
            if life is not None:
                life.child.send(signal.SIGKILL)
        elif first and self._interrupt is not None:
            self._interrupt.close()
        if self._directory is not None:
            self._directory.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def expect(self) -> None:
        inner = self._inner if self._phase == "ready" else None
        if inner is not None:
            inner.expect()

    def stream(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
    ) -> Iterator[Delta]:
        stop.raise_if_set()
        with self._used():
            yield from self._when_ready(stop, on_wait).stream(call, stop=stop, on_wait=on_wait)

    def pump(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
        feed: Callable[[Sequence[Delta]], float],
        on_slow: Callable[[], None] = lambda: None,
    ) -> Finished:
        stop.raise_if_set()
        with self._used():
            server = self._when_ready(stop, on_wait)
            return server.pump(call, stop=stop, on_wait=on_wait, feed=feed, on_slow=on_slow)

    def count_tokens(self, call: EngineCall, *, stop: StopSignal) -> int | None:
        with self._used():
            with self._changed:
                inner = self._inner if self._phase == "ready" else None
            return None if inner is None else inner.count_tokens(call, stop=stop)

    def unsupported_fields(self, call: EngineCall) -> tuple[str, ...]:
        return dialects.unsupported(call, "llamacpp")

    @contextmanager
    def _used(self) -> Iterator[None]:
        """While inside, the server is not put to sleep."""
        with self._changed:
            self._idleness.begin()
        try:
            yield
        finally:
            with self._changed:
                self._idleness.end(time.monotonic())

    def _rouse(self) -> None:
        """Start the server that sleeps, or is about to; under the lock. It is loading from now on, for everybody who asks."""
        self._hurry = True
        self._enter("loading", "The server is started: it was asleep.")

    def _when_ready(self, stop: StopSignal, on_wait: Callable[[str], None]) -> ServerEngine:
        """Wait while the server loads, for as long as that takes, and while it is restarted, for `unavailable_after_s`. One that
        sleeps is started."""
        told = ""
        away_since: float | None = None
        forget = stop.on_stop(self._notify)
        try:
            while True:
                with self._changed:
                    if self._phase == "asleep":
                        self._rouse()
                    phase, inner = self._phase, self._inner
                    if phase == "ready" and inner is not None:
                        return inner
                    if phase == "closed":
                        raise ShuttingDown("The worker is shutting its engine down.")
                    if phase == "failed":
                        raise EngineUnavailable("The worker's engine cannot load; its operator finds why in its log.")
                    reason = "engine_restarting" if phase == "restarting" else "loading"
                    if reason == told:
                        self._changed.wait(1.0)
                stop.raise_if_set()
                now = time.monotonic()
                if reason != "engine_restarting":
                    away_since = None
                else:
                    away_since = now if away_since is None else away_since
                    if now - away_since >= self._settings.unavailable_after_s:
                        raise EngineUnavailable("The engine is being restarted and does not come back.")
                if reason != told:
                    told = reason
                    on_wait(reason)
        finally:
            forget()

    # --- the thread that owns the process ----------------------------------------------------------------------------

    def _supervise(self) -> None:
        while not self._closing.is_set():
            with self._changed:
                self._hurry = False
            pause_s: float | None
            try:
                self._prepare()
                pause_s = self._live()
            except Exception as error:  # noqa: BLE001 - told there
                pause_s = self._not_started(error)
            self._pause(pause_s)

    def _prepare(self) -> None:
        """Learn what the program understands, once."""
        if self._arguments is not None:
            return
        assert self._program is not None
        assert self._directory is not None
        known = launching.abilities(self._program, self._closing)
        port = self._settings.managed.port
        key_file = None if known.key_from_environment else self._directory.write("key", self._key)
        if port == 0 and known.unix_socket:
            endpoint = Endpoint(socket_path=self._directory.socket_path, key_file=key_file)
        else:
            endpoint = Endpoint(port=port or launching.free_port(), key_file=key_file)
        made = launching.arguments(self._settings, known, endpoint)
        inner = ServerEngine(self._settings, url=endpoint.url, kind="managed", loop=self._loop)
        inner.open()
        with self._changed:
            self._endpoint, self._arguments, self._inner = endpoint, made, inner

    def _live(self) -> float | None:
        """One life of the server. Returns the pause before the next, in seconds; None until somebody asks for it."""
        assert self._program is not None
        assert self._endpoint is not None
        assert self._arguments is not None
        assert self._inner is not None
        assert self._interrupt is not None
        if self._endpoint.socket_path is not None:
            self._endpoint.socket_path.unlink(
                missing_ok=True
            )  # the server leaves it behind, and cannot bind where one is
        now = time.monotonic()
        child = Child(
            [*self._program.command, *self._arguments],
            launching.environment(self._key if self._endpoint.key_file is None else None),
        )
        life = Life(
            child=child,
            log=ServerLog(now=now, serving=lambda: self._phase == "ready"),
            engine=self._inner,
            address=ServerAddress(self._endpoint.url),
            started_at=now,
            oom_kills=oom_kills(),
        )
        log.info("llama_server.started", pid=child.pid, program=self._program.shown)
        try:
            with self._changed:
                self._life = life
                self._enter("loading", life.stage)
                if self._closing.is_set():
                    self._end(life, "close", "the worker ends")
            code = Attendant(
                interrupt=self._interrupt,
                kill_after_s=lambda: self._kill_after_s,
                heard=self._heard,
                due_s=self._doze,
            ).stay(life)
        finally:
            with self._changed:
                self._life = None
            child.close()
        return self._ended(life, code)

    def _heard(self, life: Life) -> None:
        """The server has said something: how far it has loaded, perhaps."""
        with self._changed:
            if self._phase == "loading" and self._detail != life.stage and self._life is life:
                self._enter("loading", life.stage)

    def _doze(self, life: Life, now: float) -> float:
        """Have the server end when nobody has used it for long enough; seconds until it is time to look again."""
        with self._changed:
            left_s = self._idleness.left_s(now) if self._phase == "ready" else math.inf
            if left_s == 0.0:
                self._end(life, "sleep", f"nobody used it for {self._settings.managed.sleep_after_s:g} s")
        return max(0.01, left_s)

    def _ended(self, life: Life, code: int) -> float | None:
        """Tell of an end; the pause before the next start in seconds."""
        end = End(
            code=code,
            wish=life.wish,
            why=life.why,
            ready_s=None if life.ready_at is None else time.monotonic() - life.ready_at,
            last=life.log.last(from_cause=life.ready_at is None),
            out_of_memory=life.oom_kills is not None and (oom_kills() or 0) > life.oom_kills,
        )
        ours = life.wish in ("close", "restart", "sleep")
        (log.info if ours else log.error)(
            "llama_server.ended",
            how=end.how,
            why=life.why or None,
            ready_s=None if end.ready_s is None else round(end.ready_s, 1),
            last_lines=None if ours else end.last,
        )
        with self._changed:
            self._verdicts.remember(end, time.monotonic())
            verdict = self._verdicts.judge(end)
            if verdict.state == "asleep" and self._hurry:  # somebody came while it ended
                return 0.0
            return self._obey(verdict)

    def _not_started(self, error: Exception) -> float | None:
        """Tell why; the pause before the next start in seconds."""
        known = isinstance(error, CannotLaunch)
        detail = f"{error}." if known else f"The worker failed to start its server: {error}."
        cause = error.__cause__ if known else error
        lacking = isinstance(cause, OSError) and cause.errno in _LACKING
        if lacking:
            log.error("llama_server.not_started", reason=detail)
        elif not known:
            log.error("llama_server.supervision_failed", exc_info=error)
        with self._changed:
            return self._obey((self._verdicts.lacks if lacking else self._verdicts.cannot)(detail))

    def _obey(self, verdict: Verdict) -> float | None:
        """Under the lock."""
        self._enter(verdict.state, verdict.detail)
        return verdict.pause_s

    def _pause(self, seconds: float | None) -> None:
        deadline = None if seconds is None else Deadline(seconds)
        with self._changed:
            while not (self._hurry or self._closing.is_set() or (deadline is not None and deadline.passed())):
                self._changed.wait(None if deadline is None else deadline.remaining_s())

    # --- the thread that looks how it is -----------------------------------------------------------------------------

    def _became_ready(self, life: Life) -> None:
        said = life.engine.probe()
        if said.state != "ready":
            return  # /health is earlier than the rest by a moment
        now = time.monotonic()
        with self._changed:
            if self._life is not life or life.wish:
                return
            life.ready_at = now
            self._verdicts.ready()
            self._idleness.ready(now)
            self._known = _told(said, replace(self._known, backend=life.log.backend, gpu_layers=life.log.gpu_layers))
            self._enter("ready", "")
        seconds = round(now - life.started_at, 2)
        log.info("llama_server.ready", pid=life.child.pid, seconds=seconds, backend=life.log.backend)

    def _hung(self, life: Life, problem: str) -> None:
        log.error("llama_server.hung", problem=problem, pid=life.child.pid)
        with self._changed:
            self._end(life, "hung", problem)
        self._wake()

    # --- small things ------------------------------------------------------------------------------------------------

    def _end(self, life: Life | None, wish: Wish, why: str) -> None:
        """Want the process ended; under the lock. Closing goes before the other reasons."""
        if life is None or (life.wish and wish != "close"):
            return
        life.wish, life.why = wish, why
        if wish == "sleep":
            self._hurry = False
            self._enter("asleep", "")
        elif wish != "close":
            self._enter("restarting", f"The server is ended: {why}.")

    def _enter(self, phase: EngineState, detail: str) -> None:
        """Under the lock."""
        if self._phase != "closed":
            self._phase, self._detail = phase, detail[:MAX_DETAIL_CHARS]
        self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wake(self) -> None:
        if self._interrupt is not None:
            self._interrupt()


def _told(said: EngineInfo, known: EngineInfo) -> EngineInfo:
    """What the server says of itself, with what only its owner knows."""
    return replace(
        said,
        backend=known.backend,
        gpu_layers=known.gpu_layers,
        problem=known.problem,
        can_restart=known.can_restart,
        can_unload=known.can_unload,
        kept_awake=known.kept_awake,
    )
