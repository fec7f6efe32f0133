"""Tells clients how many tokens their prompts have, in a thread of its own: who waits for the engine here delays nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.core.errors import EngineUnavailable, ShuttingDown, TimedOut, Unsupported
from llamacpp_mqtt_deploy.core.requests import check_counted
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.ports import Engine
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal
from llamacpp_mqtt_deploy.worker.client_work import ClientWork
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.prompting import PromptBuilder

WITHIN_S = 8.0
"""From the question to its answer, waiting included: clients wait ten seconds for an ack."""
_RETRY_S = 5.0


class TokenCounts:
    """Counts with this worker's own engine, also in a pool. One that sleeps is not woken: counting is not worth loading a model."""

    def __init__(
        self, *, engine: Engine, prompts: PromptBuilder, policies: Callable[[], Policies], loop: IoLoop
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._policies = policies
        self._loop = loop
        self._work = ClientWork(name="token-counts")
        self._closing = StopSignal()

    def start(self) -> None:
        self._work.start()

    @property
    def beat_at(self) -> float:
        """When the thread last came round, for the watchdog (monotonic seconds)."""
        return self._work.beat_at

    def max_bytes(self, route: str, first_level: str) -> int:
        """How long a question may be."""
        return self._policies().parse_for(route, first_level).max_request_bytes

    def call_of(self, counted: Mapping[str, Any], *, route: str, first_level: str) -> EngineCall:
        """What the engine would get. Raises a RequestError."""
        request = check_counted(counted, policy=self._policies().parse_for(route, first_level))
        self._refuse_unless_ready()
        return self._prompts.for_counting(request, route)

    def soon(
        self, first_level: str, call: EngineCall, tell: Callable[[Callable[[], Mapping[str, Any]]], object]
    ) -> bool:
        """Let `tell` have what counts, soon and in the thread for it; False when there is no place. Never waits."""
        deadline = Deadline(WITHIN_S)
        return self._work.run(first_level, lambda: tell(lambda: {"prompt_tokens": self._count(call, deadline)}))

    def close(self, timeout_s: float) -> None:
        """End what is counted, answer what waits, and end."""
        self._closing.set("shutting_down")
        self._work.close(timeout_s)

    def _count(self, call: EngineCall, deadline: Deadline) -> int:
        stop = StopSignal()
        forget = self._closing.on_stop(lambda: stop.set("shutting_down"))

        def too_late() -> None:
            stop.set("timeout")

        limit = self._loop.after(deadline.remaining_s(), too_late)
        try:
            self._refuse_unless_ready()
            tokens = self._engine.count_tokens(call, stop=stop)
        except Stopped as stopped:
            if stop.reason == "shutting_down":
                raise ShuttingDown("The worker is shutting down.", retry_after_s=_RETRY_S) from stopped
            raise TimedOut(f"The tokens were not counted within {WITHIN_S:g} s.") from stopped
        finally:
            limit.cancel()
            forget()
        if tokens is None:
            self._refuse_unless_ready()
            raise Unsupported("The engine of this worker cannot count the tokens of this.")
        return tokens

    def _refuse_unless_ready(self) -> None:
        state = self._engine.info().state
        if state == "ready":
            return
        why = (
            "The worker's engine is asleep; a request wakes it, a count does not."
            if state == "asleep"
            else "The worker's engine is not ready."
        )
        raise EngineUnavailable(why, retry_after_s=_RETRY_S)
