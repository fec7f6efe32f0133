"""What docs/metrics.md shows is what a worker answers."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path

from llamacpp_mqtt_deploy.config.loading import load
from tests.docs.pages import ROOT, blocks
from tests.metrics.scraping import address_of, get
from tests.support.ports import free_port
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


def test_curl_and_nginx_reach_the_socket_as_the_page_says(bus: Bus, tmp_path: Path) -> None:
    curl, nginx = require_program("curl"), require_program("nginx")
    text = PAGE.read_text("utf-8")
    sock = tmp_path / "m.sock"
    address_of(bus.worker(metrics__listen=f"unix://{sock}").daemon)
    line = re.search(r"`(curl --unix-socket .*?)`", text)
    assert line
    command = line[1].replace("/run/llamacpp-mqtt-deploy/metrics.sock", str(sock)).split()[1:]
    shown = subprocess.run([curl, "-s", *command], capture_output=True, text=True, timeout=30, check=True).stdout
    assert "lmd_slots{" in shown
    proxy_pass = re.search(r"`(proxy_pass .*?;)`", text)
    assert proxy_pass
    location = proxy_pass[1].replace("/run/llamacpp-mqtt-deploy/metrics.sock", str(sock))
    port = free_port()
    temporary = "".join(
        f"{name}_temp_path {tmp_path}/{name}; " for name in ("proxy", "client_body", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary}server {{ listen 127.0.0.1:{port}; location /metrics {{ {location} }} }} }}\n"
    )
    process = subprocess.Popen([nginx, "-c", str(config), "-e", str(tmp_path / "error.log")], stderr=subprocess.DEVNULL)
    try:
        told: list[str] = []

        def answers() -> bool:
            with suppress(OSError):
                told.append(get(f"http://127.0.0.1:{port}").body)
            return bool(told)

        eventually(answers, 20)
        assert "lmd_slots{" in told[0], (tmp_path / "error.log").read_text()
    finally:
        process.terminate()
        process.wait(10)
