"""What a user can set: one model per concern, each field with its unit, its bounds and a default that works on a laptop."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, StringConstraints
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

TopicPart = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
LevelName = Annotated[str, StringConstraints(pattern=r"^(route:)?[A-Za-z0-9_.-]{1,64}$")]
Lane = Literal["interactive", "normal", "batch"]
StreamingMode = Literal["native", "simulated", "off"]
EmptyPayload = Literal["ignore", "reset", "error"]
RouteFormat = Literal[
    "events", "text", "text-chunks", "json", "tokens", "content", "chatbot", "typed-chunks", "typed-events"
]


def _expand_home(path: Path) -> Path:
    """`~/x` as a shell would read it; an unknown home leaves the path as it is, and the open that fails names it."""
    if "\0" in str(path):
        raise ValueError("a path holds no null character")  # the system's calls raise ValueError, not OSError, for it
    try:
        return path.expanduser()
    except RuntimeError:
        return path


UserPath = Annotated[Path, AfterValidator(_expand_home)]


class Section(BaseModel):
    """A table of the configuration file; unknown keys are errors, so that a typing mistake is found at start. So are `inf` and
    `nan`, which TOML has: no key means them, and JSON cannot show them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def default_worker_id() -> str:
    """The host name, made fit for a topic level."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "-" for c in socket.gethostname())
    return name.lstrip("$")[:64] or "worker"


def default_state_path() -> Path:
    """`$STATE_DIRECTORY/state.db` under systemd, else the user's XDG state directory."""
    under_systemd = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if under_systemd:
        return Path(under_systemd) / "state.db"
    base = os.environ.get("XDG_STATE_HOME") or str(_expand_home(Path("~/.local/state")))
    return Path(base) / "llamacpp-mqtt-deploy" / "state.db"


class TlsSettings(Section):
    enabled: bool = False
    """Encrypt the connection to the broker (TLS 1.2 or newer); the port then defaults to 8883."""
    ca_file: UserPath | None = None
    """PEM file with the authorities to trust; the system's when absent."""
    cert_file: UserPath | None = None
    """PEM file with the client certificate, where the broker asks for one."""
    key_file: UserPath | None = None
    """PEM file with the key of the client certificate, not encrypted."""
    insecure: bool = False
    """Do not verify the broker's certificate or host name. For a first try only: anyone can pose as the broker."""


class MqttSettings(Section):
    host: str = "localhost"
    """Host name or address of the broker; the path of the socket when `transport` is `unix`."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the broker; 1883 when absent, 8883 with TLS."""
    transport: Literal["tcp", "websockets", "unix"] = "tcp"
    """How to reach the broker."""
    websocket_path: str = "/mqtt"
    """Path of the websocket on the broker, for `transport = "websockets"`."""
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    """MQTT version; `auto` tries 5 and falls back to 3.1.1."""
    root: TopicPart = "llm"
    """First level of all topics: `{root}/request/{session}` and so on."""
    worker_id: TopicPart = Field(default_factory=default_worker_id)
    """Name of this worker on the bus; must stay the same over restarts. Default: the host name."""
    username: str | None = None
    """User name at the broker."""
    password: SecretStr | None = None
    """Password at the broker; better kept in `password_file` or in the systemd credential `mqtt-password`."""
    password_file: UserPath | None = None
    """File whose first line is the password."""
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 30
    """Seconds of silence after which the connection is checked; the broker declares the worker dead after 1.5 times this."""
    session_expiry_s: Annotated[int, Field(ge=0, le=0xFFFFFFFF)] = 86400
    """Seconds for which an MQTT 5 broker keeps requests for a worker that is away (3.1.1: for as long as it likes)."""
    reconnect_max_s: Annotated[float, Field(ge=0.1, le=10.0)] = 10.0
    """Longest pause between two attempts to connect, in seconds."""
    inbox_messages: Annotated[int, Field(ge=20, le=100_000)] = 1000
    """Messages received and not yet read; beyond it QoS 1 messages wait at the broker."""
    outbox_messages: Annotated[int, Field(ge=100, le=1_000_000)] = 5000
    """Events published and not yet acknowledged by the broker; beyond it generations pause or end."""
    outbox_mib: Annotated[int, Field(ge=1, le=65_536)] = 64
    """The same in MiB: whichever bound is reached first counts. Refusals and acks get a third of both."""
    tls: TlsSettings = TlsSettings()


class ManagedSettings(Section):
    binary: UserPath | None = None
    """Path of the llama-server to start; found on PATH, then in the `xllamacpp` package, when absent."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Loopback port for the server; 0 uses a private unix socket."""
    extra_args: tuple[str, ...] = ()
    """Further arguments for llama-server, after ours."""
    cache_ram_mib: Annotated[int, Field(ge=0, le=1_048_576)] = 512
    """Memory for the server's prompt cache in MiB (llama-server's own default is 8192)."""
    sleep_after_s: Annotated[float, Field(ge=0, le=30 * 86400)] = 0.0
    """Seconds without a request after which the server ends and gives its memory back, until the next request starts it again; 0
    is never."""


class EngineSettings(Section):
    kind: Literal["server", "managed", "inprocess"] = "server"
    """A running server, a llama-server that the worker starts and watches, or llama-cpp-python inside the worker."""
    dialect: Literal["auto", "llamacpp", "openai"] = "auto"
    """What the server speaks: llama.cpp's extensions, or only OpenAI's API (Ollama, vLLM and others)."""
    url: str = "http://127.0.0.1:8080"
    """Address of the server: `http://host:port`, `https://...`, or `unix:///path/to/llama.sock`."""
    api_key: SecretStr | None = None
    """Bearer token for the server; better kept in `api_key_file` or in the systemd credential `engine-api-key`."""
    api_key_file: UserPath | None = None
    """File whose first line is the API key."""
    ca_file: UserPath | None = None
    """PEM file with the authorities to trust for an `https` address; the public ones when absent."""
    model: str | None = None
    """Name of the model, where the server serves several; becomes the default of the request field `model`."""
    models: tuple[str, ...] = ()
    """Further models that requests may name."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Other names that requests may use for a model: `{"gpt-4" = "qwen2.5-7b"}`; the name `default` stands for the model of
    requests that name none."""
    model_path: UserPath | None = None
    """GGUF file, for `managed` and `inprocess`."""
    repo_id: str | None = None
    """Model repository to download from (`owner/name`), for `inprocess`, where there is a network."""
    filename: str | None = None
    """File (or glob) in `repo_id`."""
    context_tokens: Annotated[int, Field(ge=256, le=10_000_000)] | None = None
    """Context of one slot in tokens; taken from the server or the model when absent."""
    gpu_layers: Annotated[int, Field(ge=-1, le=1000)] = -1
    """Layers to keep on the GPU, for `managed` and `inprocess`; -1 is all that fit."""
    main_gpu: Annotated[int, Field(ge=0, le=64)] = 0
    """The GPU that holds small tensors, for `managed` and `inprocess`."""
    tensor_split: tuple[float, ...] = ()
    """Share of the model per GPU, for `managed` and `inprocess`."""
    flash_attention: Literal["auto", "on", "off"] = "auto"
    """Flash attention, for `managed` and `inprocess`."""
    kv_type: Literal["f32", "f16", "q8_0", "q5_1", "q4_0"] = "f16"
    """Type of the KV cache, for `managed` and `inprocess`."""
    batch_tokens: Annotated[int, Field(ge=32, le=8192)] = 256
    """Prompt tokens per step, for `managed` and `inprocess`: a cancel waits for at most one step."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads, for `managed` and `inprocess`; the engine's own choice when absent."""
    state_cache_mib: Annotated[int, Field(ge=0, le=1_048_576)] = 256
    """Memory for saved session states of the `inprocess` engine in MiB."""
    slots: Annotated[int, Field(ge=1, le=256)] | None = None
    """Requests in flight at once; asked from llama-server when absent, 1 for other servers."""
    connect_timeout_s: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Seconds to wait for a connection to the server."""
    chunk_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """Seconds without a token or progress after which a generation ends with `idle_timeout`."""
    unavailable_after_s: Annotated[float, Field(ge=0, le=86400)] = 60.0
    """Seconds for which a request waits, in the queue or with a slot, for a server that cannot be reached, before
    `engine_unavailable`."""
    managed: ManagedSettings = ManagedSettings()


class SamplingSettings(Section):
    """Defaults of the request fields of the same name; absent ones are left to the engine."""

    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    """Randomness of the answer; 0 is always the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep the most likely tokens that together reach this probability."""
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop tokens less likely than this share of the most likely one."""
    seed: Annotated[int, Field(ge=-1, le=0xFFFFFFFF)] | None = None
    """Seed of the random numbers; -1 is a new one each time."""
    stop: tuple[str, ...] | None = None
    """Texts at which the answer ends."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Push away tokens that appeared at all."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Push away tokens by how often they appeared."""
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """llama.cpp's penalty on repeated tokens; 1 is none."""
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Longest answer in tokens."""
    thinking: bool | None = None
    """Let a reasoning model think first; the model's own habit when absent."""
    thinking_budget: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    """Longest thinking in tokens."""


class GenerationSettings(SamplingSettings):
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = 1024
    """Longest answer in tokens, where neither route nor request says; capped by `limits.max_tokens`."""
    system_prompt: str | None = None
    """System prompt of every session, where neither route nor request says otherwise."""
    timeout_s: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """Overall limit of a request in seconds, waiting included."""


class StreamingSettings(Section):
    mode: StreamingMode = "native"
    """`native` forwards tokens as they come, `simulated` paces the full answer, `off` sends only the terminal event."""
    chunk_chars: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Characters of one piece in `simulated`."""
    chunk_interval_s: Annotated[float, Field(ge=0, le=10)] = 0.01
    """Seconds between two pieces in `simulated`."""
    heartbeat_s: Annotated[float, Field(ge=0.1, le=3600)] = 15.0
    """Seconds without another event after which a `ping` is sent."""
    coalesce_min_s: Annotated[float, Field(ge=0, le=10)] = 0.01
    """Shortest pause between two chunks of a stream in `native`, in seconds; the first one goes at once. With eight streams
    and more at once it grows with a quarter of their number, and it is twice as long where a chunk carries eight tokens and
    more. 0 sends as fast as the broker acknowledges, which costs processor time with engines of hundreds of tokens a second."""
    coalesce_max_chars: Annotated[int, Field(ge=1, le=1_000_000)] = 8000
    """Longest chunk in characters; more is cut into several."""


class SessionsSettings(Section):
    store: Literal["sqlite", "memory", "postgres"] = "sqlite"
    """Where accepted requests and histories are kept; `memory` forgets them when the worker ends. `postgres` (extra `postgres`)
    is a database that several workers may share."""
    path: UserPath = Field(default_factory=default_state_path)
    """File of the SQLite store. With `postgres`, what has to be kept on this machine lies beside it."""
    url: str | None = None
    """Address of the PostgreSQL database, with its user and without a password:
    `postgresql://lmd@db.example.org/lmd?sslmode=verify-full`."""
    password_file: UserPath | None = None
    """File whose first line is the password for the database; else the systemd credential `database-password`."""
    database_schema: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,63}$")] | None = None
    """Schema of the tables in that database; made of `lmd_` and `mqtt.root` when absent, so that each root has its own."""
    ttl_s: Annotated[float, Field(ge=1)] = 30 * 86400.0
    """Seconds after its last use when a session is forgotten; a pause of more than a day without a worker does not count."""
    max_sessions: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    """Sessions kept; beyond it the oldest of whoever has most is forgotten."""
    history_tokens: Annotated[int, Field(ge=0)] | None = None
    """Most tokens of history put before a prompt; as much as the context holds when absent."""
    expose_history: bool = True
    """Answer the control action `history`."""


class LimitsSettings(Section):
    max_request_bytes: Annotated[int, Field(ge=256, le=256 * 1024 * 1024)] = 1024 * 1024
    """Largest request in bytes."""
    max_event_bytes: Annotated[int, Field(ge=1024, le=256 * 1024 * 1024)] = 131072
    """Largest event in bytes; less when the broker says so."""
    max_answer_bytes: Annotated[int, Field(ge=1024, le=256 * 1024 * 1024)] = 4 * 1024 * 1024
    """Longest answer in bytes, reasoning included; an engine that says more is stopped (`finish_reason` `length`). An answer that
    does not fit into one event is kept up to this size, so that a client can ask for what it lost of it."""
    queue_size: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Requests that wait for a slot, over all sessions."""
    max_queue_mib: Annotated[int, Field(ge=1, le=1_048_576)] = 64
    """Most MiB of requests that wait for a slot, over all sessions."""
    queue_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of the queue, of its places and of its MiB, that one first topic level may hold while others wait too."""
    session_queue: Annotated[int, Field(ge=1, le=1000)] = 4
    """Prompts of one session that wait for their turn."""
    max_requests_per_minute: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Requests and controls per minute of one first topic level; 0 is no limit. Cancels may use another minute's worth in
    advance."""
    tokens_per_day: Annotated[int, Field(ge=0, le=10**12)] = 0
    """Tokens, of prompts and answers together, that one first topic level may use in a day (UTC); 0 is no limit. A request is
    refused with `rate_limited` when none are left, or when requests under way may take what is left."""
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)] = 32768
    """Longest answer that a request may ask for, in tokens."""
    max_timeout_s: Annotated[float, Field(gt=0, le=7 * 86400)] = 3600.0
    """Longest `timeout_s` that a request may ask for, in seconds."""
    remember_s: Annotated[float, Field(ge=1, le=30 * 86400)] = 600.0
    """Seconds for which an ended request is remembered and not run again."""
    max_journal_mib: Annotated[int, Field(ge=1, le=1_048_576)] = 64
    """Most MiB of ended requests that are remembered, half of it for one first topic level; beyond it the oldest are
    forgotten sooner."""
    max_starts: Annotated[int, Field(ge=1, le=100)] = 3
    """How often a request is started that ends before its first chunk."""
    drain_timeout_s: Annotated[float, Field(ge=0, le=86400)] = 30.0
    """Seconds for running requests to finish after SIGTERM."""
    aging_s: Annotated[float, Field(gt=0, le=86400)] = 30.0
    """Seconds after which a waiting request moves up one lane, so that `batch` never starves."""
    startup_timeout_s: Annotated[float, Field(ge=0, le=86400)] = 0.0
    """Seconds to wait for broker, engine and database at start before exit code 3; 0 waits for ever."""


class RouteSettings(SamplingSettings):
    request: str | None = None
    """Topic of requests: `maze/user_input`, or `maze/request/{session}`."""
    reply: str | None = None
    """Topic of answers, with `{session}`: `maze/assistant_response/{session}`. `{client_id}` and `{request_id}` may follow, each a level
    of its own: the topic ends before the first of them that a payload does not name."""
    allow_reply_topic: bool = False
    """A payload may name the topic of its answer in `reply_topic`, below what stands before `{session}` in `reply`."""
    control: str | None = None
    """Topic of control messages, with `{session}`; none when the session comes from the payload."""
    fields: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Names of existing clients for our request fields, `client_id` and `reply_topic`: `{prompt = "message", session_id = "sessionId"}`;
    a name with dots leads into objects of the payload: `{prompt = "message.text"}`. Of several names the first one that is there
    counts: `{system_prompt = ["systemPrompt", "prompt_template.content"]}`."""
    prompt_template: str | None = None
    """Makes the prompt of a payload of any fields: `"{hero.name} stands at {place}. What now?"`. What a payload holds is text for the
    model and nothing else; two braces stand for one."""
    prompt_template_topic: str | None = None
    """Topic of the payloads that go into `prompt_template`, beside the ordinary ones on `request`; without it those of `request` do."""
    prompt_defaults: dict[str, str] = Field(default_factory=dict)
    """What stands for fields of `prompt_template` that a payload lacks: `{"hero.name" = "Somebody"}`; without it they are refused."""
    prompt_field_chars: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    """Longest value of one field in `prompt_template`, in characters."""
    prompt_chars: Annotated[int, Field(ge=1, le=10_000_000)] = 16_000
    """Longest prompt that comes of `prompt_template`, in characters."""
    answer_fields: dict[str, str] = Field(default_factory=dict)
    """Names of existing clients for the fields of an answer, with `format = "json"`: `{content = "response", request_id = "requestId"}`. Ours are
    `content`, `error`, `code`, `request_id`, `session_id` and `model`."""
    system_prompt: str | None = None
    """System prompt of this route's sessions."""
    allow_system_prompt: bool = True
    """Requests may bring their own system prompt."""
    allow_messages: bool = True
    """Requests may bring their own `messages`."""
    allow_tools: bool = True
    """Requests may bring their own tools."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tools (OpenAI function tools) of requests that bring none."""
    timeout_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    """Overall limit of this route's requests in seconds, waiting included."""
    mode: StreamingMode | None = None
    """Streaming mode of this route."""
    format: RouteFormat = "events"
    """What answers look like: `events` of the protocol, `text` (the whole answer as plain text), `text-chunks` (plain text as it
    comes), `json` (the whole answer as one object), or a kind of JSON objects that stream: `tokens`, `content`, `chatbot`, `typed-chunks`, `typed-events` ([what they look
    like](protocol.md#formats))."""
    model: str | None = None
    """Model of requests that name none."""
    default_priority: Lane = "normal"
    """Lane of requests that name none."""
    max_priority: Lane = "normal"
    """Highest lane that requests may ask for; a higher wish is lowered. With `interactive` whoever may publish here goes before
    everybody else when he says so."""
    trust_payload_session: bool = False
    """The session comes from the payload: whoever may publish here can read and steer every session of the route."""
    default_session: str | None = None
    """Session of payloads that name none, with `trust_payload_session`; without it they are refused."""
    empty_payload: EmptyPayload = "ignore"
    """What an empty message on `request` means: nothing, forget the session's history, or a mistake of the client's."""
    reset_topic: str | None = None
    """Topic on which clients let the history of a session be forgotten. Without `{session}` (needs `trust_payload_session`) the session is
    put behind it, as in `maze/clear_history/s1`, or stands in the payload."""
    delete_topic: str | None = None
    """The same for a session altogether."""
    system_prompt_topic: str | None = None
    """The same for a new system prompt, which the session keeps: `{"template": "...", "reset": true}`."""
    hint_topic: str | None = None
    """Topic, with `{session}`, of a line at QoS 0 when that was done: `{"hint": "History cleared"}`."""
    allow_all_sessions: bool = False
    """A message on these topics that names no session, or `all`, means every session of the route. Without it such a message is ignored."""
    session_topic: str | None = None
    """Topic on which any message asks for a new session; the answer is its id as plain text."""
    session_reply_topic: str | None = None
    """Topic of those answers, for all who ask."""


class LevelSettings(Section):
    """What one first topic level may use, where that is not what all may: a user of the broker, or `"route:NAME"` for all who
    send to a route with `trust_payload_session`."""

    max_priority: Lane | None = None
    """Highest lane that its requests may ask for, in place of their route's."""
    tokens_per_day: Annotated[int, Field(ge=0, le=10**12)] | None = None
    """In place of `limits.tokens_per_day`; 0 is no limit."""
    max_requests_per_minute: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """In place of `limits.max_requests_per_minute`; 0 is no limit."""


class StatusSettings(Section):
    every_s: Annotated[float, Field(ge=1, le=3600)] = 10.0
    """Seconds between two renewals of the retained status."""
    health_every_s: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """Seconds between two health messages."""


class PoolSettings(Section):
    """Several workers that serve one root together; each names the pool, and all have one database (`sessions.store = "postgres"`)
    and the same routes."""

    name: TopicPart | None = None
    """Name of the pool that this worker belongs to: its requests come through `$share/NAME/...`. Absent: it serves its root alone."""
    lease_s: Annotated[float, Field(ge=1, le=3600)] = 15.0
    """Seconds without a sign of life, by the database's clock, until others take over what a worker had."""


class HomeAssistantSettings(Section):
    """Whether Home Assistant shows this worker as a device."""

    discovery: bool = False
    """Publish a discovery message, so that Home Assistant shows this worker with its state, its figures and its buttons."""
    prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}(/[A-Za-z0-9_.-]{1,64}){0,3}$")] = (
        "homeassistant"
    )
    """First topic levels of discovery, as Home Assistant's MQTT integration has them."""
    level: TopicPart = "homeassistant"
    """First topic level of what Home Assistant asks: its user name at the broker, where the access list binds levels to users."""


class MetricsSettings(Section):
    """Figures for Prometheus; off unless one of these is set. Needs the extra `metrics`."""

    listen: str | None = None
    """Where `/metrics` is served over HTTP, to everybody who can connect: `127.0.0.1:9469`, or `unix:///run/lmd/metrics.sock`."""
    textfile: UserPath | None = None
    """File `NAME.prom` that is written every 15 seconds, for the textfile collector of node-exporter; removed at the end."""


class GatewaySettings(Section):
    """`lmd gateway`: HTTP over the bus. It connects as `[mqtt]` says; the worker does not read this section."""

    host: str = "127.0.0.1"
    """Address to listen on. Without `keys_file` only this machine is served, so it must be a loopback address then."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8089
    """Port to listen on; 0 takes a free one."""
    keys_file: UserPath | None = None
    """File with the hashes of the keys that may ask, made by `lmd gateway key add NAME`. Read again when it changes."""
    level: TopicPart | None = None
    """First topic level of all requests where there are no keys; `mqtt.username` when absent, else `web`."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may ask from elsewhere, as `https://chat.example.org`; none when empty."""
    page_brokers: tuple[str, ...] = ()
    """Websocket addresses of brokers that the chat page may speak to by itself, as `wss://broker.example.org:8084`; none when
    empty."""
    max_streams: Annotated[int, Field(ge=1, le=100_000)] = 1024
    """Answers under way at once."""
    max_streams_per_level: Annotated[int, Field(ge=1, le=100_000)] = 256
    """The same for one first topic level, so that one key leaves places to the others."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=256 * 1024 * 1024)] = 2 * 1024 * 1024
    """Largest body of a request, and largest frame of a WebSocket, in bytes."""
    max_answer_bytes: Annotated[int, Field(ge=4096, le=1024 * 1024 * 1024)] = 16 * 1024 * 1024
    """Longest answer that is held for a slow reader, about in bytes; `limits.max_answer_bytes` of the worker is the smaller one."""
    header_timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """Seconds within which the head of a request has to arrive."""
    body_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds within which the body of a request, or a message of a WebSocket, has to arrive."""
    heartbeat_s: Annotated[float, Field(ge=0.1, le=600)] = 15.0
    """Seconds of silence in a stream after which a sign of life is sent, where the API has one."""
    slow_reader_s: Annotated[float, Field(ge=0.1, le=3600)] = 60.0
    """Seconds for which a reader may take nothing before its connection is cut."""
    retry_grace_s: Annotated[float, Field(ge=0, le=600)] = 10.0
    """Seconds for which an answer goes on after its reader went away, where the request had an `Idempotency-Key`: it may be asked
    for again. Others are cancelled at once."""
    drain_timeout_s: Annotated[float, Field(ge=0, le=3600)] = 20.0
    """Seconds for answers to finish after SIGTERM; the others end with an error then."""


class LoggingSettings(Section):
    format: Literal["auto", "json", "console"] = "auto"
    """`auto` is columns on a terminal and JSON elsewhere."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least important lines to log."""
    log_content: bool = False
    """Log prompts and answers too. They may be private."""


class Settings(BaseSettings):
    """The whole configuration: file, then environment, then flags; later wins.

    `loading.load` is the one reader of the file and the environment. Building `Settings` by hand reads neither, so that a
    test or a script gets exactly what it names.
    """

    model_config = SettingsConfigDict(env_prefix="LMD_", env_nested_delimiter="__", extra="forbid", frozen=True)

    mqtt: MqttSettings = MqttSettings()
    engine: EngineSettings = EngineSettings()
    generation: GenerationSettings = GenerationSettings()
    streaming: StreamingSettings = StreamingSettings()
    sessions: SessionsSettings = SessionsSettings()
    limits: LimitsSettings = LimitsSettings()
    routes: dict[TopicPart, RouteSettings] = Field(default_factory=dict)
    levels: dict[LevelName, LevelSettings] = Field(default_factory=dict)
    status: StatusSettings = StatusSettings()
    pool: PoolSettings = PoolSettings()
    home_assistant: HomeAssistantSettings = HomeAssistantSettings()
    metrics: MetricsSettings = MetricsSettings()
    gateway: GatewaySettings = GatewaySettings()
    logging: LoggingSettings = LoggingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)
