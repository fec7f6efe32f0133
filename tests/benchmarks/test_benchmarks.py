"""The benchmarks run to their end and say what they measured; how fast anything was is not looked at."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checks import Checks
from benchmarks.figures import Figure, aligned, median_of, percentile, rows
from benchmarks.page import BEGIN, END, PageWithoutMarks, write
from benchmarks.world import World
from llamacpp_mqtt_deploy.core.errors import BadRequest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def figures_of(path: Path) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}


@pytest.mark.broker
def test_each_token_of_a_paced_engine_is_counted_on_both_ways_and_compared_with_an_older_run(tmp_path: Path) -> None:
    out = run("--only", "i", "--json", str(tmp_path / "new.json"))
    figures = figures_of(tmp_path / "new.json")
    ratio = figures["tokens/s, bus / direct, 50 tokens/s, 8 streams"]
    assert 0 < ratio["value"] < 2
    assert ratio["target"] == ">= 0.995"
    assert ("ok" if ratio["met"] else "missed") in out
    assert "\r" not in out  # plain lines in a pipe
    again = run("--only", "i", "--compare", str(tmp_path / "new.json"))
    assert "old/new" in again


@pytest.mark.broker
def test_a_long_queue_is_measured_beside_a_stream(tmp_path: Path) -> None:
    run("--only", "m", "--json", str(tmp_path / "new.json"))
    figures = figures_of(tmp_path / "new.json")
    assert figures["processor time of a newcomer, 100 waiting"]["value"] > 0
    assert figures["pause between two chunks beside, p99, while they come, 100 waiting"]["value"] >= 20
    assert figures["events of an answer, 100 waiting"]["value"] >= 3


@pytest.mark.broker
@pytest.mark.engine
def test_the_bus_is_measured_beside_a_real_engine(tmp_path: Path) -> None:
    run("--only", "b", "--json", str(tmp_path / "new.json"))
    figures = figures_of(tmp_path / "new.json")
    assert figures["first token direct, 8 streams"]["value"] > 0
    assert figures["first token over the bus, 8 streams"]["n"] == 2 * 8 * 4


@pytest.mark.broker
@pytest.mark.engine
def test_the_gateway_is_measured_beside_mqtt(tmp_path: Path) -> None:
    run("--only", "l", "--json", str(tmp_path / "new.json"))
    figures = figures_of(tmp_path / "new.json")
    assert figures["tokens/s, gateway / MQTT, 8 streams"]["target"] == ">= 0.9"
    assert figures["first token through the gateway later, p50, 1 stream"]["target"] == "<= 3"
    assert figures["first token through the gateway, 8 streams"]["n"] == 2 * 8 * 4
    assert figures["processor time of the gateway per token, 8 streams"]["value"] > 0


@pytest.mark.broker
@pytest.mark.engine
def test_a_cancel_and_the_second_turn_of_a_chat_are_measured_at_a_real_engine(tmp_path: Path) -> None:
    run("--only", "e,g", "--json", str(tmp_path / "new.json"))
    figures = figures_of(tmp_path / "new.json")
    assert figures["publish to slot free, in a prompt"]["value"] > 0
    assert figures["publish to slot free, in generation"]["value"] > 0
    assert 0 <= figures["tokens of the first turn evaluated again"]["value"] <= 100


def test_a_case_that_does_not_exist_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--only", "a,z"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "there is no case z" in done.stderr


@pytest.mark.parametrize(
    "value, target, met",
    [
        (0.97, ">= 0.97", True),
        (0.969, ">= 0.97", False),
        (22.0, "<= 22", True),
        (22.1, "<= 22", False),
        (1.0, "", None),
    ],
)
def test_a_figure_knows_whether_it_meets_its_target(value: float, target: str, met: bool | None) -> None:
    assert Figure(case="a", name="x", value=value, target=target).met is met


def test_a_table_shows_the_median_its_quartiles_and_the_ratio_to_an_older_run() -> None:
    figure = median_of("c", "per token", [1.0, 2.0, 3.0, 4.0, 100.0], unit="us", target="<= 22")
    table = rows([figure], {("c", "per token"): 6.0})
    assert table[1] == ("c", "per token", "3.00", "us", "2.00 - 4.00", "5", "<= 22", "ok", "2.00")
    assert aligned(table).splitlines()[1].startswith("c     per token")
    assert percentile(range(100), 0.99) == 99


def test_the_page_gets_tables_and_plots_between_its_marks_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"# Hand-written\n\n{BEGIN}\nold\n{END}\n\nAlso by hand.\n")
    figures = [
        Figure(case="a", name=f"tokens/s, bus / direct, {name}", value=value, n=9, low=value - 0.01, high=value + 0.01,
               target=">= 0.97")
        for name, value in (("1 stream", 0.98), ("8 streams", 0.96))
    ]  # fmt: skip
    curves = {f"i {way} 50": [number / 10 for number in range(101)] for way in ("direct", "bus")}
    titles = {"a": "tokens/s", "i": "paced"}
    written = write(page, described={"machine": {"cpu": "x & y"}}, titles=titles, figures=figures, curves=curves)
    text = page.read_text()
    assert text.startswith("# Hand-written\n")
    assert text.endswith("\n\nAlso by hand.\n")
    assert "old" not in text
    assert "| tokens/s, bus / direct, 8 streams | 0.960 |  | 0.950 - 0.970 | 9 | >= 0.97 | missed |" in text
    assert [path.name for path in written] == ["performance.md", "performance-throughput.svg", "performance-pace.svg"]
    for path in written[1:]:
        assert ET.fromstring(path.read_text()).tag.endswith("svg")
    assert write(page, described={}, titles=titles, figures=figures, curves=curves)  # and again
    with pytest.raises(PageWithoutMarks):
        write(written[1], described={}, titles=titles, figures=figures, curves=curves)


def test_docs_performance_has_its_marks() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1


def test_the_relay_with_the_checks_refuses_what_a_worker_refuses_and_asks_as_it_does() -> None:
    checks = Checks("llm")
    session, request_id, body = checks.read(
        "llm/request/ada/1", b'{"prompt": "hi", "request_id": "r1", "max_tokens": 5}'
    )
    assert (session, request_id) == ("ada/1", "r1")
    asked = json.loads(body)
    assert (asked["messages"], asked["max_tokens"], asked["stream"]) == ([{"role": "user", "content": "hi"}], 5, True)
    assert checks.read("llm/request/ada/1", b'{"prompt": "more", "request_id": "r2"}')[1] == "r2", "its session is free"
    with pytest.raises(BadRequest, match="temperature"):
        checks.read("llm/request/ada/1", b'{"prompt": "hi", "request_id": "r3", "temperature": "hot"}')


@pytest.mark.broker
@pytest.mark.engine
def test_the_relay_with_the_journal_writes_what_a_worker_writes_and_answers_as_it_does() -> None:
    with World() as world, world.relay(world.llama.port, pause_s=0.0, doing="journal") as relay:
        load = relay.run(streams=2, requests=3, max_tokens=5)
        (state,) = world.folder.glob("relay*/state.db")
        with closing(sqlite3.connect(f"file:{state}?mode=ro", uri=True)) as journal:
            ends = journal.execute("SELECT state, terminal FROM entries").fetchall()
    assert len(load.samples) == 6
    assert load.tokens == 30
    assert [(state, json.loads(event)["type"]) for state, event in ends] == [("ended", "done")] * 6
