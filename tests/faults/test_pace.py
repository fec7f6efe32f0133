"""How the rig keeps clients and faults in step: no fault without requests, none left when they run out."""

from __future__ import annotations

import pytest

from tests.faults.pace import AHEAD, Pace, shared


def test_clients_go_a_little_ahead_of_the_next_fault_and_no_further() -> None:
    pace = Pace(5)
    assert pace.allowed(after=50, begun=50, needed=False, now=1.0) == 50 + AHEAD
    assert pace.allowed(after=50, begun=60, needed=False, now=9.0) == 50 + AHEAD


def test_where_nobody_begins_what_he_may_more_is_granted_after_a_while() -> None:
    pace = Pace(5)
    pace.allowed(after=50, begun=60, needed=True, now=10.0)
    assert pace.allowed(after=50, begun=60, needed=True, now=12.0) <= 65
    assert [pace.allowed(after=50, begun=60, needed=True, now=13.0 + number) for number in range(8)][-1] > 65


def test_a_fault_that_waits_gets_one_request_at_a_time_and_at_most_one_for_each_client() -> None:
    pace = Pace(5)
    allowed = [pace.allowed(after=50, begun=60, needed=True, now=number / 10) for number in range(20)]
    assert allowed[:3] == [61, 62, 63]
    assert allowed[-1] == 65
    assert pace.allowed(after=50, begun=61, needed=True, now=2.0) == 66
    assert pace.allowed(after=80, begun=62, needed=False, now=3.0) == 90, "what was granted is not added to what comes"


@pytest.mark.parametrize("latency", [1, 5, 20])
def test_all_faults_find_a_request_however_late_the_rig_hears_of_those_that_are_begun(latency: int) -> None:
    requests, faults = 500, 72
    pace, begun, heard = Pace(5), 0, [0] * latency
    for number in range(faults):
        after = int((number + 0.5) * requests * 0.9 / faults)
        for tick in range(latency + 40):
            allowed = pace.allowed(after=after, begun=heard[0], needed=True, now=number * 100 + tick * 0.02)
            begun = min(max(begun, allowed), requests)
            heard = [*heard[1:], begun]
            if heard[0] >= after and tick >= latency:
                break
        assert begun < requests, f"fault {number} is the last one"


def test_a_client_that_is_through_leaves_its_share_to_the_others() -> None:
    clients = ["c0", "c1", "c2"]
    assert shared(10, count=100, asking=clients, clients=clients) == {"c0": 4, "c1": 3, "c2": 3}
    assert shared(107, count=100, asking=["c0", "c2"], clients=clients) == {"c0": 4, "c1": 100, "c2": 3}
    assert shared(300, count=100, asking=[], clients=clients) == {"c0": 100, "c1": 100, "c2": 100}
