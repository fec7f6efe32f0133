"""The loop of the in-process engine that makes tokens: the prompt in batches, then token after token."""

from __future__ import annotations

import codecs
import time
from collections import deque
from collections.abc import Sequence

from llamacpp_mqtt_deploy.core.answering import AnswerReader
from llamacpp_mqtt_deploy.core.deltas import Delta, Finished, FinishReason, Opened, PromptProgress, TokenUsage
from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.thinking import ThinkingSplitter
from llamacpp_mqtt_deploy.core.toolparse import ToolCallReader
from llamacpp_mqtt_deploy.engines.inprocess.native import Context
from llamacpp_mqtt_deploy.engines.inprocess.prefixes import Prefixes
from llamacpp_mqtt_deploy.engines.inprocess.running import CallInterrupted, Run
from llamacpp_mqtt_deploy.engines.inprocess.sampling import Sampler


class GenerationLoop:
    """The loop: prompt, then token after token. Runs in the owner's thread."""

    def __init__(self, run: Run, context: Context, prefixes: Prefixes) -> None:
        plan = self._plan = run.plan
        self._run = run
        self._context = context
        self._prefixes = prefixes
        thinking = None
        if plan.thinking_tags is not None:
            thinking = ThinkingSplitter(*plan.thinking_tags, inside=plan.thinking_inside)
        tools = None
        if plan.tool_style is not None:
            tools = ToolCallReader(plan.tool_style, names=plan.tool_names, new_id=plan.new_id)
        self._reader = AnswerReader(stop=plan.stop, thinking=thinking, tools=tools)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._forced: deque[int] = deque()
        self._generated = 0
        self._thought = 0

    def perform(self) -> None:
        """Give every delta, the last one `Finished`. Raises CallInterrupted, native.Aborted, native.DecodeFailed, BadRequest."""
        plan, context = self._plan, self._context
        context.watch(self._run.flag)
        try:
            sampler = Sampler(context, plan.sampling, bias=plan.bias, grammar=plan.grammar, prompt=plan.tokens)
        except ValueError as error:
            raise BadRequest("The schema cannot be turned into a grammar that llama.cpp accepts.") from error
        try:
            self._run.give([Opened(plan.model_name, warnings=plan.warnings)])
            cached = self._read_prompt()
            begun_at = time.monotonic()
            reason = self._speak(sampler)
            self._finish(reason, cached, time.monotonic() - begun_at)
        finally:
            sampler.close()

    def _read_prompt(self) -> int:
        tokens, context = self._plan.tokens, self._context
        cached = self._prefixes.settle(tokens)
        total = len(tokens)
        done = cached
        self._step([PromptProgress(done, total, cached)])
        while done < total:
            batch = tokens[done : done + context.batch_tokens]
            context.decode(batch)
            done += len(batch)
            self._step([PromptProgress(done, total, cached)])
        return cached

    def _speak(self, sampler: Sampler) -> FinishReason:
        plan, context, reader = self._plan, self._context, self._reader
        model = context.model
        limit = plan.max_tokens if plan.max_tokens is not None else context.n_ctx
        self._watch_budget()
        while True:
            token = self._choose(sampler)
            if token is None:
                return "stop"
            self._generated += 1
            self._thought += reader.thinking
            if model.is_end(token):
                return "stop"
            text = self._decoder.decode(model.piece(token))
            deltas = reader.feed(text) if text else []
            if reader.stopped_at is not None:
                self._step(deltas)
                return "stop"
            if plan.one_call and reader.calls_complete:
                self._step(deltas)
                return "tool_calls"
            self._watch_budget()
            self._step(deltas)
            if self._generated >= limit or len(context.tokens) + 1 >= context.n_ctx:
                return "length"
            context.decode([token])

    def _choose(self, sampler: Sampler) -> int | None:
        """The next token; None when the grammar has no way on."""
        if self._forced:
            token = self._forced.popleft()
            sampler.accept(token)
            return token
        if self._plan.grammar is None or self._reader.thinking:
            return sampler.sample()
        also = self._plan.thinking_open if self._reader.may_begin_to_think else None
        return sampler.sample_by_grammar(also)

    def _watch_budget(self) -> None:
        """Feed the model the end of the thinking when its budget is spent."""
        budget = self._plan.thinking_budget
        if budget is not None and self._reader.thinking and self._thought >= budget and not self._forced:
            self._forced.extend(self._plan.thinking_end)

    def _step(self, deltas: Sequence[Delta]) -> None:
        self._run.beat = time.monotonic()
        if self._run.interrupted_at is not None:
            raise CallInterrupted
        if deltas:
            self._run.give(deltas)

    def _finish(self, reason: FinishReason, cached: int, seconds: float) -> None:
        plan, reader = self._plan, self._reader
        rest = reader.end() if reader.stopped_at is None else []
        if reason == "stop" and reader.calls_begun:
            reason = "tool_calls"
        usage = TokenUsage(
            prompt_tokens=len(plan.tokens),
            completion_tokens=self._generated,
            cached_tokens=cached,
            reasoning_tokens=self._thought if plan.thinking_tags is not None else None,
        )
        # The first token comes from the prompt's computation and takes no time of its own.
        rate = (self._generated - 1) / seconds if self._generated > 1 and seconds > 0 else None
        self._step([*rest, Finished(reason, usage, rate, reader.stopped_at)])
