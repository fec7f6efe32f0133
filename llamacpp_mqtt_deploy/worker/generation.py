"""Runs one accepted request: prompt, engine, chunks, terminal event; started again while nothing was published."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import structlog

from llamacpp_mqtt_deploy.core.deltas import EngineCall, Finished
from llamacpp_mqtt_deploy.core.errors import ContextOverflow, EngineLost, RequestError
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.ports import Engine
from llamacpp_mqtt_deploy.stopping import Stopped
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.forwarding import Forwarder, TooMuch
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.journal_marks import JournalMarks
from llamacpp_mqtt_deploy.worker.own_errors import lost_too_often
from llamacpp_mqtt_deploy.worker.poison import PoisonSchemas, digest_of
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.prompting import PromptBuilder

log = structlog.get_logger(__name__)

# Some seconds of prompt processing on a small device: so long a crash costs a request its chance to be started again.
_SHORT_PROMPT_CHARS = 4000


class Generation:
    """Runs jobs, one per calling thread."""

    def __init__(
        self,
        *,
        engine: Engine,
        marks: JournalMarks,
        registry: JobRegistry,
        completion: Completion,
        loop: IoLoop,
        background: Background,
        prompts: PromptBuilder,
        policies: Callable[[], Policies],
        worker_id: str,
    ) -> None:
        self._engine = engine
        self._marks = marks
        self._registry = registry
        self._completion = completion
        self._loop = loop
        self._background = background
        self._prompts = prompts
        self._policies = policies
        self._worker_id = worker_id
        self._poison = PoisonSchemas()

    def run(self, job: Job) -> None:
        """Run the job to its terminal event, or to the point where it is paced without us."""
        try:
            job.stop.raise_if_set()
            schema = digest_of(job.request)
            if schema is not None:
                self._poison.refuse(schema, now=time.monotonic())
            finished = self._answered(job, schema)
            if not (job.live or job.responder.silent) and job.answer.begun:
                self._pace(job, finished)
            else:
                self._registry.release_slot(job)  # before the last commit: the next job need not wait for the disk
                self._completion.done(job, finished.finish_reason)
        except Stopped:
            self._completion.stopped(job)
        except RequestError as error:
            self._completion.failed(job, error)
        except Exception as cause:  # noqa: BLE001 - logged there
            self._completion.broken(job, cause)
        finally:
            self._registry.release_slot(job)

    def _answered(self, job: Job, schema: str | None) -> Finished:
        """The prompt, and the engine's answer to it."""
        call = self._prompts.build(job)
        try:
            return self._generate(job, call, schema)
        except ContextOverflow:
            # While the engine could not be asked how long the history is, its length was guessed.
            shorter = self._prompts.shorter(job, call)
            if shorter is None:
                raise
            log.info("history.fitted_again", request_id=job.key.request_id, dropped=job.answer.dropped_messages)
            job.starts -= 1  # the engine refused it: nothing was lost
            return self._generate(job, shorter, schema)

    def _generate(self, job: Job, call: EngineCall, schema: str | None) -> Finished:
        """Start the engine, again when it is lost before the first chunk (protocol, section 5), unless a schema may be why."""
        if schema is not None:
            call = replace(call, once=True)
        max_starts = self._policies().settings.limits.max_starts
        while True:
            if job.starts >= max_starts:
                raise lost_too_often(job.starts)
            job.starts += 1
            try:
                return self._once(job, call)
            except EngineLost:
                if schema is not None:
                    log.warning("engine.lost_under_schema", request_id=job.key.request_id, digest=schema[:16])
                    self._poison.died(schema, begun=job.answer.begun, now=time.monotonic())
                    raise
                if job.answer.begun or job.starts >= max_starts:
                    raise
                log.warning("engine.lost", request_id=job.key.request_id, starts=job.starts)
                self._waits(job, "engine_restarting")
                job.opened = False
                job.stop.wait(min(2.0, 0.1 * 2**job.starts))
                job.stop.raise_if_set()

    def _once(self, job: Job, call: EngineCall) -> Finished:
        short_prompt = sum(len(str(message.get("content"))) for message in call.messages) <= _SHORT_PROMPT_CHARS
        forwarder = Forwarder(
            job=job,
            native=self._policies().routes[job.key.route].mode == "native",
            worker_id=self._worker_id,
            opened=lambda job: self._opened(job, short_prompt=short_prompt),
            mark=lambda job: self._marks.streaming_soon(job.key),
            max_answer_bytes=self._policies().settings.limits.max_answer_bytes,
            max_tokens=call.sampling.get("max_tokens"),
        )
        try:
            finished = self._engine.pump(
                call,
                stop=job.stop,
                on_wait=lambda reason: self._waits(job, reason),
                feed=forwarder.feed,
                on_slow=job.hurry,
            )
        except TooMuch:
            log.warning("answer.cut", request_id=job.key.request_id, bytes=job.answer.size, pieces=job.answer.pieces)
            job.answer.warnings += (
                "the answer was cut: the engine went on beyond max_tokens or limits.max_answer_bytes",
            )
            finished = Finished("length", job.answer.usage())
        forwarder.finish(finished)
        return finished

    def _pace(self, job: Job, finished: Finished) -> None:
        streaming = self._policies().settings.streaming
        self._registry.release_slot(job, pacing=True)
        if not self._marks.streaming(job.key):
            job.responder.withhold_text()
            self._completion.done(job, finished.finish_reason)
            return
        from llamacpp_mqtt_deploy.worker.simulated import SimulatedStream  # noqa: PLC0415 - 1.5 MiB of regular expressions

        SimulatedStream(
            job=job,
            finish_reason=finished.finish_reason,
            completion=self._completion,
            loop=self._loop,
            background=self._background,
            chunk_chars=streaming.chunk_chars,
            interval_s=streaming.chunk_interval_s,
        ).start()

    def _waits(self, job: Job, reason: str) -> None:
        job.wait_reason = reason
        job.hurry()
        job.responder.queued(position=0, reason=reason, again=True)

    def _opened(self, job: Job, *, short_prompt: bool) -> bool:
        """Whether to mark the stream now. The start is counted in any case: a request that takes the whole worker down is not
        started for ever."""
        if short_prompt and job.starts == 1 and job.live:
            return True  # the mark says that it was started
        self._background.run(("started", job.key), lambda: self._marks.started(job.key))
        return False
