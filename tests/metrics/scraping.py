"""Reads a worker's metrics as Prometheus would: over HTTP, through the parser of its own library."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser

from llamacpp_mqtt_deploy.service.daemon import Daemon
from tests.support.waiting import eventually

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@dataclass(frozen=True, slots=True)
class Reply:
    """What came over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: str


def address_of(daemon: Daemon) -> str:
    """Where the metrics of this worker are, once they are there."""
    metrics = daemon.parts.metrics
    assert metrics is not None
    listener = metrics.listener
    assert listener is not None
    eventually(lambda: listener.shown)
    return listener.shown


def get(url: str, *, method: str = "GET", path: str = "/metrics", timeout_s: float = 10.0, **headers: str) -> Reply:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        connection = HTTPConnection("worker", timeout=timeout_s)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout_s)
        connection.sock.connect(parts.path)
    else:
        assert parts.hostname is not None
        connection = HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Scrape:
    """The metrics at one moment; `metrics["lmd_slots"]`, or with labels `value("lmd_queue_requests", lane="batch")`."""

    families: Mapping[str, Metric]

    def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) == 1, f"{name}{labels} is there {len(found)} times"
        return float(found[0])

    def names(self) -> set[str]:
        """The names of all series."""
        return {sample.name for family in self.families.values() for sample in family.samples}


def parsed(text: str) -> Scrape:
    read: Any = parser.text_string_to_metric_families  # it has no types
    return Scrape({family.name: family for family in read(text)})


def scrape(url: str) -> Scrape:
    reply = get(url, Accept=OPENMETRICS)
    assert reply.status == 200, reply.body
    return parsed(reply.body)


def scrape_after(url: str, ended: int) -> Scrape:
    """The metrics once so many requests have ended in them, which is a moment after a client has the terminal event."""
    told: list[Scrape] = []

    def counted() -> bool:
        told[:] = [scrape(url)]
        samples = told[0].families["lmd_requests_ended"].samples
        return sum(sample.value for sample in samples if sample.name.endswith("_total")) >= ended

    eventually(counted)
    return told[0]


@contextmanager
def raw(url: str, timeout_s: float = 20.0) -> Iterator[socket.socket]:
    """A connection to say whatever one likes over."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout_s) as sock:
        yield sock


def all_of(sock: socket.socket) -> bytes:
    """Everything until the other side ends, a reset included."""
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received
