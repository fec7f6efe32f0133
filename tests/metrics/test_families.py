"""The table of metrics: names and units by Prometheus' rules, labels of bounded number, counters that begin with 0."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.core.errors import BY_CODE
from llamacpp_mqtt_deploy.metrics.exposition import Exposition, WorkerCollector
from llamacpp_mqtt_deploy.metrics.families import FAMILIES, OTHER, MetricFamily
from llamacpp_mqtt_deploy.metrics.readings import Readings
from llamacpp_mqtt_deploy.service.assembly import Parts
from llamacpp_mqtt_deploy.testing.loopback_broker import LoopbackBroker
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from tests.metrics.scraping import OPENMETRICS, parsed
from tests.support.whole_worker import WholeWorker

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """Those of a worker that was not started yet."""
    settings = {"sessions.path": str(tmp_path / "state.db"), "mqtt.worker_id": "w1"}
    return WholeWorker(broker=LoopbackBroker(), engine=ScriptedEngine(), settings=settings).daemon.parts


@pytest.fixture
def readings(parts: Parts) -> Readings:
    return parts.measuring.read()


@each_family
def test_a_name_follows_the_rules_of_prometheus(family: MetricFamily) -> None:
    """https://prometheus.io/docs/practices/naming: a prefix, base units at the end, `_total` for what only grows."""
    assert re.fullmatch(r"lmd(_[a-z]+)+", family.name)
    assert family.name.endswith("_total") == (family.kind == "counter")
    assert family.name.endswith("_info") == (family.kind == "info")
    assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|mib|percent|count|sum|bucket|created)(_|$)", family.name)
    if family.kind == "histogram":
        assert family.name.endswith("_seconds")


@each_family
def test_a_meaning_is_one_line_that_ends_as_a_sentence(family: MetricFamily) -> None:
    assert "\n" not in family.meaning
    assert family.meaning.endswith(".")


@each_family
def test_no_label_is_chosen_by_a_client(family: MetricFamily) -> None:
    assert set(family.labels) <= {"lane", "outcome", "code", "kind"}


@each_family
def test_every_series_is_there_from_the_start_and_counts_from_nothing(family: MetricFamily, readings: Readings) -> None:
    samples = list(family.read(readings))
    assert samples
    assert len(samples) == len({values for values, _ in samples})
    assert all(len(values) == len(family.labels) for values, _ in samples)
    if family.kind == "counter" and family.name != "lmd_cpu_seconds_total":
        assert {value for _, value in samples} == {0.0}


def test_names_are_unique(readings: Readings) -> None:
    assert [name for name, times in Counter(family.name for family in FAMILIES).items() if times > 1] == []
    assert len(list(WorkerCollector(lambda: readings).collect())) == len(FAMILIES)


def test_a_worker_has_some_two_hundred_series_and_no_more_however_it_is_used(parts: Parts) -> None:
    before = _series(parts)
    parts.counters.refused("a code that nobody knows")
    parts.counters.refused("busy")
    assert _series(parts) == before < 300
    refused = next(family for family in FAMILIES if family.name == "lmd_requests_refused_total")
    assert dict(refused.read(parts.measuring.read()))[(OTHER,)] == 1


def _series(parts: Parts) -> int:
    return sum(len(metric.samples) for metric in WorkerCollector(parts.measuring.read).collect())


def test_every_code_of_the_protocol_has_its_series(readings: Readings) -> None:
    for name in ("lmd_requests_failed_total", "lmd_requests_refused_total"):
        family = next(family for family in FAMILIES if family.name == name)
        assert {values[0] for values, _ in family.read(readings)} >= set(BY_CODE)


def test_whoever_asks_often_is_given_what_was_read_a_moment_ago(readings: Readings) -> None:
    reads, now = [], [100.0]

    def read() -> Readings:
        reads.append(now[0])
        return readings

    exposition = Exposition(read, clock=lambda: now[0])
    for _ in range(100):
        exposition.page(OPENMETRICS)
        exposition.page("")
        now[0] += 0.001
    assert len(reads) == 2  # one for each format
    now[0] += 1.0
    exposition.page("")
    assert len(reads) == 3


def test_no_accept_header_breaks_the_page_or_grows_the_memory(readings: Readings) -> None:
    exposition = Exposition(lambda: readings)
    for version in ("1.0.0", "0.0.1", "9.9.9", "1.0.0.0.0", "-1", "x", "", "1.0.0\x00", "²"):
        for kind in ("application/openmetrics-text", "text/plain"):
            for escaping in ("", ";escaping=allow-utf-8", ";escaping=x\r\nX: y"):
                text, content_type = exposition.page(f"{kind};version={version}{escaping}")
                assert b"lmd_slots" in text
                assert content_type.isprintable()
    assert len(exposition._kept) <= 4


def test_openmetrics_parses_and_knows_the_units(readings: Readings) -> None:
    text, _ = Exposition(lambda: readings).page(OPENMETRICS)
    families = parsed(text.decode()).families
    assert families["lmd_first_token_seconds"].unit == "seconds"
    assert families["lmd_outbox_bytes"].unit == "bytes"
    assert families["lmd_engine_state"].type == "stateset"
