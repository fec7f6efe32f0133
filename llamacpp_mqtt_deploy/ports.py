"""The interfaces between the worker and its adapters: what an engine, a link to the broker and a store have to offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished, Message
from llamacpp_mqtt_deploy.core.histogram import Histogram
from llamacpp_mqtt_deploy.core.spending import LedgerRow, Spent
from llamacpp_mqtt_deploy.core.wallclock import elapsed_s
from llamacpp_mqtt_deploy.stopping import Deadline, StopSignal

# --- engines: who makes tokens ---------------------------------------------------------------------------------------

EngineState = Literal["starting", "loading", "ready", "asleep", "restarting", "unreachable", "failed", "closed"]
"""`asleep`: it holds no model for now, which is no fault: the next call loads it."""

SERVING: tuple[EngineState, ...] = ("ready", "asleep")
"""The engine answers, or will as soon as somebody asks."""

Unloaded = Literal["done", "busy", "away", "unsupported"]
"""What came of the wish to let the model go: it is gone; calls are under way; there is none to let go; not this kind of engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine says of itself; goes into the retained status. `slots` bounds the requests in flight."""

    state: EngineState
    kind: str
    detail: str = ""
    """One sentence for the operator when `state` is not `ready`: what happened and what to do."""
    backend: str = "unknown"
    gpu_layers: str | None = None
    """Layers on the GPU of all (`25/25`), or the model's share there (`43%`); None when the engine does not tell."""
    models: tuple[str, ...] = ()
    n_ctx: int | None = None
    """Context of one slot in tokens; None when the engine does not tell."""
    slots: int = 1
    tools: bool = False
    vision: bool = False
    thinking: bool = False
    json_schema: bool = False
    streams: bool = True
    problem: str = ""
    """One sentence for the operator about what went wrong a while ago and will again, also when `state` is `ready`."""
    can_restart: bool = False
    """`restart` is in our power."""
    can_unload: bool = False
    """`unload` and `keep_awake` are."""
    kept_awake: bool = False
    """Somebody has asked it not to fall asleep."""


class Engine(Protocol):
    """Makes tokens. All methods may be called from any thread; `stream` by at most `info().slots` threads at once."""

    def open(self) -> None:
        """Begin to connect, spawn or load; returns soon, `info().state` tells when it is ready. Raises ConfigError-like
        ValueError only for what will never work (a missing model file)."""

    def wait_ready(self, stop: StopSignal, timeout_s: float | None) -> bool:
        """Wait until the engine answers, or would if it were called (`asleep`); False when the time passed or the signal was
        set. None waits for ever."""

    def info(self) -> EngineInfo:
        """The latest knowledge, at once, without touching the engine."""

    def probe(self) -> EngineInfo:
        """Ask the engine now (bounded by a few seconds) and remember the answer; never raises."""

    def expect(self) -> None:
        """A request may be coming: get ready for it, as far as that costs next to nothing. For the I/O loop's thread; never waits."""

    def stream(self, call: EngineCall, *, stop: StopSignal, on_wait: Callable[[str], None]) -> Iterator[Delta]:
        """One generation, read by the caller: `Opened`, then deltas, then one `Finished`.

        `on_wait(reason)` is called (`loading`, `engine_restarting`) when the engine cannot take the request yet and the call
        waits for it. Raises a `RequestError` leaf, or `Stopped` soon after `stop` was set; the engine's slot is then free.
        Closing the iterator early frees the slot too.
        """

    def pump(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
        feed: Callable[[Sequence[Delta]], float],
        on_slow: Callable[[], None] = lambda: None,
    ) -> Finished:
        """One generation, given to `feed` as it comes: `stream` for whoever publishes it. Returns when it is complete.

        `feed` gets `Opened`, then all other deltas but `Finished`, several at once where they came together. It is called by
        one thread at a time, not always the caller's, and must not wait. It returns the seconds for which the engine may
        let more of them collect (0: go on); the end of the answer ends such a rest. What it raises ends the generation.
        `on_slow` is called, perhaps several times, before `Opened` where that does not come within some milliseconds.
        """

    def count_tokens(self, call: EngineCall, *, stop: StopSignal) -> int | None:
        """Tokens of the prompt as the template renders it; None when this engine cannot tell."""

    def unsupported_fields(self, call: EngineCall) -> tuple[str, ...]:
        """Names of the call's fields that this engine leaves out; told to the client as warnings."""

    def restart(self) -> bool:
        """Restart the engine (admin `restart_engine`); False when this kind cannot."""

    def unload(self) -> Unloaded:
        """Let the model go until the next call (admin `unload`), when nothing runs. Ends `keep_awake`."""

    def keep_awake(self, seconds: float | None) -> bool:
        """Do not fall asleep for so long, and wake up if need be; None is until told otherwise, 0 ends it. False when this kind
        never sleeps."""

    def close(self, deadline: Deadline) -> None:
        """Stop what runs and release everything; idempotent."""


# --- links: who carries messages -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One message as the broker delivered it. `receipt` is the link's own and goes back into `acknowledge`."""

    topic: str
    payload: bytes
    qos: int
    retain: bool = False
    received_at: float = 0.0
    """Monotonic seconds."""
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: float | None = None
    """The remaining Message Expiry, None when the publisher set none."""
    receipt: object = None
    left_out: int = 0
    """How many bytes of the payload were not kept, because it is longer than anybody takes; `payload` is its beginning then."""

    @property
    def payload_bytes(self) -> int:
        """Length of the payload as it was published."""
        return len(self.payload) + self.left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """The will: what the broker publishes for us when the connection dies."""

    topic: str
    payload: bytes


LinkState = Literal["connecting", "online", "lost", "refused", "taken_over", "dead", "closed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkInfo:
    """The link's condition for status, watchdog and log."""

    state: LinkState
    detail: str = ""
    protocol: str | None = None
    """`5` or `3.1.1` once connected."""
    max_payload_bytes: int | None = None
    """The broker's Maximum Packet Size less room for the header; None when it named none."""
    reconnects: int = 0
    unacknowledged: int = 0
    """QoS 1 publishes that wait for their PUBACK."""
    outbox_bytes: int = 0
    """What they and those that were not sent yet take, topics and payloads."""
    last_puback_at: float | None = None
    """Monotonic seconds."""
    poisoned: int = 0
    """Publishes that were given up because the broker refused them for ever."""


Published = Literal["queued", "full", "unfit"]
"""What became of a publish: it is on its way; there is no place for it now (a full outbox, a link that closes), try again later;
or no broker of this connection could ever take it as it is (its topic, its size), so trying the same again is useless."""


Share = Literal["event", "answer"]
"""Whose part of the outbox a publish takes: events of accepted requests and what the worker says of itself, or an answer to a
message that was not accepted (a refusal, an ack), of which there may be a third of the outbox."""


class Outbox(Protocol):
    """The half of a link that the worker uses: publish and acknowledge."""

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        on_done: Callable[[bool], None] | None = None,
        share: Share = "event",
        content_type: str = "application/json",
    ) -> Published:
        """Queue a publish and say whether it was; what was not queued is forgotten, and its `on_done` never runs.

        `on_done(True)` runs when the broker acknowledged it, `on_done(False)` when it was given up; at most once, in a thread
        of the link: it must return at once and must not raise. It survives a reconnect (the publish is sent again).
        """

    def acknowledge(self, delivery: Delivery) -> None:
        """Send the PUBACK. Call it in order of receipt. A receipt from an earlier connection is ignored."""


class Link(Outbox, Protocol):
    """One connection to the bus that reconnects for ever. It is made with `max_incoming_bytes`: of a payload that is longer it may
    deliver the beginning alone (`Delivery.left_out`), so that no message costs more memory than that."""

    def open(
        self,
        *,
        will: Retained,
        on_delivery: Callable[[Delivery], bool],
        on_online: Callable[[LinkInfo], None],
        on_lost: Callable[[LinkInfo], None],
    ) -> None:
        """Start to connect and return. `on_delivery` gives False when its inbox is full: a QoS 1 message is then not
        acknowledged and the link reconnects a little later so that the broker delivers it again. `on_online` runs after each
        successful CONNACK, before anything is subscribed. All callbacks run in the link's thread and must only enqueue."""

    def subscribe(
        self,
        filters: Sequence[tuple[str, int]],
        *,
        timeout_s: float,
        retained: bool = False,
        give_up: Callable[[], bool] | None = None,
    ) -> Mapping[str, str]:
        """Subscribe and wait for SUBACK; returns the refused filters with the reason, empty when all were granted. Raises
        TimeoutError (also when `give_up`, asked now and again while it waits, says so), ConnectionError. Never call it from a callback. Not repeated on reconnect: `on_online` does that.
        `retained` asks for the messages that the broker keeps for these topics (MQTT 3.1.1 sends them always, flagged)."""

    def unsubscribe(self, filters: Sequence[str], *, timeout_s: float) -> None:
        """End subscriptions and wait for the broker's word: after it nothing more comes for them that is not here already.
        Raises TimeoutError, ConnectionError. Never call it from a callback."""

    def info(self) -> LinkInfo: ...

    def max_payload_bytes(self) -> int | None:
        """As in `info`, at no cost: each request asks for it several times."""

    def room_for_answers(self, largest: int, *, timeout_s: float = 0.0) -> int:
        """How many publishes of the share `answer`, of up to so many bytes each, the outbox takes as it is now. Waits up to
        `timeout_s` until there is room for one; never from a callback."""

    def flush(self, deadline: Deadline) -> bool:
        """Wait until nothing is unacknowledged; False when the deadline passed."""

    def close(self, deadline: Deadline, *, last_message: Retained | None = None) -> None:
        """Publish the last retained message (`offline`), wait for its PUBACK, DISCONNECT; idempotent."""


# --- stores: who remembers accepted requests and sessions --------------------------------------------------------------

EntryState = Literal["accepted", "streaming", "ended"]


class EntryKey(NamedTuple):
    """Names a request on this worker: the same request id under another session is another request."""

    route: str
    session: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One accepted request in the journal. Times are seconds since the epoch (they must survive a restart)."""

    key: EntryKey
    topic: str
    payload: bytes
    digest: str
    """Hash of the request without `metadata` and `timeout_s`: the same id with another digest is another request."""
    correlation: bytes | None = None
    accepted_at: float = 0.0
    expires_at: float | None = None
    state: EntryState = "accepted"
    starts: int = 0
    terminal: bytes | None = None
    """The terminal event as published, once `state` is `ended`."""
    reply_topic: str = ""
    delivered: bool = False
    """The broker acknowledged the terminal event."""
    ended_at: float | None = None

    def waited_s(self, now: float) -> float:
        """Seconds since it was accepted, as far as clocks that were set in between can tell."""
        return elapsed_s(self.accepted_at, now)

    def left_s(self, now: float) -> float | None:
        """What is left of its time limit; None when it has none. The limit is a span: a clock that was set since must
        neither end the request at once nor keep it for years."""
        return None if self.expires_at is None else self.expires_at - self.accepted_at - self.waited_s(now)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryChange:
    """What a `done` does to its session's history: append these messages."""

    session: tuple[str, str]
    """Route and session path."""
    append: tuple[Message, ...]
    forget_before: bool = False
    """`new: true`: the messages up to now are forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldEnd:
    """The end of a request that its client has got and the journal has not."""

    key: EntryKey
    terminal: bytes
    now: float
    history: HistoryChange | None = None
    chunks: bytes | None = None
    spent: Spent | None = None


class Pending(Protocol):
    """A write that was begun. It is over when it would survive a crash, or when it failed."""

    def wait(self, timeout_s: float) -> None:
        """Wait until it is over; raises StoreError when it failed, or when the time passed (it may still come about)."""

    def done(self) -> bool:
        """Whether it is over, either way."""

    def hurry(self) -> None:
        """Keep it back no longer, should it wait for another write. Returns at once."""

    def on_done(self, callback: Callable[[StoreError | None], None]) -> None:
        """Call back once with the problem, or None, when it is over: in the store's thread, so it must return at once, or
        here and now when it is over already. Callbacks of several writes run in the order of the writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """How many of each kind a purge has dropped, and whether more is left: then call it again soon."""

    entries: int
    sessions: int
    more: bool


class Store(Protocol):
    """Journal and sessions. The disk may be full, slow, or held by another program: what the store cannot write it refuses
    with a StoreError, and takes again when it can; nothing has to be opened anew. Every method is atomic and may be called from any thread; each raises StoreError when the disk
    fails. A method that wrote returns only after the write would survive the death of the process (and of the machine, for
    the durable methods `accept`, `mark_streaming` and `finish`).

    The methods that end in `_soon` only begin to write and return. Writes take effect in the order of the calls, whatever
    thread they come from and whether they waited; a reader sees one when it is over. What waits for the disk is bounded: a
    `_soon` for which there is no place, or whose fate is known, raises StoreError at once."""

    @property
    def commit_times(self) -> Histogram:
        """Seconds that each transaction took which succeeded, since the store was made."""

    def open(self) -> None: ...

    def accept(self, entries: Sequence[Entry]) -> None:
        """Journal these requests in one transaction, in this order. A key that is unfinished stays as it is; an ended one is
        replaced and begins anew."""

    def accept_soon(self, entries: Sequence[Entry], *, unhurried: bool = False) -> Pending:
        """`unhurried`: it may be kept back until the next write, to share its commit; until `hurry`, or until somebody waits for it."""

    def find(self, key: EntryKey) -> Entry | None: ...

    def mark_started(self, key: EntryKey) -> int:
        """Count one more start; returns how often it was started now, 0 for an unknown key. An ended one is not counted."""

    def mark_streaming(self, key: EntryKey) -> None:
        """The first chunk is about to be published: from now on the request is never started again. No error for an unknown
        or ended key."""

    def mark_streaming_soon(self, key: EntryKey) -> Pending: ...

    def finish(
        self,
        key: EntryKey,
        terminal: bytes,
        *,
        now: float,
        history: HistoryChange | None = None,
        chunks: bytes | None = None,
        spent: Spent | None = None,
        on_stored: Callable[[], None] | None = None,
    ) -> None:
        """Store the terminal event, the change of the history and what the request has cost (`ledger`) in one transaction, and
        let go of the payload (the digest stays). `chunks` is the record of what the terminal event does not tell (`core/chunk_record.py`); it is kept as long as
        the entry. A request ends once: a second call changes nothing, neither history nor ledger. Under an unknown key only
        the history changes. `on_stored` is called when it is written, in the store's thread, so it must return at once; also when
        this method has raised before because that took too long."""

    def finish_soon(
        self,
        key: EntryKey,
        terminal: bytes,
        *,
        now: float,
        history: HistoryChange | None = None,
        chunks: bytes | None = None,
        spent: Spent | None = None,
    ) -> Pending: ...

    def ledger(
        self,
        *,
        since_day: int,
        until_day: int | None = None,
        first_level: str | None = None,
        skip: int = 0,
        most: int = 1000,
    ) -> list[LedgerRow]:
        """What first levels have spent in these days, both included, the newest day first and within it who took most tokens
        first. A bounded number of days is kept, and of levels within a day; the others stand together under `REST`. A day stays
        the one that the clock told, also where the clock was ahead; of too many days those ahead of now are forgotten first."""

    def set_aside(self, ends: Sequence[ToldEnd]) -> bool:
        """Keep these ends outside of the journal, which does not take them: the next `open` gives them to it, where it has not
        got them by then, and the requests end with them and with no others. False when even that does not survive a crash.
        May wait for a few seconds; never raises StoreError."""

    def clear_aside(self) -> None:
        """Forget what was set aside: the journal has it all."""

    def chunks(self, key: EntryKey) -> bytes | None:
        """The record of chunks that `finish` was given; None without one."""

    def mark_delivered(self, keys: Sequence[EntryKey]) -> None: ...

    def unfinished(self) -> list[Entry]:
        """Accepted and streaming requests in the order in which they were accepted."""

    def undelivered(self) -> list[Entry]:
        """Ended requests whose terminal event no broker has acknowledged, in the order in which they ended."""

    def history(self, session: tuple[str, str]) -> tuple[Message, ...]:
        """The messages, oldest first, with the same bytes as JSON at every turn. The oldest exchanges of a history of
        megabytes are forgotten now and then."""

    def reset(self, session: tuple[str, str]) -> None:
        """Forget the messages; the session stays."""

    def delete(self, session: tuple[str, str]) -> None:
        """Forget the session altogether."""

    def purge(self, *, now: float, remember_s: float, ttl_s: float, max_sessions: int, max_bytes: int = ...) -> Purged:
        """Drop ended entries older than `remember_s` that are delivered (undelivered ones after a day), and over `max_bytes`
        of them the oldest ones of whoever (first topic level) holds most, or more than half, the delivered ones first;
        sessions unused for `ttl_s`, and, over `max_sessions`, the least recently used one of whoever holds most.

        What has ended and sessions become no older while no worker purges for more than a day (`core/wallclock.AWAY_S`): a machine
        that was off, or whose clock was wrong when it booted, forgets nothing for it.

        One call drops a few hundred of a kind and a few megabytes at most, so that nobody waits for long; it says when more
        is left. Never an unfinished request, nor a session with one."""

    def clock_was_set(self, forward_s: float, *, now: float) -> Pending:
        """The clock was set forward by so many seconds while this worker ran, to `now`: what is remembered is as old as it was,
        and what waits has waited no longer, than without that. Tell it once, and again only where the write failed: `purge` moves
        what is remembered, some at a time, and drops nothing until it has moved all of it."""

    def trouble(self) -> str:
        """Why it takes no writes at the moment, or what else is wrong with it, and what to do, for the operator; empty when all is
        well. May look at the disk; never raises."""

    def close(self) -> None: ...


@runtime_checkable
class SessionPrompts(Protocol):
    """What a store has to offer beside, where sessions may have system prompts of their own and clients may change all sessions of
    a route. Every method as those of `Store`."""

    def system_prompt(self, session: tuple[str, str]) -> str | None:
        """The session's own system prompt; None when it has none."""

    def set_system_prompt(self, session: tuple[str, str], prompt: str | None, *, now: float, reset: bool) -> None:
        """Keep it as long as the session, which begins with it if need be; None takes it away. `reset`: forget the messages in
        the same transaction."""

    def newest_session(self) -> int:
        """The number of the session that began last; one that begins later has a higher one, whatever the clock says."""

    def sessions(self, route: str, *, up_to: int, most: int) -> tuple[tuple[int, str], ...]:
        """Numbers and names of sessions of this route, those with the highest numbers up to this one."""


class StoreError(Exception):
    """The state directory cannot be read or written; the text says what to do."""


class StoreFull(StoreError):
    """The disk is full. `open` raises it when not even a worker without new requests can start there; it may be called
    again later. An open store raises it for new requests, while the ends of accepted ones still find a place."""


class StoreAway(StoreError):
    """The database cannot be used just now, for a reason that passes by itself: it is out of reach, starts, or is too busy. `open`
    may be called again later."""


class StoreInUse(StoreError):
    """Another worker holds the state directory; the text names its process."""
