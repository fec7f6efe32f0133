"""What the machine has too little of for this worker: file descriptors and memory; a sentence for the status."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable
from pathlib import Path

from llamacpp_mqtt_deploy.ports import EngineInfo
from llamacpp_mqtt_deploy.worker.counters import Counters

FEW_DESCRIPTORS = 8
"""A request takes one, a start of the own engine six, a reload some for a moment."""

STARVED_FOR_S = 600.0
"""How long it is told that a request ran out of memory: nobody looks at every second, and the next one may need as much."""


class Shortages:
    """`problem` looks anew each time; it is meant to be called once a second or so."""

    def __init__(self, *, counters: Counters, engine: Callable[[], EngineInfo]) -> None:
        self._counters = counters
        self._engine = engine

    def problem(self) -> str:
        """What is short and what to do, for the operator; empty when nothing is."""
        found = (descriptors(), self._memory(), self._engine().problem)
        return " ".join(each for each in found if each)

    def _memory(self) -> str:
        requests = self._counters.starved_within(STARVED_FOR_S)
        if not requests:
            return ""
        return (
            f"The worker ran out of memory on {requests} {'request' if requests == 1 else 'requests'} since its start: give it more "
            "(MemoryMax= of its unit), or lower limits.max_request_bytes, limits.max_answer_bytes or engine.slots."
        )


def descriptors() -> str:
    """Why new connections and files fail, or soon will; empty while there are file descriptors enough."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        # Counted, not tried: a try would take away what another thread needs at this moment.
        left = limit - sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError as error:
        if error.errno == errno.ENFILE:
            return "The machine has no file left to open: raise fs.file-max (sysctl), or end what holds so many (lsof)."
        if error.errno != errno.EMFILE:
            return ""  # no /proc here: then the log alone tells
        left = 0
    if limit == resource.RLIM_INFINITY or left >= FEW_DESCRIPTORS:
        return ""
    return (
        f"The worker has no file descriptors left ({limit} are allowed): connections to broker and engine fail. Raise "
        "LimitNOFILE= of its unit (ulimit -n)."
    )
