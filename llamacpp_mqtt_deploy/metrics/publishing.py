"""Starts and stops what `[metrics]` asks for."""

from __future__ import annotations

from collections.abc import Callable

from llamacpp_mqtt_deploy.config import listen_address
from llamacpp_mqtt_deploy.config.settings import MetricsSettings
from llamacpp_mqtt_deploy.metrics.exposition import Exposition
from llamacpp_mqtt_deploy.metrics.http_listener import HttpListener
from llamacpp_mqtt_deploy.metrics.readings import Readings
from llamacpp_mqtt_deploy.metrics.textfile import TextFile


class Metrics:
    """At most two threads: one for HTTP, one for the file."""

    def __init__(self, settings: MetricsSettings, read: Callable[[], Readings]) -> None:
        exposition = Exposition(read)
        self.listener: HttpListener | None = None
        self.file: TextFile | None = None
        if settings.listen is not None:
            self.listener = HttpListener(listen_address.parse(settings.listen), exposition.page)
        if settings.textfile is not None:
            self.file = TextFile(settings.textfile, exposition.file)

    def start(self) -> None:
        for part in (self.listener, self.file):
            if part is not None:
                part.start()

    def close(self, timeout_s: float) -> None:
        for part in (self.listener, self.file):
            if part is not None:
                part.close(timeout_s)
