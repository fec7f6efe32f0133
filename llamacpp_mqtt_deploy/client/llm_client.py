"""The names that web backends import for a model behind HTTP, over the bus: `get_llm_client`, `LLMClient`, `SessionManager`."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamacpp_mqtt_deploy.client.asking import session_below
from llamacpp_mqtt_deploy.client.bus import BusClient
from llamacpp_mqtt_deploy.client.configured import bus_options

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client.answer import Answer

OWN_MODEL = "default"
"""The model name that means the worker's own."""


class LLMClient:
    """Asks a worker for answers to whole contexts. `bus` is an open client; without one the configuration says where the broker is,
    and the connection is made when it is first needed. Any number of threads may share it. Errors are `BusError`s.
    """

    def __init__(self, bus: BusClient | None = None) -> None:
        self._bus = bus
        self._own = bus is None
        self._lock = threading.Lock()

    @property
    def bus(self) -> BusClient:
        """The open client; raises `BusError` and `ConfigurationError`."""
        with self._lock:
            if self._bus is None:
                from llamacpp_mqtt_deploy.config.loading import load  # noqa: PLC0415 - loads pydantic

                self._bus = BusClient(**bus_options(load().settings)).open()
            return self._bus

    def generate_stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        model: str = OWN_MODEL,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = "auto",
    ) -> Iterator[str]:
        """Yield the answer to these OpenAI messages as it is generated; leaving the iteration early cancels it on the worker."""
        return _told(self._ask(messages, temperature, top_p, max_tokens, model, tools, tool_choice))

    def generate(
        self,
        messages: Sequence[Mapping[str, Any]],
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        model: str = OWN_MODEL,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = "auto",
    ) -> str:
        """The whole answer."""
        return self._ask(messages, temperature, top_p, max_tokens, model, tools, tool_choice).result().content

    def _ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        temperature: float | None,
        top_p: float | None,
        max_tokens: int | None,
        model: str,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str | Mapping[str, Any] | None,
    ) -> Answer:
        return self.bus.ask(
            messages=list(messages),
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            model=None if model == OWN_MODEL else model,
            tools=list(tools) if tools else None,
            tool_choice=tool_choice if tools else None,
        )

    def close(self) -> None:
        """Disconnect, if the connection is its own; idempotent."""
        with self._lock:
            bus, self._bus = (self._bus, None) if self._own else (None, self._bus)
        if bus is not None:
            bus.close()


class SessionManager:
    """Conversations that the worker remembers. A session id may be anything that a web backend calls one."""

    def __init__(self, client: LLMClient | None = None) -> None:
        self._client = client or get_llm_client()

    def process_message_stream(
        self,
        session_id: str | int,
        message: str,
        system_prompt: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
    ) -> Iterator[str]:
        """Yield the answer to a message of this session; leaving the iteration early cancels it on the worker."""
        return _told(self._ask(session_id, message, system_prompt, temperature, top_p, max_tokens))

    def process_message(
        self,
        session_id: str | int,
        message: str,
        system_prompt: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
    ) -> str:
        """The whole answer."""
        return self._ask(session_id, message, system_prompt, temperature, top_p, max_tokens).result().content

    def clear_session(self, session_id: str | int) -> None:
        """Let the worker forget what was said."""
        self._client.bus.control(self._path(session_id), "reset")

    def _ask(
        self,
        session_id: str | int,
        message: str,
        system_prompt: str | None,
        temperature: float | None,
        top_p: float | None,
        max_tokens: int | None,
    ) -> Answer:
        return self._client.bus.ask(
            message,
            session=self._path(session_id),
            system_prompt=system_prompt,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
        )

    def _path(self, session_id: str | int) -> str:
        first = self._client.bus.session.partition("/")[0]
        return session_below(first, str(session_id))


def _told(answer: Answer) -> Iterator[str]:
    with answer:
        yield from answer


_shared: LLMClient | None = None
_making = threading.Lock()


def get_llm_client() -> LLMClient:
    """The client of this process, for the broker that the configuration (file, `LMD_` variables) names."""
    global _shared  # noqa: PLW0603 - one connection for the whole process is the point
    with _making:
        if _shared is None:
            _shared = LLMClient()
            atexit.register(_shared.close)
        return _shared


def get_session_manager() -> SessionManager:
    """Sessions over the client of this process."""
    return SessionManager(get_llm_client())
