"""What goes out: publishes in their order, as far as window and limits allow, and what becomes of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from llamacpp_mqtt_deploy.core.outbox_budget import OutboxBudget
from llamacpp_mqtt_deploy.core.reminding import Reminder
from llamacpp_mqtt_deploy.mqtt import explain
from llamacpp_mqtt_deploy.mqtt.packets import packet_bytes, puback_name
from llamacpp_mqtt_deploy.mqtt.paho_wire import PahoWire
from llamacpp_mqtt_deploy.mqtt.session import FAULTS, Outgoing, Publish
from llamacpp_mqtt_deploy.stopping import Deadline

log = structlog.get_logger(__name__)

T = TypeVar("T")

_PASSED_OVER = 10
"""So many times longer than for all PUBACKs a single one is waited for, while others come."""


class Sending:
    """The outgoing half of a link, over whichever wire it has; `changed`, whose lock is `lock`, is notified when the last publish is done."""

    def __init__(
        self, lock: threading.RLock, changed: threading.Condition, budget: OutboxBudget, *, owner_levels: int = 3
    ) -> None:
        self._budget = budget
        self.outgoing = Outgoing(self._budget, owner_levels=owner_levels)
        self.max_packet_bytes: int | None = None
        self.retain_available = True
        """What the broker of the latest connection announced, as the line above."""
        self._flushers = self._waiters = 0
        self.last_puback_at: float | None = None
        self.connected_at = 0.0
        self.poisoned = 0
        self._lock = lock
        self._changed = changed
        self._refused: dict[str, Reminder] = {}

    def held_bytes(self) -> int:
        """What waits and what is in flight."""
        return self._budget.bytes_held()

    def flush(self, deadline: Deadline) -> bool:
        """Wait, in another thread, until nothing is left to send; False when the deadline passed."""
        with self._changed:
            self._flushers += 1
            try:
                return self._changed.wait_for(lambda: len(self.outgoing) == 0, deadline.remaining_s())
            finally:
                self._flushers -= 1

    def room_for_answers(self, largest: int, timeout_s: float) -> int:
        """See `ports.Link`; waits in another thread than the link's."""
        room = self._budget.room_for_answers(largest)
        if room or timeout_s <= 0:
            return room
        with self._changed:
            self._waiters += 1
            try:
                self._changed.wait_for(lambda: self._budget.room_for_answers(largest), timeout_s)
            finally:
                self._waiters -= 1
        return self._budget.room_for_answers(largest)

    def overdue(self, now: float, *, timeout_s: float) -> bool:
        """Whether the connection takes publishes and acknowledges none, for longer than this.

        A slow line with a full window acknowledges each of them late: so any PUBACK counts, but not for ever, since PUBACKs
        come in order, and one that was passed over will not come.
        """
        oldest = next(iter(self.outgoing.flying.values()), None)
        if oldest is None:
            return False
        since = max(oldest.sent_at, self.connected_at)
        return now - max(since, self.last_puback_at or 0.0) > timeout_s or now - since > _PASSED_OVER * timeout_s

    def pump(self, wire: PahoWire) -> bool:
        """Give the wire what may be sent now, and say whether there was anything; the link's thread alone, as all that follows.

        Whatever the wire raises but ValueError passes through, with the publish back in its place: the wire is in doubt then, the
        caller drops it and connects anew. A publish that brings this about each time is given up.
        """
        outgoing = self.outgoing
        if not (outgoing.waiting.count or outgoing.again):
            return False
        now = time.monotonic()
        if outgoing.again and not self._resend(wire, now):
            return True
        # What comes after this look wakes us again.
        while outgoing.waiting.count:
            # Under the lock of those who count: a publish between queue and flight would be in neither, the outbox would take one
            # too many, and a flush would find nothing left while the last one is still on its way.
            with self._lock:
                publish = outgoing.next(now)
            if publish is None:
                break
            try:
                went = self._send(wire, publish, now)
            except Exception as error:
                with self._lock:
                    given_up = outgoing.failed()
                if given_up is not None:
                    self.give_up(given_up, f"the MQTT client failed on it {FAULTS} times in a row: {error!r}")
                raise
            if not went:
                break
        return True

    def _resend(self, wire: PahoWire, now: float) -> bool:
        """Send again what an earlier connection of this session left in flight; False when the wire takes nothing more for now."""
        again, flying = self.outgoing.again, self.outgoing.flying
        while again:
            mid = again[0]
            publish = flying.get(mid)
            if publish is not None:  # else its PUBACK came meanwhile
                expiry_s = None if publish.expires_at is None else max(1, round(publish.expires_at - now))
                retain = publish.retain and self.retain_available
                if wire.publish(publish, retain=retain, expiry_s=expiry_s, flying=flying, mid=mid) is None:
                    return False
                publish.sent_at = now
            again.popleft()
        return True

    def _send(self, wire: PahoWire, publish: Publish, now: float) -> bool:
        """Send one, or end it; False when the wire takes nothing more for now."""
        outgoing = self.outgoing
        expiry_s = None
        if publish.expires_at is not None:
            # What waited here has grown older; 0 would mean "at once", so what is over is dropped.
            expiry_s = round(publish.expires_at - now)
            if expiry_s < 1:
                outgoing.dropped()
                self.done(publish, well=False)
                return True
        limit = self.max_packet_bytes
        if limit is not None and packet_bytes(publish, wire.version) > limit:
            outgoing.dropped()
            self.give_up(publish, f"larger than the {limit} bytes that the broker takes")
            return True
        try:
            mid = wire.publish(
                publish,
                retain=publish.retain and self.retain_available,
                expiry_s=expiry_s,
                flying=outgoing.flying,
            )
        except ValueError as error:
            outgoing.dropped()
            self.give_up(publish, str(error))
            return True
        if mid is None:
            with self._lock:
                outgoing.put_back()
            return False
        if publish.qos == 0:
            outgoing.dropped()
            self.done(publish, well=True)
        else:
            publish.sent_at = now
            with self._lock:
                outgoing.sent(mid, publish)
        return True

    def puback(self, mid: int, code: int) -> None:
        """The broker has it, or refuses it."""
        publish = self.outgoing.acknowledged(mid)
        if publish is None:
            return
        self.last_puback_at = time.monotonic()
        if code >= 0x80:
            why = explain.of_puback(code, puback_name(code))
            reminder = self._refused.setdefault(publish.topic, Reminder())
            if len(self._refused) > 256:
                self._refused.clear()
            if reminder.due(why, self.last_puback_at):
                log.error("publish.refused", topic=publish.topic, why=why)
        self.done(publish, well=code < 0x80)

    def give_up(self, publish: Publish, why: str) -> None:
        """Drop what can never be delivered."""
        self.poisoned += 1
        log.error("publish.given_up", topic=ascii(publish.topic[:200]), bytes=len(publish.payload), why=why)
        self.done(publish, well=False)

    def done(self, publish: Publish, *, well: bool) -> None:
        """Tell whoever published it, once, and whoever waits for the last one."""
        self._budget.give_back(publish.size, answer=publish.answer)
        on_done = publish.on_done
        if on_done is not None:
            publish.on_done = None
            try:  # as `guard` does; it runs for each event
                on_done(well)
            except Exception:
                log.exception("link.callback_failed", callback="on_done")
        if self._waiters or (self._flushers and len(self.outgoing) == 0):
            with self._changed:
                self._changed.notify_all()


def guard(callback: Callable[[T], None], value: T) -> None:
    """Call back; nothing that the daemon raises may end the link."""
    try:
        callback(value)
    except Exception:
        log.exception("link.callback_failed", callback=getattr(callback, "__name__", "callback"))
