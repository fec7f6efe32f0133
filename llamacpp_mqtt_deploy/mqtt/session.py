"""The publishes that no broker has acknowledged yet: their order, their window, and which of them is poison."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llamacpp_mqtt_deploy.core.outbox_budget import OutboxBudget
from llamacpp_mqtt_deploy.mqtt.waiting_publishes import WaitingPublishes

STRIKES = 3
"""So many connections in a row must end on one and the same unacknowledged publish before it is given up."""

FAULTS = 3
"""So often in a row may the client raise on one and the same publish before it is given up."""

QUIET_S = 0.3
"""A connection on probation must live this long before the suspect is sent, so that the suspect's death is its own."""


@dataclass(slots=True, eq=False)
class Publish:
    """One message on its way. `expires_at` is monotonic seconds; `on_done` runs at most once."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    correlation: bytes | None
    expires_at: float | None
    on_done: Callable[[bool], None] | None
    answer: bool = False
    """It answers a message that was not accepted; see `OutboxBudget`."""
    content_type: str = "application/json"
    size: int = 0
    """The bytes that it was counted with."""
    sent_at: float = 0.0
    """Monotonic seconds, once it is in flight."""


class Outgoing:
    """Waiting publishes, in turn between their owners, then the ones in flight in the order in which they were sent.

    `take` is for any thread; everything else belongs to the link's thread, which holds the lock of those who `take` while it changes what waits.

    A broker that closes the connection because of one publish (mosquitto's `message_size_limit` is not announced) gets it again
    after each reconnect, for ever. So: when two connections in a row end on the same oldest unacknowledged publish, the next
    ones are on probation, where publishes go one at a time. What then is alone in flight when the connection ends, and for
    the third time, is the culprit, and it alone is given up; innocent ones before it are acknowledged on the way.
    """

    def __init__(self, budget: OutboxBudget, *, owner_levels: int = 3) -> None:
        self._budget = budget
        self.waiting = WaitingPublishes(owner_levels)
        self.flying: dict[int, Publish] = {}
        self.again: deque[int] = deque()
        """Packet ids of those in flight that have to be sent once more before anything else (MQTT 5, section 4.4)."""
        self._taken: Publish | None = None
        self._faulty: Publish | None = None
        self._faults = 0
        self.window = 1
        self._suspects = 0
        self._oldest: Publish | None = None
        self._strikes = 0
        self._quiet_until = 0.0

    def __len__(self) -> int:
        return self.waiting.count + (self._taken is not None) + len(self.flying)

    def take(self, publish: Publish) -> bool:
        """Queue a publish; False when the budget has no place for it. `Sending.done` gives its place back."""
        publish.size = size = len(publish.payload) + len(publish.topic)
        if not self._budget.take(size, answer=publish.answer):
            return False
        self.waiting.append(publish)
        return True

    def take_last(self, publish: Publish) -> None:
        """Queue the last message of a connection, for which there is always a place."""
        self._budget.force(publish.size)
        self.waiting.append_last(publish)

    @property
    def on_probation(self) -> bool:
        return self._suspects > 0

    def connected(self, *, window: int, now: float) -> None:
        self.window = window
        self._quiet_until = now + QUIET_S if self._suspects else 0.0

    def quiet_s(self, now: float) -> float:
        """Seconds for which nothing may be sent yet."""
        return max(0.0, self._quiet_until - now) if self._suspects else 0.0

    def next(self, now: float) -> Publish | None:
        """Take the next publish that may be sent now; it counts as ours until `sent`, `put_back`, `failed` or `dropped`."""
        if not self.waiting.count or len(self.flying) >= (1 if self._suspects else self.window):
            return None
        if self._suspects and now < self._quiet_until:
            return None
        self._taken = self.waiting.take()
        return self._taken

    def sent(self, mid: int, publish: Publish) -> None:
        self.flying[mid] = publish
        self._taken = None

    def put_back(self) -> None:
        """What was taken cannot go now; it keeps its place."""
        if self._taken is not None:
            self.waiting.put_back([self._taken])
            self._taken = None

    def failed(self) -> Publish | None:
        """The client raised on what was taken: it keeps its place, or is returned to be given up when that came too often."""
        publish = self._taken
        if publish is None:
            return None
        self._faults = self._faults + 1 if publish is self._faulty else 1
        self._faulty = publish
        if self._faults < FAULTS:
            self.put_back()
            return None
        self._taken, self._faulty, self._faults = None, None, 0
        return publish

    def dropped(self) -> None:
        """What was taken is done with without having flown."""
        self._taken = None

    def acknowledged(self, mid: int) -> Publish | None:
        """Take out what this PUBACK is for."""
        publish = self.flying.pop(mid, None)
        if publish is not None and self._suspects:
            self._suspects -= 1
        return publish

    def resume(self) -> None:
        """The broker has kept the session: what is in flight is sent again under the same packet ids, in order."""
        self.again = deque(self.flying)

    def requeue(self) -> None:
        """Put everything in flight back in front, in order: the next connection sends it anew."""
        self.again.clear()
        # What was taken, when the link's thread died with it in its hands.
        self.put_back()
        self.waiting.put_back(self.flying.values())
        self.flying.clear()

    def lost(self, *, blameless: bool) -> Publish | None:
        """An established connection ended; returns the publish to give up, if there is one.

        `blameless` ends (our own doing, a broker that shuts down) prove nothing about any publish.
        """
        if blameless or not self.flying:
            return None
        oldest = next(iter(self.flying.values()))
        self._strikes = self._strikes + 1 if oldest is self._oldest else 1
        self._oldest = oldest
        if self._strikes >= STRIKES and self._suspects and len(self.flying) == 1:
            self.flying.clear()
            self.again.clear()
            self._suspects -= 1
            self._oldest, self._strikes = None, 0
            return oldest
        if self._strikes >= STRIKES - 1 and not self._suspects:
            self._suspects = len(self.flying)
        return None

    def give_up(self) -> list[Publish]:
        """Empty the table; for closing."""
        self.requeue()
        left = list(self.waiting)
        self.waiting.clear()
        self._suspects = 0
        return left
