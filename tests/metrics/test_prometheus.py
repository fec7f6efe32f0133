"""A real Prometheus reads a real worker: every query of the dashboard has an answer, promtool finds nothing to say (make test-metrics)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from tests.metrics import dashboard
from tests.metrics.dashboard import Query
from tests.metrics.prometheus_server import PrometheusServer, program
from tests.metrics.scraping import get
from tests.service.watcher import Watcher
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port
from tests.support.waiting import eventually

pytestmark = [pytest.mark.prometheus, pytest.mark.broker, pytest.mark.engine]

INTERVAL = "30s"
"""Of `rate()`: more than four scrapes, as Grafana would choose it, and long enough for all requests of these tests."""


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def worker(
    port: int, mosquitto: Mosquitto, llama_server: LlamaServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    program("prometheus")
    settings = {
        "mqtt.port": mosquitto.port,
        "mqtt.root": "metrics",
        "engine.url": llama_server.url,
        "metrics.listen": f"127.0.0.1:{port}",
        "metrics.textfile": str(tmp_path_factory.mktemp("textfile") / "lmd.prom"),
    }
    process = DaemonProcess(tmp_path_factory.mktemp("worker"), settings).start()
    try:
        process.wait_ready()
        textfile = Path(process.settings["metrics.textfile"])
        eventually(textfile.exists)
        yield process
    finally:
        process.close()
        process.check_log()


@pytest.fixture(scope="module")
def prometheus(
    port: int, worker: DaemonProcess, mosquitto: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrometheusServer]:
    """Set up as the page says, scraping each second, after the worker has served requests of all kinds while it looked."""
    page = ROOT / "docs" / "metrics.md"
    config = next(block.text for block in blocks(page) if block.language == "yaml" and "scrape_configs" in block.text)
    config = config.replace("127.0.0.1:9469", f"127.0.0.1:{port}").replace("15s", "1s")
    config = "global:\n  evaluation_interval: 1s\n" + config.replace(
        "/etc/prometheus/lmd-rules.yml", str(dashboard.RULES)
    )
    with ExitStack() as stack:
        server = stack.enter_context(PrometheusServer(tmp_path_factory.mktemp("prometheus") / "it", config))
        watcher = Watcher(mosquitto.port, root="metrics")
        stack.callback(watcher.close)
        eventually(lambda: server.query('up{job="lmd"} == 1'), 30.0, every_s=0.2)
        for turn in range(6):  # between scrapes, so that there is a rate
            watcher.ask(f"s{turn}", "Tell me a story", request_id=f"r{turn}", max_tokens=20)
            watcher.terminal(f"r{turn}")
            _one_more_scrape(server)
        yield server


def _one_more_scrape(server: PrometheusServer) -> None:
    def scrapes() -> float:
        return float(server.query("count_over_time(up{job='lmd'}[10m])")[0]["value"][1])

    before = scrapes()
    eventually(lambda: scrapes() > before, 30.0, every_s=0.1)


def test_every_query_of_the_dashboard_has_an_answer(prometheus: PrometheusServer) -> None:
    """All at once, while the requests are within the interval."""
    silent = [query for query in dashboard.queries() if not prometheus.query(query.filled(interval=INTERVAL))]
    assert silent == []


@pytest.mark.parametrize("panel,least", [("First token", 0.0001), ("Tokens per second", 0.1), ("Requests ended", 0.01)])
def test_what_a_panel_shows_is_what_was_done(prometheus: PrometheusServer, panel: str, least: float) -> None:
    first: Query = next(query for query in dashboard.queries() if query.panel == panel)
    values = [float(sample["value"][1]) for sample in prometheus.query(first.filled(interval=INTERVAL))]
    assert max(values) > least


def test_the_choice_of_workers_has_its_values(prometheus: PrometheusServer) -> None:
    assert prometheus.get("label/worker/values") == ["w1"]


def test_every_alert_is_loaded_and_none_fires_for_a_worker_that_is_well(prometheus: PrometheusServer) -> None:
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(list(dashboard.expressions_of_rules()))
    eventually(lambda: all(r["health"] == "ok" for g in prometheus.get("rules")["groups"] for r in g["rules"]), 30.0)
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_promtool_finds_nothing_wrong_with_the_metrics(worker: DaemonProcess, port: int) -> None:
    """It reads the classic format; OpenMetrics is what Prometheus itself asks for above."""
    assert _promtool("check", "metrics", stdin=get(f"http://127.0.0.1:{port}").body) == ""


def test_promtool_finds_nothing_wrong_with_the_file_for_node_exporter(worker: DaemonProcess) -> None:
    assert _promtool("check", "metrics", stdin=Path(worker.settings["metrics.textfile"]).read_text()) == ""


def test_node_exporter_serves_the_files_of_two_workers(worker: DaemonProcess, tmp_path: Path) -> None:
    text = Path(worker.settings["metrics.textfile"]).read_text()
    (tmp_path / "one.prom").write_text(text)
    (tmp_path / "two.prom").write_text(text.replace('worker="w1"', 'worker="w2"'))
    address = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus-node-exporter"),
        f"--web.listen-address={address}",
        "--collector.disable-defaults",
        "--collector.textfile",
        f"--collector.textfile.directory={tmp_path}",
    ]
    exporter = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told = ""

        def answers() -> bool:
            nonlocal told
            with suppress(OSError):
                told = get(f"http://{address}").body
            return bool(told)

        eventually(answers, 20.0)
    finally:
        exporter.terminate()
        exporter.wait(10)
    assert "node_textfile_scrape_error 0" in told
    for name in ("w1", "w2"):
        assert f'lmd_queue_limit_requests{{worker="{name}"}} 64' in told
    assert "node_textfile_mtime_seconds{" in told


def test_the_alerts_come_when_they_should() -> None:
    _promtool("check", "rules", str(dashboard.RULES))
    _promtool("test", "rules", str(dashboard.RULES_TEST))


def _promtool(*arguments: str, stdin: str = "") -> str:
    """What promtool says on stderr; its exit code has to be 0."""
    result = subprocess.run(
        [program("promtool"), *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stderr
