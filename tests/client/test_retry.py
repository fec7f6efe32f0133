"""The client rules without a clock: whatever happens, they end, and they never send in a rush."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.client.retry import AskPresence, GiveUp, RetryRules, Send, WaitUntil

EVENTS = st.lists(
    st.sampled_from(["hear", "hole", "nobody", "alive", "offline", "back", "cancel", "nothing"]), max_size=60
)


@given(EVENTS, st.booleans(), st.booleans(), st.one_of(st.none(), st.floats(0.1, 500)))
def test_a_request_that_hears_nothing_more_is_given_up_in_bounded_time(
    events: list[str], streams: bool, online: bool, timeout_s: float | None
) -> None:
    rules = RetryRules(streams=streams, timeout_s=timeout_s, heartbeat_s=1.0)
    rules.sent(0.0)
    now, hole, sends = 0.0, False, 0
    for event in events:
        now += 0.5
        match event:
            case "hear" | "hole":
                hole = event == "hole"
                rules.heard(now, progress=not hole)
            case "nobody":
                rules.nobody()
            case "alive":
                rules.alive()
            case "offline":
                rules.offline(now)
            case "back":
                rules.back()
            case "cancel":
                rules.cancelled(now)
    ends_at = now + 4000
    while now < ends_at:
        match rules.decide(now, hole=hole, worker_online=online):
            case GiveUp():
                return
            case Send():
                rules.sent(now)
                sends += 1
            case AskPresence():
                rules.probed(now)
            case WaitUntil(until):
                assert until > now
                now = until
    raise AssertionError(f"still waiting after {sends} deliveries")


@given(st.floats(0.1, 60), st.integers(0, 20))
def test_deliveries_in_vain_are_at_most_the_limit_and_one(heartbeat_s: float, resend_limit: int) -> None:
    rules = RetryRules(heartbeat_s=heartbeat_s, resend_limit=resend_limit)
    rules.sent(0.0)
    now = 0.0
    while not isinstance(step := rules.decide(now, hole=False, worker_online=True), GiveUp):
        if isinstance(step, Send):
            rules.sent(now)
        elif isinstance(step, WaitUntil):
            now = step.until
    assert rules.sends == resend_limit + 1
    assert step.why == "unanswered"


def test_a_steady_stream_is_never_sent_again() -> None:
    rules = RetryRules(heartbeat_s=15)
    rules.sent(0.0)
    for second in range(1, 1000, 15):
        rules.heard(float(second), progress=True)
        assert isinstance(rules.decide(second + 14.9, hole=False, worker_online=True), WaitUntil)


def test_three_heartbeats_of_silence_bring_another_delivery() -> None:
    rules = RetryRules(heartbeat_s=15)
    rules.sent(0.0)
    rules.heard(1.0, progress=True)
    assert rules.decide(45.9, hole=False, worker_online=True) == WaitUntil(46.0)
    assert rules.decide(46.0, hole=False, worker_online=True) == Send()


def test_an_answer_in_one_piece_may_take_as_long_as_it_needs() -> None:
    rules = RetryRules(heartbeat_s=1, streams=False, resend_limit=2)
    rules.sent(0.0)
    now = 0.0
    while not isinstance(step := rules.decide(now, hole=False, worker_online=True), GiveUp):
        now = max(now, step.until) if isinstance(step, WaitUntil) else now
        if isinstance(step, Send):
            rules.sent(now)
    assert now >= 3600


def test_the_wait_ends_soon_after_the_time_limit_of_the_request() -> None:
    rules = RetryRules(timeout_s=5, streams=False)
    rules.sent(0.0)
    assert rules.decide(10.0, hole=False, worker_online=True) == WaitUntil(15.0)
    assert rules.decide(15.0, hole=False, worker_online=True) == GiveUp("timeout")
