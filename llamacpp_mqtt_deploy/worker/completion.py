"""How a request ends: exactly one terminal event, stored with the history before it is published."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from llamacpp_mqtt_deploy.core.chunk_record import omits_text
from llamacpp_mqtt_deploy.core.deltas import FinishReason
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.events import interrupted
from llamacpp_mqtt_deploy.core.history import exchange_of
from llamacpp_mqtt_deploy.core.spending import Spent
from llamacpp_mqtt_deploy.pool_ports import LeaseLost
from llamacpp_mqtt_deploy.ports import HistoryChange, Store, StoreError
from llamacpp_mqtt_deploy.worker.accumulator import Told, done_fields, usage_fields
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.journal_clock import wall
from llamacpp_mqtt_deploy.worker.journal_marks import JournalMarks
from llamacpp_mqtt_deploy.worker.own_errors import defect, outbox_full, stop_error
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery

log = structlog.get_logger(__name__)

_WRITE_WAIT_S = 30.0
"""As long as a write is waited for anywhere."""

_TOLD_AT_ONCE_BYTES = 65_536
"""An end this large is not told in the store's thread: it may have to be cut to what the broker takes."""


class _Once:
    """Calls `call` at the first call, whichever thread makes it."""

    __slots__ = ("_call", "_lock")

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            call, self._call = self._call, None
        if call is not None:
            call()


class Completion:
    """Writes terminal events. Each method may be called from any thread; only the first call for a job has an effect."""

    def __init__(
        self,
        *,
        store: Store,
        marks: JournalMarks,
        registry: JobRegistry,
        counters: Counters,
        redelivery: Redelivery,
        log_content: Callable[[], bool],
        now: Callable[[], float] = wall,
    ) -> None:
        self._now = now
        self._store = store
        self._marks = marks
        self._registry = registry
        self._counters = counters
        self._redelivery = redelivery
        self._log_content = log_content

    def done(self, job: Job, finish_reason: FinishReason) -> None:
        """End with `done`."""
        if not self._claim(job):
            return
        try:
            told = self._told(job)
            error: RequestError | None = None
            history: HistoryChange | None = None
            if job.responder.overflowed and finish_reason != "cancelled":
                # What the last chunks should have told is missing: this is no whole answer.
                error = outbox_full()
                terminal = _error_event(job, error, told)
            else:
                terminal = job.responder.done(self._done_fields(job, finish_reason, told))
                history = self._history(job, told, finish_reason)
        except Exception as cause:  # noqa: BLE001 - logged there
            self._end_by_defect(job, cause)
        else:
            self._end(job, terminal, history, outcome=error.code if error is not None else finish_reason, error=error)

    def failed(self, job: Job, error: RequestError) -> None:
        """End with `error`; what was told already comes along as `partial_content`."""
        if not self._claim(job):
            return
        try:
            terminal = _error_event(job, error, self._told(job))
        except Exception as cause:  # noqa: BLE001 - logged there
            self._end_by_defect(job, cause)
        else:
            self._end(job, terminal, None, outcome=error.code, error=error)

    def broken(self, job: Job, cause: Exception) -> None:
        """End a job on which the worker itself failed."""
        self._note("generation.failed", job, cause)
        self.failed(job, defect(cause))

    def stopped(self, job: Job) -> None:
        """End a job whose stop signal was set, for the reason that it carries."""
        if job.stop.reason == "cancelled":
            self.done(job, "cancelled")
        elif job.stop.reason == "put_back":
            self._put_back(job)
        else:
            limit_s = job.deadline - job.received_at
            self.failed(job, stop_error(job.stop.reason, limit_s=limit_s, started=job.started_at is not None))

    def _claim(self, job: Job) -> bool:
        """Whether the caller has to bring the end."""
        if not self._registry.claim_end(job):
            return False
        if _was_accepted(job):
            return True
        self._refuse(job)
        return False

    def _refuse(self, job: Job) -> None:
        """The journal does not have the request. However far it got meanwhile: nobody has heard of it, and nobody would remember
        this end when the request is sent again. So it ends as one that was never accepted, and changes no history."""
        job.responder.withdraw()
        error = stop_error("unjournaled", limit_s=0.0, started=False)
        terminal = _plain_error(job, error, metadata=job.request.metadata)
        try:
            self._redelivery.send(
                job.key,
                job.responder.topic,
                terminal,
                job.entry.correlation,
                share="answer",
                rendering=job.rendering,
            )
        except Exception:
            log.exception("ending.failed", request_id=job.key.request_id)
        finally:
            self._registry.leave(job)
        self._record(job, error.code, error)

    def _note(self, event: str, job: Job, cause: Exception) -> None:
        if isinstance(cause, MemoryError):
            self._counters.starved()
            # Without its stack: that would take memory too.
            log.error("request.out_of_memory", request_id=job.key.request_id, session=job.key.session)
        else:
            log.error(event, request_id=job.key.request_id, exc_info=cause)

    def _end_by_defect(self, job: Job, cause: Exception) -> None:
        """Whoever claimed the end has to bring one: without it the session waits, and its client, until a restart."""
        self._note("ending.failed", job, cause)
        job.responder.close()
        error = defect(cause)
        terminal = _plain_error(job, error, metadata=None)
        self._end(job, terminal, None, outcome=error.code, error=error)

    def _told(self, job: Job) -> Told:
        """Close the chunks. One that is paced ends with what was told; every other is told to where the engine came."""
        catch_up = job.phase != "pacing"
        if job.marking is not None and not self._marks.written(job.marking):
            job.responder.withhold_text()
        begins = not (job.responder.silent or job.responder.withheld or job.responder.chunks)
        if catch_up and job.answer.begun and begins and not self._marks.streaming(job.key):
            job.responder.withhold_text()
        return job.responder.close_text(content=job.answer.text(), reasoning=job.answer.thoughts(), catch_up=catch_up)

    def _done_fields(self, job: Job, finish_reason: FinishReason, told: Told) -> dict[str, Any]:
        timings = _timings(job)
        if finish_reason == "cancelled" and job.stop.at is not None:
            timings["cancel_ms"] = _ms(time.monotonic() - job.stop.at)
        return done_fields(
            job.answer,
            told=told,
            finish_reason=finish_reason,
            with_text=_with_text(job),
            timings=timings,
            metadata=job.request.metadata,
            warnings=(*job.request.warnings, *job.answer.warnings),
        )

    def _put_back(self, job: Job) -> None:
        """No end at all: the journal keeps the request, and the worker runs it at its next start."""
        if self._registry.claim_end(job):
            self._registry.leave(job)
            log.info("request.put_back", session=job.key.session, request_id=job.key.request_id)

    def _history(self, job: Job, told: Told, finish_reason: FinishReason) -> HistoryChange | None:
        """Prompt and answer together, or nothing: two user messages in a row break many chat templates."""
        request = job.request
        if request.mode == "messages" or job.forgotten:
            return None
        append = exchange_of(
            job.request.new_messages(),
            job.answer.message(told.content, with_calls=told.calls),
            cancelled=finish_reason == "cancelled",
        )
        if not append:
            return None
        return HistoryChange(
            session=(job.key.route, job.key.session),
            append=append,
            forget_before=request.new,
        )

    def _end(
        self,
        job: Job,
        terminal: bytes,
        history: HistoryChange | None,
        *,
        outcome: str,
        error: RequestError | None = None,
    ) -> None:
        """Whatever fails here, the end is sent and the job leaves: else its session and its client wait until a restart.

        Told is what the journal has: a history that is asked for at once has the answer, and no crash ends the request anew.
        """
        telling = _Once(lambda: self._tell(job, terminal))

        def close() -> None:
            telling()
            self._registry.leave(job)
            self._record(job, outcome, error)

        try:
            spent = _spent(job)
            self._registry.spend(spent, self._now())
            stored = self._write(job, terminal, history, self._chunks(job, terminal), spent, telling, close)
        except Exception:
            log.exception("ending.failed", request_id=job.key.request_id)
            stored = True
        if stored:
            close()

    def _tell(self, job: Job, terminal: bytes) -> None:
        job.told = True
        try:
            self._redelivery.send(
                job.key, job.responder.topic, terminal, job.entry.correlation, rendering=job.rendering
            )
        except Exception:
            log.exception("ending.failed", request_id=job.key.request_id)

    def _chunks(self, job: Job, terminal: bytes) -> bytes | None:
        """What only the chunks told, for a client that lost some of them: stored once, with the end."""
        return job.responder.chunk_record() if omits_text(terminal) or not job.request.full_content else None

    def _write(
        self,
        job: Job,
        terminal: bytes,
        history: HistoryChange | None,
        chunks: bytes | None,
        spent: Spent,
        telling: _Once,
        close: Callable[[], None],
    ) -> bool:
        """Store the end; False when the store does not take it now: then `close` is called as soon as it does, or after a while."""
        began = time.monotonic()
        try:
            # In the store's thread: the client need not wait until this thread has woken up.
            at_once = job.rendering is None and len(terminal) <= _TOLD_AT_ONCE_BYTES

            def stored() -> None:
                if not job.forgotten:  # else the history has to go first
                    telling()
                    self._registry.leave(job)  # whoever has heard of the end and asks is told that it has ended

            self._store.finish(
                job.key,
                terminal,
                now=self._now(),
                history=history,
                chunks=chunks,
                spent=spent,
                on_stored=stored if at_once else None,
            )
            if job.forgotten and history is not None:  # a reset came while we wrote
                self._store.reset(history.session)
        except LeaseLost:
            self._leave_to_another(job)
            return False
        except StoreError as problem:
            log.error("journal.failed", step="finish", problem=str(problem), request_id=job.key.request_id)
            self._tell_later(job, terminal, history, chunks, spent, close, since=began)
            return False
        except Exception:
            # A defect, perhaps of these messages: without them the end may still be written.
            log.exception("ending.failed", step="finish", request_id=job.key.request_id)
            if history is not None:
                return self._write(job, terminal, None, chunks, spent, telling, close)
            self._tell_later(job, terminal, None, chunks, spent, close, since=began)
            return False
        return True

    def _leave_to_another(self, job: Job) -> None:
        """Another worker of the pool has taken the request over: its end is that one's to tell."""
        log.warning("request.taken_over", session=job.key.session, request_id=job.key.request_id)
        job.responder.close()
        self._registry.leave(job)

    def _tell_later(
        self,
        job: Job,
        terminal: bytes,
        history: HistoryChange | None,
        chunks: bytes | None,
        spent: Spent,
        close: Callable[[], None],
        *,
        since: float,
    ) -> None:
        self._registry.hold_end(job)
        self._redelivery.store_later(
            job.key,
            terminal,
            now=self._now(),
            history=history,
            chunks=chunks,
            then=close,
            taken_over=lambda: self._leave_to_another(job),
            since=since,
            spent=spent,
        )
        if job.forgotten and history is not None:
            self._redelivery.forget(history.session)

    def _record(self, job: Job, outcome: str, error: RequestError | None) -> None:
        """The one line of the log for each request, and its counts."""
        answer = job.answer
        usage, timings = answer.usage(), _timings(job)
        self._counters.ended(
            outcome,
            error=error is not None,
            usage=usage,
            lane=job.request.priority,
            total_s=timings["total_ms"] / 1000,
            first_token_s=None if timings["first_token_ms"] is None else timings["first_token_ms"] / 1000,
        )
        fields: dict[str, Any] = {
            "route": job.key.route,
            "session": job.key.session,
            "request_id": job.key.request_id,
            "outcome": outcome,
            "chunks": job.responder.chunks,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "starts": job.starts,
            **timings,
        }
        if self._log_content():
            fields |= {"prompt": job.request.prompt, "answer": answer.text()}
        if error is None:
            log.info("request.finished", **fields)
        else:
            cause = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else None
            log.warning("request.finished", **fields, message=self._loggable(error), cause=cause)

    def _loggable(self, error: RequestError) -> str:
        if not error.quoted or self._log_content():
            return error.message
        return error.message.replace(error.quoted, f"({len(error.quoted)} characters of the engine, not logged)")


def _was_accepted(job: Job) -> bool:
    """Whether the journal has the request; waits for it, as the end itself would do next."""
    if job.accepting is not None and not job.unjournaled:
        try:
            job.accepting.wait(_WRITE_WAIT_S)
        except StoreError:
            return not job.accepting.done()  # a disk that hangs may still take it
    return not job.unjournaled


def _plain_error(job: Job, error: RequestError, *, metadata: Mapping[str, Any] | None) -> bytes:
    """An end that says nothing of what came before it."""
    return interrupted(
        request_id=job.key.request_id,
        session_id=job.key.session,
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        metadata=metadata,
    )


def _with_text(job: Job) -> bool:
    """Whether the end tells the text: where no chunk did, it has to."""
    return job.request.full_content or job.responder.withheld


def _error_event(job: Job, error: RequestError, told: Told) -> bytes:
    details = _error_details(job, error, told)
    return job.responder.error(code=error.code, message=error.message, retryable=error.retryable, details=details)


def _error_details(job: Job, error: RequestError, told: Told) -> dict[str, Any]:
    answer = job.answer
    details: dict[str, Any] = dict(error.details)
    if answer.begun and _with_text(job):
        details["partial_content"] = told.content
    if answer.begun or answer.progress is not None:
        details["usage"] = usage_fields(answer.usage())
    details["timings"] = {name: value for name, value in _timings(job).items() if value is not None}
    warnings = [*job.request.warnings, *answer.warnings]
    if warnings:
        details["warnings"] = warnings
    if job.request.metadata is not None:
        details["metadata"] = job.request.metadata
    return details


def _spent(job: Job) -> Spent:
    """What the request has cost. An engine that tells no usage leaves the pieces to count."""
    usage, engine_s = job.answer.usage(), 0.0
    if job.started_at is not None:
        engine_s = max(0.0, (job.released_at or time.monotonic()) - job.started_at)
    return Spent(
        first_level=job.address.first_level,
        tokens_in=usage.prompt_tokens,
        tokens_out=usage.completion_tokens or job.answer.pieces,
        engine_s=round(engine_s, 3),
    )


def _timings(job: Job) -> dict[str, Any]:
    now = time.monotonic()
    started_at = job.started_at if job.started_at is not None else now
    first_at = job.responder.first_chunk_at or job.answer.first_at
    return {
        "queue_ms": _ms(started_at - job.received_at),
        "first_token_ms": _ms(first_at - job.received_at) if first_at is not None else None,
        "total_ms": _ms(now - job.received_at),
        "tokens_per_second": job.answer.tokens_per_second(),
    }


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 2)
