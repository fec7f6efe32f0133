"""What operators and dashboards see, as models: admin acks, the retained status and the retained health."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import StringConstraints

from llamacpp_mqtt_deploy.core.fields import Lane
from llamacpp_mqtt_deploy.schema.event_models import (
    Count,
    CountedCode,
    Emitted,
    EngineStateName,
    ErrorCode,
    FaultyFields,
    NonEmpty,
    Number,
)

WorkerState = Literal["online", "draining", "offline"]


Day = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class UsageRow(Emitted):
    """What a first topic level has spent in a day."""

    day: Day
    """In UTC."""
    first_level: NonEmpty
    """Who: the first level of his topics, `route:NAME` for all who send to a route that takes the session from the payload, `*` for
    those whom the ledger has no row for (beyond 500 in a day)."""
    requests: Count
    """Accepted requests that have ended."""
    tokens_in: Count
    """Of their prompts, histories included."""
    tokens_out: Count
    """Of their answers."""
    engine_s: Number
    """Seconds for which they held a slot of the engine."""
    tokens_per_day: Count | None = None
    """What this level may use in a day, where that is limited."""


class LoggedProblem(Emitted):
    """A line of the worker's log, cut short."""

    ts: str
    """When, in UTC."""
    level: Literal["warning", "error", "critical"]
    """How bad."""
    event: str
    """What."""
    text: str
    """The rest of the line."""


class AdminAck(Emitted):
    """The answer to an admin message, on the admin reply topic."""

    type: Literal["ack"]
    """Always `ack`."""
    worker: NonEmpty
    """Worker id."""
    action: str | None
    """As sent; null when it could not be read."""
    status: Literal["ok", "error"]
    """Whether it was done."""
    code: ErrorCode | None = None
    """Why not, for programs."""
    message: str | None = None
    """What happened, for people."""
    fields: FaultyFields | None = None
    """The fields at fault, each with what was expected."""
    transaction: str | None = None
    """As sent."""
    cancelled: Count | None = None
    """`cancel_all`: how many requests were told to stop."""
    state: Literal["online", "draining"] | None = None
    """`drain`, `resume`: the worker's state now."""
    keep_awake: bool | None = None
    """`keep_awake`: whether the engine is kept awake now."""
    seconds: Number | None = None
    """`keep_awake`: for how long; absent is until told otherwise."""
    model: str | None = None
    """`model`: the model of requests that name none now."""
    level: Literal["debug", "info", "warning", "error"] | None = None
    """`log_level`: the level now."""
    changed: list[str] | None = None
    """`reload`: settings that are in force now."""
    needs_restart: list[str] | None = None
    """`reload`: settings that were changed and wait for a restart."""
    today: Day | None = None
    """`usage`: the day that it is for the worker, in UTC."""
    usage: list[UsageRow] | None = None
    """`usage`: the newest day first, and within it who took most tokens first."""
    problems: list[LoggedProblem] | None = None
    """`problems`: the last warnings and errors in the worker's log, the newest last; at most 50, and at most 10 of one event."""
    next_offset: Count | None = None
    """`usage`: where to go on; absent when these are the last rows."""


class RouteStatus(Emitted):
    """One route and its topics; `{session}` stands for a session path."""

    request: NonEmpty
    """Topic of requests."""
    reply: NonEmpty
    """Topic of events."""
    control: str | None = None
    """Topic of control messages, where there is one."""
    mode: Literal["native", "simulated", "off"] | None = None
    """How answers are streamed."""
    format: NonEmpty | None = None
    """What answers look like: `events` of this page, or another format."""
    trust_payload_session: bool | None = None
    """The session comes from the payload."""


class Capabilities(Emitted):
    """What engine and model can do."""

    tools: bool
    """Call tools."""
    vision: bool
    """See images."""
    thinking: bool
    """Think first."""
    json_schema: bool
    """Answer by a JSON schema."""
    streams: bool | None = None
    """Give the answer piece by piece."""


class LimitsStatus(Emitted):
    """What requests must keep to."""

    max_request_bytes: Count
    """Largest request."""
    max_event_bytes: Count
    """Largest event."""
    max_tokens: Count | None = None
    """Longest answer."""
    max_timeout_s: Number | None = None
    """Longest `timeout_s`."""
    queue_size: Count | None = None
    """Requests that may wait."""
    session_queue: Count | None = None
    """Prompts of one session that may wait."""
    max_requests_per_minute: Count | None = None
    """Of one first topic level; 0 is no limit."""
    tokens_per_day: Count | None = None
    """Of one first topic level; 0 is no limit."""
    remember_s: Number | None = None
    """How long an ended request is remembered."""


class EngineStatus(Emitted):
    """The engine's condition."""

    state: EngineStateName
    """Whether it answers. `asleep` is no fault: it holds no model for now, and the next request loads it."""
    kind: NonEmpty
    """What it is."""
    backend: str | None = None
    """What it computes on: cpu, cuda and others; unknown where the engine does not tell."""
    gpu_layers: str | None = None
    """Layers on the GPU of all (25/25), or the model's share there (43%), where the engine tells."""
    detail: str | None = None
    """One sentence for the operator, where something is wrong or slower than it need be."""
    keep_awake: bool | None = None
    """Whether somebody keeps it awake; only where it can fall asleep."""


class Status(Emitted):
    """Retained on the status topic; the will and the last message have `state` offline and little else."""

    state: WorkerState
    """Whether requests are taken."""
    protocol: Literal[1]
    """Version of this contract."""
    instance: NonEmpty
    """Random; another one under the same topic is another process."""
    ts: Number
    """When it was made, seconds since the epoch; in the will the time of connecting."""
    every_s: Number
    """Seconds between two renewals; older than three times this is not live."""
    worker: str | None = None
    """Worker id."""
    version: str | None = None
    """Of the program."""
    host: str | None = None
    """Host name, for the operator who looks for another instance."""
    pool: str | None = None
    """Name of the pool that this worker belongs to; absent for one that serves its root alone."""
    routes: dict[str, RouteStatus] | None = None
    """By name."""
    models: list[str] | None = None
    """What requests may name in `model`."""
    model: str | None = None
    """The model of requests that name none, where the engine tells."""
    n_ctx: Count | None = None
    """Context of one request in tokens."""
    slots: Count | None = None
    """Requests in flight at once."""
    capabilities: Capabilities | None = None
    """What engine and model can do."""
    limits: LimitsStatus | None = None
    """What requests must keep to."""
    heartbeat_s: Number | None = None
    """Longest silence of a living request."""
    engine: EngineStatus | None = None
    """The engine's condition."""
    reason: str | None = None
    """Why it is offline or draining, where that is known: `lost`, `stopped`, `not_subscribed` and others."""
    problem: str | None = None
    """What the broker does not let the worker read, the disk does not let it write, or what runs short (file descriptors, memory), and
    what to do; for the operator."""


class SlotsHealth(Emitted):
    """Requests in flight."""

    busy: Count
    """Running now."""
    total: Count
    """At most."""


class RequestsHealth(Emitted):
    """Requests since the start of the process."""

    accepted: Count
    """Taken in."""
    done: Count
    """Ended with `done`, cancelled ones included."""
    cancelled: Count
    """Ended with `done` and the finish reason `cancelled`."""
    failed: Count
    """Ended with `error`."""


class TokensHealth(Emitted):
    """Tokens since the start of the process."""

    prompt: Count
    """Of contexts."""
    cached: Count
    """Of contexts, without work."""
    completion: Count
    """Of answers."""


class SlotsStatus(Emitted):
    """Slots of engines."""

    total: Count
    """Requests that may run at once."""
    busy: Count
    """Requests that run."""


class PoolMember(Emitted):
    """One worker of a pool, as the pool's database has it."""

    worker: str
    """Worker id."""
    instance: str
    """As in its own status."""
    state: Literal["online", "draining", "gone"]
    """`gone`: its lease has run out, and another worker is about to take over what it had."""
    slots: SlotsStatus
    """Requests that it may run at once, and how many it runs."""
    version: str
    """Of the program."""


class PoolStatus(Emitted):
    """Retained on the topic of a pool, told by one of its workers every `every_s` seconds."""

    pool: str
    """Name of the pool."""
    protocol: Literal[1]
    """Version of this contract."""
    ts: Number
    """When it was made, seconds since the epoch."""
    every_s: Number
    """Seconds between two of them; older than three times this says nothing about now."""
    told_by: str
    """Worker id of whoever tells it."""
    workers: Count
    """How many are there: their leases have not run out."""
    slots: SlotsStatus
    """Of all that are there."""
    queue: dict[str, Count]
    """Requests that wait, by lane."""
    oldest_wait_s: Number
    """Since when the one that waits longest does, in seconds; 0 when none waits."""
    models: list[str]
    """What requests may name in `model`: each is served by one worker at least."""
    members: list[PoolMember]
    """The workers, 500 at most."""


class Health(Emitted):
    """Retained on the health topic, renewed every 30 s."""

    worker: NonEmpty
    """Worker id."""
    ts: Number
    """When it was made, seconds since the epoch."""
    every_s: Number
    """Seconds between two renewals."""
    uptime_s: Number
    """Since the start of the process."""
    slots: SlotsHealth
    """Requests in flight."""
    queue: Count
    """Requests that wait."""
    lanes: dict[Lane, Count]
    """The same by lane."""
    tokens_per_second: Number
    """Of all answers together, over the last period."""
    first_token_ms: Number | None = None
    """Time to the first token, waiting included: the mean of the answers that ended in the last period in which any did."""
    requests: RequestsHealth
    """Since the start."""
    errors: dict[CountedCode, Count]
    """Answers with `error` or `rejected` by code, since the start; codes that never came are left out."""
    tokens: TokensHealth
    """Since the start."""
    rss_bytes: Count | None = None
    """Memory of the process."""
    reconnects: Count | None = None
    """Connections to the broker that were lost and made again."""
    unacknowledged: Count | None = None
    """Events that wait for the broker."""
    engine: EngineStateName
    """State of the engine."""
