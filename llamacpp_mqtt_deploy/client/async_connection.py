"""A client's connection to the broker inside an asyncio loop: no thread of its own, the same conduct as `Connection`."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from llamacpp_mqtt_deploy.client.address import BrokerAddress, explain_failure, not_permitted
from llamacpp_mqtt_deploy.client.exceptions import BrokerRefused, BrokerUnreachable, BusError, NotPermitted
from llamacpp_mqtt_deploy.client.paho_client import (
    IN_FLIGHT,
    LONGEST_PAUSE_S,
    OUTGOING_MESSAGES,
    REFUSED,
    Acknowledgements,
    Spoken,
    TryOlder,
    check_connack,
    check_size,
    client_options,
    configure,
    connect_arguments,
    guarded,
    publish_properties,
    versions,
)
from llamacpp_mqtt_deploy.mqtt.gathering_client import GatheringClient, tune_socket

log = logging.getLogger(__name__)  # the host program's log: this part is a library

MISC_EVERY_S = 0.5
"""How often paho looks at its keepalive."""
MOST_READS = 64
"""Packets read in one turn of the loop, so that a flood of events leaves the HTTP side its turn."""
OUTGOING_BYTES = 64 * 1024 * 1024
"""Requests without PUBACK, in bytes."""
SUBSCRIBED_WITHIN_S = 10.0


class AsyncConnection:
    """One paho client in the running loop. The callbacks run in the loop and must return at once.

    `on_message(topic, payload, retain)`; `on_ready()` after every (re)connect when all filters are granted again;
    `on_lost()`; `on_refused(filter, reason)` when a filter that was granted is refused after a reconnect.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        on_message: Callable[[str, bytes, bool], None],
        on_ready: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
        on_refused: Callable[[str, str], None] = lambda _filter, _reason: None,
    ) -> None:
        self.address = address
        self.protocol: Spoken | None = None
        self.max_packet_bytes: int | None = None
        self._on_message = on_message
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._client_id = address.client_id or f"lmd-client-{secrets.token_hex(6)}"
        self._paho: GatheringClient | None = None
        self._fd = -1
        self._ready = False
        self._closing = False
        self._filters: dict[str, asyncio.Event] = {}
        self._refusals: dict[str, str] = {}
        self._acknowledgements = Acknowledgements()
        self._outgoing_bytes = 0
        self._flush_due = False
        self._writing = False
        self._misc: asyncio.TimerHandle | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._connack: asyncio.Future[ReasonCode | None] | None = None
        self._suback: asyncio.Future[Sequence[ReasonCode] | None] | None = None

    # --- open and close ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect within `connect_timeout_s`; raises `BrokerUnreachable` or `BrokerRefused`."""
        first_refusal: BusError | None = None
        self._closing = False  # after an attempt that was given up
        self._lost.clear()
        for version in versions(self.address):
            try:
                await self._connect(version)
            except TryOlder as error:
                first_refusal = first_refusal or error.reason
                continue
            self.protocol = version
            self._ready = True
            self._keeper = asyncio.create_task(self._keep_connected(), name="lmd-bus-connection")
            return
        assert first_refusal is not None
        raise first_refusal

    async def close(self, *, timeout_s: float = 2.0) -> None:
        """Disconnect; returns within about `timeout_s` and idempotent."""
        self._closing = True
        self._ready = False
        try:
            if self._keeper is not None:
                self._keeper.cancel()
                await asyncio.wait((self._keeper,))
                self._keeper = None
            client = self._paho
            if client is None:
                return
            loop = asyncio.get_running_loop()
            ends_at = loop.time() + timeout_s
            while client.holds_unsent() and self._fd >= 0 and loop.time() < ends_at:
                self._flush()
                if client.holds_unsent():
                    await asyncio.sleep(0.01)
            client.disconnect()
            self._flush()
        finally:
            self._drop()

    async def _connect(self, version: Spoken) -> None:
        """One attempt: CONNECT, and the wait for the CONNACK. The name is resolved and the socket opened in a worker thread,
        since neither paho nor the resolver can do without waiting. Raises as `check_connack`, and `BrokerUnreachable`."""
        client = self._build(version)
        opening = asyncio.get_running_loop().run_in_executor(
            None, lambda: client.connect(**connect_arguments(self.address, version))
        )
        try:
            # TCP, TLS and a websocket's handshake each have a limit of their own; a resolver has none.
            async with asyncio.timeout(4 * self.address.connect_timeout_s):
                await asyncio.shield(opening)
        except (TimeoutError, asyncio.CancelledError) as error:
            opening.add_done_callback(lambda done: _discard(client, done))
            if isinstance(error, asyncio.CancelledError):
                raise
            raise BrokerUnreachable(explain_failure(TimeoutError(), self.address)) from error
        except (OSError, ValueError) as error:
            if client.last_socket is not None:
                client.last_socket.close()
            raise BrokerUnreachable(explain_failure(error, self.address)) from error
        self._paho = client
        self._connack = asyncio.get_running_loop().create_future()
        self._attach(client)
        try:
            async with asyncio.timeout(self.address.connect_timeout_s):
                connack = await asyncio.shield(self._connack)
            in_time = True
        except TimeoutError:
            connack, in_time = None, False
        except asyncio.CancelledError:
            self._drop()
            raise
        finally:
            self._connack = None
        if connack is None or connack.value >= REFUSED:
            self._drop()
        check_connack(connack, self.address, in_time=in_time)
        if self._fd < 0:
            raise BrokerUnreachable(f"The broker at {self.address} closed the connection right after its welcome.")

    def _build(self, version: Spoken) -> GatheringClient:
        client = GatheringClient(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            transport="unix" if self.address.transport == "unix" else "tcp",
            reconnect_on_failure=False,
            **client_options(version),
        )
        configure(client, self.address, version, on_message=self._on_message)
        client.max_inflight_messages_set(IN_FLIGHT)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_publish = lambda _c, _u, mid, reason, _p: self._acknowledgements.came(mid, [reason])
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: self._acknowledgements.came(mid, reasons)
        # With this set paho never writes by itself: what a turn of the loop queues goes out in one write.
        client.on_socket_register_write = lambda *_: None
        return client

    async def _keep_connected(self) -> None:
        """Connect again whenever the connection is lost, with growing pauses; the request's own rules bound the waiting."""
        assert self.protocol is not None
        while True:
            await self._lost.wait()
            self._lost.clear()
            pause_s = 0.5
            while self._fd < 0:
                # Spread, so that the clients of a broker that restarts do not come in one go.
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                try:
                    await self._connect(self.protocol)
                    await self._subscribe_again()
                except TryOlder as error:
                    log.warning("bus.refused broker=%s reason=%s", self.address, error.reason)
                except BrokerRefused as error:
                    log.warning("bus.refused broker=%s reason=%s", self.address, error)
                except BusError as error:
                    log.debug("bus.unreachable broker=%s reason=%s", self.address, error)
                except Exception:
                    # Nothing may end the one task that brings the connection back.
                    log.exception("bus.reconnect_failed")
                    self._drop()

    async def _subscribe_again(self) -> None:
        """Ask for all filters at once and wait for the answer; then the connection is ready."""
        filters = dict(self._filters)
        if filters:
            reasons = await self._ask_for_all(filters)
            if reasons is None:
                self._drop()
                return
            self._resubscribed(filters, reasons)
        if self._fd < 0:
            return
        self._ready = True
        late = {name: granted for name, granted in self._filters.items() if name not in filters}
        for name, granted in late.items():  # asked for while this answer was on its way
            self._ask_for(name, granted)
        log.info("bus.connected broker=%s protocol=%s", self.address, self.protocol)
        guarded(self._on_ready)

    async def _ask_for_all(self, filters: Mapping[str, object]) -> Sequence[ReasonCode] | None:
        """The broker's answers to a SUBSCRIBE with these filters; None when there is none in time."""
        assert self._paho is not None
        code, mid = self._paho.subscribe([(name, 1) for name in filters])
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            return None
        answered: asyncio.Future[Sequence[ReasonCode] | None] = asyncio.get_running_loop().create_future()
        self._suback = answered
        self._acknowledgements.expect(mid, lambda reasons: _settle(answered, reasons))
        self._flush_soon()
        try:
            async with asyncio.timeout(SUBSCRIBED_WITHIN_S):
                return await answered
        except TimeoutError:
            return None
        finally:
            self._suback = None

    def _resubscribed(self, filters: Mapping[str, asyncio.Event], reasons: Sequence[ReasonCode]) -> None:
        for (name, granted), reason in zip(filters.items(), reasons, strict=False):
            if not self._judge(name, reason):
                self._on_refused(name, str(reason))
            granted.set()

    # --- subscribe and publish ---------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Connected, and every filter is granted."""
        return self._ready

    async def subscribe(self, topic_filter: str, *, timeout_s: float = SUBSCRIBED_WITHIN_S) -> None:
        """Subscribe at QoS 1 and wait for SUBACK; kept over reconnects. Raises `NotPermitted`, `BrokerUnreachable`.

        While the connection is lost it only remembers the filter: `on_ready` tells when it is granted.
        """
        granted = self._filters.get(topic_filter)
        if granted is None:
            granted = self._filters[topic_filter] = asyncio.Event()
            self._ask_for(topic_filter, granted)
        if self._ready and not granted.is_set():
            try:
                async with asyncio.timeout(timeout_s):
                    await granted.wait()
            except TimeoutError:
                if self._ready:
                    self._forget(topic_filter)
                    raise BrokerUnreachable(
                        f"The broker at {self.address} left a subscription unanswered for {timeout_s:g} s."
                    ) from None
        reason = self._refusals.get(topic_filter)
        if reason is not None:
            raise NotPermitted(not_permitted("subscribe to", topic_filter, self.address, reason))

    def _ask_for(self, topic_filter: str, granted: asyncio.Event) -> None:
        def answered(reasons: list[ReasonCode]) -> None:
            self._judge(topic_filter, reasons[0])
            granted.set()

        if self._paho is not None and self._ready:
            code, mid = self._paho.subscribe(topic_filter, 1)
            self._flush_soon()
            if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
                self._acknowledgements.expect(mid, answered)

    def _judge(self, topic_filter: str, reason: ReasonCode) -> bool:
        """Remember whether the broker granted this filter; true when it did."""
        if reason.value < REFUSED:
            self._refusals.pop(topic_filter, None)
            return True
        self._refusals[topic_filter] = str(reason)
        self._filters.pop(topic_filter, None)
        return False

    def unsubscribe(self, topic_filter: str) -> None:
        self._forget(topic_filter)
        if self._paho is not None and self._ready:
            self._paho.unsubscribe(topic_filter)
            self._flush_soon()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        expiry_s: int | None = None,
        on_ack: Callable[[int, str], None] = lambda _value, _reason: None,
    ) -> bool:
        """Publish at QoS 1; False while the connection is lost (nothing is kept). `on_ack` gets the PUBACK's reason, which on
        3.1.1 is always success; it is not called when the connection is lost first. Raises `BusError` for what no broker takes.
        """
        if not self._ready or self._paho is None:
            return False
        check_size(topic, payload, self.max_packet_bytes)
        if self._outgoing_bytes + len(payload) > OUTGOING_BYTES:
            raise BusError(f"More than {OUTGOING_BYTES} bytes wait for the broker's acknowledgement.")
        properties = publish_properties(self.protocol, expiry_s)
        info = self._paho.publish(topic, payload, qos=1, retain=retain, properties=properties)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise BusError(f"More than {OUTGOING_MESSAGES} messages wait for the broker's acknowledgement.")
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        self._outgoing_bytes += len(payload)

        def acknowledged(reasons: list[ReasonCode]) -> None:
            self._outgoing_bytes -= len(payload)
            on_ack(reasons[0].value, str(reasons[0]))

        self._acknowledgements.expect(info.mid, acknowledged)
        self._flush_soon()
        return True

    def _forget(self, topic_filter: str) -> None:
        self._filters.pop(topic_filter, None)
        self._refusals.pop(topic_filter, None)

    # --- the socket --------------------------------------------------------------------------------------------------

    def _attach(self, client: GatheringClient) -> None:
        """Let the loop watch paho's socket."""
        sock: Any = client.socket()
        if sock is None:  # hung up between the thread and here
            self._ended()
            return
        client.on_socket_close = lambda *_: self._detach()
        self._fd = sock.fileno()
        if self.address.transport != "unix":
            tune_socket(self._fd, keepalive_s=self.address.keepalive_s)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fd, self._readable)
        self._misc = loop.call_later(MISC_EVERY_S, self._look_at_the_keepalive)
        self._flush()
        if client.holds_unread():
            loop.call_soon(self._readable)

    def _detach(self) -> None:
        if self._fd < 0:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._fd)
        loop.remove_writer(self._fd)
        self._fd, self._writing = -1, False
        if self._misc is not None:
            self._misc.cancel()
            self._misc = None

    def _readable(self) -> None:
        client = self._paho
        if client is None or self._fd < 0:
            return
        self._act(client.read_some)
        for _ in range(MOST_READS):
            if self._fd < 0 or not client.holds_unread():
                break
            self._act(client.read_some)
        if self._fd >= 0 and client.holds_unread():
            asyncio.get_running_loop().call_soon(self._readable)
        self._flush()

    def _flush_soon(self) -> None:
        """Write at the end of this turn of the loop."""
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        client = self._paho
        if client is None or self._fd < 0:
            self._notice_end()
            return
        if client.holds_unsent():
            self._act(client.write_some)
        self._notice_end()
        if self._fd < 0:
            return
        wanted = client.holds_unsent()
        if wanted != self._writing:
            loop = asyncio.get_running_loop()
            if wanted:
                loop.add_writer(self._fd, self._flush)
            else:
                loop.remove_writer(self._fd)
            self._writing = wanted

    def _look_at_the_keepalive(self) -> None:
        if self._paho is None or self._fd < 0:
            return
        self._misc = asyncio.get_running_loop().call_later(MISC_EVERY_S, self._look_at_the_keepalive)
        self._act(self._paho.loop_misc)
        self._flush()

    def _act(self, call: Callable[[], object]) -> None:
        """Let paho work; what it cannot bear ends this connection, and the next one begins anew."""
        try:
            call()
        except Exception:
            log.exception("bus.connection_failed")
            self._drop()

    def _notice_end(self) -> None:
        if self._paho is not None and self._paho.socket() is None:
            self._detach()
            self._ended()

    def _drop(self) -> None:
        """Close the socket at once, whatever state it is in."""
        client = self._paho
        if client is not None and client.socket() is not None:
            # Closes the socket and only stores the address: paho's one public way to hang up without DISCONNECT.
            client.connect_async(self.address.host or "-", 1)
        self._detach()
        self._ended()

    def _ended(self) -> None:
        """The connection is over; once for each."""
        client, self._paho = self._paho, None
        if client is None:
            return
        _settle(self._connack, None)
        _settle(self._suback, None)
        was_ready, self._ready = self._ready, False
        self._acknowledgements.clear()
        self._outgoing_bytes = 0
        if not self._closing and self.protocol is not None:
            self._lost.set()
        if was_ready and not self._closing:
            log.info("bus.lost broker=%s", self.address)
            guarded(self._on_lost)

    # --- paho's callbacks, in the loop -------------------------------------------------------------------------------

    def _connected(self, _client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        _settle(self._connack, reason)

    def _disconnected(
        self, _client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        log.debug("bus.disconnected broker=%s reason=%s", self.address, reason)


def _settle(future: asyncio.Future[Any] | None, value: Any) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _discard(client: GatheringClient, opening: asyncio.Future[Any]) -> None:
    """An attempt that ended after nobody waited for it any more."""
    if not opening.cancelled():
        opening.exception()  # heard, so that asyncio does not complain
    if client.last_socket is not None:
        client.last_socket.close()
