"""What docs/metrics.md shows is what a worker answers."""

from __future__ import annotations

import subprocess

from llamacpp_mqtt_deploy.config.loading import load
from tests.docs.pages import ROOT, blocks
from tests.metrics.scraping import address_of
from tests.support.services import require_program
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus

PAGE = ROOT / "docs" / "metrics.md"


def test_the_first_example_prints_what_the_page_shows(bus: Bus) -> None:
    require_program("curl")
    found = list(blocks(PAGE))
    at = next(at for at, block in enumerate(found) if block.language == "sh" and "curl" in block.text)
    worker = bus.worker(metrics__listen="127.0.0.1:0", mqtt__worker_id="kitchen")
    url = address_of(worker.daemon)
    eventually(lambda: worker.daemon.ready)
    command = found[at].text.replace("http://127.0.0.1:9469/metrics", url)
    shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30, check=True).stdout
    assert shown == found[at + 1].text


def test_every_address_in_the_table_is_taken_as_the_page_says() -> None:
    for value, warned in (
        ("127.0.0.1:9469", False),
        ("localhost:9469", False),
        ("[::1]:9469", False),
        ("192.168.1.5:9469", True),
        ("0.0.0.0:9469", True),
        ("unix:///run/llamacpp-mqtt-deploy/metrics.sock", False),
    ):
        assert value in PAGE.read_text("utf-8")
        loaded = load(None, {"metrics.listen": value}, environ={})
        assert any("metrics.listen" in warning for warning in loaded.warnings) == warned
