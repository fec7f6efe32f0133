"""The engine inside the worker's own process: llama.cpp through llama-cpp-python, driven by one thread that owns it."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished
from llamacpp_mqtt_deploy.core.errors import (
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    Internal,
    ModelNotFound,
    RequestError,
    ShuttingDown,
)
from llamacpp_mqtt_deploy.engines.inprocess import modelfile, native, opening
from llamacpp_mqtt_deploy.engines.inprocess.modelfile import Unreadable, Unusable
from llamacpp_mqtt_deploy.engines.inprocess.prefixes import Prefixes
from llamacpp_mqtt_deploy.engines.inprocess.running import CallInterrupted, Plan, Run
from llamacpp_mqtt_deploy.engines.slots import Slots
from llamacpp_mqtt_deploy.ports import EngineInfo, EngineState, Unloaded
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal

if TYPE_CHECKING:  # needs jinja2, which comes with llama-cpp-python and may be absent like it
    from llamacpp_mqtt_deploy.engines.inprocess.planning import Planner

log = structlog.get_logger(__name__)

GRACE_S = 0.3
"""How long a stopped call waits for the owner to free the slot before it leaves it behind."""
WEDGED_AFTER_S = 20.0
"""A batch of a large model on a slow processor takes some seconds; llama.cpp stops within one, or not at all."""
LOOK_AGAIN_S = 15.0
"""Pause between two looks for a model file that was not there."""
_MIB = 1024 * 1024


class InprocessEngine:
    """Loads one model and runs one generation at a time; see `ports.Engine`.

    llama.cpp's context belongs to the thread `llama`, which nothing else touches it from. A caller hands it a `Run` and
    reads deltas; it never waits for native code beyond `GRACE_S`.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._closing = StopSignal()
        self._slots = Slots(1)
        self._changed = threading.Condition()  # guards what follows; held for arithmetic only
        self._info = EngineInfo(
            state="starting", kind="inprocess", detail="The model was not loaded yet.", can_restart=True
        )
        self._waiting: deque[Run] = deque()
        self._running: Run | None = None
        self._reload = False
        self._thread: threading.Thread | None = None
        self._vocabulary = threading.Lock()  # held while a caller uses the model, so that it is not freed meanwhile
        self._planner: Planner | None = None

    # --- condition ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start to load in the thread that will own the model.

        Raises ValueError when no model is named or llama-cpp-python is not there: waiting mends neither.
        """
        settings = self._settings
        if settings.model_path is None and not (settings.repo_id and settings.filename):
            raise ValueError(
                "engine.model_path: name a .gguf file (or engine.repo_id and engine.filename to download one)"
            )
        if importlib.util.find_spec("llama_cpp") is None:
            raise ValueError(native.MISSING)
        with self._changed:
            if self._thread is not None or self._closing.is_set():
                return
            self._thread = threading.Thread(target=self._own, name="llama", daemon=True)
        self._become("loading", "The model is being loaded.")
        self._thread.start()

    def wait_ready(self, stop: StopSignal, timeout_s: float | None) -> bool:
        forget = stop.on_stop(self._wake)
        try:
            with self._changed:
                self._changed.wait_for(lambda: stop.is_set() or self._info.state in ("ready", "closed"), timeout_s)
                return self._info.state == "ready" and not stop.is_set()
        finally:
            forget()

    def info(self) -> EngineInfo:
        info = self._info
        wedged_s = self._wedged_s()
        if wedged_s is not None and info.state == "ready":
            return replace(
                info,
                state="failed",
                detail=f"llama.cpp did not come back from a computation for {wedged_s:.0f} s after it was told to stop. "
                "Only a restart of the worker helps.",
            )
        return info

    def probe(self) -> EngineInfo:
        return self.info()

    def restart(self) -> bool:
        """Load the model anew; a running answer is lost. False when the engine is closed or wedged."""
        with self._changed:
            if self._thread is None or self._closing.is_set() or self._wedged_s() is not None:
                return False
            self._reload = True
            running = self._running
            self._changed.notify_all()
        if running is not None:
            running.interrupt()
        return True

    def unload(self) -> Unloaded:
        return "unsupported"

    def keep_awake(self, seconds: float | None) -> bool:
        return False

    def close(self, deadline: Deadline) -> None:
        self._become("closed", "")
        self._closing.set("shutting_down")
        self._wake()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(deadline.remaining_s())
            if thread.is_alive():
                log.warning("engine.left_behind", reason="llama.cpp does not come back from a computation")

    @property
    def busy(self) -> int:
        """Slots in use."""
        return self._slots.busy

    def _become(self, state: EngineState, detail: str) -> None:
        self._saw(replace(self._info, state=state, detail=detail))

    def _saw(self, info: EngineInfo) -> None:
        with self._changed:
            before = self._info
            if before.state == "closed":
                return
            self._info = info
            self._changed.notify_all()
        if info.state != before.state:
            log.info("engine.changed", state=info.state, before=before.state, detail=info.detail)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wedged_s(self) -> float | None:
        """Seconds for which the running call has not come back after it was told to stop, once they are too many."""
        running = self._running
        if running is None or running.interrupted_at is None:
            return None
        seconds = time.monotonic() - max(running.interrupted_at, running.beat)
        return seconds if seconds > WEDGED_AFTER_S else None

    # --- calls -------------------------------------------------------------------------------------------------------

    def stream(self, call: EngineCall, *, stop: StopSignal, on_wait: Callable[[str], None]) -> Iterator[Delta]:
        with self._translating(stop), self._running_call(call, stop, on_wait) as run:
            for deltas in run.receive():
                yield from deltas

    def pump(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
        feed: Callable[[Sequence[Delta]], float],
        on_slow: Callable[[], None] = lambda: None,
    ) -> Finished:
        on_slow()  # how long a prompt takes is not known
        with self._translating(stop), self._running_call(call, stop, on_wait) as run:
            for deltas in run.receive():
                finished = deltas[-1] if isinstance(deltas[-1], Finished) else None
                pause_s = feed(deltas[:-1] if finished else deltas) if len(deltas) > 1 or not finished else 0.0
                if finished is not None:
                    return finished
                if pause_s > 0:
                    run.rest(pause_s)
        raise EngineLost("The engine ended the answer without saying that it was complete.")

    @contextmanager
    def _translating(self, stop: StopSignal) -> Iterator[None]:
        """A fault behind a stop is the stop's."""
        try:
            yield
        except (RequestError, CallInterrupted) as error:
            if stop.is_set():
                raise Stopped(stop.reason) from error
            if self._closing.is_set():
                raise _closed() from error
            if isinstance(error, CallInterrupted):
                raise EngineLost("The engine was restarted in the middle of the answer.") from error
            raise

    def expect(self) -> None:
        """Nothing to get ready."""

    def unsupported_fields(self, call: EngineCall) -> tuple[str, ...]:
        planner = self._planner
        return () if planner is None else planner.left_out(call)

    def count_tokens(self, call: EngineCall, *, stop: StopSignal) -> int | None:
        stop.raise_if_set()
        try:
            self._wait_until_ready(stop, lambda _: None)
        except EngineUnavailable:
            return None
        with self._using(stop) as planner:
            return None if planner is None else planner.count(call)

    @contextmanager
    def _running_call(self, call: EngineCall, stop: StopSignal, on_wait: Callable[[str], None]) -> Iterator[Run]:
        """The call, given to the owner; on leaving it is interrupted, should it still run."""
        stop.raise_if_set()
        self._wait_until_ready(stop, on_wait)
        plan, planner = self._plan(call, stop)
        while not self._slots.acquire(stop, timeout_s=1.0):
            if self.info().state == "failed":
                raise EngineUnavailable("The worker's engine hangs; its operator must restart the worker.")
        run = Run(plan)  # from here on the owner frees the slot
        forget = [signal.on_stop(run.interrupt) for signal in (stop, self._closing)]
        try:
            self._hand_over(run, planner)
            yield run
        finally:
            for take_back in forget:
                take_back()
            run.interrupt()
            run.ended.wait(GRACE_S)

    def _wait_until_ready(self, stop: StopSignal, on_wait: Callable[[str], None]) -> None:
        told: str | None = None
        forget = stop.on_stop(self._wake)
        try:
            while True:
                state = self._info.state
                stop.raise_if_set()
                match state:
                    case "ready":
                        return
                    case "closed":
                        raise _closed()
                    case "failed":
                        raise EngineUnavailable(
                            "The worker's engine could not load its model; its operator finds why in the status."
                        )
                reason = "engine_restarting" if state == "restarting" else "loading"
                if reason != told:
                    told = reason
                    on_wait(reason)
                with self._changed:
                    self._changed.wait_for(lambda before=state: self._info.state != before or stop.is_set())  # type: ignore[misc]
        finally:
            forget()

    @contextlib.contextmanager
    def _using(self, stop: StopSignal) -> Iterator[Planner | None]:
        """The planner, with the promise that its model is not freed meanwhile."""
        while not self._vocabulary.acquire(timeout=0.1):
            stop.raise_if_set()
        try:
            yield self._planner
        finally:
            self._vocabulary.release()

    def _plan(self, call: EngineCall, stop: StopSignal) -> tuple[Plan, Planner]:
        with self._using(stop) as planner:
            if planner is None:
                raise EngineLost("The engine was restarted before the answer began.")
            if call.model is not None and call.model != planner.name:
                raise ModelNotFound("This worker's engine does not have this model.")
            return planner.plan(call), planner

    def _hand_over(self, run: Run, planner: Planner) -> None:
        """Give the run to the owner. Its tokens are those of the planner's model, which may have been let go meanwhile."""
        with self._changed:
            closed = self._closing.is_set()
            if not closed and not self._reload and self._planner is planner:
                self._waiting.append(run)
                self._changed.notify_all()
                return
        run.end()
        self._slots.release()
        raise _closed() if closed else EngineLost("The engine was restarted before the answer began.")

    # --- the owner's thread ------------------------------------------------------------------------------------------

    def _own(self) -> None:
        """Load, then run what is handed over, until the engine is closed; again when it is told to load anew."""
        while not self._closing.is_set():
            self._reload = False
            looking = False
            try:
                self._live_once()
                continue
            except opening.GivenUp:
                continue
            except (Unusable, native.NotInstalled) as error:
                self._become("failed", str(error))
                looking = isinstance(error, Unreadable)
            except Exception:
                log.exception("engine.thread_failed")
                self._become("failed", "The engine's thread failed; the log says why.")
            self._end_waiting(EngineLost("The engine failed before the answer began."))
            self._idle(looking=looking)
        self._end_waiting(_closed())

    def _end_waiting(self, error: RequestError) -> None:
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for run in left:
            self._slots.release()
            run.end(error)

    def _live_once(self) -> None:
        model: native.Model | None = None
        context: native.Context | None = None
        try:
            model, name = opening.load(self._settings, self._tell_progress)
            context = opening.make_context(self._settings, model)
            try:
                from llamacpp_mqtt_deploy.engines.inprocess.planning import Planner  # noqa: PLC0415 - needs jinja2
            except ImportError as error:
                raise Unusable(f'{error}: pip install "llamacpp-mqtt-deploy[inprocess]".') from error
            planner = Planner(model, name=name, n_ctx=context.n_ctx)
            with self._vocabulary:
                self._planner = planner
            self._saw(self._ready(model, planner))
            self._serve(context)
        finally:
            with self._vocabulary:  # the context before the model, and neither while somebody uses it
                self._planner = None
                if context is not None:
                    context.close()
                if model is not None:
                    model.close()

    def _idle(self, *, looking: bool) -> None:
        """Nothing to run: wait to be closed or told to try again, or for the file to appear."""
        path = self._settings.model_path
        while True:
            with self._changed:
                pause_s = LOOK_AGAIN_S if looking and path is not None else None
                if self._changed.wait_for(lambda: self._closing.is_set() or self._reload, pause_s):
                    break
            with contextlib.suppress(Unusable):
                assert path is not None
                modelfile.look_at(path)
                break
        if not self._closing.is_set():
            self._become("loading", "The model is being loaded again.")

    def _serve(self, context: native.Context) -> None:
        prefixes = Prefixes(context, self._settings.state_cache_mib * _MIB)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._reload or self._closing.is_set())
                if self._closing.is_set():
                    return
                run = None if self._reload else self._waiting.popleft()
                self._running = run
            if run is None:
                self._become("restarting", "The model is being loaded again.")
                self._end_waiting(EngineLost("The engine was restarted before the answer began."))
                return
            self._perform(run, context, prefixes)

    def _perform(self, run: Run, context: native.Context, prefixes: Prefixes) -> None:
        from llamacpp_mqtt_deploy.engines.inprocess.generating import GenerationLoop  # noqa: PLC0415 - needs numpy

        error: BaseException | None = None
        try:
            GenerationLoop(run, context, prefixes).perform()
        except (CallInterrupted, native.Aborted):
            error = CallInterrupted()
        except RequestError as refused:
            error = refused
        except native.DecodeFailed as failed:
            log.warning("engine.decode_failed", problem=str(failed))
            context.truncate(0)
            error = EngineFailed(str(failed))
        except Exception as problem:
            log.exception("engine.call_failed")
            context.truncate(0)
            error = Internal("The engine failed on this request; the worker's log says why.")
            error.__cause__ = problem
        finally:
            with self._changed:
                self._running = None
            self._slots.release()
            run.end(error)

    # --- loading -----------------------------------------------------------------------------------------------------

    def _tell_progress(self, doing: str, name: str, done: float) -> bool:
        """Put the percentage into the detail, in steps of five; False when the engine is being closed."""
        detail = f"{doing} {name}: {int(done * 20) * 5} %."
        if detail != self._info.detail:
            self._become("loading", detail)
        return not self._closing.is_set()

    def _ready(self, model: native.Model, planner: Planner) -> EngineInfo:
        offloaded = model.library.can_offload() and self._settings.gpu_layers != 0
        return replace(
            self._info,
            state="ready",
            detail="",
            backend=model.library.backend() if offloaded else "cpu",
            gpu_layers=model.library.gpu_layers,
            models=(planner.name,),
            n_ctx=planner.n_ctx,
            slots=1,
            tools=planner.template.tool_style is not None,
            thinking=planner.template.thinking_tags is not None,
            json_schema=True,
        )


def _closed() -> ShuttingDown:
    return ShuttingDown("The worker is shutting its engine down.")
