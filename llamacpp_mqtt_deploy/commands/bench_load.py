"""The load of `lmd bench`: a few requests at once, one after another in each stream, and what was seen of them."""

from __future__ import annotations

import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_PAUSE_S = 30.0
"""Longest wait after an error that asks for one (`retry_after_s`)."""
LONGEST_REQUEST_PAUSES = 20_000
"""Pauses between chunks kept of one request, so that no answer fills the memory."""


class AskFailed(Exception):
    """A request brought no whole answer. `code` names why; `cause` is what the transport raised."""

    def __init__(self, code: str, cause: Exception, *, retry_after_s: float = 0.0) -> None:
        super().__init__(str(cause))
        self.code = code
        self.cause = cause
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Sampled:
    """One request. Times are of the monotonic clock; `pauses` are the seconds between neighbouring chunks."""

    asked: float
    first: float | None = None
    ended: float = 0.0
    tokens: int = 0
    chunks: int = 0
    pauses: list[float] = field(default_factory=list)
    _last: float | None = None

    def chunk(self, now: float) -> None:
        """A piece of the answer is here."""
        if self.first is None:
            self.first = now
        elif self._last is not None and len(self.pauses) < LONGEST_REQUEST_PAUSES:
            self.pauses.append(now - self._last)
        self._last = now
        self.chunks += 1


Ask = Callable[[int, str, threading.Event], Sampled | None]
"""Asks in this stream and waits for the end; gives None when the event stopped it before, raises `AskFailed`."""


@dataclass(slots=True)
class Round:
    """What several streams brought in one go."""

    seen: list[Sampled] = field(default_factory=list)
    failures: list[AskFailed] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float | None:
        """Of all streams together; None where nothing was answered."""
        if not self.seen:
            return None
        seconds = max(each.ended for each in self.seen) - min(each.asked for each in self.seen)
        return sum(each.tokens for each in self.seen) / seconds if seconds > 0 else None


def run_round(
    ask: Ask, prompts: Iterator[str], *, streams: int, requests: int, stop: threading.Event, on_end: Callable[[], None]
) -> Round:
    """`requests` requests, at most `streams` at once; returns when the last one has ended.

    `stop` ends those that run and lets none begin. A stream gives up after its second failure in a row: a deployment that
    refuses shall not be asked ever more often.
    """
    result, lock = Round(), threading.Lock()
    left = requests

    def work(stream: int) -> None:
        nonlocal left
        failed = 0
        while failed < 2 and not stop.is_set():
            with lock:
                if left == 0:
                    return
                left -= 1
                prompt = next(prompts)
            try:
                seen = ask(stream, prompt, stop)
            except AskFailed as failure:
                failed += 1
                with lock:
                    result.failures.append(failure)
                stop.wait(min(MAX_PAUSE_S, failure.retry_after_s))
            else:
                failed = 0
                if seen is not None:
                    with lock:
                        result.seen.append(seen)
            on_end()

    threads = [threading.Thread(target=work, args=(stream,), name=f"lmd-bench-{stream}") for stream in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """The figures of one way (the bus, or direct) as they are printed and told as JSON; None where there is nothing."""
    seen = [each for one in rounds for each in one.seen]
    speeds = [speed for one in rounds if (speed := one.tokens_per_s) is not None]
    first = [1e3 * (each.first - each.asked) for each in seen if each.first is not None]
    pauses = [1e3 * pause for each in seen for pause in each.pauses]
    alone = [
        each.tokens / (each.ended - each.first) for each in seen if each.first is not None and each.ended > each.first
    ]
    return {
        "answered": len(seen),
        "errors": dict(Counter(failure.code for one in rounds for failure in one.failures)),
        "tokens": sum(each.tokens for each in seen),
        "chunks": sum(each.chunks for each in seen),
        "tokens_per_s": _rounded(statistics.median(speeds)) if speeds else None,
        "tokens_per_s_of_a_stream": _rounded(statistics.median(alone)) if alone else None,
        "first_token_ms": _percentiles(first),
        "chunk_pause_ms": _percentiles(pauses),
    }


def compared(bus: dict[str, Any], direct: dict[str, Any]) -> dict[str, Any]:
    """The bus beside direct: the ratio of the tokens per second, and how much later first tokens come."""
    ratio = bus["tokens_per_s"] / direct["tokens_per_s"] if bus["tokens_per_s"] and direct["tokens_per_s"] else None
    later = {}
    for share in ("p50", "p99"):
        ours, theirs = bus["first_token_ms"][share], direct["first_token_ms"][share]
        later[share] = _rounded(ours - theirs) if ours is not None and theirs is not None else None
    return {"tokens_per_s": None if ratio is None else round(ratio, 4), "first_token_later_ms": later}


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    if not ordered:
        return {"p50": None, "p99": None, "max": None}

    def at(share: float) -> float:
        return _rounded(ordered[min(len(ordered) - 1, int(share * len(ordered)))])

    return {"p50": at(0.5), "p99": at(0.99), "max": _rounded(ordered[-1])}


def _rounded(value: float) -> float:
    return round(value, 2)
