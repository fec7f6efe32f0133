"""Keeps asking the engine how it is, in a thread of its own, and tells when that changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from llamacpp_mqtt_deploy.ports import Engine, EngineInfo, EngineState
from llamacpp_mqtt_deploy.stopping import StopSignal

log = structlog.get_logger(__name__)

# A healthy engine is asked rarely; one that is away or loading so often that its return is noticed at once. What the engine
# knows by itself (a child that died, a call that failed) costs nothing to look at.
_READY_EVERY_S = 10.0
_LOOK_EVERY_S = 0.5


class EngineWatch:
    """Calls `on_change(info)` in its own thread for the first answer and whenever the engine's condition changes."""

    def __init__(self, engine: Engine, on_change: Callable[[EngineInfo], None]) -> None:
        self._engine = engine
        self._on_change = on_change
        self._stop = StopSignal()
        self.returns = 0
        """How often the engine answered again after it had been away: its process was restarted, or could not be reached. To be woken
        is no return, it was not away."""
        self.seen: EngineState = "starting"
        """The state at the last look."""
        self._was_ready = self._away = False
        self._thread = threading.Thread(target=self._loop, name="engine-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _loop(self) -> None:
        last: EngineInfo | None = None
        asked_at = -_READY_EVERY_S
        while not self._stop.is_set():
            try:
                info = self._engine.info()
                if info.state != "ready" or time.monotonic() - asked_at >= _READY_EVERY_S:
                    info = self._engine.probe()
                    asked_at = time.monotonic()
                self._count(info.state)
                if info != last:
                    _tell(info, last)
                    last = info
                    self._on_change(info)
            except Exception:
                log.exception("engine.probe_failed")
            self._stop.wait(_LOOK_EVERY_S)

    def _count(self, state: EngineState) -> None:
        before, self.seen = self.seen, state
        if state == "ready":
            self.returns += self._away
            self._was_ready, self._away = True, False
        elif state == "asleep":
            self._away = False
        elif before == "ready" or state in ("restarting", "unreachable", "failed"):
            self._away = self._was_ready

    def close(self, timeout_s: float) -> None:
        self._stop.set("shutting_down")
        if self._thread.is_alive():
            self._thread.join(timeout_s)


def _tell(info: EngineInfo, last: EngineInfo | None) -> None:
    if last is not None and last.state == info.state:
        return
    if info.state == "ready":
        log.info(
            "engine.ready",
            kind=info.kind,
            models=list(info.models),
            slots=info.slots,
            n_ctx=info.n_ctx,
            backend=info.backend,
            gpu_layers=info.gpu_layers,
        )
    elif info.state == "asleep":
        log.info("engine.asleep")
    else:
        log.warning("engine.not_ready", state=info.state, detail=info.detail)
