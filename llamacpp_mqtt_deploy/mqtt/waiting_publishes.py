"""What waits to be sent: whoever brings about many events waits for himself, and everybody else's tokens pass them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from llamacpp_mqtt_deploy.core.fair_queue import FairQueue

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.mqtt.session import Publish


class WaitingPublishes:
    """First come, first served within an owner, who is named by the first `owner_levels` levels of the topic; one of each owner in turn.
    Pure; whatever goes to one topic keeps its order.

    What was taken and put back goes before all else, in order; what was put in as the last goes when nothing else is left.
    """

    def __init__(self, owner_levels: int) -> None:
        self._owner_levels = owner_levels
        self._in_front: deque[Publish] = deque()
        self._in_turn: FairQueue[Publish] = FairQueue()
        self._last: deque[Publish] = deque()
        self.count = 0
        """How many there are; to be read only. An attribute, since it is looked at several times for each token."""

    def __iter__(self) -> Iterator[Publish]:
        """All of them, in the order of their owners."""
        return chain(self._in_front, self._in_turn, self._last)

    def append(self, publish: Publish) -> None:
        levels = publish.topic.split("/", self._owner_levels)
        several = len(levels) > self._owner_levels
        self._in_turn.put("/".join(levels[:-1]) if several else publish.topic, publish)
        self.count += 1

    def append_last(self, publish: Publish) -> None:
        self._last.append(publish)
        self.count += 1

    def put_back(self, publishes: Iterable[Publish]) -> None:
        """These were taken, in this order, and go before all others."""
        before = len(self._in_front)
        self._in_front.extendleft(reversed(list(publishes)))
        self.count += len(self._in_front) - before

    def take(self) -> Publish:
        """The next one; raises IndexError when there is none."""
        taken = self._in_front.popleft() if self._in_front else self._in_turn.take() or self._last.popleft()
        self.count -= 1
        return taken

    def clear(self) -> None:
        self._in_front.clear()
        self._in_turn.clear()
        self._last.clear()
        self.count = 0
