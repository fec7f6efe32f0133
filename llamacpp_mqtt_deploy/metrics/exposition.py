"""Writes the metrics in the formats of Prometheus; the one place that needs its library."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, cast

from prometheus_client import core, exposition
from prometheus_client.utils import floatToGoString

from llamacpp_mqtt_deploy.core.histogram import HistogramReading
from llamacpp_mqtt_deploy.metrics.families import FAMILIES, MetricFamily
from llamacpp_mqtt_deploy.metrics.readings import Readings

FRESH_S = 0.25
"""Whoever asks again within this time gets the same answer: asking often must not cost the worker much."""
MOST_KEPT = 4
"""Formats whose answers are kept."""
_UNITS = ("seconds", "bytes")


class WorkerCollector:
    """The metrics as families of the library, made anew at each `collect` (its custom collectors do the same)."""

    def __init__(self, read: Callable[[], Readings]) -> None:
        self._read = read

    def collect(self) -> Iterator[core.Metric]:
        readings = self._read()
        for family in FAMILIES:
            yield _metric(family, readings)


class Exposition:
    """The text that Prometheus reads, in the format that it asks for; may be used from any thread."""

    def __init__(self, read: Callable[[], Readings], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._collector = WorkerCollector(read)
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, bytes]] = {}

    def page(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type for an Accept header."""
        try:
            encode, content_type = exposition.choose_encoder(accept)
        except (ValueError, TypeError):  # a version that is none: `x` is compared with numbers
            encode, content_type = exposition.generate_latest, exposition.CONTENT_TYPE_PLAIN_0_0_4
        with self._lock:
            now = self._clock()
            kept = self._kept.get(content_type)
            if kept is not None and now - kept[0] < FRESH_S:
                return kept[1], content_type
            text: bytes = encode(cast("Any", self._collector))
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[content_type] = (now, text)
            return text, content_type

    def file(self) -> bytes:
        """The text for node-exporter, which reads the classic format only."""
        text: bytes = exposition.generate_latest(cast("Any", self._collector))
        return text


def _metric(family: MetricFamily, readings: Readings) -> core.Metric:
    labels = ("worker", *family.labels)
    unit = next((unit for unit in _UNITS if family.name.removesuffix("_total").endswith(f"_{unit}")), "")
    samples = [((readings.worker, *values), value) for values, value in family.read(readings)]
    match family.kind:
        case "counter":
            counter = core.CounterMetricFamily(family.name, family.meaning, labels=labels, unit=unit)
            for values, value in samples:
                counter.add_metric(values, cast("float", value))
            return counter
        case "gauge":
            gauge = core.GaugeMetricFamily(family.name, family.meaning, labels=labels, unit=unit)
            for values, value in samples:
                gauge.add_metric(values, cast("float", value))
            return gauge
        case "histogram":
            histogram = core.HistogramMetricFamily(family.name, family.meaning, labels=labels, unit=unit)
            for values, value in samples:
                reading = cast("HistogramReading", value)
                bounds = chain(map(floatToGoString, reading.bounds), ("+Inf",))
                buckets = list(zip(bounds, map(float, reading.cumulative), strict=True))
                histogram.add_metric(values, buckets, reading.sum)
            return histogram
        case "stateset":
            states = core.StateSetMetricFamily(family.name, family.meaning, labels=labels)
            for values, value in samples:
                states.add_metric(values, dict(cast("Mapping[str, bool]", value)))
            return states
        case "info":
            info = core.InfoMetricFamily(family.name.removesuffix("_info"), family.meaning, labels=labels)
            for values, value in samples:
                info.add_metric(values, dict(cast("Mapping[str, str]", value)))
            return info
