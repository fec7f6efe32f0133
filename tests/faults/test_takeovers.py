"""How the rig measures a takeover, on entries made by hand."""

from __future__ import annotations

import json
from typing import Any

from tests.faults.history import Entry
from tests.faults.takeovers import Takeovers


def _event(at: float, request_id: str, **fields: Any) -> Entry:
    return Entry(at, "event", request_id, text=json.dumps({"request_id": request_id, **fields}))


def _after_a_kill(*entries: Entry) -> Takeovers:
    found = Takeovers(within_s=4.0)
    found.begin("w1", "3 worker.kill", ["a", "b"], now=10.0)
    for entry in entries:
        found.saw(entry)
    return found


def test_an_interruption_and_a_new_beginning_elsewhere_are_takeovers() -> None:
    found = _after_a_kill(
        _event(9.0, "a", type="start", worker="w2"),  # before it
        _event(12.0, "a", type="error", code="interrupted", final=True),
        _event(12.5, "b", type="start", worker="w1"),  # late from the one that is gone
        _event(13.0, "b", type="start", worker="w3"),
        _event(14.0, "b", type="done", final=True),
    )
    assert found.times(undisturbed=True) == [2.0, 3.0]
    assert found.close() == []


def test_a_takeover_that_is_late_or_never_comes_is_a_broken_promise() -> None:
    found = _after_a_kill(_event(15.0, "a", type="error", code="interrupted", final=True))
    assert [(broken.promise, broken.request_id) for broken in found.close()] == [("takeover", "a"), ("takeover", "b")]


def test_what_a_worker_ends_itself_after_a_short_stop_is_no_takeover() -> None:
    found = _after_a_kill(
        _event(11.0, "a", type="done", final=True), _event(11.5, "b", type="error", code="engine_lost", final=True)
    )
    assert found.times(undisturbed=False) == []
    assert found.close() == []


def test_a_takeover_beside_another_fault_is_counted_and_not_held_to_its_limit() -> None:
    found = _after_a_kill(_event(20.0, "a", type="error", code="interrupted", final=True))
    found.disturbed("3 worker.kill", 10.0)
    found.disturbed("4 database.kill", 12.0)
    assert found.times(undisturbed=False) == [10.0]
    assert found.times(undisturbed=True) == []
    assert found.close() == []


def test_a_fault_that_was_long_over_disturbs_nothing() -> None:
    found = Takeovers(within_s=4.0)
    found.disturbed("1 database.kill", 1.0)
    found.disturbed("1 database.kill", 3.0, over=True)
    found.begin("w1", "3 worker.kill", ["a"], now=10.0)
    assert [broken.promise for broken in found.close()] == ["takeover"]
