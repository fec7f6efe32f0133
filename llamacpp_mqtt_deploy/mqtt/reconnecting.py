"""What the ends of attempts and connections teach: which MQTT version comes next, when, and what the operator should know."""

from __future__ import annotations

import structlog

from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.mqtt import explain
from llamacpp_mqtt_deploy.mqtt.backoff import STABLE_AFTER_S, Backoff, VersionChoice
from llamacpp_mqtt_deploy.mqtt.explain import Refusal
from llamacpp_mqtt_deploy.mqtt.paho_wire import Closed, Connack
from llamacpp_mqtt_deploy.mqtt.receiving import STALL_S

log = structlog.get_logger(__name__)


_NO_REASON = 0x80
"""The reason code for a DISCONNECT that does not want to say why."""


class Attempts:
    """The memory of a link from one attempt to the next; the link's thread alone."""

    def __init__(self, settings: MqttSettings, *, where: str) -> None:
        self.versions = VersionChoice(settings.protocol)
        self.backoff = Backoff(settings.reconnect_max_s)
        self._where = where
        self._tls = settings.tls.enabled
        self._refusal: Refusal | None = None
        self._version_refused = False
        self.short_lives = 0
        """Connections in a row that the other side ended within seconds, without a reason."""

    def begin(self, now: float) -> None:
        """Choose the version for another attempt."""
        self.versions.before_attempt(now)
        self._refusal, self._version_refused = None, False

    def accepted(self, answer: Connack) -> bool:
        """Whether this CONNACK opens a connection; what it complains of is kept for `ended`."""
        if answer.code == explain.UNSUPPORTED_VERSION:
            self._version_refused = True
            self._refusal = explain.of_connack(answer.code, answer.name)
            return False
        self.versions.answered()
        if answer.code != 0:
            self._refusal = explain.of_connack(answer.code, answer.name)
            return False
        if not answer.qos_1_available:
            self._refusal = explain.of_connack(0x9B, answer.name)
            return False
        return True

    def ended(self, closed: Closed) -> Refusal | None:
        """The other side hung up before the connection was established; None when the other version is next, at once."""
        refusal = self._refusal
        # paho keeps the refusal of a 3.1.1 CONNECT for its version to itself.
        if self._version_refused or (refusal is None and closed.unreadable and self.versions.current == "3.1.1"):
            if self.versions.refused():
                log.info("link.fell_back", broker=self._where, protocol=self.versions.current)
                self.backoff.ended(float("inf"))
                return None
            refusal = refusal or explain.of_connack(explain.UNSUPPORTED_VERSION, "")
        elif refusal is None:
            refusal = explain.of_tls_text(closed.error, self._where)
            if refusal is None:
                if closed.unreadable:
                    refusal = Refusal(
                        f"What answers at {self._where} does not speak MQTT. Check mqtt.host and mqtt.port."
                    )
                else:
                    refusal = explain.of_silence(self._where, tls=self._tls)
                    self.unanswered(refusal)
        return refusal

    def unanswered(self, refusal: Refusal) -> None:
        """No CONNACK came: the other version may be next."""
        if self.versions.unanswered():
            log.info("link.fell_back", broker=self._where, protocol=self.versions.current, why=refusal.text)

    def lost(self, closed: Closed, now: float, *, lived_s: float, in_flight: bool, ours: bool) -> None:
        """An established connection ended; `in_flight` when publishes were, which may be why, `ours` when we ended it."""
        self.backoff.ended(lived_s)
        unexplained = not (closed.from_broker and closed.code != _NO_REASON) and not closed.unreadable and not ours
        self.short_lives = self.short_lives + 1 if unexplained and lived_s < STABLE_AFTER_S else 0
        self.versions.lost(now)
        if closed.unreadable and not in_flight:
            self.versions.unreadable()
        elif lived_s > STALL_S:
            self.versions.readable()
