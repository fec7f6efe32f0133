"""Opens the store at the start, and tries again while a database is away or a disk too full: nobody may be there to start us again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
import tenacity

from llamacpp_mqtt_deploy.core.reminding import Reminder
from llamacpp_mqtt_deploy.ports import Store, StoreAway, StoreFull
from llamacpp_mqtt_deploy.stopping import ASK_EVERY_S

log = structlog.get_logger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Between two attempts."""

_LET_GO_S = 0.5
# What passes by itself.
_PASSING = (StoreAway, StoreFull)


class StoreOpening:
    """Tries in a thread of its own: an attempt may wait for an answer for long, and a signal is to end the wait at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reminder = Reminder()
        self._stop = threading.Event()
        self._over = threading.Event()
        self._waits_for: BaseException | None = None
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="store-opening", daemon=True)

    def run(self, waiting: Callable[[BaseException | None], bool]) -> bool:
        """Until the store is open. `waiting` is asked twice a second whether to give up, with why the last attempt failed; False when
        it said so. An attempt that is under way then is left to itself. Raises what does not pass by itself."""
        began = time.monotonic()
        self._thread.start()
        try:
            while not self._over.wait(ASK_EVERY_S):
                if waiting(self._waits_for):
                    return False
        finally:
            self._stop.set()
            self._thread.join(_LET_GO_S)
        if self._problem is not None:
            raise self._problem
        if self._waits_for is not None:
            log.info("store.opened", seconds=round(time.monotonic() - began, 3))
        return True

    # --- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_PASSING),
            # At random, so that a fleet spreads.
            wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
            stop=tenacity.stop_when_event_set(self._stop),
            sleep=tenacity.sleep_using_event(self._stop),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            retrying(self._attempt)
        except BaseException as problem:  # noqa: BLE001  raised again where it is waited for
            self._problem = problem
        self._over.set()

    def _attempt(self) -> None:
        # Looked at once more: giving up may have cut the pause before this attempt short.
        if not self._stop.is_set():
            self._store.open()

    def _tell(self, state: tenacity.RetryCallState) -> None:
        """At growing pauses, as long as the reason stays the same."""
        problem = state.outcome.exception() if state.outcome else None
        self._waits_for = problem
        if self._reminder.due(str(problem), time.monotonic()):
            log.warning(
                "store.waiting",
                reason=str(problem),
                tries=state.attempt_number,
                message=f"tried again after {LONGEST_PAUSE_S:g} s at most, until it succeeds",
            )
