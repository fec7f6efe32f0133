"""The engine that the worker starts itself: a llama.cpp server as a child process, watched, and started again when it fails."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import structlog
from pydantic import SecretStr

from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall
from llamacpp_mqtt_deploy.core.errors import EngineUnavailable, ShuttingDown
from llamacpp_mqtt_deploy.engines import dialects, launching, lifeline
from llamacpp_mqtt_deploy.engines.child import EXITED_LOOK_EVERY_S, Child
from llamacpp_mqtt_deploy.engines.http import Address, Broken, ConnectFailed, Exchange, NoAnswer, Silent
from llamacpp_mqtt_deploy.engines.launching import CannotLaunch, Door
from llamacpp_mqtt_deploy.engines.privatedir import PrivateDir
from llamacpp_mqtt_deploy.engines.server import ServerEngine
from llamacpp_mqtt_deploy.engines.serverlog import ServerLog
from llamacpp_mqtt_deploy.engines.stalling import StallWatch, Vigilance
from llamacpp_mqtt_deploy.ports import EngineInfo
from llamacpp_mqtt_deploy.settings import EngineSettings
from llamacpp_mqtt_deploy.stopping import Deadline, StopSignal

log = structlog.get_logger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""Between two starts of a server that has crashed."""
HEALTHY_AFTER_S = 60.0
"""A server that answered this long was well: the next crash is a first one again."""
FIRST_FAILED_PAUSE_S = 10.0
LONGEST_FAILED_PAUSE_S = 300.0
"""Between two starts of a server that cannot load: it reads a whole model each time, and a person has to do something."""
FAILED_AFTER_CRASHES = 3
"""So many crashes in a row before the server was ready are no bad luck."""
SECOND_SIGNAL_AFTER_S = 1.0
"""llama-server waits for its open streams at the first SIGTERM and ends at once at the second."""
KILL_AFTER_S = 3.0
SLOW_LOOK_S = 0.5
MAX_DETAIL_CHARS = 600

Phase = Literal["starting", "loading", "ready", "restarting", "failed", "closed"]
Wish = Literal["", "restart", "hung", "close"]


@dataclass(slots=True, kw_only=True)
class _Life:
    """One server process from its start to its end."""

    child: Child
    log: ServerLog
    started_at: float
    ready_at: float | None = None
    wish: Wish = ""
    """Why it has to end, when we want it to."""
    why: str = ""
    told_at: list[float] = field(default_factory=list)
    """When it was sent which number of signals."""


class ManagedEngine:
    """See `ports.Engine`. Two threads live from `open` to `close`: one owns the process, one looks how it is."""

    def __init__(self, settings: EngineSettings, *, vigilance: Vigilance | None = None) -> None:
        key = secrets.token_urlsafe(32)
        self._settings = settings.model_copy(
            update={"dialect": "llamacpp", "api_key": SecretStr(key), "api_key_file": None, "ca_file": None}
        )
        self._key = key
        self._vigilance = vigilance or Vigilance(stuck_after_s=settings.chunk_timeout_s + 10.0)
        self._program: launching.Program | None = None
        self._directory: PrivateDir | None = None
        # Guards what follows, for arithmetic only; notified at each change of the phase.
        self._changed = threading.Condition()
        self._phase: Phase = "starting"
        self._detail = "The server was not started yet."
        self._life: _Life | None = None
        self._inner: ServerEngine | None = None
        self._address: Address | None = None
        self._known = EngineInfo(
            state="starting",
            kind="managed",
            slots=settings.slots or launching.default_slots(),
            models=tuple(dict.fromkeys(((settings.model,) if settings.model else ()) + settings.models)),
            n_ctx=settings.context_tokens,
            can_restart=True,
        )
        self._closing = StopSignal()
        self._hurry = False  # start now, without the rest of the pause
        self._failures = 0
        self._crashes_before_ready = 0
        self._ever_ready = False
        self._door: Door | None = None
        self._arguments: list[str] | None = None
        self._wakeup: socket.socket | None = None  # the supervisor's end of what interrupts its waiting
        self._waker: socket.socket | None = None
        self._kill_after_s = KILL_AFTER_S
        self._supervisor = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="engine-watcher", daemon=True)

    # --- the door ----------------------------------------------------------------------------------------------------

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
        self._wakeup, self._waker = socket.socketpair()
        for end in (self._wakeup, self._waker):
            end.setblocking(False)
        self._supervisor.start()
        self._watcher.start()

    def wait_ready(self, stop: StopSignal, timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else Deadline(timeout_s)
        forget = stop.on_stop(self._notify)
        try:
            with self._changed:
                while self._phase not in ("ready", "closed") and not stop.is_set():
                    if deadline is not None and deadline.passed():
                        return False
                    self._changed.wait(None if deadline is None else deadline.remaining_s())
                return self._phase == "ready"
        finally:
            forget()

    def info(self) -> EngineInfo:
        with self._changed:
            phase, detail, inner, known = self._phase, self._detail, self._inner, self._known
        if phase != "ready" or inner is None:
            return replace(known, state=phase, detail=detail)
        said = inner.info()
        return replace(said, can_restart=True, backend=known.backend)

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
            self._failures = self._crashes_before_ready = 0
            self._hurry = True
            if self._life is None:
                self._enter("restarting", "The server is started anew, as was asked for.")
            self._end(self._life, "restart", "a restart was asked for")
        self._wake()
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
            inner.close(
                deadline
            )  # first: the server ends in 50 ms when its streams are gone, and waits for them otherwise
        self._wake()
        for thread in (self._supervisor, self._watcher):
            if thread.is_alive():
                thread.join(max(0.1, deadline.remaining_s()))
        if self._supervisor.is_alive():
            log.error("llama_server.not_ended", problem="its thread does not end; the process is killed")
            with self._changed:
                life = self._life
            if life is not None:
                life.child.send(signal.SIGKILL)
        elif first and self._wakeup is not None and self._waker is not None:
            self._wakeup.close()
            self._waker.close()
        if self._directory is not None:
            self._directory.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def stream(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
        before_read: Callable[[], None] | None = None,
    ) -> Iterator[Delta]:
        stop.raise_if_set()
        inner = self._when_ready(stop, on_wait)
        yield from inner.stream(call, stop=stop, on_wait=on_wait, before_read=before_read)

    def count_tokens(self, call: EngineCall, *, stop: StopSignal) -> int | None:
        with self._changed:
            inner = self._inner if self._phase == "ready" else None
        return None if inner is None else inner.count_tokens(call, stop=stop)

    def unsupported_fields(self, call: EngineCall) -> tuple[str, ...]:
        return dialects.unsupported(call, "llamacpp")

    @property
    def busy(self) -> int:
        """Requests in flight at the server."""
        inner = self._inner
        return 0 if inner is None else inner.busy

    def _when_ready(self, stop: StopSignal, on_wait: Callable[[str], None]) -> ServerEngine:
        """Wait while the server loads, for as long as that takes, and while it is restarted, for `unavailable_after_s`."""
        told = ""
        away_since: float | None = None
        forget = stop.on_stop(self._notify)
        try:
            while True:
                with self._changed:
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
            try:
                self._prepare()
                pause_s = self._live()
            except CannotLaunch as problem:
                pause_s = self._cannot(f"{problem}.")
            except Exception as error:
                log.exception("llama_server.supervision_failed")
                pause_s = self._cannot(f"The worker failed to start its server: {error}.")
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
            door = Door(self._key, socket_path=self._directory.socket_path, key_file=key_file)
        else:
            door = Door(self._key, port=port or _free_port(), key_file=key_file)
        made = launching.arguments(self._settings, known, door)
        inner = ServerEngine(self._settings, url=door.url, kind="managed")
        inner.open()
        with self._changed:
            self._door, self._arguments, self._inner, self._address = door, made, inner, Address(door.url)

    def _live(self) -> float:
        """One life of the server. Returns the pause before the next, in seconds."""
        assert self._program is not None
        assert self._door is not None
        assert self._arguments is not None
        if self._door.socket_path is not None:
            self._door.socket_path.unlink(missing_ok=True)  # the server leaves it behind, and cannot bind where one is
        now = time.monotonic()
        child = Child(
            [*self._program.command, *self._arguments],
            launching.environment(self._key if self._door.key_file is None else None),
        )
        life = _Life(
            child=child,
            log=ServerLog(now=now, serving=lambda: self._phase == "ready"),
            started_at=now,
        )
        log.info("llama_server.started", pid=child.pid, program=self._program.shown)
        code: int | None = None
        try:
            with self._changed:
                self._life = life
                self._enter("loading", _loading(life))
                if self._closing.is_set():
                    self._end(life, "close", "the worker ends")
            code = self._accompany(life)
        finally:
            with self._changed:
                self._life = None
            child.close()
        return self._ended(life, code)

    def _accompany(self, life: _Life) -> int:
        child = life.child
        wakeup = self._wakeup
        assert wakeup is not None
        with selectors.DefaultSelector() as selector:
            selector.register(wakeup, selectors.EVENT_READ)
            selector.register(child.output, selectors.EVENT_READ)
            if child.ending is not None:
                selector.register(child.ending, selectors.EVENT_READ)
            while True:
                wait_s = self._remind(life)
                ready = {key.fd for key, _ in selector.select(wait_s)}
                if child.output in ready and not self._listen(life):
                    selector.unregister(child.output)
                if wakeup.fileno() in ready:
                    _drain(wakeup)
                code = child.reap()
                if code is not None:
                    while self._listen(life, to_the_end=True):
                        pass
                    return code

    def _listen(self, life: _Life, *, to_the_end: bool = False) -> bool:
        """Read what the server wrote; False when there is no more."""
        data = life.child.read()
        if data is None:
            return not to_the_end
        life.log.feed(data, time.monotonic())
        detail = _loading(life)
        with self._changed:
            if self._phase == "loading" and self._detail != detail and self._life is life:
                self._enter("loading", detail)
        return bool(data)

    def _remind(self, life: _Life) -> float:
        """Send the signals that are due; the seconds until the next."""
        look_s = 1.0 if life.child.ending is not None else EXITED_LOOK_EVERY_S
        if not life.wish:
            return look_s
        now = time.monotonic()
        if life.wish == "hung":
            life.child.send(signal.SIGKILL)  # it did not even answer a question
            return look_s
        if not life.told_at:
            life.told_at.append(now)
            life.child.send(signal.SIGTERM)
        waited_s = now - life.told_at[0]
        second_s = min(SECOND_SIGNAL_AFTER_S, self._kill_after_s / 2)
        if waited_s >= self._kill_after_s:
            life.child.send(signal.SIGKILL)
        elif waited_s >= second_s and len(life.told_at) == 1:
            life.told_at.append(now)
            life.child.send(signal.SIGTERM)
        due_s = second_s if waited_s < second_s else self._kill_after_s
        return min(look_s, max(0.01, due_s - waited_s))

    def _ended(self, life: _Life, code: int) -> float:
        """Judge an end: what to show, and how long to wait."""
        now = time.monotonic()
        was_ready_s = None if life.ready_at is None else now - life.ready_at
        how = _ending(code, ours=bool(life.wish))
        last = life.log.last()
        event = log.info if life.wish in ("close", "restart") else log.error
        event(
            "llama_server.ended",
            how=how,
            why=life.why or None,
            ready_s=None if was_ready_s is None else round(was_ready_s, 1),
            last_lines=None if life.wish in ("close", "restart") else last,
        )
        if life.wish == "close":
            return 0.0
        if life.wish == "restart":
            self._set("restarting", "The server is started anew, as was asked for.")
            return 0.0
        if was_ready_s is None:
            self._crashes_before_ready += 1
            # An exit code is the server's own decision; one that was ready before may only lack memory for a moment.
            gave_up = code > 0 and not self._ever_ready
            if gave_up or self._crashes_before_ready >= FAILED_AFTER_CRASHES:
                return self._cannot(
                    f"The server cannot load the model: it {how}. It said: {last or 'nothing'}. Check "
                    "engine.model_path, the memory, and engine.managed.extra_args; `restart_engine` tries at once."
                )
        elif was_ready_s >= HEALTHY_AFTER_S:
            self._failures = 0
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**self._failures)
        self._failures = min(self._failures + 1, 20)
        what = f"hung ({life.why}) and was killed" if life.wish == "hung" else how
        self._set(
            "restarting", f"The server {what}; it is started again in {pause_s:g} s. It said last: {last or 'nothing'}."
        )
        return pause_s

    def _cannot(self, detail: str) -> float:
        pause_s = min(LONGEST_FAILED_PAUSE_S, FIRST_FAILED_PAUSE_S * 2.0**self._failures)
        self._failures = min(self._failures + 1, 20)
        self._set("failed", detail)
        return pause_s

    def _pause(self, seconds: float) -> None:
        deadline = Deadline(seconds)
        with self._changed:
            while not (self._hurry or self._closing.is_set() or deadline.passed()):
                self._changed.wait(deadline.remaining_s())

    # --- the thread that looks how it is -----------------------------------------------------------------------------

    def _watch(self) -> None:
        life: _Life | None = None
        watch = StallWatch(self._vigilance)
        while not self._closing.is_set():
            with self._changed:
                if self._life is None:
                    self._changed.wait(1.0)
                    continue
                if self._life is not life:
                    life, watch = self._life, StallWatch(self._vigilance)
            try:
                pause_s = self._look(life, watch)
            except Exception:
                log.exception("llama_server.look_failed")
                pause_s = self._vigilance.idle_every_s
            ends_at = time.monotonic() + pause_s
            with self._changed:
                while self._life is life and not self._closing.is_set() and time.monotonic() < ends_at:
                    self._changed.wait(ends_at - time.monotonic())

    def _look(self, life: _Life, watch: StallWatch) -> float:
        """Look once; the pause before the next look in seconds."""
        asked_at = time.monotonic()
        status = self._health()
        now = time.monotonic()
        if life.ready_at is None:
            if status == 200:
                self._became_ready(life)
            else:
                # Refused at once is a server that does not listen yet; a hang takes the question and does not answer.
                self._end_if_hung(life, watch.loading(status != 0 or now - asked_at < SLOW_LOOK_S, asked_at, now))
            loading_s = now - life.started_at
            return self._vigilance.loading_every_s if loading_s < 10 else SLOW_LOOK_S
        self._end_if_hung(life, watch.reached(status != 0, asked_at, now))
        inner = self._inner
        if status != 200 or inner is None or not (inner.busy or watch.doubtful):
            return self._vigilance.idle_every_s if status else self._vigilance.busy_every_s
        asked_at = time.monotonic()
        slots = inner.slots_progress()
        now = time.monotonic()
        if slots is not None or now - asked_at >= SLOW_LOOK_S:  # a quick refusal says nothing
            self._end_if_hung(life, watch.saw(slots, asked_at, now))
        return self._vigilance.busy_every_s

    def _end_if_hung(self, life: _Life, problem: str | None) -> None:
        if problem is None:
            return
        log.error("llama_server.hung", problem=problem, pid=life.child.pid)
        with self._changed:
            self._end(life, "hung", problem)
        self._wake()

    def _health(self) -> int:
        """HTTP status of the page that needs neither key nor model; 0 when nothing came."""
        if self._address is None:
            return 0
        limit_s = self._vigilance.answer_within_s
        try:
            with Exchange(self._address, api_key=None, connect_timeout_s=limit_s, stops=(self._closing,)) as asked:
                asked.send("GET", "/health", timeout_s=limit_s)
                return asked.status
        except (ConnectFailed, NoAnswer, Broken, Silent):
            return 0

    def _became_ready(self, life: _Life) -> None:
        inner = self._inner
        if inner is None:
            return
        said = inner.probe()
        if said.state != "ready":
            return  # /health is earlier than the rest by a moment
        with self._changed:
            if self._life is not life or life.wish:
                return
            life.ready_at = time.monotonic()
            self._ever_ready = True
            self._crashes_before_ready = 0
            self._known = replace(said, can_restart=True, backend=life.log.backend)
            self._enter("ready", "")
        log.info(
            "llama_server.ready",
            pid=life.child.pid,
            seconds=round(life.ready_at - life.started_at, 2),
            backend=life.log.backend,
        )

    # --- small things ------------------------------------------------------------------------------------------------

    def _end(self, life: _Life | None, wish: Wish, why: str) -> None:
        """Want the process ended; under the lock. Closing goes before the other reasons."""
        if life is None or (life.wish and wish != "close"):
            return
        life.wish, life.why = wish, why
        if wish != "close":
            self._enter("restarting", f"The server is ended: {why}.")

    def _set(self, phase: Phase, detail: str) -> None:
        with self._changed:
            self._enter(phase, detail)

    def _enter(self, phase: Phase, detail: str) -> None:
        """Under the lock."""
        if self._phase != "closed":
            self._phase, self._detail = phase, detail[:MAX_DETAIL_CHARS]
        self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wake(self) -> None:
        if self._waker is not None:
            with contextlib.suppress(OSError):  # full: it is awake already; closed: it has ended
                self._waker.send(b"\0")


def _loading(life: _Life) -> str:
    return f"The server loads: it {life.log.stage}." if life.log.stage else "The server starts."


def _ending(code: int, *, ours: bool) -> str:
    if code >= 0:
        hint = " (a library or the program itself is missing)" if code == lifeline.CANNOT_EXECUTE else ""
        return f"ended with exit code {code}{hint}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if code == -signal.SIGKILL and not ours:
        return (
            "was killed by SIGKILL from outside, perhaps by the kernel for lack of memory (`journalctl -k` tells; fewer "
            "engine.slots or engine.context_tokens need less)"
        )
    return f"was ended by {name}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _drain(end: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while end.recv(4096):
            pass
