"""The engine that lives in another process: llama.cpp's server, or any OpenAI-compatible one, over HTTP."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import orjson
import structlog

from llamacpp_mqtt_deploy.core.completions import CompletionReader, error_from
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Opened
from llamacpp_mqtt_deploy.core.errors import (
    BadRequest,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    IdleTimeout,
    RequestError,
    ShuttingDown,
)
from llamacpp_mqtt_deploy.core.sse import EventTooLong, SseDecoder
from llamacpp_mqtt_deploy.engines import dialects
from llamacpp_mqtt_deploy.engines.describing import Description, NotDescribed, describe
from llamacpp_mqtt_deploy.engines.http import Address, Broken, ConnectFailed, Exchange, NoAnswer, Silent
from llamacpp_mqtt_deploy.engines.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S, NotReady, Patience, patiently
from llamacpp_mqtt_deploy.engines.slots import Slots
from llamacpp_mqtt_deploy.ports import EngineInfo
from llamacpp_mqtt_deploy.settings import EngineSettings
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal

log = structlog.get_logger(__name__)

COMPLETIONS = "/v1/chat/completions"
COUNT_WITHIN_S = 5.0
ASKING_CONNECT_S = 3.0
COUNTS_KEPT = 256
"""Token counts remembered; the same conversation is counted again while its history is fitted."""


class ServerEngine:
    """Speaks to one server. Holds no connection between calls and no thread of its own; see `ports.Engine`."""

    def __init__(self, settings: EngineSettings, *, url: str | None = None, kind: str = "server") -> None:
        self._settings = settings
        self._address = Address(url or settings.url)
        self._kind = kind
        self._api_key: str | None = settings.api_key.get_secret_value() if settings.api_key else None
        self._lock = threading.Lock()  # guards the three below; held for arithmetic only
        self._dialect: dialects.Dialect | None = None if settings.dialect == "auto" else settings.dialect
        self._described = False
        self._info = EngineInfo(
            state="starting", kind=kind, detail=f"The server at {self._address.shown} was not asked yet."
        )
        self._describing = threading.Lock()  # whoever holds it asks; the others take what is known
        self._closing = StopSignal()
        self._slots = Slots(settings.slots or 1)
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._can_count = True

    # --- condition ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Read the key; nothing is asked yet. Raises ValueError when a file is missing that the settings name."""
        if self._settings.ca_file is not None and not self._settings.ca_file.is_file():
            raise ValueError(f"engine.ca_file: there is no file {self._settings.ca_file}")
        path = self._settings.api_key_file
        if self._api_key is None and path is not None:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"engine.api_key_file: {path} cannot be read: {error}") from error
            self._api_key = lines[0].strip() if lines else None

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

    def close(self, deadline: Deadline) -> None:
        with self._lock:
            self._info = replace(self._info, state="closed", detail="")
        self._closing.set("shutting_down")

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
                )
            )
        except NotDescribed as why:
            return self._saw(replace(self._info, state=why.state, detail=why.text))
        finally:
            self._describing.release()

    def _learn(self, description: Description) -> EngineInfo:
        self._slots.resize(description.info.slots)
        with self._lock:
            self._dialect = description.dialect
            self._described = True
            self._can_count = True
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

    def stream(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
        before_read: Callable[[], None] | None = None,
    ) -> Iterator[Delta]:
        try:
            yield from self._stream(call, stop, on_wait, before_read)
        except RequestError as error:
            if stop.is_set():
                raise Stopped(stop.reason) from error
            if self._api_key and self._api_key in error.message:
                without = type(error)(error.message.replace(self._api_key, "[key]"), **error.details)
                without.quoted = error.quoted.replace(self._api_key, "[key]")
                raise without from None
            raise

    def unsupported_fields(self, call: EngineCall) -> tuple[str, ...]:
        """Names of the request fields that this server cannot be given; they are left out, and a `start` can warn."""
        return dialects.unsupported(call, self._dialect or "llamacpp")

    def _stream(
        self,
        call: EngineCall,
        stop: StopSignal,
        on_wait: Callable[[str], None],
        before_read: Callable[[], None] | None,
    ) -> Iterator[Delta]:
        stop.raise_if_set()
        patience = Patience(self._settings.unavailable_after_s)
        patiently(lambda: self._need_description(stop), patience, stop, on_wait)
        self._slots.acquire(stop)
        try:
            with patiently(lambda: self._begin(call, stop), patience, stop, on_wait) as exchange:
                if exchange.content_type == "text/event-stream" or not exchange.content_type:
                    yield from self._receive(exchange, call, stop, before_read)
                elif exchange.content_type == "application/json":
                    yield from self._receive_whole(exchange, call, stop)
                else:
                    raise EngineFailed("The engine's address answers, but not with a completion; check engine.url.")
        finally:
            self._slots.release()

    def _receive(
        self, exchange: Exchange, call: EngineCall, stop: StopSignal, before_read: Callable[[], None] | None
    ) -> Iterator[Delta]:
        yield Opened(self._model_of(call))
        decoder, reader = SseDecoder(), CompletionReader()
        heard_at = time.monotonic()
        only_pings = False
        while not reader.done:
            if before_read is not None:
                before_read()
            chunk = self._read(exchange, call, stop)
            heard = False
            for data in self._decode(decoder, chunk):
                for delta in reader.read(data):
                    heard = True
                    yield delta
            if stop.is_set():
                raise Stopped(stop.reason)
            if not chunk:
                break
            # The server's pings keep the socket awake; only output counts. The clock stands while our reader is busy.
            now = time.monotonic()
            if heard:
                heard_at = now
                if only_pings:
                    exchange.limit_silence(call.chunk_timeout_s)
                    only_pings = False
            else:
                left_s = heard_at + call.chunk_timeout_s - now
                if left_s <= 0:
                    raise _idle(call)
                exchange.limit_silence(left_s)
                only_pings = True
        if not reader.done and not (self._dialect == "openai" and reader.finish_reason):
            raise EngineLost("The engine's answer broke off in the middle.")
        yield reader.finished()

    def _receive_whole(self, exchange: Exchange, call: EngineCall, stop: StopSignal) -> Iterator[Delta]:
        yield Opened(self._model_of(call), streams=False)
        try:
            document = exchange.read_all(timeout_s=call.chunk_timeout_s)
        except Silent:
            raise _idle(call) from None
        except Broken as error:
            self._refuse_when_closed()
            raise EngineLost("The connection to the engine broke in the middle of the answer.") from error
        except ValueError as error:
            raise EngineFailed("The engine's answer is too long.") from error
        stop.raise_if_set()
        reader = CompletionReader()
        deltas = reader.read(document)
        if not deltas and not reader.finish_reason:
            raise EngineFailed("The engine answered with JSON that is no completion.")
        yield from deltas
        yield reader.finished()

    def _read(self, exchange: Exchange, call: EngineCall, stop: StopSignal) -> bytes:
        try:
            return exchange.read_some()
        except Silent:
            stop.raise_if_set()
            raise _idle(call) from None
        except Broken as error:
            stop.raise_if_set()
            self._refuse_when_closed()
            if self._dialect == "openai":
                return b""  # a finish reason may have come before: then the answer is whole
            raise EngineLost("The connection to the engine broke in the middle of the answer.") from error

    def _decode(self, decoder: SseDecoder, chunk: bytes) -> list[bytes]:
        try:
            if chunk:
                return decoder.feed(chunk)
            # What a broken connection left of an event is no JSON object any more and says nothing.
            return [data for data in decoder.end() if data == b"[DONE]" or (data[:1] == b"{" and data[-1:] == b"}")]
        except EventTooLong as error:
            raise EngineFailed("The engine sent an event without end.") from error

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

    def _begin(self, call: EngineCall, stop: StopSignal) -> Exchange:
        """Send the request and wait for the headers, which come when the server gives it a slot."""
        content = self._content(call)
        self._refuse_when_closed()
        exchange = self._exchange(stop)
        try:
            exchange.send("POST", COMPLETIONS, content, timeout_s=call.chunk_timeout_s)
            if exchange.status != 200:
                raise self._refusal(exchange)
        except BaseException as error:
            exchange.close()
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
                    raise _idle(call) from error
                case _:
                    raise
        if self._info.state != "ready":
            self._saw(replace(self._info, state="ready", detail=""))
        return exchange

    def _refusal(self, exchange: Exchange) -> Exception:
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

    def _exchange(self, *stops: StopSignal, connect_timeout_s: float | None = None) -> Exchange:
        limit_s = self._settings.connect_timeout_s
        return Exchange(
            self._address,
            api_key=self._api_key,
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
        if self._dialect != "llamacpp" or not self._can_count:
            return None
        content = self._content(call)
        key = hashlib.blake2b(content, digest_size=16).digest()
        with self._lock:
            if key in self._counts:
                self._counts.move_to_end(key)
                return self._counts[key]
        count = self._count(content, stop)
        stop.raise_if_set()
        if count is not None:
            with self._lock:
                self._counts[key] = count
                while len(self._counts) > COUNTS_KEPT:
                    self._counts.popitem(last=False)
        return count

    def _count(self, content: bytes, stop: StopSignal) -> int | None:
        """Ask the server to count; servers older than that endpoint render the template and tokenize it."""
        status, answer = self._question(f"{COMPLETIONS}/input_tokens", content, stop)
        if status == 200:
            return _whole(answer.get("input_tokens"))
        if status not in (404, 405, 501):
            return None
        status, answer = self._question("/apply-template", content, stop)
        prompt = answer.get("prompt")
        if status != 200 or not isinstance(prompt, str):
            self._can_count = status not in (404, 405, 501)  # until the next probe finds a server
            return None
        asked = orjson.dumps({"content": prompt, "add_special": True, "parse_special": True})
        status, answer = self._question("/tokenize", asked, stop)
        tokens = answer.get("tokens")
        return len(tokens) if status == 200 and isinstance(tokens, list) else None

    def slots_progress(self) -> tuple[SlotProgress, ...] | None:
        """What each slot of a llama.cpp server has done, to tell a long prompt from a hang; None when it does not answer.

        Not more than once in a few seconds: each answer puts off what the server does about a client that has gone.
        """
        status, answer = self._question("/slots", None, None)
        slots = answer.get("")
        if status != 200 or not isinstance(slots, list):
            return None
        return tuple(_slot_progress(slot) for slot in slots if isinstance(slot, dict))

    def _question(self, path: str, content: bytes | None, stop: StopSignal | None) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of a short request, a list under the key ""; status 0 when there is none."""
        stops = () if stop is None else (stop,)
        try:
            with self._exchange(*stops, connect_timeout_s=ASKING_CONNECT_S) as exchange:
                exchange.send("GET" if content is None else "POST", path, content, timeout_s=COUNT_WITHIN_S)
                document = orjson.loads(exchange.read_all(timeout_s=COUNT_WITHIN_S))
                return exchange.status, document if isinstance(document, dict) else {"": document}
        except (ConnectFailed, NoAnswer, Broken, Silent, ValueError):
            return 0, {}


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotProgress:
    """The work of one slot of a llama.cpp server; a slot that works and does not move is stuck."""

    id: int
    working: bool
    task: int | None
    prompt_tokens_processed: int
    tokens_decoded: int


def _slot_progress(slot: dict[str, Any]) -> SlotProgress:
    following = slot.get("next_token")
    first = following[0] if isinstance(following, list) and following else following
    decoded = first.get("n_decoded") if isinstance(first, dict) else None
    return SlotProgress(
        id=_whole(slot.get("id")) or 0,
        working=bool(slot.get("is_processing")),
        task=_whole(slot.get("id_task")),
        prompt_tokens_processed=_whole(slot.get("n_prompt_tokens_processed")) or 0,
        tokens_decoded=_whole(decoded) or 0,
    )


def _idle(call: EngineCall) -> IdleTimeout:
    return IdleTimeout(f"The engine gave no token and no progress for {call.chunk_timeout_s:g} s.")


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
