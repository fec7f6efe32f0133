"""Turns a call into the plan of a generation: the prompt's tokens, the grammar, and what the template makes possible."""

from __future__ import annotations

import math
import secrets
import string
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from llamacpp_mqtt_deploy.core.control_tokens import WARNING, WELL_KNOWN, ControlStrings, clean_call
from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.core.errors import BadRequest, ContextOverflow, Unsupported
from llamacpp_mqtt_deploy.core.gbnf import NotConvertible, grammar_of, tool_grammar
from llamacpp_mqtt_deploy.core.toolparse import MARKS, ToolStyle
from llamacpp_mqtt_deploy.engines.inprocess.native import Model
from llamacpp_mqtt_deploy.engines.inprocess.running import Plan
from llamacpp_mqtt_deploy.engines.inprocess.templates import ChatTemplate

_PROMPTS_KEPT = 4
"""Tokenized prompts remembered: a call is counted while its history is fitted, and then run."""
_ID_CHARS = string.ascii_letters + string.digits


class Planner:
    """Knows one loaded model's vocabulary and template. Safe to use from several threads while the model lives."""

    def __init__(self, model: Model, *, name: str, n_ctx: int) -> None:
        self._model = model
        self.name = name
        self.n_ctx = n_ctx
        self._bos, self._eos = model.token_text("bos"), model.token_text("eos")
        self.template = ChatTemplate(model.metadata("tokenizer.chat_template"), bos=self._bos, eos=self._eos)
        self._lock = threading.Lock()
        self._prompts: OrderedDict[str, list[int]] = OrderedDict()
        marks: list[str] = list(self.template.thinking_tags or ())
        if self.template.tool_style is not None:
            marks += MARKS[self.template.tool_style]
        model.show(marks)
        tags = self.template.thinking_tags
        # Some models mark turns by what is no token: what the template writes counts too, if it is known for that.
        written = {string for string in WELL_KNOWN if string in self.template.source}
        self._controls = ControlStrings(model.control_texts | written)
        self._thinking_open = model.single_token(tags[0]) if tags else None
        self._thinking_end = model.tokenize(f"\n{tags[1]}\n\n", add_special=False) if tags else []

    def count(self, call: EngineCall) -> int:
        """Tokens of the prompt."""
        call, _ = clean_call(call, self._controls)
        return len(self._tokenize(self._render(call)))

    def plan(self, call: EngineCall) -> Plan:
        """Raises BadRequest, Unsupported and ContextOverflow."""
        call, cleaned = clean_call(call, self._controls)
        sampling = call.sampling
        style, tools = self._tools(call)
        grammar = self._grammar(call, style, tools)
        prompt = self._render(call)
        tokens = self._tokenize(prompt)
        if len(tokens) >= self.n_ctx:
            raise ContextOverflow(
                f"The request needs {len(tokens)} tokens and the engine's context holds {self.n_ctx}.",
                n_prompt_tokens=len(tokens),
                n_ctx=self.n_ctx,
            )
        if not tokens:
            raise BadRequest("The model's chat template makes an empty prompt of these messages.")
        tags = self.template.thinking_tags
        tail = prompt.rstrip()
        inside = tags is not None and tail.endswith(tags[0])
        closed = tags is not None and tail.endswith(tags[1])
        stop = sampling.get("stop") or ()
        return Plan(
            tokens=tokens,
            model_name=self.name,
            sampling=sampling,
            bias=self._bias(sampling.get("logit_bias")),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            max_tokens=sampling.get("max_tokens"),
            grammar=grammar,
            thinking_tags=tags,
            thinking_inside=inside,
            thinking_open=self._thinking_open if not closed and call.thinking is not False else None,
            thinking_end=self._thinking_end,
            # A template that always opens the thinking is overruled by closing it at once.
            thinking_budget=0 if call.thinking is False else call.thinking_budget,
            tool_style=style,
            tool_names=tuple(name for name, _ in tools),
            one_call=call.parallel_tool_calls is False or isinstance(call.tool_choice, Mapping),
            new_id=_mistral_id if style in ("mistral", "mistral_args") else _id,
            chunk_timeout_s=call.chunk_timeout_s,
            warnings=(WARNING,) if cleaned else (),
        )

    def left_out(self, call: EngineCall) -> tuple[str, ...]:
        """Names of the call's fields that mean nothing to this model."""
        if self.template.thinking_tags is not None:
            return ()
        names = {"thinking": call.thinking is True, "thinking_budget": call.thinking_budget is not None}
        return tuple(name for name, asked in names.items() if asked)

    # --- the prompt --------------------------------------------------------------------------------------------------

    def _render(self, call: EngineCall) -> str:
        tools = None if call.tool_choice == "none" else call.tools
        prompt = self.template.render(call.messages, tools=tools, thinking=call.thinking)
        # The tokenizer adds what the vocabulary asks for; a template that wrote it too must not double it.
        if self._model.adds_bos and self._bos:
            prompt = prompt.removeprefix(self._bos)
        if self._model.adds_eos and self._eos:
            prompt = prompt.removesuffix(self._eos)
        return prompt

    def _tokenize(self, prompt: str) -> list[int]:
        with self._lock:
            known = self._prompts.get(prompt)
        if known is None:
            known = self._model.tokenize(prompt, add_special=True)
            with self._lock:
                self._prompts[prompt] = known
                while len(self._prompts) > _PROMPTS_KEPT:
                    self._prompts.popitem(last=False)
        return known

    # --- tools and formats -------------------------------------------------------------------------------------------

    def _tools(self, call: EngineCall) -> tuple[ToolStyle | None, list[tuple[str, Any]]]:
        """The style in which to read calls and the tools that may be called."""
        if not call.tools or call.tool_choice == "none":
            return None, []
        style = self.template.tool_style
        if style is None:
            raise Unsupported(
                "This model's chat template takes no tools in a form that the worker's engine can read; "
                "leave `tools` out, or use another model or engine."
            )
        tools = [(str(tool["function"]["name"]), tool["function"].get("parameters")) for tool in call.tools]
        if isinstance(call.tool_choice, Mapping):
            wanted = str(call.tool_choice.get("function", {}).get("name"))
            tools = [(name, schema) for name, schema in tools if name == wanted]
            if not tools:
                raise BadRequest(
                    f"tool_choice names {wanted[:64]!r}, which is none of the tools.", fields=["tool_choice"]
                )
        return style, tools

    def _grammar(self, call: EngineCall, style: ToolStyle | None, tools: Sequence[tuple[str, Any]]) -> str | None:
        form = call.response_format or {}
        kind = form.get("type", "text")
        forced = style is not None and (call.tool_choice == "required" or isinstance(call.tool_choice, Mapping))
        try:
            if forced and style is not None:
                several = call.parallel_tool_calls is not False and call.tool_choice == "required"
                return tool_grammar(style, tools, several=several)
        except NotConvertible as error:
            raise BadRequest(f"The tools cannot be enforced: {error}.", fields={"tools": str(error)}) from error
        match kind:
            case "text":
                return None
            case "json_object":
                schema = form.get("schema", {"type": "object"})
            case "json_schema":
                named = form.get("json_schema")
                schema = named.get("schema") if isinstance(named, Mapping) else form.get("schema")
                if schema is None:
                    raise _bad_format("`json_schema` needs a `schema`")
            case _:
                raise BadRequest(
                    "response_format: `type` must be json_object or json_schema.", fields=["response_format"]
                )
        if style is not None:
            raise Unsupported(
                "This engine cannot hold an answer to a response_format and call tools in the same request."
            )
        try:
            return grammar_of(schema)
        except NotConvertible as error:
            raise _bad_format(str(error)) from error

    def _bias(self, given: Any) -> dict[int, float]:
        if not given:
            return {}
        pairs = given.items() if isinstance(given, Mapping) else given
        bias: dict[int, float] = {}
        for key, value in pairs:
            amount = -math.inf if value is False else float(value)
            if isinstance(key, str) and not key.isdecimal():
                tokens = self._model.tokenize(key, add_special=False)
            else:
                tokens = [int(key)]
            for token in tokens:
                if not 0 <= token < self._model.n_vocab:
                    raise BadRequest(
                        f"logit_bias: the model has no token {token}.", fields={"logit_bias": "the model's token ids"}
                    )
                bias[token] = bias.get(token, 0.0) + amount
        return bias


def _bad_format(why: str) -> BadRequest:
    return BadRequest(f"response_format: {why}.", fields={"response_format": why})


def _id() -> str:
    return "call_" + "".join(secrets.choice(_ID_CHARS) for _ in range(24))


def _mistral_id() -> str:
    """Mistral's templates refuse ids that are not nine letters and digits."""
    return "".join(secrets.choice(_ID_CHARS) for _ in range(9))
