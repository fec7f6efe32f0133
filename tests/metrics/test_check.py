"""What `lmd check` says of the metrics."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.checking.metrics_endpoint import check_metrics
from llamacpp_mqtt_deploy.config.settings import MetricsSettings
from tests.metrics.scraping import address_of
from tests.support.ports import free_port
from tests.support.whole_worker import Bus


def test_where_metrics_are_off_nothing_is_said() -> None:
    assert list(check_metrics(MetricsSettings())) == []


def test_a_worker_that_serves_them_is_found_by_its_address(bus: Bus, tmp_path: Path) -> None:
    listen = f"unix://{tmp_path / 'm.sock'}"
    textfile = tmp_path / "lmd.prom"
    address_of(bus.worker(metrics__listen=listen, metrics__textfile=str(textfile)).daemon)
    served, file = check_metrics(MetricsSettings(listen=listen, textfile=textfile))
    assert (served.verdict, served.text) == ("ok", f"{listen} answers")
    assert (file.verdict, file.text) == ("ok", f"{textfile} can be written")


def test_a_port_where_nobody_listens_yet_is_free() -> None:
    port = free_port()
    (finding,) = check_metrics(MetricsSettings(listen=f"127.0.0.1:{port}"))
    assert finding.verdict == "ok"
    assert finding.text.startswith(f"http://127.0.0.1:{port}/metrics (nobody listens")


def test_another_program_on_the_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def hang_up() -> None:
            connection, _ = other.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        (finding,) = check_metrics(MetricsSettings(listen=f"127.0.0.1:{other.getsockname()[1]}"))
        thread.join()
    assert finding.verdict == "FAIL"
    assert "another program" in finding.text


def test_a_missing_folder_and_a_missing_package_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    package, file = check_metrics(MetricsSettings(textfile=tmp_path / "nowhere" / "lmd.prom"))
    assert (package.verdict, file.verdict) == ("FAIL", "FAIL")
    assert "pip install 'llamacpp-mqtt-deploy[metrics]'" in package.advice
