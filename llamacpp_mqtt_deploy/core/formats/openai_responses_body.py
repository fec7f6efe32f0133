"""From a body of OpenAI's `/v1/responses` to a request on the bus, and from a `previous_response_id` to a session.

A worker keeps the conversation of a session. So a response whose input is a text, or one message of the user, begins a session
(unless `store` is false), and a response with a `previous_response_id` goes on with it. Any other input is a whole context, of
which nothing is kept: the client sends it anew each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llamacpp_mqtt_deploy.core.formats.asked import Asked, BodyFields, bad, checked, folded_seed, model_of, unserved
from llamacpp_mqtt_deploy.core.formats.openai_chat import thinks_at
from llamacpp_mqtt_deploy.core.routes import is_level

PASSED = (
    "temperature", "top_p", "parallel_tool_calls",
    # Not OpenAI's, but what clients of llama.cpp and its like put beside them, and the protocol's own.
    "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "seed", "stop", "thinking", "thinking_budget",
    "priority", "timeout_s",
)  # fmt: skip
RENAMED: Mapping[str, str] = {"max_output_tokens": "max_tokens"}
REFUSED: Mapping[str, str] = {
    "background": "answers are not kept to be fetched",
    "conversation": "conversations go on by previous_response_id",
    "prompt": "there are no stored prompts",
    "top_logprobs": "the bus carries no probabilities",
}
IGNORED = (
    "include", "max_tool_calls", "prompt_cache_key", "prompt_cache_retention", "reasoning.summary", "safety_identifier",
    "service_tier", "stream_options", "text.verbosity", "truncation", "user",
)  # fmt: skip

ECHOED = (
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id", "reasoning", "temperature",
    "text", "tool_choice", "tools", "top_p",
)  # fmt: skip
"""What a response object repeats of the body."""

_NAMES = {"max_tokens": "max_output_tokens", "response_format": "text.format", "system_prompt": "instructions"}
_PREFIX, _JOINT = "resp_", "~"


def response_id(request_id: str, session: str | None) -> str:
    """The id of a response; with the session that its conversation is kept in, if it is."""
    return _PREFIX + (f"{session}{_JOINT}{request_id}" if session is not None else request_id)


def session_of_response(previous: str) -> str | None:
    """The session that a response id holds."""
    session, joint, _ = previous.removeprefix(_PREFIX).partition(_JOINT)
    return session if joint and previous.startswith(_PREFIX) and is_level(session) else None


def parse_responses(fields: Mapping[str, Any]) -> Asked:
    """A body of `/v1/responses`. Raises BadRequest and Unsupported, which name the field."""
    body = BodyFields(fields)
    body.refuse(REFUSED)
    talk = _talk(body)
    told, session = (
        _continued(body, talk) if body.get("previous_response_id") is not None else (_begun(body, talk), None)
    )
    request = body.named({**{name: name for name in PASSED}, **RENAMED}) | told | _tools(body) | _format(body)
    if "seed" in request:
        request["seed"] = folded_seed(request["seed"])
    body.object("metadata")
    reasoning = body.object("reasoning")
    if reasoning is not None and (thinking := thinks_at(reasoning.text("effort"))) is not None:
        request.setdefault("thinking", thinking)
    return Asked(
        request=checked(request, names=_NAMES, origins=talk.origins),
        streams=body.flag("stream") is True,
        session=session,
        model=model_of(body),
        echo={
            **{name: value for name in ECHOED if (value := body.get(name)) is not None},
            "kept": "messages" not in request,
        },
    )


def _begun(body: BodyFields, talk: _Talk) -> dict[str, Any]:
    only = talk.only_message()
    if body.flag("store") is not False and only is not None:
        return {"prompt": only} | ({"system_prompt": talk.system} if talk.system else {})
    if not talk.messages:
        raise bad("input", "a text that is not empty, or a list of items")
    if instructions := body.text("instructions"):
        talk.messages.insert(0, {"role": "system", "content": instructions})
        talk.origins.insert(0, "instructions")
    return {"messages": talk.messages}


def _continued(body: BodyFields, talk: _Talk) -> tuple[dict[str, Any], str]:
    previous = body.needed_text("previous_response_id")
    session = session_of_response(previous)
    if session is None:
        expected = "the id of a response whose conversation was kept: its input was a text or one message of the user"
        raise bad("previous_response_id", expected)
    told: dict[str, Any] = {"system_prompt": talk.system} if talk.system else {}
    if (prompt := talk.only_message()) is not None:
        return told | {"prompt": prompt}, session
    results = [message for message in talk.messages if message["role"] == "tool"]
    if results and len(results) == len(talk.messages):
        return told | {
            "tool_results": [{name: result[name] for name in ("tool_call_id", "content")} for result in results]
        }, session
    raise bad("input", "with previous_response_id, one message of the user (text), or function_call_output items")


# --- input -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Talk:
    """The input as messages of the bus; `system` is what instructs the model in front of them."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    instructions: str = ""
    reasoning: list[str] = field(default_factory=list)

    def add(self, path: str, message: dict[str, Any]) -> None:
        if message["role"] == "assistant" and (reasoning := "".join(self.reasoning)):
            message["reasoning_content"] = reasoning
        self.reasoning = []
        self.messages.append(message)
        self.origins.append(path)

    @property
    def leading(self) -> list[str]:
        """Texts that instruct the model before anybody speaks."""
        texts = []
        for message in self.messages:
            if message["role"] != "system" or not isinstance(message["content"], str):
                break
            texts.append(message["content"])
        return texts

    @property
    def system(self) -> str:
        return "\n\n".join(text for text in (self.instructions, *self.leading) if text)

    def only_message(self) -> str | None:
        """The text of the user, when that is all there is beside instructions."""
        spoken = self.messages[len(self.leading) :]
        if len(spoken) != 1 or spoken[0]["role"] != "user":
            return None
        content = spoken[0]["content"]
        return content if isinstance(content, str) and content else None


def _talk(body: BodyFields) -> _Talk:
    talk = _Talk(instructions=body.text("instructions") or "")
    given = body.get("input")
    if isinstance(given, str):
        if given:
            talk.add("input", {"role": "user", "content": given})
        return talk
    for item in body.objects("input"):
        _add_item(talk, item)
    return talk


def _add_item(talk: _Talk, item: BodyFields) -> None:
    match item.get("type") or "message":
        case "message":
            talk.add(item.path("content"), _message(item))
        case "function_call":
            _add_call(talk, item)
        case "function_call_output":
            output = _output(item)
            talk.add(item.own_path, {"role": "tool", "tool_call_id": item.needed_text("call_id"), "content": output})
        case "reasoning":
            talk.reasoning += [text for part in item.objects("content") if (text := part.text("text"))]
        case _:
            raise unserved(item.path("type"), "items are message, function_call, function_call_output or reasoning")


def _message(item: BodyFields) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise bad(item.path("role"), "user, assistant, system or developer")
    content = item.get("content")
    if not isinstance(content, str):
        if not isinstance(content, list):
            raise bad(item.path("content"), "a text or a list of parts")
        parts = [_part(part) for part in item.objects("content")]
        only_text = all(part["type"] == "text" for part in parts)
        content = "\n".join(part["text"] for part in parts) if only_text or role != "user" else parts
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: BodyFields) -> dict[str, Any]:
    match part.get("type"):
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": part.needed_text("text")}
        case "refusal":
            return {"type": "text", "text": part.needed_text("refusal")}
        case "input_image":
            if part.get("image_url") is None:
                raise unserved(part.path("file_id"), "pictures have to come as data in image_url")
            return {"type": "image_url", "image_url": {"url": part.needed_text("image_url")}}
        case _:
            raise unserved(part.path("type"), "parts are input_text and input_image")


def _output(item: BodyFields) -> str:
    output = item.get("output")
    if isinstance(output, str):
        return output
    parts = [_part(part) for part in item.objects("output")]
    if any(part["type"] != "text" for part in parts):
        raise unserved(item.path("output"), "the result of a function is text")
    return "\n".join(part["text"] for part in parts)


def _add_call(talk: _Talk, item: BodyFields) -> None:
    function = {"name": item.needed_text("name"), "arguments": item.needed_text("arguments")}
    call = {"id": item.needed_text("call_id"), "type": "function", "function": function}
    if talk.messages and talk.messages[-1]["role"] == "assistant" and not talk.reasoning:
        talk.messages[-1].setdefault("tool_calls", []).append(call)
    else:
        talk.add(item.own_path, {"role": "assistant", "content": None, "tool_calls": [call]})


# --- tools and format ------------------------------------------------------------------------------------------------


def _tools(body: BodyFields) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if body.list("tools") is not None:
        told["tools"] = list(_offered(body))
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        told["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(choice, Mapping):
        raise unserved("tool_choice.type", "tools are functions")
    elif choice is not None:
        told["tool_choice"] = choice
    return told


def _offered(body: BodyFields) -> Iterator[dict[str, Any]]:
    for tool in body.objects("tools"):
        if tool.get("type") != "function":
            raise unserved(tool.path("type"), "tools are functions")
        yield {
            "type": "function",
            "function": tool.named({n: n for n in ("name", "description", "parameters", "strict")}),
        }


def _format(body: BodyFields) -> dict[str, Any]:
    text = body.object("text")
    told = text.object("format") if text is not None else None
    if told is None:
        return {}
    match told.get("type"):
        case "text":
            return {}
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            schema = told.named({name: name for name in ("name", "description", "schema", "strict")})
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        case _:
            raise bad(told.path("type"), "text, json_object or json_schema")
