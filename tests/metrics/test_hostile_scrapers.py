"""Eight hostile connections at a time for some seconds cost the worker little, and no request notices."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from llamacpp_mqtt_deploy.service.measuring import open_descriptors
from tests.metrics import flooder
from tests.metrics.scraping import address_of, get, scrape_after
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus

SECONDS = 4.0
MOST_CPU_SHARE = 0.2
"""Of one core, for the thread that serves the metrics. Measured: 0.02."""


def _cpu_s(thread: threading.Thread) -> float:
    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def little_to_collect() -> Iterator[None]:
    """A full round of the garbage collector through what thousands of tests have left takes a second of whichever thread it hits."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_to_collect")
def test_a_hostile_crowd_gets_little_of_the_processor_and_nothing_else(bus: Bus) -> None:
    daemon = bus.worker(metrics__listen="127.0.0.1:0").daemon
    url = address_of(daemon)
    before, threads = open_descriptors(), threading.active_count()
    assert before is not None
    (serving,) = (thread for thread in threading.enumerate() if thread.name == "metrics")
    cpu_before = _cpu_s(serving)
    port = str(urlsplit(url).port)
    crowd = subprocess.Popen([sys.executable, flooder.__file__, port, "7", str(SECONDS)], stdout=subprocess.PIPE)
    asked = 0
    while crowd.poll() is None:
        bus.ask(f"question {asked} with some words", request_id=f"r{asked}", session=f"s{asked}")
        assert bus.listener.terminal(f"r{asked}", 20)["type"] == "done"
        asked += 1
        assert threading.active_count() <= threads + 2  # generation threads; none for a connection
    tried, _ = crowd.communicate()
    assert crowd.returncode == 0
    assert int(tried) > 60
    assert _cpu_s(serving) - cpu_before < MOST_CPU_SHARE * SECONDS
    eventually(lambda: (open_descriptors() or 0) <= before + 2, 30.0, every_s=0.1)
    eventually(lambda: get(url).status == 200, 30.0, every_s=0.1)
    assert scrape_after(url, asked).value("lmd_requests_ended_total", lane="normal", outcome="stop") == asked


def test_a_request_of_many_tokens_is_one_observation(bus: Bus) -> None:
    daemon = bus.worker(metrics__listen="127.0.0.1:0").daemon
    url = address_of(daemon)
    bus.ask("word " * 499 + "word", request_id="r1")
    bus.listener.terminal("r1")
    told = scrape_after(url, 1)
    assert told.value("lmd_completion_tokens_total") == 500
    assert told.value("lmd_first_token_seconds_count", lane="normal") == 1
    assert told.value("lmd_request_duration_seconds_count", lane="normal") == 1
