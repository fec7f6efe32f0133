"""What `lmd top` makes of status and health, whoever wrote them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.commands.fleet import Fleet, figure, share, span, sparkline
from llamacpp_mqtt_deploy.commands.terminal import one_line
from llamacpp_mqtt_deploy.commands.top import _cells

NOW = 1_800_000_000.0
ENGINE = {"state": "ready", "kind": "server", "backend": "cuda"}
STATUS = {"state": "online", "ts": NOW, "every_s": 10, "slots": 4, "engine": ENGINE, "models": ["qwen"]}
HEALTH = {
    "ts": NOW,
    "slots": {"busy": 1, "total": 4},
    "queue": 3,
    "lanes": {"interactive": 1, "normal": 2, "batch": 0},
    "tokens_per_second": 41.5,
    "first_token_ms": 230.0,
    "requests": {"accepted": 9, "done": 7, "cancelled": 1, "failed": 2},
    "errors": {"busy": 2, "timeout": 0},
    "rss_bytes": 64 * 2**20,
    "uptime_s": 7200,
}


def test_a_worker_is_shown_with_all_that_it_tells() -> None:
    (kitchen,) = Fleet().look({"kitchen": STATUS}, {"kitchen": HEALTH}, now=NOW, steady=0.0)
    assert _cells(kitchen) == (
        "kitchen", "online", "ready/cuda", "1/4", "3", "1/2/0", "41.5", "230ms", "7", "2", "-",
    )  # fmt: skip
    assert kitchen.speeds == (41.5,)
    assert dict(kitchen.details) == {
        "up": "2.0 h",
        "memory": "64 MiB",
        "errors": "busy 2",
    }


def test_the_speeds_are_kept_one_for_each_health_and_the_oldest_go() -> None:
    fleet, looks = Fleet(), []
    for number in range(50):
        for _ in range(3):  # looked at more often than it is told
            health = HEALTH | {"ts": NOW + number, "tokens_per_second": number}
            looks += fleet.look({"kitchen": STATUS}, {"kitchen": health}, now=NOW, steady=0.0)
    assert looks[-1].speeds == tuple(float(number) for number in range(20, 50))


def test_a_status_is_as_old_as_its_last_renewal_whatever_the_clock_of_its_worker_says() -> None:
    fleet, late = Fleet(), STATUS | {"ts": NOW - 5000}

    def state(status: dict[str, Any], steady: float) -> str:
        return fleet.look({"kitchen": status}, {}, now=NOW + steady, steady=steady)[0].state

    assert state(late, 0.0) == "stale", "kept by the broker, for all we know"
    assert state(late, 10.0) == "stale"
    assert state(late | {"ts": NOW - 4990}, 12.0) == "online", "renewed before our eyes"
    assert state(late | {"ts": NOW - 4990}, 40.0) == "online", "the same message again is no renewal"
    assert state(late | {"ts": NOW - 4990}, 43.0) == "stale"
    assert state(STATUS | {"ts": NOW + 90_000}, 50.0) == "online", "a clock ahead of ours"
    assert state(STATUS | {"ts": NOW + 90_000}, 90.0) == "stale"


def test_a_worker_that_is_gone_shows_nothing_of_the_time_before() -> None:
    offline = {"state": "offline", "reason": "lost", "ts": NOW, "every_s": 10}
    (kitchen,) = Fleet().look({"kitchen": offline}, {"kitchen": HEALTH}, now=NOW, steady=0.0)
    assert (kitchen.state, kitchen.problem, kitchen.busy, kitchen.speed) == (
        "offline",
        "its connection was lost",
        None,
        None,
    )
    assert Fleet().look({}, {"kitchen": HEALTH}, now=NOW, steady=0.0) == []


def test_what_hinders_a_worker_is_told_whether_it_is_the_engine_or_the_worker() -> None:
    status = STATUS | {
        "engine": ENGINE | {"state": "failed", "detail": "No such\x1b[2J file."},
        "problem": "Disk full.",
    }
    (kitchen,) = Fleet().look({"kitchen": status}, {}, now=NOW, steady=0.0)
    assert kitchen.problem == "No such[2J file.; Disk full."


def test_texts_without_end_are_cut() -> None:
    huge = STATUS | {"models": ["m" * 60_000], "problem": "p" * 60_000, "engine": {"state": "s" * 60_000}}
    (kitchen,) = Fleet().look({"w" * 60_000: huge}, {}, now=NOW, steady=0.0)
    assert max(map(len, (kitchen.name, kitchen.engine, kitchen.models, kitchen.problem))) <= 300


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=10,
)
NAMES = ["state", "ts", "every_s", "slots", "engine", "models", "problem", "reason", "n_ctx", "version", "host"]
FIGURES = [*HEALTH, "tokens", "reconnects", "engine"]
NESTED = st.dictionaries(
    st.sampled_from(["busy", "total", "normal", "batch", "median", "done", "failed", "prompt"]), JSON
)


@settings(max_examples=50)
@given(
    status=st.dictionaries(st.sampled_from(NAMES), JSON | st.just("online") | NESTED, max_size=11),
    health=st.dictionaries(st.sampled_from(FIGURES), JSON | NESTED, max_size=13),
    name=st.text(max_size=80),
)
def test_nothing_that_a_worker_says_breaks_the_picture_or_steers_the_terminal(
    status: dict[str, Any], health: dict[str, Any], name: str
) -> None:
    fleet = Fleet()
    for steady in (0.0, 50.0):
        (kitchen,) = fleet.look({name: status}, {name: health}, now=NOW, steady=steady)
        told = [*_cells(kitchen), kitchen.models, *(text for _, text in kitchen.details)]
        assert all(text == one_line(text) for text in told)
        assert len(sparkline(kitchen.speeds, 12)) == len(kitchen.speeds)


@pytest.mark.parametrize(
    "value, text",
    [(None, ""), (0.0, "0"), (3.0, "3"), (41.53, "41.5"), (140.2, "140"), (9999.0, "9999"), (12_345.0, "12.3k"),
     (2_500_000.0, "2.5M"), (3e9, "3G")],
)  # fmt: skip
def test_figures_are_short(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_times_shares_and_sparklines() -> None:
    assert (span(None), span(230.4), span(1500.0)) == ("", "230 ms", "1.5 s")
    assert (share(1.0, 4.0), share(None, 4.0), share(1.0, None)) == ("1/4", "?/4", "")
    assert sparkline((), 8) == ""
    assert sparkline((0.0, 0.0), 8) == "▁▁"
    assert sparkline((1.0, 0.0, 5.0, 10.0), 3) == "▁▅█"
