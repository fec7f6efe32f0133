"""The worker's retained status on the bus, and what it knows of other workers under the same root."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.events import PROTOCOL, encode
from llamacpp_mqtt_deploy.ports import Delivery, Outbox, Retained

WorkerState = Literal["online", "draining", "offline"]

# Protocol, section 1: a status older than this many renewals is not live.
LIVE_RENEWALS = 3
# Statuses of other workers that are remembered; anybody with the right to publish there could send more.
_MAX_SEEN = 256
_MAX_STATUS_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Seen:
    """Another instance's status as it came in; `at` is monotonic seconds, `live` says that it was sent just then."""

    worker: str
    instance: str
    gone: bool
    ts: float
    every_s: float
    host: str
    live: bool
    at: float
    pool: str | None = None

    def stale_in_s(self, now: float, wall: float) -> float:
        """Seconds until this status is no longer live; a clock far from ours counts from when the status came in."""
        age = (now - self.at) + max(0.0, min(wall - self.ts - (now - self.at), self.every_s * LIVE_RENEWALS))
        return max(0.0, self.every_s * LIVE_RENEWALS - age)

    def told(self) -> str:
        """Who and where, for the operator."""
        return f"worker {self.worker!r} (instance {self.instance}) on host {self.host or 'unknown'}"


class Presence:
    """Publishes our status and remembers that of others."""

    def __init__(
        self,
        *,
        mark: str,
        topics: TopicMap,
        outbox: Outbox,
        every_s: Callable[[], float],
        details: Callable[[], Mapping[str, Any]],
        pool: str | None = None,
    ) -> None:
        self._mark = mark
        self._pool = pool
        self.instance = mark + uuid.uuid4().hex[len(mark) :]
        self.announced = False
        """Whether we have said anything since the start; before that nobody needs to be told that we go."""
        self.unreadable = ""
        """What the broker does not let us read and what to do, for the operator; empty when it lets us read everything."""
        self.unwritable = ""
        """The same for what the disk does not let us write."""
        self.short = ""
        """The same for what the machine has too little of."""
        self.yielded = False
        """Another worker was here before us, and the status is its own."""
        self._claiming = False
        self._first: str | None = None
        self._wanted: WorkerState = "online"
        self._subscribed: bool | None = None
        """Whether any request can arrive on this connection; None while that is not known, and then nothing is said."""
        self._topics = topics
        self._outbox = outbox
        self._every_s = every_s
        self._details = details
        self._lock = threading.Lock()
        self._seen: dict[str, Seen] = {}
        self._changed = threading.Event()

    # --- ours ----------------------------------------------------------------------------------------------------------

    def will(self) -> Retained:
        """What the broker publishes for us when the connection is lost."""
        return Retained(topic=self._topics.status_topic, payload=encode(self._core("offline") | {"reason": "lost"}))

    def offline(self) -> Retained:
        """What we publish last when we stop."""
        return Retained(topic=self._topics.status_topic, payload=encode(self._core("offline") | {"reason": "stopped"}))

    @property
    def problem(self) -> str:
        """What hinders us although we are connected, for the operator; empty when nothing does."""
        return " ".join(each for each in (self.unreadable, self.unwritable, self.short) if each)

    @property
    def state(self) -> WorkerState:
        """What we say of ourselves: whatever we would like to be, a worker that no request can reach is `offline`."""
        return "offline" if self._subscribed is False else self._wanted

    def become(self, state: WorkerState) -> None:
        self._wanted = state
        self.renew()

    def disconnected(self) -> None:
        """The will speaks for us from now on, until it is known whether requests arrive on the next connection."""
        self._subscribed = None

    def connected(self, *, subscribed: bool, problem: str = "") -> None:
        """Say how we are on this connection; `subscribed` tells whether any request can arrive."""
        self._subscribed, self.unreadable = subscribed, problem
        self._publish()

    def renew(self) -> None:
        """Say again how we are, if we have said it at all on this connection."""
        if self._subscribed is not None:
            self._publish()

    def _publish(self) -> None:
        # On MQTT 5 it expires, so that a power cut leaves no `online` behind.
        self.announced = True
        status = self._core(self.state) | dict(self._details())
        if self.state == "offline":
            status["reason"] = "not_subscribed"
        if self.problem:
            status["problem"] = self.problem
        self._outbox.publish(
            self._topics.status_topic,
            encode(status),
            retain=True,
            expiry_s=int(LIVE_RENEWALS * self._every_s()) + 1,
        )

    def _core(self, state: WorkerState) -> dict[str, Any]:
        return {
            "state": state,
            "protocol": PROTOCOL,
            "instance": self.instance,
            "ts": round(time.time(), 3),
            "every_s": self._every_s(),
            "worker": self._topics.worker_id,
            "host": socket.gethostname(),
            **({} if self._pool is None else {"pool": self._pool}),
        }

    # --- the claim -----------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Say, before anything is read, that we want to serve this root: of several that start together, whom the broker hears
        first stays (`claimed_by`). To others this is a worker that lives and that no request reaches yet."""
        live = next((seen for seen in self.rivals() if seen.live), None)
        with self._lock:
            self._claiming, self._first = True, live.instance if live is not None else None
        self._subscribed = False
        self._publish()
        self._subscribed = None

    def claimed_by(self) -> str | None:
        """The instance whose status came first after `claim`: ours or another's; None while none has come."""
        with self._lock:
            return self._first

    def is_earlier_life(self, seen: Seen) -> bool:
        """Whether this is a status of ours, from before a restart (or of a copy of our state, under our client id)."""
        return seen.instance.startswith(self._mark)

    # --- others --------------------------------------------------------------------------------------------------------

    def note(self, delivery: Delivery) -> None:
        """A status message came in (link's thread)."""
        worker = delivery.topic.rpartition("/")[2]
        seen = _read(worker, delivery)
        with self._lock:
            claims = seen is not None and seen.live and not seen.gone and not self._is_companion(seen)
            if self._claiming and self._first is None and seen is not None and claims:
                self._first = seen.instance
            if seen is None or seen.instance == self.instance:
                self._seen.pop(worker, None)
            elif worker in self._seen or len(self._seen) < _MAX_SEEN:
                self._seen[worker] = seen
        self._changed.set()

    def rivals(self) -> list[Seen]:
        """Other instances under our root that are not known to be gone."""
        now, wall = time.monotonic(), time.time()
        with self._lock:
            here = [seen for seen in self._seen.values() if not seen.gone and seen.stale_in_s(now, wall) > 0]
        return [seen for seen in here if not self._is_companion(seen)]

    def _is_companion(self, seen: Seen) -> bool:
        """Another worker of our pool."""
        return self._pool is not None and seen.pool == self._pool and seen.worker != self._topics.worker_id

    def twin(self) -> Seen | None:
        """Another instance that speaks under our own worker id, just now."""
        return next((seen for seen in self.rivals() if seen.worker == self._topics.worker_id), None)

    def wait_for_news(self, timeout_s: float) -> None:
        self._changed.wait(timeout_s)
        self._changed.clear()


def _read(worker: str, delivery: Delivery) -> Seen | None:
    if not delivery.payload or delivery.payload_bytes > _MAX_STATUS_BYTES:
        return None
    try:
        told = orjson.loads(delivery.payload)
        return Seen(
            worker=worker[:64],
            instance=str(told["instance"])[:64],
            # One that may read nothing for the moment is there, and reads again as soon as it may.
            gone=told["state"] == "offline" and told.get("reason") != "not_subscribed",
            ts=float(told["ts"]),
            every_s=min(3600.0, max(0.1, float(told["every_s"]))),
            host=str(told.get("host") or "")[:64],
            live=not delivery.retain,
            pool=str(told["pool"])[:64] if told.get("pool") else None,
            at=time.monotonic(),
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, OverflowError):
        return None
