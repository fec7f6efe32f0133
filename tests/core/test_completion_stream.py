"""A streamed completion as deltas: the short way for tokens says the same as the general one, at any cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.completion_stream import CompletionStream
from llamacpp_mqtt_deploy.core.deltas import Delta, Reasoning, Text
from llamacpp_mqtt_deploy.core.thinking import ThinkingSplitter
from llamacpp_mqtt_deploy.core.token_lines import TokenLines

FIELDS = {
    "created": 1795162877,
    "id": "chatcmpl-y5gEKDczag3DfXeOSNx9TOZHQZBYGaKq",
    "model": "tiny.gguf",
    "system_fingerprint": "b0-unknown",
    "object": "chat.completion.chunk",
}


def event(delta: dict[str, Any], *, ascii_only: bool = False, **fields: Any) -> bytes:
    choice = {"finish_reason": None, "index": 0, "delta": delta}
    text = json.dumps({"choices": [choice], **FIELDS, **fields}, separators=(",", ":"), ensure_ascii=ascii_only)
    return b"data: " + text.encode("utf-8", "surrogatepass") + b"\n\n"


def joined(deltas: list[Delta]) -> list[tuple[type[Delta], str]]:
    """Runs of text as one; how many events they came in does not count."""
    runs: list[tuple[type[Delta], str]] = []
    for delta in deltas:
        if isinstance(delta, Text | Reasoning):
            if runs and runs[-1][0] is type(delta):
                runs[-1] = (type(delta), runs[-1][1] + delta.text)
            else:
                runs.append((type(delta), delta.text))
        else:
            runs.append((type(delta), repr(delta)))
    return runs


TRICKY = st.sampled_from(
    [
        '"',
        "\\",
        '\\"',
        '"}}],"created":',
        'data: {"choices":[',
        "\n\n",
        "\\u",
        "é",
        "😀",
        "\u2028",
        "\x00",
        '"}}],"created":1,"id":"',
    ]
)
TEXTS = st.text(max_size=6) | TRICKY | st.lists(TRICKY, max_size=4).map("".join)
EVENTS = st.one_of(
    st.builds(
        lambda text, kind, plain: event({kind: text}, ascii_only=plain),
        TEXTS,
        st.sampled_from(["content", "reasoning_content"]),
        st.booleans(),
    ),
    st.just(event({"role": "assistant", "content": None})),
    st.just(event({}, usage={"prompt_tokens": 3, "completion_tokens": 5})),
    st.just(b":\n\n"),
    st.just(event({"content": "other"}, model="another model")),
    st.just(event({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]})),
    st.builds(lambda text: event({"content": text}, ascii_only=True), st.sampled_from(["\ud83d", "\ude00"])),
)


@given(st.lists(EVENTS, max_size=12), st.data())
def test_the_short_way_says_what_the_general_one_says(events: list[bytes], data: st.DataObject) -> None:
    body = b"".join(events)
    borders = st.sampled_from([sum(map(len, events[:number])) for number in range(len(events) + 1)])
    cuts = sorted({*data.draw(st.lists(borders | st.integers(0, len(body)), max_size=8)), 0, len(body)})
    chunks = [body[start:end] for start, end in itertools.pairwise(cuts)]
    with pytest.MonkeyPatch.context() as patch:
        short = read_all(chunks)
        patch.setattr(TokenLines, "read", lambda self, body: None)
        patch.setattr(TokenLines, "find", lambda self, body: None)
        general = read_all(chunks)
    assert short == general


@given(st.lists(EVENTS, max_size=16), st.data())
def test_parts_that_may_be_events_say_what_their_bytes_say(events: list[bytes], data: st.DataObject) -> None:
    """A part may be an event, several, or the half of one; a read brings some of them."""
    body = b"".join(events)
    places = [sum(map(len, events[:number])) for number in range(len(events) + 1)]
    kept = data.draw(st.lists(st.sampled_from(places), max_size=16) | st.just(places))
    cuts = sorted({*kept, *data.draw(st.lists(st.integers(0, len(body)), max_size=2)), 0, len(body)})
    parts = [body[start:end] for start, end in itertools.pairwise(cuts)]
    reads = sorted({*data.draw(st.lists(st.integers(0, len(parts)), max_size=4)), 0, len(parts)})
    stream = CompletionStream()
    deltas: list[Delta] = []
    for start, end in itertools.pairwise(reads):
        deltas += stream.feed_parts(parts[start:end])
    deltas += stream.end()
    assert (joined(deltas), stream.reader.finished()) == read_all([body])


def test_events_of_one_token_each_are_read_together_where_they_come_in_parts() -> None:
    first, last = (
        event({"role": "assistant", "content": None}),
        event({}, usage={"prompt_tokens": 3}) + b"data: [DONE]\n\n",
    )
    tokens = [event({"content": text}) for text in (" fo", 'o "bar"\n', "é")]
    stream = CompletionStream()
    assert stream.feed_parts([first, *tokens, last]) == [Text(' foo "bar"\né', 3)]
    assert stream.reader.done
    assert stream.reader.finished().usage.completion_tokens == 3
    mixed = CompletionStream()
    assert mixed.feed_parts([*tokens, event({"reasoning_content": "c"}), *tokens[:2]])[0] == Text(" fo")


def test_an_event_without_text_is_not_counted_as_a_token() -> None:
    _, finished = read_all([event({"content": ""}) + event({"content": "0"})])
    assert finished.usage.completion_tokens == 1


def read_all(chunks: list[bytes]) -> tuple[list[tuple[type[Delta], str]], Any]:
    stream = CompletionStream()
    deltas: list[Delta] = []
    for chunk in chunks:
        deltas += stream.feed(chunk)
    deltas += stream.end()
    return joined(deltas), stream.reader.finished()


def test_tokens_that_come_together_are_read_as_one_text_and_counted_each() -> None:
    lines = TokenLines()
    body = event({"content": " fo"}) + event({"content": 'o "bar"\n'}) + event({"content": "é"})
    assert lines.read(body) == Text(' foo "bar"\né', 3)
    assert lines.read(event({"reasoning_content": "hm"})) == Reasoning("hm")
    stream = CompletionStream()
    stream.feed(body)
    assert stream.reader.finished().usage.completion_tokens == 3


def test_tokens_between_other_events_and_halves_of_events_are_read_as_one_text_too() -> None:
    tokens = event({"content": "a"}) + event({"content": "b"})
    last = event({}, usage={"prompt_tokens": 3, "completion_tokens": 5}) + b"data: [DONE]\n\n"
    whole = CompletionStream()
    assert whole.feed(event({"role": "assistant", "content": None}) + tokens + last) == [Text("ab", 2)]
    assert whole.reader.done
    cut = CompletionStream()
    assert cut.feed(tokens + event({"content": "c"})[:70]) == [Text("ab", 2)]
    assert cut.feed(event({"content": "c"})[70:] + tokens + tokens + last[:9]) == [Text("c"), Text("abab", 4)]
    assert cut.feed(last[9:]) == []
    assert cut.reader.done
    mixed = CompletionStream()
    assert mixed.feed(tokens + event({"reasoning_content": "c"}) + tokens) == [
        Text("a"),
        Text("b"),
        Reasoning("c"),
        Text("a"),
        Text("b"),
    ]


@pytest.mark.parametrize(
    "body",
    [
        event({"content": "a"})[:-1],
        event({"content": "a"}) + event({"reasoning_content": "b"}),
        event({"content": "a"}) + event({}, finish_reason="stop"),
        event({"content": "\x1b"}, ascii_only=True),
        event({"content": ""}),
        event({"content": "a"}, id='quote"d'),
        b"",
        b"data: [DONE]\n\n",
    ],
)
def test_everything_but_whole_tokens_of_one_kind_is_left_to_the_general_way(body: bytes) -> None:
    assert TokenLines().read(body) is None


def test_a_stream_whose_ids_change_on_the_way_is_read_on() -> None:
    lines = TokenLines()
    assert lines.read(event({"content": "one"})) == Text("one")
    assert lines.read(event({"content": "two"}, id="a longer id than the one before, for whatever reason")) == Text(
        "two"
    )
    assert lines.read(event({"content": "three"}, id="short") + event({"content": "four"}, id="short")) == Text(
        "threefour", 2
    )
    assert lines.read(event({"content": "one"}, id="a") + event({"content": "two"}, id="b")) is None


def test_thinking_in_the_text_is_split_off_also_where_tokens_come_one_by_one() -> None:
    stream = CompletionStream(thinking=ThinkingSplitter("<think>", "</think>"))
    deltas = [
        delta for text in ("<th", "ink>", "hm", "</think>", "a") for delta in stream.feed(event({"content": text}))
    ]
    assert joined(deltas) == [(Reasoning, "hm"), (Text, "a")]
    held = CompletionStream(thinking=ThinkingSplitter("<think>", "</think>"))
    assert held.feed(event({"content": "<th"})) == []
    assert held.end() == [Text("<th")]


def test_half_a_pair_waits_for_the_other_half_in_the_next_read() -> None:
    stream = CompletionStream()
    stream.feed(event({"content": "\ud83d"}, ascii_only=True))
    assert stream.reader.holds_half
    assert stream.feed(event({"content": "plain"})) == [Text("\ufffdplain")]


@pytest.mark.parametrize(
    "left,read",
    [
        (event({"content": "a"})[:-2], [Text("a")]),
        (event({"content": "a"})[:-3], []),
        (b'data: "choices"}', []),
        (b"data: [DONE]", []),
        (b"data: [DONE", []),
        (b"data: [DONE] ", []),
        (b"data: ", []),
    ],
)
def test_what_a_server_leaves_at_the_end_is_read_where_it_is_whole(left: bytes, read: list[Delta]) -> None:
    stream = CompletionStream()
    assert stream.feed(left) == []
    assert stream.end() == read
    assert stream.reader.done is (left.rstrip() == b"data: [DONE]")


@pytest.mark.parametrize("ping", [b"data: \n\n", b"data:\n\n", b"event: ping\ndata:\n\n"])
def test_what_proxies_send_so_that_a_connection_stays_open_says_nothing(ping: bytes) -> None:
    token, done = event({"content": "a"}), b"data: [DONE] \n\n"
    (runs, finished) = read_all([ping + token + ping + token, ping, token + ping + done])
    assert (runs, finished.usage.completion_tokens) == ([(Text, "aaa")], 3)
    stream = CompletionStream()
    stream.feed(done)
    assert stream.reader.done
