"""How far the clients may go ahead of the faults (pure): every fault meets requests, and something is asked after each."""

from __future__ import annotations

AHEAD = 10
"""Requests beyond those that the next fault waits for."""

GRANT_EVERY_S = 0.1
"""A client needs most of this to begin what it may, and the rig to hear of it."""

STALLED_S = 3.0
"""Those that may begin one do not for so long: others may have to."""


class Pace:
    """One more request at a time is granted where nothing is under way and a fault waits for one.

    A client may be away or cut off, so as many as there are clients are granted before any is begun, and no more: what they ask while
    a fault waits for the one before it to be over is missing in the end, and with it the last faults.
    """

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._granted = 0
        self._granted_at = -GRANT_EVERY_S
        self._begun = 0
        self._begun_at = 0.0

    def allowed(self, *, after: int, begun: int, needed: bool, now: float) -> int:
        """How many requests may be begun in all; `after` is how many the next fault waits for."""
        base = after + AHEAD
        if begun != self._begun:
            self._begun, self._begun_at = begun, now
        if needed and now >= self._granted_at + GRANT_EVERY_S:
            self._granted_at = now
            if now < self._begun_at + STALLED_S:
                self._granted = min(begun + self._clients, max(self._granted, begun) + 1)
            else:
                self._granted = max(self._granted, base) + 1
        return max(base, self._granted)


def shared(allowed: int, *, count: int, asking: list[str], clients: list[str]) -> dict[str, int]:
    """What each client may have begun: those that are through with their `count` leave the rest to the others."""
    left = max(0, allowed - count * (len(clients) - len(asking)))
    shares = dict.fromkeys(clients, count)
    for number, name in enumerate(asking):
        shares[name] = (left + len(asking) - 1 - number) // len(asking)
    return shares
