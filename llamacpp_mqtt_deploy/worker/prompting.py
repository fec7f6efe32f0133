"""From a request, its route and its session's history to the call that the engine gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson
import structlog

from llamacpp_mqtt_deploy.core.deltas import EngineCall, Message
from llamacpp_mqtt_deploy.core.errors import BadRequest, Unsupported
from llamacpp_mqtt_deploy.core.history import fit, pending_tool_calls
from llamacpp_mqtt_deploy.core.kept_messages import mended
from llamacpp_mqtt_deploy.core.requests import Generate
from llamacpp_mqtt_deploy.ports import Engine, SessionPrompts, Store, StoreError
from llamacpp_mqtt_deploy.worker.jobs import Job
from llamacpp_mqtt_deploy.worker.policies import Policies, RoutePolicy

log = structlog.get_logger(__name__)

# Share of the context that history may not take: an answer needs room, whatever `max_tokens` says.
_LARGEST_ANSWER_SHARE = 0.5


class PromptBuilder:
    """Lays defaults under a request (worker, then route, then request) and the session's history before its prompt."""

    def __init__(self, *, engine: Engine, store: Store, policies: Callable[[], Policies]) -> None:
        self._engine = engine
        self._store = store
        self._policies = policies

    def build(self, job: Job) -> EngineCall:
        """The engine's call; what was left out of the history is noted in the answer. Raises a RequestError."""
        request, policy = job.request, self._policies().routes[job.key.route]
        call = self._laid_out(request, policy)
        job.answer.warnings = tuple(
            f"the engine does not know {name}; it was left out" for name in self._engine.unsupported_fields(call)
        )
        if request.mode == "messages":
            return _with_own_system_prompt(call, policy)
        return self._with_history(job, call, policy)

    def shorter(self, job: Job, refused: EngineCall) -> EngineCall | None:
        """The call with as much history as really fits, after the engine has refused it as too long; None where the first fit was
        no guess, or this one is no shorter. Raises a RequestError."""
        if not job.guessed_fit or job.answer.begun:
            return None
        call = self.build(job)
        return call if len(call.messages) < len(refused.messages) else None

    def for_counting(self, request: Generate, route: str) -> EngineCall:
        """The same for a prompt that is counted and not answered: the history of its session is no part of it. Raises a
        RequestError."""
        policy = self._policies().routes[route]
        call = self._laid_out(request, policy)
        if request.mode == "messages":
            return _with_own_system_prompt(call, policy)
        system = policy.system_prompt if request.system_prompt is None else request.system_prompt
        first: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
        return call.with_messages((*first, *request.new_messages()))

    def _laid_out(self, request: Generate, policy: RoutePolicy) -> EngineCall:
        """The defaults of worker and route under what the request says."""
        settings = self._policies().settings
        if request.has_images and not self._engine.info().vision:
            raise Unsupported("the model of this worker does not read images", fields={"messages": "text parts only"})
        sampling: dict[str, Any] = {**policy.sampling, **request.sampling}
        if sampling.get("max_tokens") is not None:
            sampling["max_tokens"] = min(sampling["max_tokens"], settings.limits.max_tokens)
        return EngineCall(
            messages=request.messages or (),
            model=request.model or policy.model,
            sampling=sampling,
            tools=request.tools if request.tools is not None else (policy.tools or None),
            tool_choice=request.tool_choice,
            parallel_tool_calls=request.parallel_tool_calls,
            response_format=request.response_format,
            thinking=request.thinking if request.thinking is not None else policy.thinking,
            thinking_budget=(
                request.thinking_budget if request.thinking_budget is not None else policy.thinking_budget
            ),
            chunk_timeout_s=settings.engine.chunk_timeout_s,
        )

    def _with_history(self, job: Job, call: EngineCall, policy: RoutePolicy) -> EngineCall:
        history = self._history(job)
        newest = job.request.new_messages()
        if job.request.mode == "tool_results":
            _check_results(history, newest)
        budget_tokens = self._budget_tokens(call)
        fitted = fit(
            history,
            system_prompt=self._system_prompt(job, policy),
            newest=newest,
            budget_tokens=budget_tokens,
            count=lambda messages: self._count(job, call.with_messages(messages)),
            extra_bytes=len(orjson.dumps(call.tools)) if call.tools else 0,
        )
        job.guessed_fit = fitted.estimated or budget_tokens is None
        job.answer.dropped_messages = fitted.dropped_messages
        return call.with_messages(fitted.messages)

    def _count(self, job: Job, call: EngineCall) -> int | None:
        job.hurry()  # the engine may take its time
        return self._engine.count_tokens(call, stop=job.stop)

    def _system_prompt(self, job: Job, policy: RoutePolicy) -> str | None:
        """That of the request, else of its session, else of the route."""
        if job.request.system_prompt is not None:
            return job.request.system_prompt
        if not policy.keeps_system_prompts or not isinstance(self._store, SessionPrompts):
            return policy.system_prompt
        try:
            own = self._store.system_prompt((job.key.route, job.key.session))
        except StoreError as problem:
            log.error("history.unreadable", problem=str(problem), session=job.key.session)
            return policy.system_prompt
        return own if own is not None else policy.system_prompt

    def _history(self, job: Job) -> Sequence[Message]:
        if job.request.new:
            return ()
        try:
            return mended(self._store.history((job.key.route, job.key.session)))
        except StoreError as problem:
            log.error("history.unreadable", problem=str(problem), session=job.key.session)
            return ()

    def _budget_tokens(self, call: EngineCall) -> int | None:
        """Tokens for everything before the answer; None when the engine does not tell its context."""
        settings = self._policies().settings
        n_ctx = self._engine.info().n_ctx or settings.engine.context_tokens
        limit = settings.sessions.history_tokens
        if n_ctx is None:
            return limit
        largest = int(n_ctx * _LARGEST_ANSWER_SHARE)
        budget = n_ctx - min(call.sampling.get("max_tokens") or largest, largest)
        return budget if limit is None else min(budget, limit)


def _with_own_system_prompt(call: EngineCall, policy: RoutePolicy) -> EngineCall:
    """A route that allows no other system prompt means its own one to stand before everything."""
    if policy.parse.allow_system_prompt or not policy.system_prompt:
        return call
    return call.with_messages(({"role": "system", "content": policy.system_prompt}, *call.messages))


def _check_results(history: Sequence[Message], results: Sequence[Message]) -> None:
    """Tool results must answer the calls of the session's last answer, each once; raises BadRequest."""
    pending = pending_tool_calls(history)
    if not pending:
        raise BadRequest(
            "tool_results: the last answer of this session called no tool",
            fields={"tool_results": "only after an answer whose finish_reason is tool_calls"},
        )
    given = [str(result["tool_call_id"]) for result in results]
    if sorted(given) != sorted(pending):
        raise BadRequest(
            f"tool_results: expected one result for each of the calls {', '.join(pending)[:200]}",
            fields={"tool_results": f"a list with the tool_call_id of each pending call: {', '.join(pending)[:200]}"},
        )
