"""One answer as it arrives in an asyncio program: text, events or the finished whole, for one consumer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from llamacpp_mqtt_deploy.client.exceptions import AnswerError, BusError
from llamacpp_mqtt_deploy.client.followed import Done, FollowedAnswer
from llamacpp_mqtt_deploy.client.retry import RetryRules
from llamacpp_mqtt_deploy.core.events import Reading


class _AsyncBus(Protocol):
    """What an answer needs of its bus client."""

    def _cancel(self, answer: AsyncAnswer) -> None: ...

    def _abandon(self, answer: AsyncAnswer) -> None: ...


class AsyncAnswer(FollowedAnswer):
    """The answer to one request, consumed once: iterate for the text, or over `events()`, or only `await result()`.

    As an async context manager it cancels the request on the worker when the block is left before the end. Iterating again goes
    on where the last iteration stopped. Everything belongs to the loop of its client.
    """

    def __init__(
        self,
        bus: _AsyncBus,
        *,
        session: str,
        request_id: str,
        payload: bytes,
        rules: RetryRules,
        expects_text: bool = True,
        max_chars: int,
    ) -> None:
        self._bus = bus
        self._changed = asyncio.Event()
        super().__init__(
            session=session,
            request_id=request_id,
            payload=payload,
            rules=rules,
            lock=contextlib.nullcontext(),  # one loop, and nothing in between awaits
            expects_text=expects_text,
            max_chars=max_chars,
        )

    def _notify(self) -> None:
        self._changed.set()

    # --- the consumer ------------------------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yield the text as it comes; raises `AnswerError` for an `error` event, `BusError` when no end can be had."""
        while (reading := await self.poll()) is not None:
            if reading.content:
                yield reading.content
        await self.result()

    async def events(self) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the decoded events, without repeated ones, the terminal one last; raises only when no end can be had."""
        while (reading := await self.poll()) is not None:
            yield reading.event
        if isinstance(self._outcome, BusError) and not isinstance(self._outcome, AnswerError):
            raise self._outcome

    async def poll(self, timeout_s: float | None = None) -> Reading | None:
        """The next new thing, waiting at most this long; None when the time passed or the answer is at its `ended`."""
        if not self._pending:
            try:
                async with asyncio.timeout(timeout_s):
                    while not self._pending and self._outcome is None:
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                pass  # what came in the same turn of the loop counts
        return self._pending.popleft() if self._pending else None

    async def result(self, timeout_s: float | None = None) -> Done:
        """Wait for the end; raises `AnswerError`, another `BusError`, or TimeoutError when `timeout_s` passes first."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.ended:
                    await self.poll()
        except TimeoutError:
            raise TimeoutError(f"request {self.request_id} has not ended within {timeout_s:g} s") from None
        if isinstance(self._outcome, Done):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    async def cancel(self) -> None:
        """Ask the worker to stop; the answer then ends with `finish_reason` `cancelled` and the text so far."""
        self.cancel_soon()

    def cancel_soon(self) -> None:
        """As `cancel`, for those who cannot await: the message goes out with the loop's next turn."""
        if not self.ended:
            self.note(lambda rules: rules.cancelled(time.monotonic()))
            self._bus._cancel(self)  # noqa: SLF001 - one package

    def abandon(self) -> None:
        """Stop listening without a word to the worker, which goes on; the same request again brings what it has made."""
        self._bus._abandon(self)  # noqa: SLF001 - one package

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()
