"""AsyncBusClient with BusClient's face, so that both pass the same tests: its loop runs in a thread, every call goes there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from llamacpp_mqtt_deploy.client import AsyncAnswer, AsyncBusClient, Done

T = TypeVar("T")


class LoopThread:
    """A running asyncio loop; `do` waits for a coroutine in it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop", daemon=True)
        self._thread.start()

    def do(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class LoopedAnswer:
    def __init__(self, thread: LoopThread, answer: AsyncAnswer) -> None:
        self._thread = thread
        self._answer = answer

    def __iter__(self) -> Iterator[str]:
        return self._drive(self._answer.__aiter__())

    def events(self) -> Iterator[Mapping[str, Any]]:
        return self._drive(self._answer.events())

    def _drive(self, things: AsyncIterator[T]) -> Iterator[T]:
        async def following() -> T | None:
            return await anext(things, None)

        while (thing := self._thread.do(following())) is not None:
            yield thing

    def result(self, timeout_s: float | None = None) -> Done:
        return self._thread.do(self._answer.result(timeout_s))

    def cancel(self) -> None:
        self._thread.do(self._answer.cancel())

    def __enter__(self) -> Self:
        self._thread.do(self._answer.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.do(self._answer.__aexit__(kind, error, trace))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._answer, name)


class LoopedBusClient:
    def __init__(self, thread: LoopThread, *arguments: Any, **named: Any) -> None:
        self._thread = thread
        self._bus = AsyncBusClient(*arguments, **named)

    def open(self) -> Self:
        self._thread.do(self._bus.open())
        return self

    def close(self) -> None:
        self._thread.do(self._bus.close())

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, *arguments: Any, **named: Any) -> LoopedAnswer:
        return LoopedAnswer(self._thread, self._thread.do(self._bus.ask(*arguments, **named)))

    def control(self, session: str | None, action: str, **named: Any) -> Mapping[str, Any]:
        return self._thread.do(self._bus.control(session, action, **named))

    def count_tokens(self, *arguments: Any, **named: Any) -> int:
        return self._thread.do(self._bus.count_tokens(*arguments, **named))

    def history(self, session: str | None = None) -> list[Mapping[str, Any]]:
        return self._thread.do(self._bus.history(session))

    def status(self, **named: Any) -> dict[str, Mapping[str, Any]]:
        return self._thread.do(self._bus.status(**named))

    def health(self, **named: Any) -> dict[str, Mapping[str, Any]]:
        return self._thread.do(self._bus.health(**named))

    def workers_online(self) -> list[str]:
        return self._bus.workers_online()

    @property
    def session(self) -> str:
        return self._bus.session

    @property
    def protocol(self) -> str | None:
        return self._bus.protocol

    @property
    def address(self) -> Any:
        return self._bus.address
