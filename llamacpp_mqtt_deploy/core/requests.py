"""From a message's bytes to a checked value: Generate, ControlCommand, AdminCommand, or a refusal that names the fields at fault."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import orjson
from pydantic import ValidationError

from llamacpp_mqtt_deploy.core.aliases import resolve
from llamacpp_mqtt_deploy.core.deltas import SAMPLING_FIELDS, Message
from llamacpp_mqtt_deploy.core.errors import BadRequest, ModelNotFound, Unsupported
from llamacpp_mqtt_deploy.core.fields import AdminFields, ControlFields, Lane, RequestFields
from llamacpp_mqtt_deploy.core.guessing import guess_words
from llamacpp_mqtt_deploy.core.names import REPLY_FIELDS, FieldNames, Names
from llamacpp_mqtt_deploy.core.payloads import decode_payload, shown, too_large
from llamacpp_mqtt_deploy.core.prompt_templates import PromptTemplate
from llamacpp_mqtt_deploy.core.routes import is_level, is_session
from llamacpp_mqtt_deploy.core.validation import WireModel, expectations, faults

Mode = Literal["prompt", "messages", "tool_results"]
Stream = bool | Literal["sentence"]
ControlAction = Literal["cancel", "reset", "delete", "history", "ping", "count_tokens"]
AdminAction = Literal[
    "cancel_all",
    "drain",
    "resume",
    "reload",
    "restart_engine",
    "unload",
    "keep_awake",
    "model",
    "log_level",
    "usage",
    "problems",
]

MAX_CONTROL_BYTES = 4096
"""A control or admin message has three short fields; `count_tokens` alone brings a request's text with it."""

COUNTED_FIELDS = ("prompt", "messages", "system_prompt", "tools", "model")
"""What `count_tokens` reads of a request; all else does not lengthen the prompt."""

LANES: tuple[Lane, ...] = ("interactive", "normal", "batch")
"""From the highest to the lowest."""

_REQUEST = expectations(RequestFields)
_CONTROL = expectations(ControlFields)
_ADMIN = expectations(AdminFields)
_ADMIN_WORDS = {"log_level": ("level", True), "keep_awake": ("seconds", False), "model": ("model", True)}
"""The field of an admin action that has one, and whether it must be there; as a bare word it follows the action."""

_MODES: tuple[Mode, ...] = ("prompt", "messages", "tool_results")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPolicy:
    """What a route and the worker allow.

    `fields` maps our names to those of existing clients (`{"prompt": "message"}`, with dots for paths); `names` reads them.
    `reply_fields` are the fields that this route's reply topics are made of, beside the session. `default_session` is that of
    payloads that name none. `prompt_template` makes the prompts of payloads on its own topic, or of all with `templates_requests`.
    `models` are the names that a request may choose: an empty tuple refuses every name, None leaves names to the engine;
    `aliases` lead from other names to those, or to `default`. `tool_names` are the route's own tools, offered when a request
    brings none. Times are seconds.
    """

    max_request_bytes: int = 1024 * 1024
    max_tokens: int | None = None
    max_timeout_s: float | None = None
    default_timeout_s: float | None = None
    fields: Names = field(default_factory=dict)
    reply_fields: tuple[str, ...] = ()
    default_session: str | None = None
    prompt_template: PromptTemplate | None = None
    templates_requests: bool = False
    allow_system_prompt: bool = True
    allow_messages: bool = True
    allow_tools: bool = True
    trust_payload_session: bool = False
    models: tuple[str, ...] | None = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    tool_names: tuple[str, ...] = ()
    default_priority: Lane = "normal"
    max_priority: Lane = "normal"
    names: FieldNames = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", FieldNames(self.fields, self.reply_fields))


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request that could be read but is not yet checked.

    Exactly one of `text` and `body` is set; `body` has our field names. `request_id` and `session_id` are set when they
    are well-formed, so that a refusal of the rest can be addressed. `unknown` are the names that no field has.
    """

    text: str | None
    body: Mapping[str, Any]
    request_id: str | None
    session_id: str | None
    unknown: tuple[str, ...]
    digest: str

    def ids(self) -> dict[str, Any]:
        """What a refusal of it is addressed by, as far as the client named it."""
        named = {name: self.body[name] for name in ("session_id", "client_id", "reply_topic") if name in self.body}
        return named | {"request_id": self.request_id}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """A request of section 2 of the protocol, checked. What the client left out is None (or False, or empty).

    `messages` and `tools` hold known fields only, in OpenAI's shape. `tools` is None when the request says nothing about
    them and empty when it wants none. `priority` and `timeout_s` are final. `digest` tells whether two requests with one
    id are the same: a hash of all known fields but `metadata` and `timeout_s`.
    """

    request_id: str | None
    session_id: str | None
    mode: Mode
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    tool_results: tuple[Message, ...] = ()
    new: bool = False
    system_prompt: str | None = None
    stream: Stream = True
    full_content: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: Mapping[str, Any] | None = None
    thinking: bool | None = None
    thinking_budget: int | None = None
    model: str | None = None
    priority: Lane = "normal"
    timeout_s: float | None = None
    metadata: Mapping[str, Any] | None = None
    has_images: bool = False
    warnings: tuple[str, ...] = ()
    digest: str = ""

    def new_messages(self) -> tuple[Message, ...]:
        """What this request adds to its session before the answer."""
        if self.mode == "tool_results":
            return tuple(
                {"role": "tool", "tool_call_id": result["tool_call_id"], "content": result["content"]}
                for result in self.tool_results
            )
        return ({"role": "user", "content": self.prompt},)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlCommand:
    """A control message; `request_id` is set only for `cancel`, and `counted`, which is still unchecked, only for `count_tokens`."""

    action: ControlAction
    request_id: str | None = None
    transaction: str | None = None
    counted: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminCommand:
    """An admin message; `level` is set for `log_level`, `model` for `model`, and each only for it. `seconds` of `keep_awake` may be
    None: until told otherwise. What stands behind `transaction` is for `usage` and `problems`."""

    action: AdminAction
    level: Literal["debug", "info", "warning", "error"] | None = None
    seconds: float | None = None
    model: str | None = None
    transaction: str | None = None
    first_level: str | None = None
    days: int = 1
    limit: int = 100
    offset: int = 0


# --- requests --------------------------------------------------------------------------------------------------------


def read_request(
    payload: bytes, *, policy: RequestPolicy, templated: bool = False, left_out: int = 0
) -> RawRequest | None:
    """A request from its bytes: named values, still unchecked; None when the payload is blank. Raises BadRequest, PayloadTooLarge.

    Reading and checking are two steps so that a refusal of the second is answered under the client's own request id (and
    session, on a route that takes it from the payload). A message that even this refuses has no certain id;
    `guessing.guess_ids` finds a likely one. `templated`: it came on the topic of the route's prompt template.
    """
    content = decode_payload(payload, max_bytes=policy.max_request_bytes, left_out=left_out)
    if content is None:
        return None
    if policy.prompt_template is not None and (templated or policy.templates_requests):
        return _read_templated(content, policy.prompt_template, policy.names)
    if isinstance(content, str):
        return RawRequest(content, {}, None, None, (), _digest({"prompt": content}))
    body, unknown = policy.names.read(content)
    return _raw(body, unknown, _digest(body))


def _read_templated(content: str | dict[str, Any], template: PromptTemplate, names: FieldNames) -> RawRequest:
    """Of such a payload only the ids are fields of a request: whatever else it holds is data, and its names mean nothing here."""
    if isinstance(content, str):
        words = f"a JSON object with {', '.join(template.fields) or 'any fields'}"
        raise BadRequest(f"payload: expected {words}", fields={"payload": words})
    ids = names.read_only(content, ("session_id", "request_id", *sorted(REPLY_FIELDS)))
    return _raw(ids | {"prompt": template.fill(content)}, (), _digest({"content": content}))


def _raw(body: Mapping[str, Any], unknown: tuple[str, ...], digest: str) -> RawRequest:
    request_id, session_id = body.get("request_id"), body.get("session_id")
    return RawRequest(
        text=None,
        body=body,
        request_id=request_id if isinstance(request_id, str) and is_level(request_id) else None,
        session_id=session_id if isinstance(session_id, str) and is_session(session_id) else None,
        unknown=unknown,
        digest=digest,
    )


def check_request(raw: RawRequest, *, policy: RequestPolicy) -> Generate:
    """What may be generated, after `read_request`. Raises BadRequest, ModelNotFound, Unsupported."""
    names = policy.names
    hints = names.warnings(raw.unknown)
    given = {"prompt": raw.text} if raw.text is not None else raw.body
    request = _validated(RequestFields, given, _REQUEST, names)
    mode = _mode(request, names, hints)
    _check_combinations(request, mode, names)
    _check_permissions(request, policy, names)
    if policy.trust_payload_session and request.session_id is None and policy.default_session is None:
        raise _bad({"session_id": _REQUEST["session_id"]}, names)
    tools = None if request.tools is None else tuple(_plain(tool) for tool in request.tools)
    messages = tuple(_message(message) for message in request.messages or ())
    warnings: list[str] = []
    return Generate(
        request_id=request.request_id,
        session_id=_session(request, policy, names, warnings),
        mode=mode,
        prompt=request.prompt,
        messages=messages,
        tool_results=tuple(_plain(result) for result in request.tool_results or ()),
        new=_new(request, mode, names, warnings),
        system_prompt=request.system_prompt,
        stream=True if request.stream is None else request.stream,
        full_content=request.full_content is not False,
        sampling=_sampling(request, policy, names, warnings),
        tools=tools,
        tool_choice=_tool_choice(request, policy, names),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(request),
        thinking=request.thinking,
        thinking_budget=request.thinking_budget,
        model=_model(request, policy, names),
        priority=_priority(request, policy, names, warnings),
        timeout_s=_timeout(request, policy, names, warnings),
        metadata=request.metadata,
        has_images=any(_has_image(message) for message in messages),
        warnings=(*warnings, *hints),
        digest=raw.digest,
    )


# --- control and admin -----------------------------------------------------------------------------------------------


def parse_control(payload: bytes, *, max_count_bytes: int = MAX_CONTROL_BYTES, left_out: int = 0) -> ControlCommand:
    """A control message from its bytes: a JSON object, or the bare action for a person at a shell (`cancel`).

    `max_count_bytes` bounds a `count_tokens`. Raises BadRequest, PayloadTooLarge; `details` then holds `action` and `transaction`
    where they could be read, so that the ack can carry them.
    """
    # Before anything is parsed: a large message of another action costs a search and no more.
    max_bytes = max_count_bytes if b"count_tokens" in payload else MAX_CONTROL_BYTES
    if left_out or len(payload) > max_bytes:
        raise too_large(len(payload) + left_out, max_bytes, **guess_words(payload, _ANSWERABLE, max_chars=64))
    content = _content(payload, _CONTROL, max_bytes=max_bytes)
    found = _validated(ControlFields, content, _CONTROL)
    if found.action == "count_tokens":
        counted = {name: value for name, value in content.items() if name not in ("action", "transaction")}
        return ControlCommand(action=found.action, transaction=found.transaction, counted=counted)
    if len(payload) > MAX_CONTROL_BYTES:
        raise too_large(len(payload), MAX_CONTROL_BYTES, **_answerable(content))
    request_id = found.request_id if found.action == "cancel" else None
    return ControlCommand(action=found.action, request_id=request_id, transaction=found.transaction)


def check_counted(counted: Mapping[str, Any], *, policy: RequestPolicy) -> Generate:
    """What `count_tokens` is to count, by the checks of a request. Raises BadRequest, ModelNotFound, Unsupported."""
    body, _ = policy.names.read(counted)
    kept = {name: value for name, value in body.items() if name in COUNTED_FIELDS}
    return check_request(RawRequest(None, kept, None, None, (), ""), policy=policy)


def parse_admin(payload: bytes, *, left_out: int = 0) -> AdminCommand:
    """An admin message from its bytes: a JSON object, or bare words (`drain`, `log_level debug`).

    Raises BadRequest, PayloadTooLarge, as `parse_control` does.
    """
    content = _content(payload, _ADMIN, max_bytes=MAX_CONTROL_BYTES, left_out=left_out)
    found = _validated(AdminFields, content, _ADMIN)
    if found.action in ("usage", "problems"):
        return AdminCommand(
            action=found.action,
            transaction=found.transaction,
            first_level=found.first_level,
            days=found.days or 1,
            limit=found.limit or 100,
            offset=found.offset or 0,
        )
    field, needed = _ADMIN_WORDS.get(found.action, ("", False))
    if not field:
        return AdminCommand(action=found.action, transaction=found.transaction)
    if needed and getattr(found, field) is None:
        raise _bad({field: _ADMIN[field]}, None, **_answerable(found.model_dump()))
    return AdminCommand(action=found.action, transaction=found.transaction, **{field: getattr(found, field)})


def _content(payload: bytes, expected: Mapping[str, str], *, max_bytes: int, left_out: int = 0) -> dict[str, Any]:
    """The fields of a control or admin message that are there, still unchecked."""
    content = decode_payload(payload, max_bytes=max_bytes, left_out=left_out)
    if content is None:
        raise _bad({"action": expected["action"]})
    if isinstance(content, str):
        action, *rest = content.split() or [""]  # there are blanks that are no JSON blanks
        field, _ = _ADMIN_WORDS.get(action, ("", False))  # no control action is among them
        if field and len(rest) == 1:
            content = {"action": action, field: _word(field, rest[0])}
        else:
            content = {"action": " ".join((action, *rest))}
    return {name: value for name, value in content.items() if value is not None}


def _word(field: str, word: str) -> str | float:
    """The value of a bare word; what is no number stays a text, which is told as a fault."""
    if field != "seconds":
        return word
    try:
        return float(word)
    except ValueError:
        return word


def _digest(body: Mapping[str, Any]) -> str:
    # Of what the client wrote, not of what the limits made of it: a journal outlives a change of the limits.
    told = {name: value for name, value in body.items() if name not in ("metadata", "timeout_s")}
    return hashlib.sha256(orjson.dumps(told, option=orjson.OPT_SORT_KEYS)).hexdigest()


# --- checks ----------------------------------------------------------------------------------------------------------

_Model = TypeVar("_Model", bound=WireModel)


def _validated(
    model: type[_Model], given: Mapping[str, Any], expected: Mapping[str, str], names: FieldNames | None = None
) -> _Model:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        found = faults(error, expected)
    details = {} if model is RequestFields else _answerable(given)
    # Outside the except clause: pydantic's error holds the client's text, which must not reach a log as a cause.
    raise _bad(found, names, **details)


_ANSWERABLE = ("action", "transaction")
"""What an ack repeats."""


def _answerable(given: Mapping[str, Any]) -> dict[str, str]:
    return {name: value for name in _ANSWERABLE if isinstance(value := given.get(name), str) and len(value) <= 64}


def _bad(found: Mapping[str, str], names: FieldNames | None = None, **details: Any) -> BadRequest:
    told = {(names.of_path(path) if names else path): words for path, words in found.items()}
    message = "; ".join(f"{path}: expected {words}" for path, words in told.items())
    return BadRequest(message, fields=told, **details)


def _mode(request: RequestFields, names: FieldNames, hints: Iterable[str]) -> Mode:
    given = [mode for mode in _MODES if getattr(request, mode) is not None]
    if len(given) == 1:
        return given[0]
    told = ", ".join(names.of(mode) for mode in _MODES[:2]) + f" and {names.of(_MODES[2])}"
    found = " and ".join(names.of(mode) for mode in given) if given else "none"
    message = "; ".join([f"expected exactly one of {told}, found {found}", *hints])
    raise BadRequest(message, fields={names.of(mode): f"exactly one of {told}" for mode in (given or _MODES[:1])})


def _check_combinations(request: RequestFields, mode: Mode, names: FieldNames) -> None:
    if mode == "messages" and request.system_prompt is not None:
        raise _bad(
            {"system_prompt": f"not together with {names.of('messages')}: write a message with the role system"}, names
        )
    if mode == "tool_results" and request.new:
        raise _bad(
            {"new": f"not together with {names.of('tool_results')}: it would forget the call that they answer"}, names
        )


def _check_permissions(request: RequestFields, policy: RequestPolicy, names: FieldNames) -> None:
    forbidden = {}
    if request.messages is not None and not policy.allow_messages:
        forbidden["messages"] = f"this route does not allow it, send {names.of('prompt')}"
    elif not policy.allow_system_prompt:
        own = [
            number for number, message in enumerate(request.messages or ()) if message.role in ("system", "developer")
        ]
        forbidden |= {f"messages[{number}].role": "this route has its own system prompt" for number in own[:1]}
    if request.system_prompt is not None and not policy.allow_system_prompt:
        forbidden["system_prompt"] = "this route has its own"
    if request.tools and not policy.allow_tools:
        forbidden["tools"] = "this route does not allow it"
    if forbidden:
        told = {names.of_path(path): words for path, words in forbidden.items()}
        raise Unsupported("; ".join(f"{path}: {words}" for path, words in told.items()), fields=told)


# --- values ----------------------------------------------------------------------------------------------------------


def _plain(model: WireModel) -> dict[str, Any]:
    return model.model_dump(exclude_none=True, by_alias=True)


def _message(message: WireModel) -> dict[str, Any]:
    plain = _plain(message)
    if plain["role"] == "developer":
        # OpenAI's newer word for system; most chat templates do not know it.
        plain["role"] = "system"
    return plain


def _has_image(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(part["type"] == "image_url" for part in content)


def _session(request: RequestFields, policy: RequestPolicy, names: FieldNames, warnings: list[str]) -> str | None:
    if policy.trust_payload_session:
        return request.session_id or policy.default_session
    if request.session_id is None:
        return None
    warnings.append(f"{names.of('session_id')} was ignored: on this route the topic names the session")
    return None


def _new(request: RequestFields, mode: Mode, names: FieldNames, warnings: list[str]) -> bool:
    if request.new and mode == "messages":
        warnings.append(f"{names.of('new')} was ignored: messages do not touch the history")
        return False
    return bool(request.new)


def _sampling(request: RequestFields, policy: RequestPolicy, names: FieldNames, warnings: list[str]) -> dict[str, Any]:
    sampling = {name: value for name in SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    asked = sampling.get("max_tokens")
    if asked is not None and policy.max_tokens is not None and asked > policy.max_tokens:
        sampling["max_tokens"] = policy.max_tokens
        warnings.append(
            f"{names.of('max_tokens')} was lowered from {asked} to this worker's limit of {policy.max_tokens}"
        )
    return sampling


def _tool_choice(request: RequestFields, policy: RequestPolicy, names: FieldNames) -> str | Mapping[str, Any] | None:
    choice = request.tool_choice
    if choice is None:
        return None
    offered = policy.tool_names if request.tools is None else tuple(tool.function.name for tool in request.tools)
    if isinstance(choice, str):
        if choice == "required" and not offered:
            raise _bad({"tool_choice": f"{names.of('tools')} to choose from"}, names)
        return choice if offered else None
    if choice.function.name not in offered:
        known = ", ".join(offered[:8]) or "none is offered"
        raise _bad({"tool_choice.function.name": f"the name of an offered tool ({known})"}, names)
    return _plain(choice)


def _response_format(request: RequestFields) -> dict[str, Any] | None:
    if request.response_format is None or request.response_format.type == "text":
        return None
    return _plain(request.response_format)


def _model(request: RequestFields, policy: RequestPolicy, names: FieldNames) -> str | None:
    model = None if request.model is None else resolve(request.model, policy.aliases)
    if model is None or policy.models is None or model in policy.models:
        return model
    known = (*policy.models, *policy.aliases)
    expected = f"one of {', '.join(known[:8])}" if known else "nothing: requests cannot choose here"
    meant = "" if model == request.model else f" (an alias of {shown(model)})"
    raise ModelNotFound(
        f"{names.of('model')}: {shown(request.model or '')}{meant} is not served by this worker, expected {expected}",
        fields={names.of("model"): expected},
    )


def _priority(request: RequestFields, policy: RequestPolicy, names: FieldNames, warnings: list[str]) -> Lane:
    wanted = request.priority or policy.default_priority
    if LANES.index(wanted) >= LANES.index(policy.max_priority):
        return wanted
    if request.priority is not None:
        warnings.append(
            f"{names.of('priority')} was lowered from {wanted} to the highest one allowed here, {policy.max_priority}"
        )
    return policy.max_priority


def _timeout(request: RequestFields, policy: RequestPolicy, names: FieldNames, warnings: list[str]) -> float | None:
    asked, limit = request.timeout_s, policy.max_timeout_s
    if asked is not None and limit is not None and asked > limit:
        warnings.append(f"{names.of('timeout_s')} was lowered from {asked:g} to this worker's limit of {limit:g}")
    wanted = policy.default_timeout_s if asked is None else asked
    return wanted if wanted is None or limit is None else min(wanted, limit)
