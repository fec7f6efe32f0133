"""Topics and filters, checked against paho and the specification."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from llamacpp_mqtt_deploy.core.topics import filter_fault, topic_fault, topic_matches

LEVEL = st.text("ab$", max_size=2)
TOPIC = st.lists(LEVEL, min_size=1, max_size=4).map("/".join).filter(bool)
FILTER = st.tuples(
    st.lists(LEVEL | st.just("+"), min_size=0, max_size=4), st.sampled_from([[], ["#"]])
).map(lambda parts: "/".join([*parts[0], *parts[1]])).filter(bool)  # fmt: skip


@given(FILTER, TOPIC)
def test_matching_agrees_with_paho(topic_filter: str, topic: str) -> None:
    assert filter_fault(topic_filter) is None
    assert topic_matches(topic_filter, topic) == topic_matches_sub(topic_filter, topic)


@given(st.text(max_size=60))
def test_a_fit_topic_can_be_written_on_the_wire(topic: str) -> None:
    if topic_fault(topic) is None:
        encoded = topic.encode()
        assert 0 < len(encoded) <= 65535
        assert not set(topic) & set("+#\0\n\x7f")
        assert not topic.startswith("$")
        assert filter_fault(topic) is None


@pytest.mark.parametrize("topic", ["llm/reply/alice/s-1", "ü/日本", " ", "a//b", "/", "/".join("x" * 200)])
def test_ordinary_topics_are_fit(topic: str) -> None:
    assert topic_fault(topic) is None


@pytest.mark.parametrize("topic_filter", ["", "a/#/b", "a#", "a+/b", "a/+b", "a\0", "#/#"])
def test_illegal_filters_are_told_apart(topic_filter: str) -> None:
    assert filter_fault(topic_filter) is not None
