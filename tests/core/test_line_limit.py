"""A flood of bad messages brings a few lines about, and one that says how many were left out."""

from __future__ import annotations

from llamacpp_mqtt_deploy.core.line_limit import LINES, WINDOW_S, LineLimit, Suppressed


def test_a_flood_brings_a_few_lines_and_then_how_many_were_left_out() -> None:
    limit = LineLimit()
    assert sum(limit.allow("request.refused", "greedy", 0.0) for _ in range(1000)) == LINES
    assert limit.allow("request.refused", "modest", 1.0)
    assert limit.allow("control.answered", "greedy", 1.0)
    assert limit.over(WINDOW_S - 0.1) == []
    assert limit.over(WINDOW_S) == [Suppressed("request.refused", "greedy", 1000 - LINES)]
    assert limit.over(WINDOW_S + 10) == []
    assert limit.allow("request.refused", "greedy", WINDOW_S)


def test_made_up_levels_share_one_count() -> None:
    limit = LineLimit()
    allowed = sum(limit.allow("request.refused", f"level{number}", 0.0) for number in range(10_000))
    assert allowed == 1000 + LINES
    (suppressed,) = limit.over(WINDOW_S)
    assert suppressed == Suppressed("request.refused", "(others)", 9000 - LINES)
    assert limit.allow("request.refused", "level1", WINDOW_S)
