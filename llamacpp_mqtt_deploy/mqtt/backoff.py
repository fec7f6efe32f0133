"""When to try again: pure arithmetic on a clock that the caller reads."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Literal

from tenacity import RetryCallState
from tenacity.wait import wait_base, wait_exponential

Version = Literal["5", "3.1.1"]

FIRST_PAUSE_S = 0.1
STABLE_AFTER_S = 5.0
"""A connection that lived this long was a success; a shorter one does not shorten the next pause."""

STATED_AGAIN_AFTER_S = 60.0
"""After an outage this long the broker may be another one, or a newer one: MQTT 5 is tried again."""


class Backoff(wait_base):
    """Pauses that double from 0.1 s up to the most, each shortened at random by up to half (so that a fleet spreads).

    They count the attempts since the last connection that lasted, which is what tenacity's own count cannot know.
    """

    def __init__(self, most_s: float, *, draw: Callable[[], float] = random.random) -> None:
        self._doubling = wait_exponential(multiplier=FIRST_PAUSE_S, max=most_s)
        self._draw = draw
        self._attempts = 0

    def __call__(self, retry_state: RetryCallState) -> float:
        """The pause before the next attempt, in seconds."""
        self._attempts += 1
        since_lasting = copy.copy(retry_state)
        since_lasting.attempt_number = self._attempts
        return self._doubling(since_lasting) * (1.0 - self._draw() / 2)

    def ended(self, lived_s: float) -> None:
        """A connection ended that lived this long."""
        if lived_s >= STABLE_AFTER_S:
            self._attempts = 0


class VersionChoice:
    """Which MQTT version to speak next.

    `auto` begins with 5. A broker that *says* it does not know the version (reason 0x84) is believed at once. One that hangs up
    without a word (RabbitMQ before 3.13) or does not answer (amqtt, which takes the properties for the length of a client id and
    waits for the rest) is believed after two such attempts in a row, since a broker or proxy that is just starting does the same,
    and never once 5 has worked in this process. What was guessed from silence is tried once more at the next outage; what was
    stated, or guessed twice, only after an outage of a minute, because then another broker may be there.
    """

    def __init__(self, setting: Literal["auto", "5", "3.1.1"]) -> None:
        self._auto = setting == "auto"
        self.current: Version = "3.1.1" if setting == "3.1.1" else "5"
        self._proven_5 = False
        self._guessed = False
        self._trying_again = False
        self._silent = 0
        self._unreadable = 0
        self._down_since: float | None = None

    @property
    def in_doubt(self) -> bool:
        """Whether the broker may not know the version that is spoken now: a short wait for its answer is enough."""
        return self._auto and self.current == "5" and not self._proven_5

    def answered(self) -> None:
        """The broker sent a CONNACK that does not complain about the version."""
        self._silent = 0
        self._down_since = None
        self._trying_again = False
        if self.current == "5":
            self._proven_5 = True

    def refused(self) -> bool:
        """The broker does not know this version; True when it is worth trying the other one at once."""
        if not self._auto:
            return False
        was_5 = self.current == "5"
        self._switch(guessed=False)
        self._proven_5 = False
        return was_5

    def unanswered(self) -> bool:
        """No CONNACK came: closed before it, or silence. True when the other version is next."""
        self._silent += 1
        if (
            not self._auto
            or (self._proven_5 and self.current == "5")
            or self._silent < (1 if self._trying_again else 2)
        ):
            return False
        self._switch(guessed=not self._trying_again)
        self._trying_again = False
        return True

    def unreadable(self) -> None:
        """The client could not read what the broker sent and hung up.

        A message that paho cannot decode would come again after each reconnect; a 3.1.1 connection receives it
        without the properties that are the usual cause.
        """
        self._unreadable += 1
        if self._auto and self._unreadable >= 3 and self.current == "5":
            self._switch(guessed=True)

    def readable(self) -> None:
        """Messages arrive and are understood."""
        self._unreadable = 0

    def lost(self, now: float) -> None:
        """An established connection ended."""
        self._down_since = now
        if self._auto and self._guessed and self.current == "3.1.1":
            self._switch(guessed=False)
            self._trying_again = True

    def before_attempt(self, now: float) -> None:
        if self._auto and self.current == "3.1.1" and self._down_since is not None:
            if now - self._down_since < STATED_AGAIN_AFTER_S:
                return
            self._down_since = None
            self._switch(guessed=False)
            self._trying_again = True

    def _switch(self, *, guessed: bool) -> None:
        self.current = "3.1.1" if self.current == "5" else "5"
        self._guessed = guessed
        self._silent = self._unreadable = 0
