"""Looks how a managed server is, in a thread of its own: when it is ready, and whether it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from llamacpp_mqtt_deploy.engines.managed.child import Child
from llamacpp_mqtt_deploy.engines.managed.serverlog import ServerLog
from llamacpp_mqtt_deploy.engines.managed.stalling import StallWatch, Vigilance
from llamacpp_mqtt_deploy.engines.managed.verdicts import Wish
from llamacpp_mqtt_deploy.engines.server.failures import Broken, ConnectFailed, NoAnswer, Silent
from llamacpp_mqtt_deploy.engines.server.http import HttpExchange
from llamacpp_mqtt_deploy.engines.server.line import ServerAddress
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.stopping import StopSignal

log = structlog.get_logger(__name__)

SLOW_LOOK_S = 0.5
"""A question that fails faster than this was refused; a hang takes it and does not answer."""
LONG_LOAD_S = 10.0


@dataclass(slots=True, kw_only=True)
class Life:
    """One server process from its start to its end."""

    child: Child
    log: ServerLog
    engine: ServerEngine
    address: ServerAddress
    started_at: float
    oom_kills: int | None = None
    """How many processes of ours the kernel had killed for lack of memory when it started."""
    ready_at: float | None = None
    wish: Wish = ""
    why: str = ""
    told_at: list[float] = field(default_factory=list)
    """When it was sent signals to end."""

    @property
    def stage(self) -> str:
        """How far it has loaded, for the operator."""
        return f"The server loads: it {self.log.stage}." if self.log.stage else "The server starts."


class Watcher:
    """Calls `on_ready(life)` once and `on_hung(life, why)`, in its thread. `life` is asked for under `changed`, which is
    notified when another one begins or everything ends."""

    def __init__(
        self,
        *,
        vigilance: Vigilance,
        life: Callable[[], Life | None],
        changed: threading.Condition,
        closing: StopSignal,
        on_ready: Callable[[Life], None],
        on_hung: Callable[[Life, str], None],
    ) -> None:
        self._vigilance = vigilance
        self._current = life
        self._changed = changed
        self._closing = closing
        self._on_ready = on_ready
        self._on_hung = on_hung
        self.thread = threading.Thread(target=self._watch, name="engine-watcher", daemon=True)

    def _watch(self) -> None:
        life: Life | None = None
        stalls = StallWatch(self._vigilance)
        while not self._closing.is_set():
            with self._changed:
                current = self._current()
                if current is None:
                    self._changed.wait(1.0)
                    continue
            if current is not life:
                life, stalls = current, StallWatch(self._vigilance)
            try:
                pause_s = self._look(life, stalls)
            except Exception:
                log.exception("llama_server.look_failed")
                pause_s = self._vigilance.idle_every_s
            ends_at = time.monotonic() + pause_s
            with self._changed:
                while self._current() is life and not self._closing.is_set() and time.monotonic() < ends_at:
                    self._changed.wait(max(0.0, ends_at - time.monotonic()))

    def _look(self, life: Life, stalls: StallWatch) -> float:
        """Look once; the pause before the next look in seconds."""
        asked_at = time.monotonic()
        status = self._health(life)
        now = time.monotonic()
        if life.ready_at is None:
            if status == 200:
                self._on_ready(life)
            else:
                self._judge(life, stalls.loading(status != 0 or now - asked_at < SLOW_LOOK_S, asked_at, now))
            return self._vigilance.loading_every_s if now - life.started_at < LONG_LOAD_S else SLOW_LOOK_S
        self._judge(life, stalls.reached(status != 0, asked_at, now))
        if status == 0:
            return self._vigilance.busy_every_s
        if not (life.engine.busy or stalls.doubtful):
            return self._vigilance.idle_every_s
        asked_at = time.monotonic()
        slots = life.engine.slots_progress()
        now = time.monotonic()
        if slots is not None or now - asked_at >= SLOW_LOOK_S:
            self._judge(life, stalls.saw(slots, asked_at, now))
        return self._vigilance.busy_every_s

    def _judge(self, life: Life, problem: str | None) -> None:
        if problem is not None:
            self._on_hung(life, problem)

    def _health(self, life: Life) -> int:
        """HTTP status of the page that needs neither key nor model; 0 when nothing came."""
        limit_s = self._vigilance.answer_within_s
        try:
            with HttpExchange(life.address, api_key=None, connect_timeout_s=limit_s, stops=(self._closing,)) as asked:
                asked.send("GET", "/health", timeout_s=limit_s)
                return asked.status
        except (ConnectFailed, NoAnswer, Broken, Silent):
            return 0
