"""The errors that the worker itself ends a request with: it was stopped, lost its engine too often, or met a defect."""

from __future__ import annotations

from llamacpp_mqtt_deploy.core.errors import (
    EngineLost,
    EngineUnavailable,
    Internal,
    Interrupted,
    RequestError,
    ShuttingDown,
    TimedOut,
)
from llamacpp_mqtt_deploy.stopping import StopReason


def stop_error(reason: StopReason | None, *, limit_s: float, started: bool) -> RequestError:
    """For a request whose stop signal carries this reason; `limit_s` is its time limit, `started` tells that it had a slot."""
    match reason:
        case "timeout":
            waited = "" if started else " while it waited for a slot"
            return TimedOut(f"the limit of {limit_s:.3g} s for this request passed{waited}")
        case "shutting_down":
            return ShuttingDown("the worker is stopping; send the request again in a moment")
        case "outbox_full":
            return outbox_full()
        case "unjournaled":
            return Internal("the worker cannot write its journal (is its disk full?); the request was not accepted")
        case "engine_away":
            return EngineUnavailable(
                "the engine cannot be reached; its operator finds why in the worker's log and status"
            )
        case "cancelled" | "put_back" | None:
            return Internal("the request was stopped without a reason")


def outbox_full() -> RequestError:
    """For a stream of which the outbox did not take an event."""
    return Interrupted("the broker does not take events at the moment: the worker's outbox is full")


def lost_too_often(starts: int) -> RequestError:
    """For a request that took the engine or the worker down each time."""
    return EngineLost(f"the engine or the worker went away {starts} times before the first token of this request")


def defect(cause: Exception) -> RequestError:
    """For a request on which the worker failed; whoever raises it has logged the cause."""
    if isinstance(cause, MemoryError):
        return out_of_memory()
    return Internal("the worker failed on this request; its log says why")


def out_of_memory() -> RequestError:
    """For a request that needed more memory than the worker could get."""
    return Internal("the worker ran out of memory on this request; others go on, and a shorter one may have room")
