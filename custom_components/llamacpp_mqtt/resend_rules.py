"""When a request is sent again and when it is given up: the protocol's rules for clients, without a clock and without a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WhyEnded = Literal["no_worker", "unanswered", "lost", "cut_short", "offline", "timeout"]

SILENT_HEARTBEATS = 3
ANSWER_WITHIN_S = 10.0  # the first event comes within a second; on a loaded machine with a slow broker somewhat later
RESEND_LIMIT = 5  # deliveries in a row that brought nothing
ENDED_RESEND_LIMIT = 2
AWAY_LIMIT_S = 60.0  # a broker or a worker that is away longer is not being restarted
GRACE_S = 10.0  # the worker's own `timeout` is the better message: let it come first


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing to do before this moment."""

    until: float


@dataclass(frozen=True, slots=True)
class Deliver:
    """Publish the request (again): same id, same bytes."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop waiting."""

    why: WhyEnded


Move = Pause | Deliver | Abandon


@dataclass(slots=True, kw_only=True)
class ResendRules:
    """Follows one request that streams; all moments are monotonic seconds that the caller gives."""

    heartbeat_s: float = 15.0
    timeout_s: float | None = None
    in_vain: int = 0
    _first_sent_at: float | None = None
    _sent_at: float | None = None
    _heard_at: float | None = None
    _away_since: float | None = None
    _away_why: WhyEnded = "offline"

    def sent(self, now: float) -> None:
        """The request was handed to the broker."""
        if self._first_sent_at is None:
            self._first_sent_at = now
        self._sent_at = now
        self.in_vain += 1

    def heard(self, now: float, *, progress: bool) -> None:
        """An event of this request came; `progress` is false while a chunk is missing."""
        self._heard_at = now
        if self._away_why == "no_worker":  # another worker of its pool answers
            self._away_since = None
        if progress:
            self.in_vain = 0

    def away(self, now: float, why: WhyEnded = "offline") -> None:
        """The broker or the worker is gone; nothing is counted against the request until it is back."""
        if self._away_since is None:
            self._away_since = now
        self._away_why = why

    def back(self) -> None:
        """Connected and subscribed again, with a live worker: what came meanwhile is lost, so the request goes out again."""
        if self._away_since is not None:
            self._away_since = None
            self._sent_at = None

    @property
    def was_sent(self) -> bool:
        return self._first_sent_at is not None

    def decide(self, now: float, *, lacks: bool, cut_short: bool = False) -> Move:
        """What to do now. `lacks`: a chunk is missing. `cut_short`: the worker has ended the answer all the same."""
        if self._away_since is not None:
            return _at(self._away_since + AWAY_LIMIT_S, now, Abandon(self._away_why))
        ends_at = None
        if self.timeout_s is not None and self._first_sent_at is not None:
            ends_at = self._first_sent_at + self.timeout_s + GRACE_S
            if now >= ends_at:
                return Abandon("timeout")
        if self._sent_at is None:
            # One delivery per connection is free; beyond the limit it is this very message that the broker drops us for.
            return Abandon("lost") if self.in_vain > RESEND_LIMIT else Deliver()
        move = self._when_sent(now, self._sent_at, lacks=lacks, cut_short=cut_short)
        return Pause(min(move.until, ends_at)) if isinstance(move, Pause) and ends_at is not None else move

    def _when_sent(self, now: float, sent_at: float, *, lacks: bool, cut_short: bool) -> Move:
        if self._heard_at is None:
            return self._again(now, sent_at + ANSWER_WITHIN_S)
        if not lacks:
            return self._again(now, max(sent_at, self._heard_at) + SILENT_HEARTBEATS * self.heartbeat_s)
        due_at = sent_at + min(2.0 ** max(0, self.in_vain - 1), 10.0)
        if cut_short and now >= due_at and self.in_vain > ENDED_RESEND_LIMIT:
            return Abandon("cut_short")
        return self._again(now, due_at)

    def _again(self, now: float, due_at: float) -> Move:
        if now < due_at:
            return Pause(due_at)
        if self.in_vain <= RESEND_LIMIT:
            return Deliver()
        return Abandon("lost" if self._heard_at is not None else "unanswered")


def _at(due_at: float, now: float, move: Move) -> Move:
    return move if now >= due_at else Pause(due_at)
