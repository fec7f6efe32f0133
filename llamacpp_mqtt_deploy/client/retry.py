"""When a request is sent again and when it is given up: the client rules of the protocol (section 5) without a clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Why = Literal["no_worker", "unanswered", "lost", "cut_short", "offline", "timeout", "cancel_unanswered"]

SILENT_HEARTBEATS = 3  # section 5, rule 4
PROBE_S = 3.0  # an idle worker answers a control ping in milliseconds
GRACE_S = 10.0  # the worker's own `timeout` error is the better message: let it come first
CANCEL_S = 15.0  # one step of prompt processing on a slow machine, and the way there and back
RETRY_NOBODY_S = 1.0
ENDED_RESEND_LIMIT = 2
# A request without a stream is silent by contract. Without `timeout_s` the worker ends it by its own limit, which a client
# does not know; this is the default of `limits.max_timeout_s`.
UNSTREAMED_LIMIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Nothing to do before this moment."""

    until: float


@dataclass(frozen=True, slots=True)
class Send:
    """Publish the request (again): same id, same bytes."""


@dataclass(frozen=True, slots=True)
class AskPresence:
    """Ask with a control `ping` whether anybody is there."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Stop waiting."""

    why: Why


Step = WaitUntil | Send | AskPresence | GiveUp


@dataclass(slots=True, kw_only=True)
class RetryRules:
    """Follows one request; all moments are monotonic seconds that the caller gives.

    `heartbeat_s` is the worker's; `answer_within_s` bounds the silence before the first event, `resend_limit` the deliveries
    in a row that brought nothing, `offline_limit_s` an outage of the broker.
    """

    heartbeat_s: float = 15.0
    streams: bool = True
    timeout_s: float | None = None
    answer_within_s: float = 10.0
    resend_limit: int = 5
    offline_limit_s: float = 60.0
    sends: int = 0
    in_vain: int = 0
    _first_sent_at: float | None = None
    _sent_at: float | None = None
    _heard_at: float | None = None
    _probed_at: float | None = None
    _offline_since: float | None = None
    _cancelled_at: float | None = None
    _nobody: bool = False
    _alive: bool = False

    def sent(self, now: float) -> None:
        """The request was handed to the broker."""
        if self._first_sent_at is None:
            self._first_sent_at = now
        self._sent_at = now
        self._nobody = False
        self.sends += 1
        self.in_vain += 1

    def heard(self, now: float, *, progress: bool) -> None:
        """An event of this request came; `progress` is false while a chunk is missing."""
        self._heard_at = now
        if progress:
            self.in_vain = 0

    def nobody(self) -> None:
        """The broker said (MQTT 5) that nobody has subscribed to requests."""
        self._nobody = True

    def alive(self) -> None:
        """A worker answered the probe."""
        self._alive = True

    def probed(self, now: float) -> None:
        self._probed_at = now

    def cancelled(self, now: float) -> None:
        """A cancel was published: the terminal event comes soon or never."""
        if self._cancelled_at is None:
            self._cancelled_at = now

    def offline(self, now: float) -> None:
        """The connection is lost; nothing is counted against the worker until it is back."""
        if self._offline_since is None:
            self._offline_since = now

    def back(self) -> None:
        """Connected and subscribed again: what came meanwhile is lost, so the request goes out again."""
        self._offline_since = None
        self._sent_at = None
        self._probed_at = None

    @property
    def heard_anything(self) -> bool:
        return self._heard_at is not None

    def decide(self, now: float, *, hole: bool, worker_online: bool, cut_short: bool = False) -> Step:
        """What to do now. `hole`: a chunk is missing. `worker_online`: the retained status says so.

        `cut_short`: the worker has ended the answer all the same; what it keeps of it does not change any more.
        """
        if self._offline_since is not None:
            return _at(self._offline_since + self.offline_limit_s, now, GiveUp("offline"))
        if self._first_sent_at is not None and self.timeout_s is not None:
            ends_at = self._first_sent_at + self.timeout_s + GRACE_S
            if now >= ends_at:
                return GiveUp("timeout")
        if self._cancelled_at is not None and now >= self._cancelled_at + CANCEL_S:
            return GiveUp("cancel_unanswered")
        if self._sent_at is None or self._first_sent_at is None:
            # One delivery per connection is free; beyond the limit the broker itself drops us for this very message.
            return GiveUp("lost") if self.in_vain > self.resend_limit else Send()
        if self._heard_at is None:
            step = self._before_the_first_event(now, self._first_sent_at, self._sent_at, worker_online=worker_online)
        elif hole or self._nobody:
            # Nobody: the worker has not found its way back to the broker yet.
            due_at = self._sent_at + min(2.0 ** max(0, self.in_vain - 1), 10.0)
            if cut_short and now >= due_at and self.in_vain > ENDED_RESEND_LIMIT:
                return GiveUp("cut_short")
            # Chunks have come, so this is no answer that may be silent until its end.
            step = self._again(now, due_at, silent=not hole)
        else:
            step = self._again(now, max(self._sent_at, self._heard_at) + SILENT_HEARTBEATS * self.heartbeat_s)
        return self._cut(step)

    def _before_the_first_event(self, now: float, first_at: float, sent_at: float, *, worker_online: bool) -> Step:
        due_at = first_at + self.answer_within_s
        if self._nobody:
            if not worker_online or now >= due_at:
                return GiveUp("no_worker")
            return _at(sent_at + RETRY_NOBODY_S, now, Send())
        if not worker_online and not self._alive:
            if now < due_at:
                return WaitUntil(due_at)
            if self._probed_at is None:
                return AskPresence()
            return _at(self._probed_at + min(PROBE_S, self.answer_within_s), now, GiveUp("no_worker"))
        # A stream begins within a second: after this long the delivery is lost. An answer in one piece may take its time.
        quiet_s = self.answer_within_s if self.streams else SILENT_HEARTBEATS * self.heartbeat_s
        return self._again(now, sent_at + quiet_s)

    def _again(self, now: float, due_at: float, *, silent: bool = True) -> Step:
        if now < due_at:
            return WaitUntil(due_at)
        if self.in_vain <= self.resend_limit or (silent and self._may_be_silent(now)):
            return Send()
        return GiveUp("lost" if self.heard_anything else "unanswered")

    def _may_be_silent(self, now: float) -> bool:
        return not self.streams and self._first_sent_at is not None and now < self._first_sent_at + UNSTREAMED_LIMIT_S

    def _cut(self, step: Step) -> Step:
        """Never wait past the overall limit or the end of a cancel."""
        if not isinstance(step, WaitUntil):
            return step
        until = step.until
        if self.timeout_s is not None and self._first_sent_at is not None:
            until = min(until, self._first_sent_at + self.timeout_s + GRACE_S)
        if self._cancelled_at is not None:
            until = min(until, self._cancelled_at + CANCEL_S)
        return WaitUntil(until)


def _at(due_at: float, now: float, step: Step) -> Step:
    return step if now >= due_at else WaitUntil(due_at)
