"""Understands long bodies in a thread, so that the answers of all others go on meanwhile."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from llamacpp_mqtt_deploy.core.errors import Busy
from llamacpp_mqtt_deploy.core.fair_queue import FairQueue

T = TypeVar("T")

# Loop and thread share Python's lock, and the loop gives it away with each write to a socket. After Python's own 5 ms a hundred
# streams would get their next pieces half a second later.
_SWITCH_S = 0.0005


@dataclass(slots=True)
class _Job:
    work: Callable[[], Any]
    done: asyncio.Future[Any]


class LongBodies:
    """For one event loop: a long body at a time, whoever sent it; owners take turns."""

    def __init__(self, *, within_s: float) -> None:
        self._within_s = within_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="long-bodies")  # begins with the first of them
        # Unbounded: who waits here has a connection, and how many there are is bounded elsewhere.
        self._waiting: FairQueue[_Job] = FairQueue()
        self._working = False

    async def understand(self, owner: str, work: Callable[[], T]) -> T:
        """What `work` makes of a body; raises what it raises, and Busy where that is not done in time."""
        job = _Job(work, asyncio.get_running_loop().create_future())
        self._waiting.put(owner, job)
        self._go_on()
        try:
            async with asyncio.timeout(self._within_s):
                done: T = await job.done
                return done
        except TimeoutError:
            raise Busy("Too many long requests wait to be read.", retry_after_s=self._within_s) from None

    def close(self) -> None:
        """Begin no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        while not self._working and (job := self._waiting.take()) is not None:
            if job.done.done():
                continue  # nobody waits for it any more
            self._working = True
            working = asyncio.get_running_loop().run_in_executor(self._thread, _in_short_turns, job.work)
            working.add_done_callback(partial(self._end, job))

    def _end(self, job: _Job, working: asyncio.Future[Any]) -> None:
        self._working = False
        if working.cancelled():
            job.done.cancel()
        elif (error := working.exception()) is not None:
            if not job.done.done():
                job.done.set_exception(error)
        elif not job.done.done():
            job.done.set_result(working.result())
        self._go_on()


def _in_short_turns(work: Callable[[], T]) -> T:
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        return work()
    finally:
        sys.setswitchinterval(usual_s)
