"""The pace of a stream: one unacknowledged chunk at a time, and a pause that grows with the number of streams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.flow import KEEP_UP_S, SHORTEST_REST_S, FlowControl


def sent_one(*, at: float, min_interval_s: float = 1.0) -> FlowControl:
    flow = FlowControl(min_interval_s=min_interval_s)
    flow.sent, flow.sent_at = 1, at
    return flow


def test_the_first_chunk_goes_at_once() -> None:
    flow = FlowControl(min_interval_s=1.0)
    assert flow.may_send(0.0)
    assert (flow.due_in_s(0.0), flow.rest_s(0.0), flow.in_flight()) == (0.0, 0.0, 0)


def test_the_next_chunk_goes_when_the_one_before_it_is_acknowledged() -> None:
    flow = sent_one(at=0.0)
    assert (flow.may_send(9.0), flow.in_flight()) == (False, 1)
    flow.acked += 1
    assert (flow.may_send(9.0), flow.in_flight()) == (True, 0)


def test_the_pause_after_a_chunk_is_named_to_the_moment() -> None:
    flow = sent_one(at=100.0)
    flow.acked += 1
    assert (flow.may_send(100.5), flow.due_in_s(100.5)) == (False, 0.5)
    assert (flow.may_send(101.0), flow.due_in_s(101.0)) == (True, 0.0)
    assert flow.due_in_s(103.0) == 0.0


def test_no_time_is_named_while_an_acknowledgement_is_awaited() -> None:
    flow = sent_one(at=100.0)
    assert flow.due_in_s(100.5) is None
    assert flow.due_in_s(200.0) is None


def test_a_reader_rests_until_text_may_go_and_never_long() -> None:
    flow = sent_one(at=100.0, min_interval_s=0.01)
    assert flow.rest_s(100.0) == SHORTEST_REST_S  # the broker has not answered
    assert flow.rest_s(100.004) == pytest.approx(0.004)
    assert flow.rest_s(107.0) == KEEP_UP_S, "a broker that hangs costs no processor time"
    flow.acknowledge(100.0)
    assert flow.in_flight() == 0
    assert flow.rest_s(100.0) == pytest.approx(0.01)
    assert flow.rest_s(101.0) == 0.0
    flow.share(60)
    assert flow.rest_s(100.0) == KEEP_UP_S


def test_a_reader_that_awaits_an_acknowledgement_rests_as_long_as_this_broker_takes() -> None:
    flow = FlowControl()
    for number in range(40):
        flow.sent, flow.sent_at = flow.sent + 1, float(number)
        flow.acknowledge(number + 0.008)
    flow.sent, flow.sent_at = flow.sent + 1, 40.0
    assert flow.rest_s(40.0) == pytest.approx(0.008, rel=0.01)
    flow.acknowledge(40.2)  # one that came late counts for a quarter
    flow.sent, flow.sent_at = flow.sent + 1, 41.0
    assert flow.rest_s(41.0) == KEEP_UP_S
    assert flow.round_trip_s == pytest.approx(0.75 * 0.008 + 0.25 * 0.2, rel=0.01)


@pytest.mark.parametrize("streams,factor", [(0, 1), (1, 1), (4, 1), (7, 1), (8, 2), (11, 2), (16, 4)])
def test_many_streams_share_what_a_few_may_send(streams: int, factor: int) -> None:
    flow = FlowControl(min_interval_s=0.01)
    flow.share(streams)
    assert flow.interval_s == pytest.approx(0.01 * factor)
    flow.share(1)
    assert flow.interval_s == 0.01


@pytest.mark.parametrize(
    "streams,pieces,interval_s", [(1, 1, 0.01), (1, 7, 0.01), (1, 8, 0.02), (8, 7, 0.02), (8, 90, 0.04)]
)
def test_a_stream_with_many_tokens_in_a_chunk_sends_half_as_many(streams: int, pieces: int, interval_s: float) -> None:
    flow = FlowControl(min_interval_s=0.01)
    flow.share(streams, pieces)
    assert flow.interval_s == pytest.approx(interval_s)
    flow.share(streams, 1)
    assert flow.interval_s == pytest.approx(0.01 if streams == 1 else 0.02), "as soon as the engine is slow again"
    every_token = FlowControl()
    every_token.share(streams, pieces)
    assert every_token.interval_s == 0.0


def test_the_pauses_of_many_streams_end_together() -> None:
    streams = [sent_one(at=at, min_interval_s=0.01) for at in (100.001, 100.004, 100.0099)]
    for flow in streams:
        flow.acked = 1
        flow.share(8)
    assert [flow.due_in_s(100.015) for flow in streams] == pytest.approx([0.005] * 3)
    # Sent late in the common interval: the shortest pause comes first, and the next chunk is in step again.
    late = sent_one(at=100.019, min_interval_s=0.01)
    late.acked = 1
    late.share(8)
    assert late.due_in_s(100.019) == pytest.approx(0.01)
    late.sent_at = 100.029
    assert late.due_in_s(100.029) == pytest.approx(0.011)


def test_after_a_chunk_of_a_quick_engine_a_reader_rests_for_the_pause_and_never_long() -> None:
    flow = FlowControl(min_interval_s=0.005)
    assert flow.after_sending_s() == 0.005
    flow.share(64)
    assert flow.after_sending_s() == KEEP_UP_S


@given(st.floats(0, 1e6), st.floats(0.001, 1), st.integers(0, 300))
def test_a_stream_among_many_waits_between_the_shortest_pause_and_its_share(
    sent_at: float, min_interval_s: float, streams: int
) -> None:
    flow = sent_one(at=sent_at, min_interval_s=min_interval_s)
    flow.acked = 1
    flow.share(streams)
    due_in_s = flow.due_in_s(sent_at)
    assert due_in_s is not None
    assert min_interval_s - 1e-6 <= due_in_s <= max(flow.interval_s, min_interval_s) + 1e-6
    assert flow.may_send(sent_at + due_in_s + 1e-6)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 2)), max_size=40), st.just(0.0) | st.floats(0.001, 1))
def test_two_chunks_are_never_closer_than_the_pause_and_never_both_in_flight(
    steps: list[tuple[bool, float]], min_interval_s: float
) -> None:
    flow, now = FlowControl(min_interval_s=min_interval_s), 0.0
    for acknowledged, passed in steps:
        now += passed
        if acknowledged and flow.in_flight():
            flow.acked += 1
        before = flow.sent_at
        if flow.may_send(now):
            assert flow.in_flight() == 0
            assert before is None or now - before >= min_interval_s - 1e-9
            flow.sent, flow.sent_at = flow.sent + 1, now
        else:
            due_in_s = flow.due_in_s(now)
            assert (due_in_s is None) == bool(flow.in_flight())


def test_without_an_interval_only_the_acknowledgement_is_awaited() -> None:
    flow = FlowControl()
    flow.sent, flow.sent_at, flow.acked = 1, 100.0, 1
    assert (flow.may_send(100.0), flow.due_in_s(100.0)) == (True, 0.0)
