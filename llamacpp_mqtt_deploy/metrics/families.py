"""The metrics: names, kinds, labels and meanings as one table, which the exposition and the documentation read.

Names follow Prometheus' rules: base units, `_total` for counters. No label has values that clients choose. Each counter begins with 0 at
the start of the worker, so `rate()` and `increase()` bridge a restart.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from llamacpp_mqtt_deploy import __version__
from llamacpp_mqtt_deploy.core.deltas import FinishReason
from llamacpp_mqtt_deploy.core.errors import BY_CODE
from llamacpp_mqtt_deploy.core.histogram import HistogramReading
from llamacpp_mqtt_deploy.core.turns import LANES
from llamacpp_mqtt_deploy.metrics.readings import Readings
from llamacpp_mqtt_deploy.ports import EngineState

WORKER_STATES = ("online", "draining", "offline")
OUTCOMES = (*get_args(FinishReason), "error")
REFUSAL_CODES = (*BY_CODE, "duplicate_request", "reply_topic_forbidden")
OTHER = "other"
"""For a code that is not in the table: it should not happen, and must not make a series of its own."""

MetricKind = Literal["counter", "gauge", "histogram", "stateset", "info"]
Value = float | HistogramReading | Mapping[str, bool] | Mapping[str, str]
Sample = tuple[tuple[str, ...], Value]
"""The values of the labels, and what was measured."""


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """One metric. `name` is the one to ask Prometheus for, without what a histogram appends; all have the label `worker` too."""

    name: str
    kind: MetricKind
    meaning: str
    read: Callable[[Readings], Iterable[Sample]]
    labels: tuple[str, ...] = ()


def _one(read: Callable[[Readings], float | None]) -> Callable[[Readings], Iterable[Sample]]:
    """A metric without labels of its own; absent while nobody knows the value."""

    def samples(readings: Readings) -> Iterable[Sample]:
        value = read(readings)
        return () if value is None else (((), float(value)),)

    return samples


def _by_lane(read: Callable[[Readings], Mapping[str, Value]]) -> Callable[[Readings], Iterable[Sample]]:
    def samples(readings: Readings) -> Iterable[Sample]:
        told = read(readings)
        return [((lane,), told.get(lane, 0.0)) for lane in LANES]

    return samples


def _by_code(
    codes: Iterable[str], read: Callable[[Readings], Mapping[str, int]]
) -> Callable[[Readings], Iterable[Sample]]:
    """Every code from the start with 0: of a series that begins with 1, Prometheus does not see the first event."""
    known = tuple(codes)

    def samples(readings: Readings) -> Iterable[Sample]:
        counts = dict.fromkeys((*known, OTHER), 0)
        for code, count in read(readings).items():
            counts[code if code in counts else OTHER] += count
        return [((code,), float(count)) for code, count in counts.items()]

    return samples


def _ended(readings: Readings) -> Iterable[Sample]:
    ended = readings.tally.ended
    return [((lane, outcome), float(ended.get((lane, outcome), 0))) for lane in LANES for outcome in OUTCOMES]


def _states(names: Iterable[str], read: Callable[[Readings], str]) -> Callable[[Readings], Iterable[Sample]]:
    known = tuple(names)
    return lambda readings: [((), {name: name == read(readings) for name in known})]


FAMILIES: tuple[MetricFamily, ...] = (
    MetricFamily(
        "lmd_build_info",
        "info",
        "Which version runs, and on which Python; always 1.",
        lambda _: [((), {"version": __version__, "python": platform.python_version()})],
    ),
    MetricFamily(
        "lmd_start_time_seconds", "gauge", "When the worker started, since the epoch.", _one(lambda r: r.started_at)
    ),
    MetricFamily(
        "lmd_worker_state",
        "stateset",
        "What the retained status says of the worker: `offline` also while it is not connected to the broker.",
        _states(WORKER_STATES, lambda r: r.state),
    ),
    MetricFamily(
        "lmd_problem",
        "gauge",
        "Whether the worker has a problem of this kind now (1) or not (0): `subscription` (the broker refuses a topic), `store` (the "
        "disk takes no writes), `machine` (file descriptors or memory are short), `thread` (a thread of the worker hangs). The "
        "status and the log say what to do.",
        lambda r: [((kind,), float(there)) for kind, there in r.problems.items()],
        ("kind",),
    ),
    # --- requests ---
    MetricFamily(
        "lmd_requests_accepted_total",
        "counter",
        "Requests that were accepted by this start of the worker; what an earlier one left in the journal is not counted again.",
        _one(lambda r: r.tally.accepted),
    ),
    MetricFamily(
        "lmd_requests_ended_total",
        "counter",
        "Accepted requests that ended, by lane and by the finish reason; `error` for those with an error.",
        _ended,
        ("lane", "outcome"),
    ),
    MetricFamily(
        "lmd_requests_failed_total",
        "counter",
        "Accepted requests that ended with an error, by its code.",
        _by_code(BY_CODE, lambda r: r.tally.failed),
        ("code",),
    ),
    MetricFamily(
        "lmd_requests_refused_total",
        "counter",
        "Requests that were not accepted, by the code of the answer.",
        _by_code(REFUSAL_CODES, lambda r: r.tally.refused),
        ("code",),
    ),
    MetricFamily(
        "lmd_first_token_seconds",
        "histogram",
        "From the arrival of a request to its first token, waiting included; observed when the request ends.",
        _by_lane(lambda r: r.tally.first_token),
        ("lane",),
    ),
    MetricFamily(
        "lmd_request_duration_seconds",
        "histogram",
        "From the arrival of a request to its end, waiting included.",
        _by_lane(lambda r: r.tally.total),
        ("lane",),
    ),
    MetricFamily(
        "lmd_prompt_tokens_total",
        "counter",
        "Tokens of the prompts of requests that ended, cached ones included.",
        _one(lambda r: r.tally.prompt_tokens),
    ),
    MetricFamily(
        "lmd_cached_tokens_total",
        "counter",
        "Tokens of those prompts that the engine had in its cache.",
        _one(lambda r: r.tally.cached_tokens),
    ),
    MetricFamily(
        "lmd_completion_tokens_total",
        "counter",
        "Tokens that were generated for requests that ended.",
        _one(lambda r: r.tally.completion_tokens),
    ),
    # --- queue and slots ---
    MetricFamily(
        "lmd_queue_requests",
        "gauge",
        "Requests that wait for a slot, by lane.",
        _by_lane(lambda r: {lane: float(count) for lane, count in r.load.lanes.items()}),
        ("lane",),
    ),
    MetricFamily(
        "lmd_queue_limit_requests",
        "gauge",
        "How many may wait, over all lanes: `limits.queue_size`.",
        _one(lambda r: r.queue_size),
    ),
    MetricFamily("lmd_slots", "gauge", "Requests that may run at once.", _one(lambda r: r.load.slots)),
    MetricFamily("lmd_slots_busy", "gauge", "Slots that are taken.", _one(lambda r: r.load.busy)),
    # --- engine ---
    MetricFamily(
        "lmd_engine_state",
        "stateset",
        "The condition of the engine as the worker knows it.",
        _states(get_args(EngineState), lambda r: r.engine.state),
    ),
    MetricFamily(
        "lmd_engine_restarts_total",
        "counter",
        "How often the engine answered again after it had been away: it was restarted, or could not be reached "
        "(looked at twice a second).",
        _one(lambda r: r.engine_returns),
    ),
    # --- broker ---
    MetricFamily(
        "lmd_broker_connected",
        "gauge",
        "Whether the worker is connected to the broker (1) or not (0).",
        _one(lambda r: r.link.state == "online"),
    ),
    MetricFamily(
        "lmd_broker_reconnects_total",
        "counter",
        "How often the worker connected again after a lost connection.",
        _one(lambda r: r.link.reconnects),
    ),
    MetricFamily(
        "lmd_outbox_messages",
        "gauge",
        "Messages that wait for the broker, or for its acknowledgement.",
        _one(lambda r: r.link.unacknowledged),
    ),
    MetricFamily("lmd_outbox_bytes", "gauge", "What these take.", _one(lambda r: r.link.outbox_bytes)),
    MetricFamily(
        "lmd_messages_given_up_total",
        "counter",
        "Messages that were dropped because the broker refuses them for ever.",
        _one(lambda r: r.link.poisoned),
    ),
    # --- disk and process ---
    MetricFamily(
        "lmd_journal_commit_seconds",
        "histogram",
        "How long the journal's transactions took, fsync included; those that failed are not counted.",
        lambda r: [((), r.commits)],
    ),
    MetricFamily(
        "lmd_state_disk_free_bytes",
        "gauge",
        "Room that is left for the worker where its state lies; absent where that is no file here.",
        _one(lambda r: r.disk_free_bytes),
    ),
    MetricFamily(
        "lmd_resident_memory_bytes",
        "gauge",
        "Memory of the worker's process, without a managed engine.",
        _one(lambda r: r.rss_bytes),
    ),
    MetricFamily(
        "lmd_cpu_seconds_total", "counter", "Processor time of the worker's process.", _one(lambda r: r.cpu_s)
    ),
    MetricFamily("lmd_open_fds", "gauge", "Open file descriptors of the worker.", _one(lambda r: r.open_fds)),
    MetricFamily("lmd_max_fds", "gauge", "How many it may have.", _one(lambda r: r.max_fds)),
)
