"""A worker on the bus, as Home Assistant's own MQTT connection sees it: its status, and the requests that are under way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

from homeassistant.components import mqtt
from homeassistant.config_entries import ConfigEntry
from homeassistant.core import CALLBACK_TYPE, HomeAssistant, callback
from homeassistant.exceptions import HomeAssistantError
from homeassistant.helpers import issue_registry as ir
from homeassistant.helpers.event import async_call_later
from homeassistant.helpers.json import json_bytes
from homeassistant.util.ulid import ulid_now

from .asking import Asking, Unanswered
from .const import (
    CONF_FIRST_LEVEL,
    CONF_ROOT,
    CONF_WORKER,
    DOMAIN,
    GONE_AFTER_S,
    LIVE_RENEWALS,
    LOGGER,
    MAX_ASKINGS,
    STATUS_WITHIN_S,
    TIMEOUT_S,
)
from .errors import sentence_error, unanswered_error
from .resend_rules import ResendRules, WhyEnded
from .worker_status import WorkerStatus, parse_status

BusWorkerEntry: TypeAlias = "ConfigEntry[BusWorker]"


class BusWorker:
    """Follows one worker from `start` until the config entry is unloaded."""

    def __init__(self, hass: HomeAssistant, entry: BusWorkerEntry) -> None:
        self.hass = hass
        self.entry = entry
        self.root: str = entry.data[CONF_ROOT]
        self.name: str = entry.data[CONF_WORKER]
        # One session for all requests: it carries no history, and the subscription stands before the first of them.
        self._session = f"{entry.data[CONF_FIRST_LEVEL]}/{entry.entry_id}"
        self.status: WorkerStatus | None = None
        self.counts = {"asked": 0, "ended": 0, "errors": 0, "cancelled": 0}
        self.last_error: str | None = None
        self._askings: dict[str, Asking] = {}
        self._listeners: set[CALLBACK_TYPE] = set()
        self._connected = False
        self._subscribed = False
        self._told_since_connect = False
        self._stale: CALLBACK_TYPE | None = None
        self._gone: CALLBACK_TYPE | None = None
        self._available = False
        self._first_status = asyncio.Event()

    def topic(self, kind: str) -> str:
        """The session's topic of this kind: request, reply or control."""
        return f"{self.root}/{kind}/{self._session}"

    @property
    def status_topic(self) -> str:
        return f"{self.root}/status/{self.name}"

    @property
    def available(self) -> bool:
        """The broker is connected, the replies are subscribed, the worker is online and has lately said so."""
        return self._available

    async def start(self) -> None:
        """Subscribe, and watch the connection."""
        unload = self.entry.async_on_unload
        self._connected = mqtt.is_connected(self.hass)
        unload(mqtt.async_subscribe_connection_status(self.hass, self._connection_changed))
        unload(await mqtt.async_subscribe(self.hass, self.status_topic, self._status_received, qos=1))
        unload(await mqtt.async_subscribe(self.hass, self.topic("reply"), self._event_received, qos=1))
        unload(mqtt.async_on_subscribe_done(self.hass, self.topic("reply"), 1, self._reply_subscribed))
        unload(self._stop)
        self._watch_gone()
        # What the broker keeps of the status comes at once; the entities' devices tell model and version.
        with suppress(TimeoutError):
            async with asyncio.timeout(STATUS_WITHIN_S):
                await self._first_status.wait()

    @callback
    def listen(self, changed: CALLBACK_TYPE) -> CALLBACK_TYPE:
        """Call `changed` when the status or the availability changes; returns what ends that."""
        self._listeners.add(changed)
        return lambda: self._listeners.discard(changed)

    @asynccontextmanager
    async def asking(self, body: Mapping[str, Any], *, wait_for_worker: bool = False) -> AsyncIterator[Asking]:
        """Ask; left before the end, by a cancelled task too, it cancels the request on the worker.

        A worker that is away is told at once, unless `wait_for_worker`: then it has as long to come back as in mid-answer.
        """
        if not self._available and not wait_for_worker:
            raise unanswered_error(self, self._why_away())
        if len(self._askings) >= MAX_ASKINGS:
            raise sentence_error("too_many_requests", worker=self.name)
        request_id = ulid_now()
        payload = json_bytes({"request_id": request_id, "timeout_s": TIMEOUT_S, **body})
        heartbeat_s = 15.0
        if self.status is not None:
            heartbeat_s = self.status.heartbeat_s
            if len(payload) > self.status.max_request_bytes:
                most = self.status.max_request_bytes // 1024
                raise sentence_error("request_too_large", kib=str(len(payload) // 1024 + 1), most=str(most))
        cancel = json_bytes({"action": "cancel", "request_id": request_id})
        asking = Asking(
            request_id,
            ResendRules(heartbeat_s=heartbeat_s, timeout_s=TIMEOUT_S),
            deliver=lambda: self._publish("request", payload),
            cancel=lambda: self._publish("control", cancel),
        )
        if not self._available:
            asking.away(self._why_away())
        self._askings[request_id] = asking
        self.counts["asked"] += 1
        try:
            yield asking
        except Unanswered as error:
            raise unanswered_error(self, error.why) from error
        finally:
            del self._askings[request_id]
            self._count(asking)
            asking.close()

    def _count(self, asking: Asking) -> None:
        end = asking.end
        if end is None:
            self.counts["cancelled"] += 1
        elif end.get("type") == "done":
            self.counts["ended"] += 1
        else:
            self.counts["errors"] += 1
            self.last_error = str(end.get("code"))

    # --- the broker ----------------------------------------------------------------------------------------------------

    @callback
    def _publish(self, kind: str, payload: bytes) -> None:
        """Without waiting for the broker's acknowledgement: the rules for clients notice what is lost."""
        topic = self.topic(kind)

        async def publish() -> None:
            try:
                await mqtt.async_publish(self.hass, topic, payload, qos=1)
            except HomeAssistantError as error:
                LOGGER.debug("Publishing on %s: %s", topic, error)

        self.hass.async_create_task(publish(), f"{DOMAIN} publish {kind}")

    @callback
    def _connection_changed(self, connected: bool) -> None:
        self._connected = connected
        if not connected:
            self._subscribed = self._told_since_connect = False
        self._check()

    @callback
    def _reply_subscribed(self) -> None:
        """The broker has acknowledged the subscription (again): from now on no event is missed."""
        self._connected = self._subscribed = True
        self._check()

    @callback
    def _event_received(self, message: mqtt.ReceiveMessage) -> None:
        if message.retain:
            return
        try:
            event = json.loads(message.payload)
        except (ValueError, RecursionError):
            return
        asking = self._askings.get(str(event.get("request_id"))) if isinstance(event, dict) else None
        if asking is not None:
            asking.take(event)

    @callback
    def _status_received(self, message: mqtt.ReceiveMessage) -> None:
        self.status = parse_status(message.payload)
        self._told_since_connect = True
        self._first_status.set()
        if self._stale is not None:
            self._stale()
            self._stale = None
        if self.status is not None and self.status.online:
            self._stale = async_call_later(self.hass, LIVE_RENEWALS * self.status.every_s, self._status_is_stale)
        self._check(changed=True)

    @callback
    def _status_is_stale(self, _now: object) -> None:
        """Nobody renews it, and no will came: a power cut of broker and worker together, or a will that the broker lost."""
        self._stale = None
        self._told_since_connect = False
        self._check()

    # --- the worker's presence ------------------------------------------------------------------------------------------

    def _why_away(self) -> WhyEnded:
        return "no_worker" if self._connected and self._subscribed else "offline"

    def _check(self, *, changed: bool = False) -> None:
        online = self.status is not None and self.status.online
        available = self._connected and self._subscribed and self._told_since_connect and online
        if available != self._available:
            changed = True
            self._available = available
            self._watch_gone()
        for asking in tuple(self._askings.values()):
            if available:
                assert self.status is not None
                asking.back(self.status.heartbeat_s)
            else:
                asking.away(self._why_away())
        if changed:
            for listener in tuple(self._listeners):
                listener()

    def _watch_gone(self) -> None:
        """An issue once the worker has been away for some time; none as soon as it is back."""
        if self._gone is not None:
            self._gone()
            self._gone = None
        if self._available:
            ir.async_delete_issue(self.hass, DOMAIN, self.issue_id)
        else:
            self._gone = async_call_later(self.hass, GONE_AFTER_S, self._is_gone)

    @property
    def issue_id(self) -> str:
        return f"worker_gone_{self.entry.entry_id}"

    @callback
    def _is_gone(self, _now: object) -> None:
        self._gone = None
        if not self._connected:
            # The MQTT integration says that itself, for all that depends on it.
            self._watch_gone()
            return
        ir.async_create_issue(
            self.hass,
            DOMAIN,
            self.issue_id,
            is_fixable=False,
            severity=ir.IssueSeverity.WARNING,
            translation_key="worker_gone",
            translation_placeholders={
                "worker": self.name,
                "topic": self.status_topic,
                "reason": (self.status.reason if self.status is not None else None) or "-",
            },
        )

    @callback
    def _stop(self) -> None:
        for timer in (self._stale, self._gone):
            if timer is not None:
                timer()
        self._stale = self._gone = None
        for asking in tuple(self._askings.values()):
            asking.give_up("lost")  # its replies are no longer subscribed
        self._listeners.clear()
        ir.async_delete_issue(self.hass, DOMAIN, self.issue_id)
