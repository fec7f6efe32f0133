"""One answer as it arrives: text, events or the finished whole, for one consumer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from llamacpp_mqtt_deploy.client.exceptions import AnswerError, AnswerLost, BusError
from llamacpp_mqtt_deploy.client.followed import Done, FollowedAnswer
from llamacpp_mqtt_deploy.client.retry import RetryRules
from llamacpp_mqtt_deploy.core.events import Reading


class _Bus(Protocol):
    """What an answer needs of its bus client."""

    def _cancel(self, answer: Answer) -> None: ...

    def _wake(self) -> None: ...

    def _alive(self) -> bool: ...


class Answer(FollowedAnswer):
    """The answer to one request, consumed once: iterate for the text, or `events()`, or only `result()`.

    As a context manager it cancels the request on the worker when the block is left before the end. Iterating again goes on
    where the last iteration stopped. `cancel` and the properties may be used from any thread.
    """

    def __init__(
        self,
        bus: _Bus,
        *,
        session: str,
        request_id: str,
        payload: bytes,
        rules: RetryRules,
        expects_text: bool = True,
    ) -> None:
        self._bus = bus
        self._changed = threading.Condition()
        super().__init__(
            session=session,
            request_id=request_id,
            payload=payload,
            rules=rules,
            lock=self._changed,
            expects_text=expects_text,
        )

    def _notify(self) -> None:
        self._changed.notify_all()

    # --- the consumer ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        """Yield the text as it comes; raises `AnswerError` for an `error` event, `BusError` when no end can be had."""
        while (reading := self.poll()) is not None:
            if reading.content:
                yield reading.content
        self.result()

    def events(self) -> Iterator[Mapping[str, Any]]:
        """Yield the decoded events, without repeated ones, the terminal one last; raises only when no end can be had."""
        while (reading := self.poll()) is not None:
            yield reading.event
        if isinstance(self._outcome, BusError) and not isinstance(self._outcome, AnswerError):
            raise self._outcome

    def poll(self, timeout_s: float | None = None) -> Reading | None:
        """The next new thing, waiting at most this long; None when the time passed or the answer is at its `ended`."""
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._pending:
                if self._outcome is not None:
                    return None
                remaining_s = 1.0 if ends_at is None else min(1.0, ends_at - time.monotonic())
                if remaining_s <= 0:
                    return None
                # In steps, so that the death of the thread that guards the deadlines is noticed.
                if not self._changed.wait(remaining_s) and not self._bus._alive():  # noqa: SLF001 - one package
                    self._end(AnswerLost("The bus client was closed before the answer was complete."))
            return self._pending.popleft()

    def result(self, timeout_s: float | None = None) -> Done:
        """Wait for the end; raises `AnswerError`, another `BusError`, or TimeoutError when `timeout_s` passes first."""
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.ended:
            self.poll(None if ends_at is None else max(0.0, ends_at - time.monotonic()))
            if ends_at is not None and time.monotonic() >= ends_at and not self.ended:
                raise TimeoutError(f"request {self.request_id} has not ended within {timeout_s:g} s")
        if isinstance(self._outcome, Done):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def cancel(self) -> None:
        """Ask the worker to stop; the answer then ends with `finish_reason` `cancelled` and the text so far."""
        if not self.ended:
            self.note(lambda rules: rules.cancelled(time.monotonic()))
            self._bus._cancel(self)  # noqa: SLF001 - one package
            self._bus._wake()  # noqa: SLF001 - one package

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
