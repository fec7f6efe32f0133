"""Makes the wire for the next attempt: the last one again, or another where version, password or TLS files have changed."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from llamacpp_mqtt_deploy.config.credentials import CredentialError
from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.core.reminding import Reminder
from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.paho_wire import PahoWire, WireEvents
from llamacpp_mqtt_deploy.mqtt.tls import build_context, stamps
from llamacpp_mqtt_deploy.ports import Retained

log = structlog.get_logger(__name__)


class TlsFilesUnfitError(ValueError):
    """A TLS file vanished or broke after the start; the next attempt looks again."""


class WireFactory:
    """Knows what every wire of a link has in common. Raises ValueError, from the constructor, when a TLS file is unfit.

    `password` is asked before each attempt: its file may be renewed while we run.
    """

    def __init__(
        self,
        settings: MqttSettings,
        *,
        client_id: str,
        password: Callable[[], str | None],
        max_incoming_bytes: Callable[[], int] | None,
        where: str,
    ) -> None:
        self._settings = settings
        self._client_id = client_id
        self._read_password = password
        self._password = password()
        self._where = where
        self._reminder = Reminder()
        self._max_incoming_bytes = max_incoming_bytes
        self._stamps = stamps(settings.tls)
        if settings.tls.enabled:
            build_context(settings.tls)
            if settings.tls.insecure:
                log.warning(
                    "link.insecure", broker=where, why="mqtt.tls.insecure is set: anyone can pose as this broker"
                )

    def fits(self, wire: PahoWire, version: Version) -> bool:
        """Whether the next attempt may use this wire again."""
        return (
            wire.version == version
            and stamps(self._settings.tls) == self._stamps
            and self._latest_password() == self._password
        )

    def make(self, version: Version, *, will: Retained, events: WireEvents) -> PahoWire:
        """A new wire. Raises TlsFilesUnfitError."""
        found = stamps(self._settings.tls)
        context = None
        if self._settings.tls.enabled:
            try:
                context = build_context(self._settings.tls)
            except ValueError as error:
                raise TlsFilesUnfitError(str(error)) from error
        self._stamps = found
        self._password = self._latest_password()
        return PahoWire(
            self._settings,
            version=version,
            client_id=self._client_id,
            password=self._password,
            will=will,
            tls=context,
            events=events,
            max_incoming_bytes=self._max_incoming_bytes,
        )

    def _latest_password(self) -> str | None:
        """The password as its file has it now; the last one while the file cannot be read."""
        try:
            return self._read_password()
        except CredentialError as problem:
            if self._reminder.due(str(problem), time.monotonic()):
                log.warning(
                    "link.password_unreadable", broker=self._where, why=str(problem), message="the last one is used"
                )
            return self._password
