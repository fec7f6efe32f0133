"""How far a link has come with its end."""

from __future__ import annotations

from dataclasses import dataclass

from llamacpp_mqtt_deploy.mqtt.session import Publish
from llamacpp_mqtt_deploy.stopping import Deadline

GOODBYE_S = 1.0
"""How long the last packets may take on their way into the socket."""

OFFLINE_GRACE_S = 2.0
"""How long closing waits for a connection that is down just then."""


@dataclass(slots=True)
class Closing:
    """A link that was told to close: until when, what it says last, and whether the broker has that."""

    deadline: Deadline
    grace: Deadline
    last_message: Publish | None
    said: bool = False

    def over(self, *, online: bool, left: int) -> bool:
        """Whether nothing is left to wait for."""
        return self.deadline.passed() or left == 0 or (not online and self.grace.passed())

    def at_most_s(self, seconds: float) -> float:
        """A pause between two attempts that ends when the closing does."""
        return min(seconds, self.deadline.remaining_s(), self.grace.remaining_s() + 0.001)

    def needs_will(self) -> bool:
        """Without the PUBACK of the last message the broker must say `offline` for us: the will, which a clean DISCONNECT would suppress."""
        return self.last_message is not None and not self.said
