"""Sentences for answers that end without a terminal event: what happened and what to look at."""

from __future__ import annotations

from collections.abc import Sequence

from llamacpp_mqtt_deploy.client.exceptions import AnswerLost, BrokerUnreachable, BusError, NoWorker
from llamacpp_mqtt_deploy.client.retry import Why


def nobody(what: str, *, status: str, broker: str, known: str) -> str:
    """`what` went unanswered and no worker is online; `known` tells what the retained status says instead."""
    found = f" ({known})" if known else ""
    return (
        f"{what}: no worker is online under {status} at {broker}{found}."
        " Start one with `lmd run`, or look for a wrong root, user or permission with `lmd check`."
    )


def silent(what: str, workers: Sequence[str]) -> str:
    """`what` went unanswered although workers are online."""
    return (
        f"{what}, though online: {', '.join(workers[:5])}."
        " Over MQTT 3.1.1 a publish that the access list forbids looks like success; `lmd check` tells."
    )


def given_up(
    why: Why, *, broker: str, sends: int, workers: Sequence[str], offline_limit_s: float, nobody: str
) -> BusError:
    """The error for a request that is given up."""
    tries = f"{sends} deliveries" if sends > 1 else "the delivery"
    match why:
        case "no_worker":
            return NoWorker(nobody)
        case "offline":
            return BrokerUnreachable(
                f"The broker at {broker} has been away for {offline_limit_s:g} s; the request was given up."
            )
        case "timeout":
            return AnswerLost("The time limit passed, and no worker said so. Is it still running?")
        case "cancel_unanswered":
            return AnswerLost("The cancel was not answered in time. Is the worker still running?")
        case "unanswered":
            return AnswerLost(
                f"{', '.join(workers) or 'A worker'} is online, but {tries} of the request brought no event."
                " Over MQTT 3.1.1 a publish that the access list forbids looks like success; `lmd check` tells."
            )
        case "cut_short":
            return AnswerLost(
                f"The answer is incomplete: the worker has ended it, but a part of its text did not arrive, and {tries} of the"
                " request did not bring it. Was it larger than limits.max_event_bytes, or the broker's queue too short?"
            )
        case "lost":
            return AnswerLost(
                f"The answer broke off, and {tries} of the request did not bring the rest."
                " Is the worker still running, and is the request within the broker's message_size_limit?"
            )
