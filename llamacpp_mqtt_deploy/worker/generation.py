"""The corridor: one request from its prompt to its terminal event."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import structlog

from llamacpp_mqtt_deploy.core.chunking import SentenceCutter
from llamacpp_mqtt_deploy.core.deltas import (
    Delta,
    EngineCall,
    Finished,
    Opened,
    PromptProgress,
    Reasoning,
    Text,
    ToolCall,
)
from llamacpp_mqtt_deploy.core.errors import EngineLost, Internal, RequestError
from llamacpp_mqtt_deploy.ports import Engine, Store, StoreError
from llamacpp_mqtt_deploy.stopping import Stopped
from llamacpp_mqtt_deploy.worker.completion import Completion, often_lost
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.prompting import PromptBuilder
from llamacpp_mqtt_deploy.worker.simulated import SimulatedStream
from llamacpp_mqtt_deploy.worker.timers import Timers

log = structlog.get_logger(__name__)

# Protocol, section 3: `progress` at most twice a second. The first one goes at once when there is work worth telling of.
_PROGRESS_EVERY_S = 0.5
_PROGRESS_WORTH_TOKENS = 256


class Generation:
    """Runs jobs, one per calling thread."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        registry: JobRegistry,
        completion: Completion,
        timers: Timers,
        prompts: PromptBuilder,
        policies: Callable[[], Policies],
        worker_id: str,
    ) -> None:
        self._engine = engine
        self._store = store
        self._registry = registry
        self._completion = completion
        self._timers = timers
        self._prompts = prompts
        self._policies = policies
        self._worker_id = worker_id

    def run(self, job: Job) -> None:
        """Run the job to its terminal event, or to the point where it is paced without us."""
        try:
            job.stop.raise_if_set()
            call = self._prompts.build(job)
            finished = self._generate(job, call)
            if not (job.live or job.responder.silent) and job.answer.begun:
                self._pace(job, finished)
            else:
                self._registry.release_slot(job)  # before the last commit: the next job need not wait for the disk
                self._completion.done(job, finished.finish_reason)
        except Stopped:
            self._completion.stopped(job)
        except RequestError as error:
            self._completion.failed(job, error)
        except Exception:
            log.exception("generation.failed", request_id=job.key.request_id)
            self._completion.failed(job, Internal("the worker failed on this request; its log says why"))
        finally:
            self._registry.release_slot(job)

    def _generate(self, job: Job, call: EngineCall) -> Finished:
        """Start the engine, again when it is lost before the first chunk (protocol, section 5)."""
        max_starts = self._policies().settings.limits.max_starts
        while True:
            if job.starts >= max_starts:
                raise often_lost(job.starts)
            job.starts += 1
            try:
                with contextlib.closing(self._deltas(job, call)) as deltas:
                    return self._forward(job, deltas)
            except EngineLost:
                if job.answer.begun or job.starts >= max_starts:
                    raise
                log.warning("engine.lost", request_id=job.key.request_id, starts=job.starts)
                self._waits(job, "engine_restarting")
                job.opened = False
                job.stop.wait(min(2.0, 0.1 * 2**job.starts))
                job.stop.raise_if_set()

    def _deltas(self, job: Job, call: EngineCall) -> Any:
        return self._engine.stream(
            call, stop=job.stop, on_wait=lambda reason: self._waits(job, reason), before_read=job.responder.settle
        )

    def _forward(self, job: Job, deltas: Iterator[Delta]) -> Finished:
        """Pass on what the engine says; a token's way is the first branch."""
        responder, answer, silent = job.responder, job.answer, job.responder.silent
        live = not silent and self._policies().routes[job.key.route].mode == "native"
        sentences = SentenceCutter() if job.request.stream == "sentence" else None
        marked = not live
        told_progress_at: float | None = None
        for delta in deltas:
            now = job.activity_at = time.monotonic()
            if type(delta) is Text or type(delta) is Reasoning:
                if not marked:
                    self._mark_streaming(job)
                    marked = True
                if type(delta) is Text:
                    answer.add_text(delta.text, now)
                    if live:
                        if sentences is None:
                            responder.text("content", delta.text)
                        else:
                            for sentence in sentences.feed(delta.text):
                                responder.piece("content", sentence)
                else:
                    answer.add_reasoning(delta.text, now)
                    if live:
                        responder.text("reasoning", delta.text)
                job.prompt_done = True
            elif type(delta) is ToolCall:
                if not marked:
                    self._mark_streaming(job)
                    marked = True
                event = answer.add_call(delta, now)
                if live:
                    responder.tool_call(event)
                job.prompt_done = True
            elif type(delta) is PromptProgress:
                answer.progress = delta
                worth = delta.total - delta.processed >= _PROGRESS_WORTH_TOKENS
                if worth if told_progress_at is None else now - told_progress_at >= _PROGRESS_EVERY_S:
                    told_progress_at = now
                    responder.progress(processed=delta.processed, total=delta.total, cached=delta.cached)
            elif type(delta) is Opened:
                answer.model = delta.model
                job.opened = True
                self._count_start(job)
                live = job.live = live and delta.streams
                marked = not live
                self._tell_start(job)
            elif type(delta) is Finished:
                if live:
                    for sentence in sentences.flush() if sentences is not None else ():
                        responder.piece("content", sentence)
                    # Text that came together with the end still waits; untold it would pass for an answer to be paced.
                    responder.flush()
                answer.finished = delta
                return delta
        raise EngineLost("the engine ended the answer without saying that it was complete")

    def _tell_start(self, job: Job) -> None:
        fields: dict[str, Any] = {
            "model": job.answer.model or job.request.model or "",
            "worker": self._worker_id,
            "created": int(time.time()),
        }
        warnings = [*job.request.warnings, *job.answer.warnings]
        if warnings:
            fields["warnings"] = warnings
        if job.request.metadata is not None:
            fields["metadata"] = job.request.metadata
        job.responder.start(fields)

    def _pace(self, job: Job, finished: Finished) -> None:
        streaming = self._policies().settings.streaming
        self._registry.release_slot(job, pacing=True)
        SimulatedStream(
            job=job,
            finish_reason=finished.finish_reason,
            completion=self._completion,
            timers=self._timers,
            before_first=self._mark_streaming,
            chunk_chars=streaming.chunk_chars,
            interval_s=streaming.chunk_interval_s,
        ).start()

    def _waits(self, job: Job, reason: str) -> None:
        job.activity_at = time.monotonic()
        job.wait_reason = reason
        job.responder.queued(position=0, reason=reason, again=True)

    def _count_start(self, job: Job) -> None:
        """In the journal too: a request that takes the whole worker down is not started for ever."""
        try:
            self._store.mark_started(job.key)
        except StoreError as problem:
            log.error("journal.failed", step="mark_started", problem=str(problem), request_id=job.key.request_id)

    def _mark_streaming(self, job: Job) -> None:
        """Before the first chunk: from here on the request is never started again, also after a crash."""
        try:
            self._store.mark_streaming(job.key)
        except StoreError as problem:
            log.error("journal.failed", step="mark_streaming", problem=str(problem), request_id=job.key.request_id)
