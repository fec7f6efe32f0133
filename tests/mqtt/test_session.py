"""The table of unacknowledged publishes: order, window, and finding the one that ends connections."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.outbox_budget import MIB, OutboxBudget
from llamacpp_mqtt_deploy.mqtt.session import QUIET_S, Outgoing, Publish


def publish(name: str) -> Publish:
    return Publish(name, b"", 1, False, None, None, None)


def table(count: int, window: int = 4) -> Outgoing:
    outgoing = Outgoing(OutboxBudget(most_messages=5000, most_bytes=64 * MIB))
    for number in range(count):
        outgoing.waiting.append(publish(str(number)))
    outgoing.connected(window=window, now=0.0)
    return outgoing


def send_all(outgoing: Outgoing, now: float) -> list[str]:
    sent = []
    while (found := outgoing.next(now)) is not None:
        outgoing.sent(int(found.topic) + 1, found)
        sent.append(found.topic)
    return sent


def test_no_more_than_the_window_is_in_flight() -> None:
    outgoing = table(10)
    assert send_all(outgoing, 0.0) == ["0", "1", "2", "3"]
    outgoing.acknowledged(1)
    assert send_all(outgoing, 0.0) == ["4"]
    assert len(outgoing) == 9


def test_what_was_in_flight_goes_first_and_in_order_on_the_next_connection() -> None:
    outgoing = table(6)
    send_all(outgoing, 0.0)
    outgoing.acknowledged(2)
    outgoing.requeue()
    assert [p.topic for p in outgoing.waiting] == ["0", "2", "3", "4", "5"]


def test_blameless_ends_and_ends_with_nothing_in_flight_prove_nothing() -> None:
    outgoing = table(2)
    for _ in range(10):
        assert outgoing.lost(blameless=False) is None
    send_all(outgoing, 0.0)
    for _ in range(10):
        assert outgoing.lost(blameless=True) is None
    assert not outgoing.on_probation


def test_on_probation_a_connection_is_quiet_first_and_sends_one_at_a_time() -> None:
    outgoing = table(3)
    for _ in range(2):
        send_all(outgoing, 1.0)
        outgoing.lost(blameless=False)
    assert outgoing.on_probation
    outgoing.requeue()
    outgoing.connected(window=4, now=10.0)
    assert outgoing.next(10.0) is None
    assert outgoing.quiet_s(10.0) == pytest.approx(QUIET_S)
    assert send_all(outgoing, 10.5) == ["0"]
    for mid in (1, 2, 3):
        outgoing.acknowledged(mid)
        send_all(outgoing, 11.0)
    assert not outgoing.on_probation


@given(
    count=st.integers(1, 30),
    window=st.integers(1, 12),
    data=st.data(),
    acks_get_lost=st.booleans(),
)
def test_exactly_the_culprits_are_given_up_and_nothing_overtakes(
    count: int, window: int, data: st.DataObject, acks_get_lost: bool
) -> None:
    culprits = data.draw(st.sets(st.integers(0, count - 1), max_size=3))
    outgoing = table(count, window)
    taken: list[str] = []
    given_up: list[str] = []
    for connection in range(200):
        if not outgoing:
            break
        now = connection * 100.0
        outgoing.requeue()
        outgoing.connected(window=window, now=now)
        broken = False
        while not broken and outgoing:
            batch = []
            while (found := outgoing.next(now + 1)) is not None:
                outgoing.sent(int(found.topic) + 1, found)
                batch.append(found)
            for found in list(outgoing.flying.values()):
                if int(found.topic) in culprits:
                    broken = True
                    break
                taken.append(found.topic)
                # The broker's last PUBACKs may die with the connection, unless there was time for them.
                if acks_get_lost and len(outgoing.flying) > 1 and any(int(p.topic) in culprits for p in batch):
                    continue
                outgoing.acknowledged(int(found.topic) + 1)
        if broken:
            poison = outgoing.lost(blameless=False)
            if poison is not None:
                given_up.append(poison.topic)
    assert not outgoing
    assert sorted(given_up, key=int) == [str(c) for c in sorted(culprits)]
    first_seen = list(dict.fromkeys(taken))
    assert first_seen == [str(n) for n in range(count) if n not in culprits]
