"""The dashboard and the alerts name only metrics and labels that a worker has, and the page tells of all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.metrics.families import FAMILIES
from tests.metrics import dashboard
from tests.metrics.dashboard import Query
from tests.metrics.scraping import address_of, scrape
from tests.support.whole_worker import bus_in

OF_OTHERS = {"up", "node_textfile_mtime_seconds"}
LABELS = {"worker", "instance", "le", "job", "file", "lmd_worker_state", "lmd_engine_state"} | {
    label for family in FAMILIES for label in family.labels
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """The names of all series of a worker."""
    with bus_in(tmp_path_factory.mktemp("worker")) as bus:
        yield scrape(address_of(bus.worker(metrics__listen="127.0.0.1:0").daemon)).names()


@pytest.mark.parametrize("query", dashboard.queries(), ids=lambda query: query.panel)
def test_a_panel_asks_for_what_a_worker_has(query: Query, names: set[str]) -> None:
    named = dashboard.metrics_in(query.expression)
    assert named
    assert named <= names
    assert 'worker=~"$worker"' in query.expression
    assert set(re.findall(r"([a-z_]+)(?:=~?|!=)\"", query.expression)) <= LABELS


@pytest.mark.parametrize("expression", list(dashboard.expressions_of_rules()))
def test_an_alert_asks_for_what_a_worker_has(expression: str, names: set[str]) -> None:
    named = dashboard.metrics_in(expression)
    assert named
    assert named <= names | OF_OTHERS
    assert set(re.findall(r"([a-z_]+)(?:=~?|!=)\"", expression)) <= LABELS


def test_every_metric_has_its_place_on_the_dashboard_or_in_an_alert() -> None:
    expressions = " ".join((*(query.expression for query in dashboard.queries()), *dashboard.expressions_of_rules()))
    missing = {family.name for family in FAMILIES if family.name not in expressions}
    assert missing == {"lmd_requests_accepted_total"}  # what came and what ended are the same in the long run


def test_panels_have_titles_descriptions_and_places_of_their_own() -> None:
    panels = [panel for panel in dashboard.panels() if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard.panels()}) == len(dashboard.panels())
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert all(panel["description"].endswith(".") for panel in panels)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard.panels():
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_every_alert_is_tested() -> None:
    alerts = re.findall(r"- alert: (\w+)", dashboard.RULES.read_text("utf-8"))
    tested = dashboard.RULES_TEST.read_text("utf-8")
    assert len(alerts) == len(set(alerts)) >= 8
    for alert in alerts:
        assert re.search(rf"alertname: {alert}\n +exp_alerts:\n", tested), alert
        assert f"{{eval_time: 30m, alertname: {alert}}}" in tested


def test_the_alert_for_a_full_disk_and_the_check_agree() -> None:
    from llamacpp_mqtt_deploy.checking.machine import LOW_DISK_BYTES

    assert f"lmd_state_disk_free_bytes < {LOW_DISK_BYTES}\n" in dashboard.RULES.read_text("utf-8")


def test_files_name_no_path_of_this_machine() -> None:
    for file in (dashboard.DASHBOARD, dashboard.RULES):
        assert str(Path(__file__).parents[2]) not in file.read_text("utf-8")
