"""What the metrics of a worker say, read over HTTP with the library that Prometheus' own clients use."""

from __future__ import annotations

import stat
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy import __version__
from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.ports import EngineState
from llamacpp_mqtt_deploy.service.daemon import run
from llamacpp_mqtt_deploy.service.enginewatch import EngineWatch
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.metrics.scraping import OPENMETRICS, address_of, get, scrape, scrape_after
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus

LISTEN: Mapping[str, Any] = {"metrics__listen": "127.0.0.1:0"}


def test_without_the_section_nothing_listens_and_no_file_is_written(bus: Bus) -> None:
    worker = bus.worker()
    assert worker.daemon.parts.metrics is None
    assert not any(thread.name.startswith("metrics") for thread in threading.enumerate())


def test_a_finished_request_is_in_every_metric_that_tells_of_it(bus: Bus) -> None:
    url = address_of(bus.worker(**LISTEN).daemon)
    bus.ask("one two three", request_id="r1", priority="batch")
    bus.listener.terminal("r1")
    told = scrape_after(url, 1)
    assert told.value("lmd_requests_accepted_total") == 1
    assert told.value("lmd_requests_ended_total", lane="batch", outcome="stop") == 1
    assert told.value("lmd_requests_ended_total", lane="normal", outcome="stop") == 0
    assert told.value("lmd_first_token_seconds_count", lane="batch") == 1
    assert told.value("lmd_request_duration_seconds_count", lane="batch") == 1
    assert 0 < told.value("lmd_request_duration_seconds_sum", lane="batch") < 10
    assert told.value("lmd_prompt_tokens_total") == 3
    assert told.value("lmd_completion_tokens_total") == 3
    assert told.value("lmd_journal_commit_seconds_count") > 0
    assert told.value("lmd_build_info", version=__version__, worker="w1") == 1
    assert told.value("lmd_worker_state", lmd_worker_state="online") == 1
    assert told.value("lmd_engine_state", lmd_engine_state="ready") == 1
    assert told.value("lmd_broker_connected") == 1
    assert told.value("lmd_resident_memory_bytes") > 1e6
    assert told.value("lmd_cpu_seconds_total") > 0
    assert told.value("lmd_state_disk_free_bytes") > 0


def test_requests_that_run_and_wait_are_seen_in_slots_and_lanes(bus: Bus) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    engine.play(gate, "done")
    url = address_of(bus.worker(engine, limits__queue_size=7, **LISTEN).daemon)
    bus.ask("first", request_id="r1", session="a")
    assert gate.reached.wait(10)
    bus.ask("second", request_id="r2", session="b", priority="batch")
    bus.listener.until(type="queued", request_id="r2")
    told = scrape(url)
    assert (told.value("lmd_slots"), told.value("lmd_slots_busy")) == (1, 1)
    assert told.value("lmd_queue_requests", lane="batch") == 1
    assert told.value("lmd_queue_requests", lane="normal") == 0
    assert told.value("lmd_queue_limit_requests") == 7
    gate.open()
    bus.listener.terminal("r2")
    eventually(lambda: scrape(url).value("lmd_slots_busy") == 0)


def test_refusals_and_failures_are_counted_apart_by_their_codes(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play("a word", EngineFailed("it broke"))
    url = address_of(bus.worker(engine, **LISTEN).daemon)
    bus.sender.publish("llm/request/demo", b"{not json")
    bus.listener.until(type="error", code="bad_request")
    bus.ask("a question", request_id="r1")
    bus.listener.terminal("r1")
    told = scrape_after(url, 1)
    assert told.value("lmd_requests_refused_total", code="bad_request") == 1
    assert told.value("lmd_requests_failed_total", code="bad_request") == 0
    assert told.value("lmd_requests_failed_total", code=EngineFailed.code) == 1
    assert told.value("lmd_requests_ended_total", lane="normal", outcome="error") == 1
    assert told.value("lmd_requests_accepted_total") == 1


def test_an_engine_that_comes_back_has_restarted_once(bus: Bus) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine, **LISTEN)
    url = address_of(worker.daemon)
    eventually(lambda: worker.daemon.ready)
    engine.become("unreachable")
    assert scrape(url).value("lmd_engine_state", lmd_engine_state="unreachable") == 1
    eventually(lambda: worker.daemon.parts.engine_watch.seen == "unreachable")
    assert scrape(url).value("lmd_engine_restarts_total") == 0
    engine.become("ready")
    eventually(lambda: scrape(url).value("lmd_engine_restarts_total") == 1)


def _until_seen(watch: EngineWatch, state: EngineState) -> None:
    eventually(lambda: watch.seen == state)


def test_an_engine_that_is_woken_has_not_restarted(bus: Bus) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine, **LISTEN)
    url = address_of(worker.daemon)
    watch = worker.daemon.parts.engine_watch
    states: tuple[EngineState, ...] = ("ready", "asleep", "loading", "ready", "restarting", "ready")
    for state in states:
        engine.become(state)
        _until_seen(watch, state)
    assert scrape(url).value("lmd_engine_restarts_total") == 1


def test_a_lost_broker_is_seen_and_its_return_counted(bus: Bus) -> None:
    url = address_of(bus.worker(**LISTEN).daemon)
    bus.broker.stop()
    eventually(lambda: scrape(url).value("lmd_broker_connected") == 0)
    assert scrape(url).value("lmd_worker_state", lmd_worker_state="offline") == 1
    bus.broker.start()
    eventually(lambda: scrape(url).value("lmd_broker_reconnects_total") == 1)
    eventually(lambda: scrape(url).value("lmd_worker_state", lmd_worker_state="online") == 1)


def test_what_the_broker_does_not_acknowledge_fills_the_outbox(bus: Bus) -> None:
    url = address_of(bus.worker(**LISTEN).daemon)
    bus.broker.hold_pubacks()
    bus.ask("a question", request_id="r1")
    eventually(lambda: scrape(url).value("lmd_outbox_messages") > 0)
    assert scrape(url).value("lmd_outbox_bytes") > 50
    bus.broker.release_pubacks()
    eventually(lambda: scrape(url).value("lmd_outbox_messages") == 0)
    assert scrape(url).value("lmd_outbox_bytes") == 0


def test_a_problem_is_told_by_its_kind(bus: Bus) -> None:
    bus.broker.refuse("llm/request/+")
    url = address_of(bus.worker(wait=False, **LISTEN).daemon)
    eventually(lambda: scrape(url).value("lmd_problem", kind="subscription") == 1)
    assert scrape(url).value("lmd_problem", kind="store") == 0


def test_a_state_in_memory_has_no_disk(bus: Bus) -> None:
    url = address_of(bus.worker(sessions__store="memory", **LISTEN).daemon)
    assert "lmd_state_disk_free_bytes" not in scrape(url).names()


def test_the_library_negotiates_the_format(bus: Bus) -> None:
    url = address_of(bus.worker(**LISTEN).daemon)
    classic = get(url)
    assert classic.headers["content-type"].startswith("text/plain; version=0.0.4")
    modern = get(url, Accept=f"{OPENMETRICS},text/plain;version=0.0.4;q=0.3")
    assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert modern.body.endswith("# EOF\n")
    assert get(url, Accept="application/openmetrics-text; version=x.y").status == 200


def test_a_unix_socket_serves_owner_and_group_and_goes_with_the_worker(bus: Bus, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    worker = bus.worker(metrics__listen=f"unix://{path}")
    url = address_of(worker.daemon)
    assert url == f"unix://{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    eventually(lambda: scrape(url).value("lmd_slots") == 2)
    worker.stop()
    assert not path.exists()


def test_the_file_is_readable_for_others_and_goes_with_the_worker(bus: Bus, tmp_path: Path) -> None:
    path = tmp_path / "lmd.prom"
    worker = bus.worker(metrics__textfile=str(path))
    eventually(path.exists)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    text = path.read_text()
    assert 'lmd_slots{worker="w1"}' in text
    assert "# EOF" not in text  # node-exporter reads the classic format
    worker.stop()
    assert list(tmp_path.glob("*lmd.prom*")) == []


def test_without_the_library_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("prometheus_client", "llamacpp_mqtt_deploy.metrics."))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with capture_logs() as lines:
        assert run(load(None, {"metrics.listen": "127.0.0.1:0", "sessions.store": "memory"}, environ={})) == 2
    (line,) = [line for line in lines if line["event"] == "worker.ending"]
    assert "pip install 'llamacpp-mqtt-deploy[metrics]'" in line["reason"]
