"""Coalescing, cutting into pieces and into sentences: no character is lost."""

from __future__ import annotations

from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.chunking import MAX_SENTENCE_CHARS, SentenceCutter, pieces
from llamacpp_mqtt_deploy.core.coalescer import Coalescer, TextKind
from tests.support.effort import seconds_of


@given(st.lists(st.tuples(st.sampled_from(["content", "reasoning"]), st.text(min_size=1)), max_size=50), st.data())
def test_a_coalescer_loses_nothing_and_keeps_the_order(deltas: list[tuple[str, str]], data: st.DataObject) -> None:
    coalescer = Coalescer()
    out: list[tuple[str, Any]] = []
    for kind, text in deltas:
        coalescer.feed(kind, text)  # type: ignore[arg-type]
        assert coalescer
        if data.draw(st.booleans()):
            out += coalescer.take()
    out += coalescer.take()
    for wanted in ("content", "reasoning"):
        assert "".join(t for k, t in out if k == wanted) == "".join(t for k, t in deltas if k == wanted)
    assert not coalescer
    assert coalescer.take() == []


def test_text_that_waits_is_joined_and_kinds_are_kept_apart() -> None:
    coalescer = Coalescer()
    for kind, text in (("reasoning", "hm"), ("content", "b"), ("content", "c"), ("reasoning", "oh")):
        coalescer.feed(kind, text)  # type: ignore[arg-type]
    assert coalescer.take() == [("reasoning", "hm"), ("content", "bc"), ("reasoning", "oh")]


@pytest.mark.parametrize(
    "another",
    [
        {"index": 1, "arguments": "}"},
        {"index": 0, "id": "c2", "arguments": "{"},
        {"index": 0, "name": "g", "arguments": "{"},
    ],
)
def test_a_piece_of_another_tool_call_is_not_joined_to_the_call_before(another: dict[str, Any]) -> None:
    coalescer = Coalescer()
    first = {"index": 0, "id": "c", "name": "f", "arguments": "{"}
    coalescer.feed_call(first)
    coalescer.feed_call(another)
    assert coalescer.take() == [("tool_calls", [first, another])]


def test_arguments_of_the_same_tool_call_are_joined() -> None:
    coalescer = Coalescer()
    coalescer.feed("content", "look: ")
    coalescer.feed_call({"index": 1, "id": "c", "name": "f", "arguments": "{"})
    coalescer.feed_call({"index": 1, "arguments": "}"})
    joined = {"index": 1, "id": "c", "name": "f", "arguments": "{}"}
    assert coalescer.take() == [("content", "look: "), ("tool_calls", [joined])]


def test_arguments_that_wait_are_not_copied_for_each_piece_that_comes() -> None:
    def feed(pieces: int) -> Coalescer:
        coalescer = Coalescer()
        coalescer.feed_call({"index": 0, "id": "c", "name": "f", "arguments": ""})
        for _ in range(pieces):
            coalescer.feed_call({"index": 0, "arguments": "abcd"})
        return coalescer

    (piece,) = feed(3).take()
    assert piece == ("tool_calls", [{"index": 0, "id": "c", "name": "f", "arguments": "abcd" * 3}])
    # Sixteen times as many would take 256 times as long.
    assert seconds_of(lambda: feed(160_000)) < 64 * seconds_of(lambda: feed(10_000))


GRAPHEMES = st.text(alphabet=st.sampled_from("ab \n\u0301\u200d👩👨👧🏽🇩🇪\U0001f3fbक्षि"))


@given(GRAPHEMES | st.text(), st.integers(1, 12))
def test_pieces_split_no_grapheme_cluster_and_join_to_the_text(text: str, chars: int) -> None:
    found = list(pieces(text, chars))
    assert "".join(found) == text
    clusters = [regex.findall(r"\X", piece) for piece in found]
    assert sum(map(len, clusters)) == len(regex.findall(r"\X", text))
    assert all(len(cluster) == chars for cluster in clusters[:-1])


@given(st.lists(st.text(alphabet="ab .!?\n\"'。3", max_size=20), max_size=30))
def test_sentences_join_to_the_text_at_any_cut(cuts: list[str]) -> None:
    cutter = SentenceCutter()
    found = [sentence for cut in cuts for sentence in cutter.feed(cut)] + cutter.flush()
    assert "".join(found) == "".join(cuts)
    assert all(found)


_END = regex.compile(r"""[.!?…]+["'”’»)\]]*(?=\s)|[。！？]+["'”’»）」』】]*|\n+""")
_SHORT = regex.compile(r"(?:^|\s)(?:e\.g|i\.e|etc|vs|Mr|Mrs|Ms|Dr|St|Nr|No|z\.B|d\.h|bzw|ca|\p{Lu}|\d+)\.$")


def plainly_cut(parts: list[str]) -> list[str]:
    """The rules of sentences in a few lines, looking at everything that is held with each part."""
    held, sentences = "", []
    for part in parts:
        held, start = held + part, 0
        for match in _END.finditer(held):
            candidate = held[start : match.end()]
            if not _SHORT.search(candidate):
                sentences.append(candidate)
                start = match.end()
        held = held[start:]
        while len(held) > MAX_SENTENCE_CHARS:
            cut = held.rfind(" ", 0, MAX_SENTENCE_CHARS) + 1 or MAX_SENTENCE_CHARS
            sentences.append(held[:cut])
            held = held[cut:]
    return [*sentences, held] if held else sentences


_WORDS = [
    ".",
    "...",
    "1. ",
    "A. ",
    "e.g. ",
    "x.",
    " ",
    "x",
    '"',
    "'",
    '! "',
    '?"',
    ")",
    "\n",
    "。",
    "」",
    "Dr. ",
    "3.5 ",
    "…",
    "z.B. ",
]
PARTS = st.lists(
    st.lists(st.sampled_from(_WORDS) | st.sampled_from(["y" * 600, "." * 600, "12" * 300, " " * 400]), max_size=6).map(
        "".join
    ),
    max_size=40,
)


@given(PARTS)
def test_sentences_end_where_the_plain_rules_say_at_any_cut(parts: list[str]) -> None:
    cutter = SentenceCutter()
    assert [each for part in parts for each in cutter.feed(part)] + cutter.flush() == plainly_cut(parts)


@pytest.mark.parametrize(
    "row", [".", "...", ". ", "1. ", "A. ", '."', "x", "x ", " ", "\n", "123456789", "。", "One. "]
)
@pytest.mark.parametrize("tokens", [1, 1000])
def test_a_text_costs_what_its_length_says_whatever_is_in_it(row: str, tokens: int) -> None:
    """Sixteen times the text may cost sixteen times the work; the square would be 256 times."""

    def cut(chars: int) -> None:
        text, cutter = row * (chars // len(row)), SentenceCutter()
        size = -(-len(text) // tokens)
        for start in range(0, len(text), size):
            cutter.feed(text[start : start + size])

    cut(1000)
    assert seconds_of(lambda: cut(64_000)) < 64 * max(0.001, seconds_of(lambda: cut(4000)))


def test_a_sentence_waits_for_what_shows_that_it_has_ended() -> None:
    cutter = SentenceCutter()
    assert cutter.feed("It costs 3.") == []
    assert cutter.feed("50 euros. And") == ["It costs 3.50 euros."]
    assert cutter.feed(" e.g. this! Next") == [" And e.g. this!"]
    assert cutter.flush() == [" Next"]


def test_sentences_end_without_a_blank_in_chinese() -> None:
    assert SentenceCutter().feed("你好。再见。") == ["你好。", "再见。"]


def test_text_without_an_end_is_not_held_back_for_ever() -> None:
    cutter = SentenceCutter()
    found = [part for _ in range(80) for part in cutter.feed("no end in sight and ")]
    assert found
    assert max(map(len, found)) <= MAX_SENTENCE_CHARS


def test_at_a_thousand_characters_a_text_is_cut_behind_a_blank_or_where_it_has_none_at_once() -> None:
    cutter = SentenceCutter()
    assert cutter.feed("x" * 1000) == []
    assert cutter.feed("y") == ["x" * 1000]
    assert cutter.flush() == ["y"]
    assert cutter.feed("x" * 998 + " " + "y" * 10) == ["x" * 998 + " "]
    assert cutter.flush() == ["y" * 10]
    assert cutter.feed("x" * 999 + " y") == ["x" * 999 + " "]
    cutter = SentenceCutter()
    assert cutter.feed(" " + "x" * 1000) == [" "], "the first blank is one, too"
    assert cutter.flush() == ["x" * 1000]
    assert cutter.flush() == []


def test_several_sentences_of_one_piece_are_told_one_by_one() -> None:
    assert SentenceCutter().feed("One. Two! Three? Four") == ["One.", " Two!", " Three?"]


@given(
    st.lists(st.tuples(st.sampled_from(["content", "reasoning"]), st.text(min_size=1, max_size=20), st.booleans())),
    st.integers(1, 30),
    st.integers(1, 5),
)
def test_what_is_taken_in_parts_is_the_same_text_in_the_same_order(
    fed: list[tuple[TextKind, str, bool]], most_chars: int, most_pieces: int
) -> None:
    coalescer = Coalescer()
    for kind, text, apart in fed:
        (coalescer.feed_apart if apart else coalescer.feed)(kind, text)
    taken: list[Any] = []
    while coalescer:
        part = coalescer.take(most_chars, most_pieces)
        assert 0 < sum(len(text) for _, text in part) <= most_chars
        assert len(part) <= most_pieces
        taken += part
    assert [(kind, char) for kind, text in taken for char in text] == [
        (kind, char) for kind, text, _ in fed for char in text
    ]


def test_what_is_taken_fills_the_limit_to_the_character_and_cuts_no_call() -> None:
    coalescer = Coalescer()
    for text in ("ab", "cd", "ef"):
        coalescer.feed_apart("content", text)
    assert coalescer.take(most_chars=4) == [("content", "ab"), ("content", "cd")]
    coalescer.feed_apart("content", "gh")
    assert coalescer.take(most_chars=3) == [("content", "ef")]
    assert coalescer.take(most_chars=1) == [("content", "g")]
    call = {"index": 0, "id": "c", "name": "f", "arguments": "long"}
    coalescer.feed_call(call)
    assert coalescer.take(most_chars=1) == [("content", "h"), ("tool_calls", [call])]
    assert not coalescer
