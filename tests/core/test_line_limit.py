"""A flood of bad messages brings a few lines about, and one that says how many were left out."""

from __future__ import annotations

from llamacpp_mqtt_deploy.core.line_limit import LineLimit, Suppressed


def test_a_flood_brings_a_few_lines_and_then_how_many_were_left_out() -> None:
    limit = LineLimit()
    assert sum(limit.allow("request.refused", "greedy", 0.0) for _ in range(1000)) == 20
    assert limit.allow("request.refused", "modest", 1.0)
    assert limit.allow("control.answered", "greedy", 1.0)
    assert limit.over(9.9) == []
    assert limit.over(10.0) == [Suppressed("request.refused", "greedy", 980)]
    assert limit.over(20.0) == []
    assert limit.allow("request.refused", "greedy", 10.0)


def test_made_up_levels_share_one_count() -> None:
    limit = LineLimit()
    allowed = sum(limit.allow("request.refused", f"level{number}", 0.0) for number in range(10_000))
    assert allowed == 1020
    (suppressed,) = limit.over(10.0)
    assert suppressed == Suppressed("request.refused", "(others)", 8980)
    assert limit.allow("request.refused", "level1", 10.0)


def test_a_client_that_stays_within_its_lines_is_not_spoken_of() -> None:
    limit = LineLimit()
    assert all(limit.allow("request.refused", "chatty", 5.0) for _ in range(20))
    assert limit.over(15.0) == []
    for _ in range(21):
        limit.allow("request.refused", "chatty", 15.0)
    assert limit.over(24.9) == []
    assert limit.over(25.0) == [Suppressed("request.refused", "chatty", 1)]
