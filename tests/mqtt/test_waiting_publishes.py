"""In turn between clients, in order within each: one's backlog holds up nobody else's tokens."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from llamacpp_mqtt_deploy.core.outbox_budget import MIB, OutboxBudget
from llamacpp_mqtt_deploy.core.topics import owner_levels
from llamacpp_mqtt_deploy.mqtt.session import Outgoing, Publish
from llamacpp_mqtt_deploy.mqtt.waiting_publishes import WaitingPublishes


def _publish(topic: str, payload: bytes = b"") -> Publish:
    return Publish(topic, payload, 1, False, None, None, None)


def _taken(waiting: WaitingPublishes) -> list[str]:
    return [waiting.take().topic for _ in range(waiting.count)]


def test_one_of_each_client_goes_in_turn_whatever_its_sessions_are() -> None:
    waiting = WaitingPublishes(owner_levels("llm"))
    for number in range(4):
        waiting.append(_publish(f"llm/reply/flood/s{number}"))
    waiting.append(_publish("llm/reply/ada"))
    waiting.append(_publish("llm/reply/ada/chat"))
    waiting.append(_publish("llm/status/w1"))
    assert _taken(waiting) == [
        "llm/reply/flood/s0",
        "llm/reply/ada",
        "llm/status/w1",
        "llm/reply/flood/s1",
        "llm/reply/ada/chat",
        "llm/reply/flood/s2",
        "llm/reply/flood/s3",
    ]


def test_a_root_of_several_levels_counts_as_a_whole() -> None:
    waiting = WaitingPublishes(owner_levels("site/a/llm"))
    for topic in ("site/a/llm/reply/ada/x", "site/a/llm/reply/ada/y", "site/a/llm/reply/bob/x"):
        waiting.append(_publish(topic))
    assert _taken(waiting) == ["site/a/llm/reply/ada/x", "site/a/llm/reply/bob/x", "site/a/llm/reply/ada/y"]


def test_the_last_message_of_a_connection_goes_behind_all_that_waits() -> None:
    outgoing = Outgoing(OutboxBudget(most_messages=10, most_bytes=MIB))
    outgoing.connected(window=10, now=0.0)
    outgoing.take_last(_publish("llm/status/w"))
    for _ in range(3):
        outgoing.take(_publish("llm/reply/ada"))
    assert _taken(outgoing.waiting) == [*["llm/reply/ada"] * 3, "llm/status/w"]


@pytest.mark.parametrize("seed", range(30))
def test_each_topic_keeps_its_order_whatever_is_put_back(seed: int) -> None:
    chance = random.Random(seed)
    waiting, flying = WaitingPublishes(3), list[Publish]()
    sent: dict[str, list[int]] = defaultdict(list)
    came: dict[str, int] = defaultdict(int)
    for _ in range(500):
        match chance.randrange(8):
            case 0 | 1 | 2 | 3:
                topic = f"llm/reply/{chance.choice('aab')}/{chance.choice('xyz')}"
                waiting.append(_publish(topic, b"%d" % came[topic]))
                came[topic] += 1
            case 4 | 5 if waiting.count:
                flying.append(waiting.take())
            case 6 if flying:
                gone = flying.pop(0)
                sent[gone.topic].append(int(gone.payload))
            case 7 if chance.random() < 0.3:
                waiting.put_back(flying)
                flying.clear()
    waiting.put_back(flying)
    assert waiting.count == len(list(waiting)) == sum(came.values()) - sum(map(len, sent.values()))
    while waiting.count:
        gone = waiting.take()
        sent[gone.topic].append(int(gone.payload))
    assert sent == {topic: list(range(number)) for topic, number in came.items()}
    with pytest.raises(IndexError):
        waiting.take()


def test_what_is_cleared_is_gone() -> None:
    waiting = WaitingPublishes(3)
    waiting.append(_publish("a"))
    waiting.append_last(_publish("b"))
    waiting.put_back([_publish("c")])
    assert [each.topic for each in waiting] == ["c", "a", "b"]
    waiting.clear()
    assert (waiting.count, list(waiting)) == (0, [])
