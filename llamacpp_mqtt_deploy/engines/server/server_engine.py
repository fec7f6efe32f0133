"""The engine in another process: llama.cpp's server, or any OpenAI-compatible one, over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

import orjson
import structlog

from llamacpp_mqtt_deploy.config.credentials import CredentialError, server_key
from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.completions import error_from
from llamacpp_mqtt_deploy.core.control_tokens import WARNING, clean_call
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished
from llamacpp_mqtt_deploy.core.errors import (
    BadRequest,
    EngineUnavailable,
    RequestError,
    ShuttingDown,
)
from llamacpp_mqtt_deploy.engines.draining import drain
from llamacpp_mqtt_deploy.engines.server import dialects
from llamacpp_mqtt_deploy.engines.server.api_key import ApiKey
from llamacpp_mqtt_deploy.engines.server.controls import LearnedControls, unproven
from llamacpp_mqtt_deploy.engines.server.describing import Description, NotDescribed, describe
from llamacpp_mqtt_deploy.engines.server.failures import Broken, ConnectFailed, NoAnswer, Silent
from llamacpp_mqtt_deploy.engines.server.http import HttpExchange
from llamacpp_mqtt_deploy.engines.server.line import ServerAddress
from llamacpp_mqtt_deploy.engines.server.preconnect import Preconnection
from llamacpp_mqtt_deploy.engines.server.questions import COMPLETIONS, COUNT_WITHIN_S, Questions, SlotProgress
from llamacpp_mqtt_deploy.engines.server.reply import Reply, idle
from llamacpp_mqtt_deploy.engines.server.streaming import StreamingExchange
from llamacpp_mqtt_deploy.engines.server.waiting import FIRST_PAUSE_S, LONGEST_PAUSE_S, NotReady, ReadyWait, until_ready
from llamacpp_mqtt_deploy.engines.slots import Slots
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.ports import EngineInfo, Unloaded
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal

log = structlog.get_logger(__name__)

ASKING_CONNECT_S = 3.0

_WITHOUT_ANSWER = (ConnectFailed, NoAnswer, Broken, Silent, NotReady)

__all__ = ["ServerEngine", "SlotProgress"]


class ServerEngine:
    """Speaks to one server. Holds no connection between calls and no thread of its own; see `ports.Engine`.

    `loop` reads the answers of `pump`; without it the calling thread does. `read_key` gives the API key, each time that it is
    wanted; without it the settings say where it is.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        url: str | None = None,
        kind: str = "server",
        loop: IoLoop | None = None,
        read_key: Callable[[], str | None] | None = None,
    ) -> None:
        self._settings = settings
        self._address = ServerAddress(url or settings.url)
        self._kind = kind
        self._loop = loop
        self._key = ApiKey(read_key or (lambda: server_key(settings, environ={})))
        self._lock = threading.Lock()  # guards the three below; held for arithmetic only
        self._dialect: dialects.Dialect | None = None if settings.dialect == "auto" else settings.dialect
        self._described = False
        self._known: Description | None = None
        self._info = EngineInfo(
            state="starting", kind=kind, detail=f"The server at {self._address.shown} was not asked yet."
        )
        self._describing = threading.Lock()  # whoever holds it asks; the others take what is known
        self._closing = StopSignal()
        self._slots = Slots(settings.slots or 1)
        self._preconnection = None if loop is None else Preconnection(self._address, loop)
        self._questions = Questions(lambda *stops: self._exchange(*stops, connect_timeout_s=ASKING_CONNECT_S))
        self._controls = LearnedControls(self._questions.ask)

    # --- condition ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Read the key; nothing is asked yet. Raises ValueError when a file is missing that the settings name."""
        if self._settings.ca_file is not None and not self._settings.ca_file.is_file():
            raise ValueError(f"engine.ca_file: there is no file {self._settings.ca_file}")
        try:
            self._key.open()
        except CredentialError as error:
            raise ValueError(f"{error.key}: {error}") from error

    def wait_ready(self, stop: StopSignal, timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else Deadline(timeout_s)
        pause_s = FIRST_PAUSE_S
        while not stop.is_set():
            if self._ask(stop).state in ("ready", "closed"):
                return self._info.state == "ready"
            if deadline is not None and deadline.passed():
                return False
            stop.wait(pause_s if deadline is None else min(pause_s, deadline.remaining_s()))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return False

    def info(self) -> EngineInfo:
        return self._info

    @property
    def busy(self) -> int:
        """Requests that this engine has in flight."""
        return self._slots.busy

    def probe(self) -> EngineInfo:
        return self._ask()

    def restart(self) -> bool:
        return False

    def unload(self) -> Unloaded:
        return "unsupported"

    def keep_awake(self, seconds: float | None) -> bool:
        return False

    def close(self, deadline: Deadline) -> None:
        with self._lock:
            self._info = replace(self._info, state="closed", detail="")
        self._closing.set("shutting_down")
        if self._preconnection is not None:
            self._preconnection.close()

    def _ask(self, *stops: StopSignal) -> EngineInfo:
        if not self._describing.acquire(blocking=False):
            return self._info
        try:
            return self._learn(
                describe(
                    self._settings,
                    kind=self._kind,
                    shown=self._address.shown,
                    exchange=lambda: self._exchange(*stops, connect_timeout_s=ASKING_CONNECT_S),
                    known=self._known,
                )
            )
        except NotDescribed as why:
            return self._saw(replace(self._info, state=why.state, detail=why.text))
        finally:
            self._describing.release()

    def _learn(self, description: Description) -> EngineInfo:
        self._slots.resize(description.info.slots)
        self._controls.described(description.marks)
        with self._lock:
            self._dialect = description.dialect
            self._described = True
            self._known = description
            self._questions.can_count = True
        return self._saw(description.info)

    def _saw(self, info: EngineInfo) -> EngineInfo:
        with self._lock:
            before = self._info
            if before.state == "closed":
                return before
            self._info = info
        if info.state != before.state:
            log.debug("engine.changed", state=info.state, before=before.state, detail=info.detail, slots=info.slots)
        return info

    # --- generation --------------------------------------------------------------------------------------------------

    def expect(self) -> None:
        # Beside other requests it would only move the work to the thread that all their tokens go through.
        if self._preconnection is not None and not self._slots.busy and self._info.state == "ready":
            self._preconnection.begin()

    def stream(self, call: EngineCall, *, stop: StopSignal, on_wait: Callable[[str], None]) -> Iterator[Delta]:
        try:
            wait = self._enter(call, stop, on_wait, lambda: None)
            try:
                exchange, reply = until_ready(lambda: self._open(call, stop, lambda: None), wait, stop, on_wait)
                with exchange:
                    yield from reply.deltas()
            finally:
                self._leave()
        except RequestError as error:
            self._raise_translated(error, stop)

    def pump(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
        feed: Callable[[Sequence[Delta]], float],
        on_slow: Callable[[], None] = lambda: None,
    ) -> Finished:
        loop = self._loop
        try:
            wait = self._enter(call, stop, on_wait, on_slow)
            try:
                if loop is not None:
                    return until_ready(lambda: self._pump(loop, call, stop, feed, on_slow), wait, stop, on_wait)
                exchange, reply = until_ready(lambda: self._open(call, stop, on_slow), wait, stop, on_wait)
                with exchange:
                    return drain(reply.deltas(), feed)
            finally:
                self._leave()
        except RequestError as error:
            self._raise_translated(error, stop)

    def _raise_translated(self, error: RequestError, stop: StopSignal) -> NoReturn:
        """A fault behind a stop is the stop's; a key in a server's words goes to nobody."""
        if stop.is_set():
            raise Stopped(stop.reason) from error
        if (message := self._key.hidden(error.message)) != error.message:
            without = type(error)(message, **error.details)
            without.quoted = self._key.hidden(error.quoted)
            raise without from None
        raise error

    def unsupported_fields(self, call: EngineCall) -> tuple[str, ...]:
        """Names of the request fields that this server cannot be given; they are left out, and a `start` can warn."""
        return dialects.unsupported(call, self._dialect or "llamacpp")

    def _enter(
        self, call: EngineCall, stop: StopSignal, on_wait: Callable[[str], None], on_slow: Callable[[], None]
    ) -> ReadyWait:
        """Take a slot of ours, once the server is known, until `_leave`; says how long to try."""
        stop.raise_if_set()
        wait = ReadyWait(self._settings.unavailable_after_s, once=call.once)
        if not self._described:
            on_slow()
            until_ready(lambda: self._need_description(stop), wait, stop, on_wait)
        if not self._slots.acquire(stop, timeout_s=0.0):
            on_slow()
            self._slots.acquire(stop)
        return wait

    def _leave(self) -> None:
        """Give the slot back."""
        self._slots.release()
        if self._preconnection is not None:
            self._preconnection.prepare()

    # --- before the first byte ---------------------------------------------------------------------------------------

    def _need_description(self, stop: StopSignal) -> None:
        if self._described:
            return
        info = self._ask(stop)
        stop.raise_if_set()
        self._refuse_when_closed()
        match info.state:
            case "ready":
                return
            case "starting" | "loading":
                raise NotReady("loading", "The engine is still loading.")
            case "failed":
                raise EngineUnavailable(
                    "The worker cannot use its engine as configured; its operator finds why in its log."
                )
            case _:
                raise NotReady("engine_restarting", "The engine cannot be reached.")

    def _open(self, call: EngineCall, stop: StopSignal, on_slow: Callable[[], None]) -> tuple[StreamingExchange, Reply]:
        """Send the request and wait for the headers, which come when the server gives it a slot."""
        call, content, warnings = self._prepared(call, stop)
        exchange = self._streaming_exchange(stop)
        try:
            exchange.send(COMPLETIONS, content, timeout_s=call.chunk_timeout_s)
            reply = self._reply(exchange, call, stop, warnings)
            reply.open(on_slow)
        except _WITHOUT_ANSWER as error:
            exchange.close()
            self._raise_not_ready(error, call, stop)
        except BaseException:
            exchange.close()
            raise
        return exchange, reply

    def _pump(
        self,
        loop: IoLoop,
        call: EngineCall,
        stop: StopSignal,
        feed: Callable[[Sequence[Delta]], float],
        on_slow: Callable[[], None],
    ) -> Finished:
        """Send the request and have the loop read all of the answer."""
        call, content, warnings = self._prepared(call, stop)
        with self._streaming_exchange(stop) as exchange:
            try:
                exchange.send(COMPLETIONS, content, timeout_s=call.chunk_timeout_s)
                return self._reply(exchange, call, stop, warnings).pump(loop, feed, on_slow)
            except _WITHOUT_ANSWER as error:
                self._raise_not_ready(error, call, stop)

    def _prepared(self, call: EngineCall, stop: StopSignal) -> tuple[EngineCall, bytes, tuple[str, ...]]:
        """The call without what only the model may say, its body, and warnings for the client."""
        call, cleaned = self._clean(call, stop)
        content = self._content(call)
        self._refuse_when_closed()
        return call, content, (WARNING,) if cleaned else ()

    def _streaming_exchange(self, stop: StopSignal) -> StreamingExchange:
        return StreamingExchange(
            self._address,
            api_key=self._key.current(),
            connect_timeout_s=self._settings.connect_timeout_s,
            ca_file=self._settings.ca_file,
            stops=(stop, self._closing),
            preconnection=self._preconnection,
        )

    def _reply(
        self, exchange: StreamingExchange, call: EngineCall, stop: StopSignal, warnings: tuple[str, ...]
    ) -> Reply:
        return Reply(
            exchange,
            call,
            stop,
            model=self._model_of(call),
            dialect=self._dialect,
            warnings=warnings,
            welcomed=self._is_ready,
            refusal=self._refusal,
            refuse_when_closed=self._refuse_when_closed,
        )

    def _raise_not_ready(self, error: Exception, call: EngineCall, stop: StopSignal) -> NoReturn:
        """What a server without an answer means, which is nothing when we ended the connection ourselves."""
        stop.raise_if_set()
        self._refuse_when_closed()
        match error:
            case ConnectFailed():
                text = f"No connection to {self._address.shown}: {error}. Start the server, or set engine.url."
                self._saw(replace(self._info, state="unreachable", detail=text))
                raise NotReady("engine_restarting", "The engine cannot be reached.") from error
            case NoAnswer() | Broken():
                raise NotReady("engine_restarting", "The engine ended without an answer.", asked=True) from error
            case Silent():
                raise idle(call) from error
            case _:
                raise error

    def _is_ready(self) -> None:
        if self._info.state != "ready":
            self._saw(replace(self._info, state="ready", detail=""))

    def _clean(self, call: EngineCall, stop: StopSignal) -> tuple[EngineCall, bool]:
        """The call without control strings of the model; a server that is not llama.cpp's cannot be asked for them."""
        if self._dialect != "llamacpp":
            return clean_call(call, unproven(call))
        try:
            controls = self._controls.of(call, call.model or self._settings.model, stop)
        except TypeError as error:
            raise BadRequest(f"The request cannot be written as JSON: {error}.") from error
        return clean_call(call, controls)

    def _refusal(self, exchange: StreamingExchange) -> Exception:
        """The error for an answer other than 200."""
        status = exchange.status
        try:
            document = exchange.read_all(timeout_s=COUNT_WITHIN_S)
        except (Silent, ValueError):
            document = b""  # the status says enough
        try:
            parsed = orjson.loads(document)
        except orjson.JSONDecodeError:
            parsed = None
        error = parsed.get("error", parsed) if isinstance(parsed, dict) else None
        kind = error.get("type") if isinstance(error, dict) else None
        # `content`: llama.cpp repeats parts of the request in some of its errors; logged only where contents are.
        log.info("engine.refused", status=status, kind=str(kind)[:64], content=str(error or document[:300])[:500])
        if status == 503 and isinstance(error, dict) and error.get("type") == "unavailable_error":
            return NotReady("loading", "The engine is still loading.")
        if status in (502, 503, 504):
            return NotReady("engine_restarting", f"The engine is not available (HTTP {status}).")
        if status == 429:
            return NotReady("waiting", "The engine takes no more requests for now (HTTP 429).")
        if status < 400:
            return EngineUnavailable(
                f"The engine's address does not serve completions itself (HTTP {status}); its operator must set engine.url."
            )
        return error_from(error or "", status)

    def _content(self, call: EngineCall) -> bytes:
        dialect = self._dialect or "llamacpp"
        model = call.model or self._settings.model
        if model is None and dialect == "openai":
            model = next(iter(self._info.models), None)  # OpenAI's API wants one; llama.cpp ignores it
        try:
            return orjson.dumps(dialects.body(call, dialect, model=model))
        except TypeError as error:
            raise BadRequest(f"The request cannot be written as JSON: {error}.") from error

    def _exchange(self, *stops: StopSignal, connect_timeout_s: float | None = None) -> HttpExchange:
        if self._preconnection is not None:
            self._preconnection.give_up()
        limit_s = self._settings.connect_timeout_s
        return HttpExchange(
            self._address,
            api_key=self._key.current(),
            connect_timeout_s=limit_s if connect_timeout_s is None else min(limit_s, connect_timeout_s),
            ca_file=self._settings.ca_file,
            stops=(*stops, self._closing),
        )

    def _model_of(self, call: EngineCall) -> str | None:
        return call.model or self._settings.model or next(iter(self._info.models), None)

    def _refuse_when_closed(self) -> None:
        if self._closing.is_set():
            raise ShuttingDown("The worker is shutting its engine down.")

    # --- questions ---------------------------------------------------------------------------------------------------

    def count_tokens(self, call: EngineCall, *, stop: StopSignal) -> int | None:
        stop.raise_if_set()
        if self._dialect != "llamacpp" or not self._questions.can_count:
            return None
        call, _ = self._clean(call, stop)
        return self._questions.count_tokens(self._content(call), stop)

    def slots_progress(self) -> tuple[SlotProgress, ...] | None:
        """What each slot of a llama.cpp server has done; see `Questions.slots_progress`."""
        return self._questions.slots_progress()
