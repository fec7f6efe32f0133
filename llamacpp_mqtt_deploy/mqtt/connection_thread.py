"""The thread of the link to a real broker: it connects, reconnects for ever, sends, and hands over what comes.

The thread `mqtt-link` runs paho's client itself (`paho_wire.PahoWire`) instead of paho's `loop_start`. paho's own thread dies of an
exception in a callback while `is_connected()` stays true, never falls back to MQTT 3.1.1, cannot be stopped while
something is queued (its issue 608), and leaves no place for a window, a breaker or a back-off of ours. It makes the
connections, which takes waiting, and lets each of them live in the I/O loop (`wire_loop.WireLoop`). Other threads only append to
deques and wake that loop, so no lock is ever held across a call into paho or into the daemon.
When to try again and when to stop is decided by tenacity's loop (`backoff.Backoff` gives the pauses).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import structlog
import tenacity

from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.core.outbox_budget import MIB, OutboxBudget
from llamacpp_mqtt_deploy.core.reminding import Reminder
from llamacpp_mqtt_deploy.core.topics import owner_levels
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.mqtt import explain
from llamacpp_mqtt_deploy.mqtt.backoff import STABLE_AFTER_S
from llamacpp_mqtt_deploy.mqtt.closing import GOODBYE_S, OFFLINE_GRACE_S, Closing
from llamacpp_mqtt_deploy.mqtt.explain import Refusal
from llamacpp_mqtt_deploy.mqtt.paho_wire import Closed, Connack, PahoWire
from llamacpp_mqtt_deploy.mqtt.receiving import Deliveries, Receipts, Subscription, Subscriptions
from llamacpp_mqtt_deploy.mqtt.reconnecting import Attempts
from llamacpp_mqtt_deploy.mqtt.sending import Sending, guard
from llamacpp_mqtt_deploy.mqtt.session import STRIKES, Publish
from llamacpp_mqtt_deploy.mqtt.wire_loop import WireLoop
from llamacpp_mqtt_deploy.mqtt.wires import TlsFilesUnfitError, WireFactory
from llamacpp_mqtt_deploy.ports import Delivery, LinkInfo, LinkState, Retained
from llamacpp_mqtt_deploy.stopping import Deadline

log = structlog.get_logger(__name__)

CONNACK_TIMEOUT_S = 10.0
DOUBTFUL_CONNACK_TIMEOUT_S = 3.0
"""Where the broker may not know MQTT 5 and silence may be its answer."""

PUBACK_TIMEOUT_S = 20.0
"""So long may a living connection acknowledge nothing that we publish; a broker that syncs a slow disk needs a second or two."""

SHORT_LIVES = 3
"""After so many connections that ended at once in a row, chance is out of the question."""

HEADER_ROOM = 1024
"""What `max_payload_bytes` leaves for topic and properties (correlation data has at most 64 bytes)."""


class ConnectionThread:
    """Keeps one connection alive and carries messages over it. The public methods are for any thread but its own; they only queue.

    It is the `WireEvents` of its wires. Raises ValueError, from the constructor, when a TLS file is missing or unfit.
    """

    _will: Retained
    _on_online: Callable[[LinkInfo], None]
    _on_lost: Callable[[LinkInfo], None]

    def __init__(
        self,
        settings: MqttSettings,
        *,
        loop: IoLoop,
        client_id: str,
        password: Callable[[], str | None],
        max_incoming_bytes: Callable[[], int] | None,
    ) -> None:
        self._loop = loop
        self._port = settings.port or (8883 if settings.tls.enabled else 1883)
        self.where = settings.host if settings.transport == "unix" else f"{settings.host}:{self._port}"
        self._settings = settings
        self._client_id = client_id
        self._wires = WireFactory(
            settings,
            client_id=client_id,
            password=password,
            max_incoming_bytes=max_incoming_bytes,
            where=self.where,
        )

        # Shared with other threads.
        # Each chunk and each PUBACK takes the lock alone: a condition's own way to it is two calls longer.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        budget = OutboxBudget(most_messages=settings.outbox_messages, most_bytes=settings.outbox_mib * MIB)
        self._sending = Sending(self._lock, self._changed, budget, owner_levels=owner_levels(settings.root))
        self.room_for_answers = self._sending.room_for_answers
        self._outgoing = self._sending.outgoing
        self.puback = self._sending.puback  # straight from the wire: one comes for each event
        self._receipts = Receipts()
        self._subscriptions = Subscriptions()
        self._closing: Closing | None = None
        self._wire_loop = WireLoop(loop, work=self._work, on_time=self._on_time, due_in_s=self._due_in_s)
        self._thread: threading.Thread | None = None
        self._state: LinkState = "connecting"
        self._detail = ""

        # The link's thread's, and while a wire lives in the loop, the loop's.
        self._connack_by = 0.0
        self._wire: PahoWire | None = None
        self._attempts = Attempts(settings, where=self.where)
        self._reminder = Reminder()
        self._full_reminder = Reminder()
        self._generation = self._connections = 0
        self._online_since = 0.0
        self._deliveries = Deliveries(self._receipts)
        self._died_online, self._loud = False, True
        self._own_end: Refusal | None = None
        """Why we are about to end the connection ourselves."""

    # --- for other threads ---

    def open(
        self,
        *,
        will: Retained,
        on_delivery: Callable[[Delivery], bool],
        on_online: Callable[[LinkInfo], None],
        on_lost: Callable[[LinkInfo], None],
    ) -> None:
        """Start to connect; see `ports.Link.open`."""
        self._will, self._on_online, self._on_lost = will, on_online, on_lost
        self._deliveries.take = on_delivery
        with self._changed:
            self._start()

    def is_current(self) -> bool:
        """Whether the caller runs inside a callback."""
        return threading.current_thread() is self._thread or self._loop.is_here()

    def max_packet_bytes(self) -> int | None:
        """What the broker of the latest connection takes, None when it named no limit."""
        return self._sending.max_packet_bytes

    def max_payload_bytes(self) -> int | None:
        limit = self._sending.max_packet_bytes
        return None if limit is None else max(0, limit - HEADER_ROOM)

    def enqueue(self, publish: Publish) -> bool:
        """Queue a publish; False when there is no place for it."""
        with self._lock:
            if self._closing is not None or self._state in ("closed", "taken_over"):
                return False
            if (publish.qos == 0 and self._state != "online") or not self._outgoing.take(publish):
                return False
        self._wire_loop.wake()
        return True

    def acknowledge(self, delivery: Delivery) -> None:
        if self._receipts.give(delivery):
            self._wire_loop.wake()

    def subscribe(self, subscription: Subscription) -> bool:
        """Ask for a subscription, whose `done` is set when it is answered or lost; False without a connection."""
        with self._changed:
            if self._state != "online":
                return False
            self._subscriptions.ask(subscription)
        self._wire_loop.wake()
        return True

    def info(self) -> LinkInfo:
        self._revive()
        with self._changed:
            return self._info()

    def flush(self, deadline: Deadline) -> bool:
        return self._sending.flush(deadline)

    def close(self, deadline: Deadline, last_message: Retained | None) -> None:
        """Publish the last message, end the connection and the thread; idempotent."""
        thread = self._thread
        with self._changed:
            if thread is None or self._state == "closed":
                self._state = "closed"
                return
            if self._closing is None:
                last = None
                if last_message is not None and self._state != "taken_over":
                    last = Publish(
                        last_message.topic, last_message.payload, 1, True, None, None, self._last_message_done
                    )
                    self._outgoing.take_last(last)
                self._closing = Closing(deadline, Deadline(OFFLINE_GRACE_S), last)
                self._changed.notify_all()
        self._wire_loop.wake()
        if self.is_current():
            return
        # The thread may hang in a name look-up, which nothing can cut short; it is a daemon thread and ends by itself.
        thread.join(deadline.remaining_s() + GOODBYE_S + 1.0)
        if thread.is_alive():
            log.warning("link.close_timed_out", broker=self.where)

    def _revive(self) -> None:
        """Start the thread again should it have died; `info()` is called by status and watchdog often enough."""
        with self._changed:
            thread = self._thread
            if thread is None or thread.is_alive() or self._state == "closed":
                return
            self._died_online = self._state == "online"
            self._state, self._detail = "dead", "The link's thread died; it was started again."
            self._start()
        log.error("link.thread_died", broker=self.where)

    # --- the thread's life ---

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="mqtt-link", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._discard_wire()
        if self._died_online:
            self._died_online = False
            self._went_down(Refusal(self._detail, needs_person=False), state="dead", tell=True)
        # Tried again whatever the outcome; only what is no Exception ends the thread, and `info` starts it again.
        tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda _: True),
            stop=lambda _: self._finished(),
            wait=self._attempts.backoff,
            sleep=self._pause,
            retry_error_callback=lambda _: None,
        )(self._attempt)
        self._say_closed()

    def _attempt(self) -> None:
        try:
            # Looked at once more: closing may have cut the pause before this attempt short.
            if not self._finished():
                self._live_once()
        except Exception:
            # Nothing here is known to raise; whatever does must not end the link.
            log.exception("link.failed", broker=self.where)
            self._went_down(Refusal("A defect in the link; the log says more.", needs_person=False))
            self._discard_wire()

    def _finished(self) -> bool:
        closing = self._closing
        if closing is None:
            return False
        return self._state == "taken_over" or closing.over(online=self._state == "online", left=len(self._outgoing))

    def _live_once(self) -> None:
        """One attempt, and the connection's whole life when it succeeds."""
        if self._state == "taken_over":
            return
        self._attempts.begin(time.monotonic())
        self._generation += 1
        try:
            wire = self._make_wire()
            wire.connect(self._port, self._generation)
        except TlsFilesUnfitError as error:
            self._failed(Refusal(f"{error}."))
            return
        except OSError as error:
            self._failed(explain.of_exception(error, self.where))
            return
        except ValueError as error:
            # A host that cannot be one, for example a label over 63 characters.
            self._failed(Refusal(f"{self.where} is no address: {error}. Check mqtt.host."))
            return
        timeout_s = DOUBTFUL_CONNACK_TIMEOUT_S if self._attempts.versions.in_doubt else CONNACK_TIMEOUT_S
        self._connack_by = time.monotonic() + timeout_s
        self._wire_loop.run(wire)
        if wire.closed is None and self._finished():
            self._leave(wire)
            return
        if wire.closed is None and self._state != "online":
            wire.abort()
            refusal = explain.of_no_connack(self.where, timeout_s)
            self._attempts.unanswered(refusal)
            self._failed(refusal)
            return
        if wire.closed is None:
            if self._own_end is explain.INBOX_FULL and self._full_reminder.due("", time.monotonic()):
                log.warning("inbox.full", broker=self.where, why="connecting again so that the broker delivers again")
            wire.disconnect(with_will=False, timeout_s=GOODBYE_S)
        self._ended(wire, wire.closed or Closed())

    # --- while a wire lives, in the loop's thread ---

    def _work(self) -> bool:
        """Send what other threads have queued; False when this connection's life is over."""
        wire = self._wire
        if wire is None or self._life_over(wire):
            return False
        if self._state != "online":
            return True
        queued = False
        if self._receipts.given:
            self._receipts.send(self._generation, wire.acknowledge)
            queued = True
        if self._subscriptions.asked:
            self._subscriptions.send(
                lambda asked: (
                    wire.unsubscribe([name for name, _ in asked.filters])
                    if asked.ends
                    else wire.subscribe(asked.filters, retained=asked.retained)
                )
            )
            queued = True
        if self._sending.pump(wire):
            queued = True
        if queued:
            wire.on_writable()
            return wire.closed is None
        return True

    def _life_over(self, wire: PahoWire) -> bool:
        if wire.closed is not None or self._own_end is not None:
            return True
        if self._closing is not None and self._finished():
            return True
        return self._state != "online" and time.monotonic() >= self._connack_by

    def _on_time(self, now: float) -> None:
        """Look at what only time brings about."""
        if self._wire is not None:
            self._wire.on_time(now)
        if self._state != "online":
            return
        stalled_until = self._deliveries.stalled_until
        if stalled_until is not None and now >= stalled_until:
            self._own_end = explain.INBOX_FULL
        elif self._sending.overdue(now, timeout_s=PUBACK_TIMEOUT_S):
            self._own_end = explain.of_no_pubacks(self.where, PUBACK_TIMEOUT_S)

    def _due_in_s(self, now: float) -> float:
        due = 0.5
        if self._state != "online":
            due = min(due, max(0.001, self._connack_by - now))
        if self._deliveries.stalled_until is not None:
            due = min(due, max(0.001, self._deliveries.stalled_until - now))
        if self._outgoing.on_probation:
            due = min(due, self._outgoing.quiet_s(now) or due)
        if self._closing is not None:
            due = min(due, self._closing.deadline.remaining_s() + 0.001)
        return due

    def _pause(self, seconds: float) -> None:
        """Wait between two attempts; closing cuts it short."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._finished():
                left = until - time.monotonic()
                if self._state == "taken_over":
                    left = 3600.0
                if left <= 0:
                    return
                self._changed.wait(left if self._closing is None else self._closing.at_most_s(left))

    # --- what the wire tells (its callbacks run in this thread) ---

    def connack(self, answer: Connack) -> None:
        if not self._attempts.accepted(answer):
            return
        wire = self._wire
        assert wire is not None
        outgoing = self._outgoing
        now = time.monotonic()
        outgoing.connected(window=answer.window, now=now)
        # A resumed session gets the same packet ids and DUP (MQTT 5, section 4.4). They go as new publishes where there is no
        # session, on probation (one at a time), and where the window became smaller than what is in flight.
        if not answer.session_present or outgoing.on_probation or len(outgoing.flying) > answer.window:
            with self._lock:
                outgoing.requeue()
        else:
            outgoing.resume()
        with self._changed:
            self._connections += 1
            self._online_since = now
            self._sending.max_packet_bytes = answer.max_packet_bytes
            self._sending.retain_available = answer.retain_available
            self._state, self._detail = "online", ""
            info = self._info()
        self._sending.connected_at = now
        self._deliveries.connected()
        self._own_end = None
        # Where connections break as fast as they come, the log tells of both at growing pauses only.
        (log.info if self._loud else log.debug)(
            "link.online",
            broker=self.where,
            protocol=wire.version,
            session_present=answer.session_present,
            window=answer.window,
            unacknowledged=info.unacknowledged,
        )
        if not answer.retain_available:
            log.warning(
                "link.no_retain", broker=self.where, why="the broker keeps no retained messages: no status stays"
            )
        guard(self._on_online, info)

    def suback(self, mid: int, codes: Sequence[tuple[int, str]]) -> None:
        self._subscriptions.answered(mid, codes)

    def message(self, delivery: Delivery) -> None:
        self._deliveries.arrived(delivery)

    # --- ends ---

    def _ended(self, wire: PahoWire, closed: Closed) -> None:
        """The connection, or the attempt, is over."""
        if self._state != "online":
            refused = self._attempts.ended(closed)
            if refused is not None:
                self._failed(refused)
            return
        now = time.monotonic()
        lived_s = now - self._online_since
        own_end, self._own_end = self._own_end, None
        if lived_s >= STABLE_AFTER_S:
            self._reminder.clear()
            self._full_reminder.clear()
        # A flood that is being read: mosquitto before 2.0.13 sends another window for each PUBACK, so that what waits there overruns
        # the inbox again and again, and whoever else asks would wait for ever longer pauses.
        in_a_flood = own_end is explain.INBOX_FULL and self._deliveries.taken
        self._attempts.lost(
            closed,
            now,
            lived_s=max(lived_s, STABLE_AFTER_S) if in_a_flood else lived_s,
            in_flight=bool(self._outgoing.flying),
            ours=own_end is not None,
        )
        if closed.from_broker and closed.code == explain.TAKEN_OVER:
            self._went_down(explain.of_disconnect(closed.code, closed.name), state="taken_over")
            return
        refusal = own_end or explain.of_end(
            self.where,
            code=closed.code,
            name=closed.name,
            from_broker=closed.from_broker,
            unreadable=closed.unreadable,
        )
        if self._attempts.short_lives >= SHORT_LIVES:
            refusal = explain.of_short_lives(self.where, self._attempts.short_lives, self._client_id)
        blameless = own_end is not None or closed.code in explain.BLAMELESS_CLOSES
        poison = self._outgoing.lost(blameless=blameless)
        self._went_down(refusal)
        if poison is not None:
            self._sending.give_up(
                poison,
                f"the broker ended {STRIKES} connections in a row on it ({closed.name if closed.from_broker else 'without a reason'}); "
                "is it over the broker's message size limit?",
            )

    def _failed(self, refusal: Refusal) -> None:
        """An attempt ended without a connection."""
        with self._changed:
            self._detail = refusal.text
            if refusal.needs_person:
                self._state = "refused"
            elif self._connections:
                self._state = "lost"
            else:
                self._state = "connecting"
        if self._reminder.due(refusal.text, time.monotonic()):
            (log.error if refusal.needs_person else log.warning)("link.refused", broker=self.where, why=refusal.text)

    def _went_down(self, refusal: Refusal, *, state: LinkState = "lost", tell: bool = False) -> None:
        """Tell of the end of an established connection, once."""
        with self._changed:
            was_online = tell or self._state == "online"
            self._state, self._detail = state, refusal.text
            info = self._info()
        self._deliveries.stalled_until = None
        self._subscriptions.fail()
        if was_online:
            self._loud = self._reminder.due(refusal.text, time.monotonic())
            if self._loud:
                log.warning("link.lost", broker=self.where, why=refusal.text, unacknowledged=info.unacknowledged)
            guard(self._on_lost, info)

    def _leave(self, wire: PahoWire) -> None:
        """The clean end: everything said, or no time left."""
        self._receipts.send(self._generation, wire.acknowledge)
        wire.disconnect(with_will=self._closing is not None and self._closing.needs_will(), timeout_s=GOODBYE_S)

    def _say_closed(self) -> None:
        self._discard_wire()
        with self._changed:
            self._state, self._detail = "closed", ""
            left = self._outgoing.give_up()
            self._changed.notify_all()
        for publish in left:
            self._sending.done(publish, well=False)
        self._subscriptions.fail()
        log.info("link.closed", broker=self.where, given_up=len(left))

    # --- small things ---

    def _make_wire(self) -> PahoWire:
        version = self._attempts.versions.current
        if self._wire is None or not self._wires.fits(self._wire, version):
            self._discard_wire()
            self._wire = self._wires.make(version, will=self._will, events=self)
        return self._wire

    def _discard_wire(self) -> None:
        """Drop the client; what it had in flight is sent anew by the next one."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort()
        with self._lock:
            self._outgoing.requeue()

    def _last_message_done(self, well: bool) -> None:
        if self._closing is not None:
            self._closing.said = well

    def _info(self) -> LinkInfo:
        wire = self._wire
        return LinkInfo(
            state=self._state,
            detail=self._detail,
            protocol=wire.version if wire is not None and self._state == "online" else None,
            max_payload_bytes=self.max_payload_bytes(),
            reconnects=max(0, self._connections - 1),
            unacknowledged=len(self._outgoing),
            outbox_bytes=self._sending.held_bytes(),
            last_puback_at=self._sending.last_puback_at,
            poisoned=self._sending.poisoned,
        )
