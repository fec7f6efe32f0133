"""After each connect: detect other workers, recover the journal (the first time), subscribe, publish `online`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.ports import Link
from llamacpp_mqtt_deploy.service.presence import Presence, Seen
from llamacpp_mqtt_deploy.stopping import Deadline

log = structlog.get_logger(__name__)

_SUBSCRIBE_TIMEOUT_S = 10.0
# With another instance under our own client id: whoever holds it pushes the other off within its first, shortest reconnect
# pause.
_TWIN_SETTLES_S = 3.0
# How long our own status may take to come back from the broker.
_CLAIM_S = 2.0
# So many refused topics are named in the status; a worker may have hundreds of routes.
_MOST_NAMED = 4


class AnotherWorkerError(Exception):
    """Another worker serves this root, or has taken our place; the text says who and where."""


class Startup:
    """Runs in the main thread, once for each connection. `waiting` is called every second while it waits; True ends it."""

    def __init__(
        self,
        *,
        link: Link,
        topics: TopicMap,
        presence: Presence,
        recover: Callable[[], object],
        waiting: Callable[[str], bool],
        pool: str | None = None,
    ) -> None:
        self._link = link
        self._topics = topics
        self._presence = presence
        self._recover = recover
        self._pool = pool
        self._waiting = waiting
        self.settled = False
        """We were on the bus before: nobody else was there, and what an earlier start left was taken up."""

    def start_up(self) -> bool:
        """Whether every topic is subscribed; True as well when nothing is left to try again.

        Raises AnotherWorkerError, and ConnectionError or TimeoutError when the connection does not hold.
        """
        self._look_around()
        if not self.settled:
            self._claim()
            self._recover()
            self.settled = True
        return self._subscribe()

    def _look_around(self) -> None:
        """Refuse to serve a root that another worker serves (protocol, section 1)."""
        # Twice: what is retained comes before the second SUBACK, on every broker that we know.
        look = [(self._topics.status_filter, 0)]
        refused = self._ask(look, retained=True)
        refused = refused or self._ask(look, retained=True)
        if refused:
            log.warning("presence.blind", refused=dict(refused), message="cannot see whether another worker is here")
            return
        if not self.settled:
            for rival in self._presence.rivals():
                self._settle(rival)
            return
        twin = self._presence.twin()
        if twin is not None:
            raise AnotherWorkerError(f"pushed off our client id by {twin.told()}; stopping instead of fighting")

    def _settle(self, rival: Seen) -> None:
        """Wait until another worker's status turns out to be alive, or stale."""
        own = self._presence.is_earlier_life(rival)
        wait_s = rival.stale_in_s(time.monotonic(), time.time())
        deadline = Deadline(min(wait_s, _TWIN_SETTLES_S) if own else wait_s)
        log.warning("presence.rival_suspected", rival=rival.told(), waiting_s=round(deadline.remaining_s(), 1))
        while not deadline.passed():
            seen = next((other for other in self._presence.rivals() if other.worker == rival.worker), None)
            if seen is None:
                return
            if seen.live or (own and self._link.info().state != "online"):
                raise AnotherWorkerError(
                    f"{seen.told()} serves the root {self._topics.root!r} already: stop it, or give this worker another "
                    "mqtt.root"
                )
            if self._waiting(f"waiting to see whether {rival.told()} is alive"):
                raise ConnectionError("told to stop")
            self._presence.wait_for_news(min(1.0, deadline.remaining_s()))

    def _claim(self) -> None:
        """Of several workers that start together and have not seen each other, one stays: before any of them reads a request."""
        self._presence.claim()
        deadline = Deadline(_CLAIM_S)
        while (first := self._presence.claimed_by()) is None and not deadline.passed():
            if self._waiting("waiting for the broker to tell our own status"):
                raise ConnectionError("told to stop")
            self._presence.wait_for_news(min(0.5, deadline.remaining_s()))
        if first is not None and first != self._presence.instance:
            self._presence.yielded = True
            rival = next((seen for seen in self._presence.rivals() if seen.instance == first), None)
            who = rival.told() if rival is not None else f"another worker (instance {first})"
            raise AnotherWorkerError(
                f"{who} began to serve the root {self._topics.root!r} just before us: stop it, or give this worker another "
                "mqtt.root"
            )

    def _ask(self, filters: Sequence[tuple[str, int]], *, retained: bool = False) -> Mapping[str, str]:
        """Subscribe; a broker that hangs must not keep a worker from stopping."""
        return self._link.subscribe(
            filters,
            timeout_s=_SUBSCRIBE_TIMEOUT_S,
            retained=retained,
            give_up=lambda: self._waiting("waiting for the broker to answer a subscription"),
        )

    def shared_filters(self) -> list[str]:
        """What to subscribe to for requests and controls: each message comes to one worker of the pool."""
        filters = [*self._topics.request_filters(), *self._topics.control_filters()]
        return filters if self._pool is None else [f"$share/{self._pool}/{each}" for each in filters]

    def _subscribe(self) -> bool:
        filters = [*self.shared_filters(), self._topics.admin_topic]
        refused = self._ask([(name, 1) for name in filters])
        problem = _problem(refused)
        for name, reason in refused.items():
            log.error(
                "subscription.refused",
                filter=name,
                reason=reason,
                message=f"the broker's access list must let this worker read {name}",
            )
        self._presence.connected(subscribed=len(refused) < len(filters), problem=problem)
        return not refused


def _problem(refused: Mapping[str, str]) -> str:
    """One sentence for whoever reads the status, which may be all that they can see of this worker."""
    if not refused:
        return ""
    named = ", ".join(f"{name} ({reason})" for name, reason in [*refused.items()][:_MOST_NAMED])
    more = f" and {len(refused) - _MOST_NAMED} more" if len(refused) > _MOST_NAMED else ""
    return (
        f"The broker does not let this worker read {named}{more}. Let the worker's user read them in the broker's access list; "
        "the worker tries again every 30 s."
    )
