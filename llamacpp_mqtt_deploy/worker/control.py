"""What a client may do to its own session: cancel, reset, delete, history, ping; and have the tokens of a prompt counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from llamacpp_mqtt_deploy.core.addresses import Address
from llamacpp_mqtt_deploy.core.errors import Busy, RequestError, Unsupported
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.requests import parse_control
from llamacpp_mqtt_deploy.ports import EntryKey, Link, Store, StoreError
from llamacpp_mqtt_deploy.worker.answers import Answers
from llamacpp_mqtt_deploy.worker.client_work import ClientWork
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.history_reads import HistoryReads
from llamacpp_mqtt_deploy.worker.jobs import Job, JobRegistry
from llamacpp_mqtt_deploy.worker.message_log import MessageLog
from llamacpp_mqtt_deploy.worker.own_errors import out_of_memory
from llamacpp_mqtt_deploy.worker.pooled.pooled_sessions import PooledSessions
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from llamacpp_mqtt_deploy.worker.token_counts import TokenCounts

log = structlog.get_logger(__name__)

_RETRY_S = 1.0
# How long an answer waits for the broker to take those before it; then its client has long asked again.
_ROOM_S = 10.0


@dataclass(slots=True)
class _Asked:
    """A control message and the `ack` that answers it, as far as it is known."""

    address: Address
    session: tuple[str, str]
    correlation: bytes | None
    ack: dict[str, Any]

    @property
    def first_level(self) -> str:
        return self.address.first_level


class Controls:
    """Answers control messages. What may wait for the disk is left to `work`, which others do not wait for."""

    def __init__(
        self,
        *,
        answers: Answers,
        link: Link,
        store: Store,
        registry: JobRegistry,
        completion: Completion,
        work: ClientWork,
        counts: TokenCounts,
        redelivery: Redelivery,
        state: Callable[[], Mapping[str, Any]],
        expose_history: Callable[[], bool],
        max_event_bytes: Callable[[], int],
        message_log: MessageLog,
        tells: Callable[[str], bool] = lambda _route: True,
        pool: PooledSessions | None = None,
    ) -> None:
        self._tells = tells
        self._answers = answers
        self._link = link
        self._store = store
        self._registry = registry
        self._completion = completion
        self._work = work
        self._counts = counts
        self._redelivery = redelivery
        self._state = state
        self._expose_history = expose_history
        self._max_event_bytes = max_event_bytes
        self._log = message_log
        self._pool = pool
        self._histories = HistoryReads()

    def handle(self, address: Address, payload: bytes, correlation: bytes | None, *, left_out: int = 0) -> None:
        """Do what the message asks, and publish its `ack` on the session's reply topic: at once, or when it is done. `left_out`: so
        many bytes of it are not here.

        Where `tells` says so of the route: clients of a format do not know what an ack is.
        """
        assert address.session is not None
        ack = {"type": "ack", "action": None, "status": "ok", "session_id": address.session}
        asked = _Asked(address, (address.route, address.session), correlation, ack)
        if self._step(asked, lambda: self._begin(asked, payload, left_out)) and self._tells(address.route):
            assert address.reply_topic is not None
            self._answers.publish(address.reply_topic, self._fitted(asked.ack), correlation=correlation)

    def _step(self, asked: _Asked, step: Callable[[], Mapping[str, Any] | None]) -> bool:
        """Do a step and put what comes of it into the ack; False when it gave None: the rest is left to a later one."""
        try:
            found = step()
            if found is None:
                return False
            asked.ack |= found
        except (RequestError, MemoryError) as problem:
            error = problem if isinstance(problem, RequestError) else out_of_memory()
            asked.ack |= {"status": "error", "code": error.code, "message": error.message, **error.details}
        except StoreError as problem:
            log.error("journal.failed", step="control", problem=str(problem))
            asked.ack |= {
                "status": "error",
                "code": "internal",
                "message": "the worker's state cannot be read or written",
            }
        self._log.info(
            "control.answered",
            asked.first_level,
            action=asked.ack["action"],
            session=asked.address.session,
            status=asked.ack["status"],
        )
        return True

    def _publish_later(self, asked: _Asked, on_done: Callable[[bool], None] | None = None) -> None:
        """In the thread of `work`: wait for room among the answers, and give the ack up when there is none for long."""
        if not self._tells(asked.address.route):
            if on_done is not None:
                on_done(True)
            return
        payload = self._fitted(asked.ack)
        assert asked.address.reply_topic is not None
        if self._link.room_for_answers(len(payload), timeout_s=_ROOM_S):
            published = self._link.publish(
                asked.address.reply_topic, payload, correlation=asked.correlation, on_done=on_done, share="answer"
            )
            if published == "queued":
                return
        self._log.warning(
            "control.unanswered", asked.first_level, action=asked.ack["action"], session=asked.address.session
        )
        if on_done is not None:
            on_done(False)

    def _begin(self, asked: _Asked, payload: bytes, left_out: int) -> Mapping[str, Any] | None:
        """In the intake's thread: what is known at once is answered at once."""
        try:
            limit = self._counts.max_bytes(asked.address.route, asked.first_level)
            control = parse_control(payload, max_count_bytes=limit, left_out=left_out)
        except RequestError:
            self._registry.count_control(asked.first_level)
            raise
        asked.ack["action"] = control.action
        if control.request_id:
            asked.ack["request_id"] = control.request_id
        if control.transaction is not None:
            asked.ack["transaction"] = control.transaction
        self._registry.count_control(asked.first_level, ahead=control.action == "cancel")
        match control.action:
            case "cancel":
                if self._pool is None:
                    return self._cancel(asked, control.request_id)
                self._in_pool(asked, partial(self._pool.cancel, asked.session, control.request_id))
            case "ping":
                return dict(self._state())
            case "history":
                self._read_soon(asked)
            case "count_tokens":
                self._count_soon(asked, control.counted)
            case "reset":
                self._change_soon(asked, self._store.reset)
            case "delete":
                self._change_soon(asked, self._store.delete)
        return None

    # --- cancel --------------------------------------------------------------------------------------------------------

    def _cancel(self, asked: _Asked, request_id: str | None) -> Mapping[str, Any]:
        if request_id is None:
            return {"cancelled": self.cancel(*self._registry.of_session(asked.session))}
        key = EntryKey(*asked.session, request_id)
        job = self._registry.untold(key)
        if job is not None:
            state = "queued" if job.phase == "queued" else "running"
            self.cancel(job)
            return {"state": state, "cancelled": 1}
        entry = self._store.find(key)
        if entry is not None and entry.state == "ended":
            return {"state": "ended"}
        self._registry.remember_cancel(asked.first_level, key)
        return {"state": "unknown"}

    def cancel(self, *jobs: Job) -> int:
        """Stop jobs wherever they are, and return at once with how many were not stopped before."""
        stopped = sum(job.stop.set("cancelled") for job in jobs)
        for job in jobs:
            if self._registry.withdraw(job):
                # Its end waits for the disk. Without a place for it here the next look at all deadlines ends it.
                self._work.run(job.address.first_level, partial(self._completion.stopped, job))
        return stopped

    # --- what reads or writes the session ------------------------------------------------------------------------------

    def _read_soon(self, asked: _Asked) -> None:
        if not self._expose_history():
            raise Unsupported("this worker does not show histories")
        self._histories.begin(asked.session, asked.first_level)
        if not self._work.run(asked.first_level, lambda: self._read(asked)):
            self._histories.end(asked.session)
            raise _too_many()

    def _read(self, asked: _Asked) -> None:
        """Publish the history; the next one of this session is read when the broker has this one."""
        try:
            self._step(asked, lambda: {"messages": self._history(asked.session)})
            self._publish_later(asked, on_done=lambda _: self._histories.end(asked.session))
        except BaseException:
            self._histories.end(asked.session)
            raise

    def _history(self, session: tuple[str, str]) -> list[Mapping[str, Any]]:
        """Raises StoreError."""
        if self._pool is None:
            return list(self._store.history(session))
        return self._pool.patiently(lambda: list(self._store.history(session)))

    def _count_soon(self, asked: _Asked, counted: Mapping[str, Any]) -> None:
        call = self._counts.call_of(counted, route=asked.address.route, first_level=asked.first_level)

        def tell(count: Callable[[], Mapping[str, Any]]) -> None:
            self._step(asked, count)
            self._publish_later(asked)

        if not self._counts.soon(asked.first_level, call, tell):
            raise _too_many()

    def _in_pool(self, asked: _Asked, step: Callable[[], Mapping[str, Any]]) -> None:
        """Whichever worker runs the session's requests: the database knows, and is asked in another thread."""

        def run() -> None:
            self._step(asked, step)
            self._publish_later(asked)

        if not self._work.run(asked.first_level, run):
            raise _too_many()

    def _change_soon(self, asked: _Asked, change: Callable[[tuple[str, str]], None]) -> None:
        if self._pool is not None:
            self._in_pool(asked, partial(self._forget_in_pool, self._pool, asked.session, change))
            return

        def forget(cancelled: int) -> Mapping[str, Any]:
            change(asked.session)
            return {"cancelled": cancelled}

        self.change_soon(
            asked.session,
            asked.first_level,
            lambda cancelled: self._step(asked, lambda: forget(cancelled)),
            after=lambda: self._publish_later(asked),
        )

    def change_soon(
        self,
        session: tuple[str, str],
        first_level: str,
        change: Callable[[int], object],
        *,
        after: Callable[[], object],
        failed: Callable[[RequestError | StoreError], object] = lambda _problem: None,
        cancels: bool = True,
    ) -> None:
        """Stop all of the session now, and let `change` (given how many that were) change it soon, in the thread of `work`; prompts
        that come after this wait until it has. `after` follows. `failed` is called when a pool could not let it change anything.
        Raises Busy when too much of this level waits already.

        Without `cancels` only the order counts: what came before goes on as it was.
        """
        if self._pool is not None:

            def run_in_pool() -> None:
                self.change_now(session, change, failed=failed, cancels=cancels)
                after()

            if not self._work.run(first_level, run_in_pool):
                raise _too_many()
            return
        if not self._work.has_place(first_level):
            raise _too_many()
        jobs = self._hold(session, cancels=cancels)
        cancelled = sum(not job.stop.is_set() for job in jobs)

        def run() -> None:
            self._forget_jobs(jobs)
            self._change(session, change, cancelled, cancels=cancels)
            after()

        if not self._work.run(first_level, run):
            # It was closed this moment: nothing was stopped, and who sends the message again finds all as it was.
            self._registry.free_session(session)
            raise _too_many()
        self._forget_jobs(jobs)

    def change_now(
        self,
        session: tuple[str, str],
        change: Callable[[int], object],
        *,
        failed: Callable[[RequestError | StoreError], object] = lambda _problem: None,
        cancels: bool = True,
    ) -> None:
        """The same, at once: in the thread of `work`."""
        if self._pool is not None:
            try:
                self._change_in_pool(self._pool, session, change, cancels=cancels)
            except (RequestError, StoreError) as problem:
                log.error("journal.failed", step="control", problem=str(problem), session=session[1])
                failed(problem)
            return
        jobs = self._hold(session, cancels=cancels)
        cancelled = self._forget_jobs(jobs)
        self._change(session, change, cancelled, cancels=cancels)

    def begun_elsewhere(self, route: str, *, age_s: float) -> Sequence[str]:
        """Sessions of the route with requests that wait for any worker of the pool, or that one of them runs. Raises StoreError."""
        return () if self._pool is None else self._pool.begun(route, age_s=age_s)

    def _hold(self, session: tuple[str, str], *, cancels: bool) -> list[Job]:
        """Let nothing new of the session begin; what is to be stopped of it."""
        jobs = self._registry.of_session(session) if cancels else []
        self._registry.hold_session(session)
        return jobs

    def _forget_jobs(self, jobs: list[Job]) -> int:
        """Stop them, so that they leave nothing in the history; with how many were not stopped before."""
        for job in jobs:
            job.forgotten = True
        return self.cancel(*jobs)

    def _change(
        self, session: tuple[str, str], change: Callable[[int], object], cancelled: int, *, cancels: bool
    ) -> None:
        try:
            if cancels:
                self._redelivery.forget(session)
            change(cancelled)
        finally:
            self._registry.free_session(session)

    def _forget_in_pool(
        self, pool: PooledSessions, session: tuple[str, str], change: Callable[[tuple[str, str]], None]
    ) -> Mapping[str, Any]:
        self._redelivery.forget(session)
        return pool.forget(session, change)

    def _change_in_pool(
        self, pool: PooledSessions, session: tuple[str, str], change: Callable[[int], object], *, cancels: bool
    ) -> None:
        def forget(_session: tuple[str, str]) -> None:
            change(0)

        if cancels:
            self._forget_in_pool(pool, session, forget)
        else:
            change(0)

    def _fitted(self, ack: dict[str, Any]) -> bytes:
        """The ack as bytes; a long history loses its oldest messages, and says so."""
        payload = encode(ack)
        limit = self._max_event_bytes()
        while len(payload) > limit and ack.get("messages"):
            messages = ack["messages"]
            ack["messages"] = messages[max(1, len(messages) // 4) :]
            ack["message"] = "the oldest messages are left out: the history is larger than an event"
            payload = encode(ack)
        return payload


def _too_many() -> Busy:
    return Busy("too many of your controls wait already; send this one again", retry_after_s=_RETRY_S)
