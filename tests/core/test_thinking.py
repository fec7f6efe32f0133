"""Holds the splitting of thinking and answer, and the search for stop texts, to what they promise at any cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.answering import AnswerReader
from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.stopwords import StopWords, held_back
from llamacpp_mqtt_deploy.core.thinking import MAX_HELD_BLANKS, ThinkingSplitter
from llamacpp_mqtt_deploy.core.toolparse import ToolCallReader

TAGS = ("<think>", "</think>")
ALPHABET = "<>/think ab\n"


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    """The text cut at these places."""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


def split(pieces: list[str], *, inside: bool = False) -> tuple[str, str]:
    splitter = ThinkingSplitter(*TAGS, inside=inside)
    out = [delta for piece in pieces for delta in splitter.feed(piece)] + splitter.end()
    assert all(delta.text for delta in out)
    kinds = [type(delta) for delta in out]
    assert kinds == sorted(kinds, key=[Reasoning, Text].index)
    joined = {kind: "".join(delta.text for delta in out if isinstance(delta, kind)) for kind in (Reasoning, Text)}
    return joined[Reasoning], joined[Text]


@pytest.mark.parametrize(
    "text,inside,expected",
    [
        ("<think>\nhm\n</think>\n\nyes", False, ("hm", "yes")),
        ("hm\n</think>\n\nyes", True, ("hm", "yes")),
        ("hm", True, ("hm", "")),
        ("  <think>a b </think>c", False, ("a b", "c")),
        ("<think></think>c", False, ("", "c")),
        ("no <think>tag</think>", False, ("", "no <think>tag</think>")),
        ("<thin", False, ("", "<thin")),
        ("<thinner>", False, ("", "<thinner>")),
        ("\n\nyes ", False, ("", "\n\nyes ")),
        ("<think>a</think", False, ("a</think", "")),
        ("<think>a</thin b</think> x</think>", False, ("a</thin b", "x</think>")),
    ],
)
def test_thinking_and_answer_are_told_apart(text: str, inside: bool, expected: tuple[str, str]) -> None:
    assert split([text], inside=inside) == expected
    assert split(list(text), inside=inside) == expected


@given(st.text(ALPHABET, max_size=60), st.lists(st.integers(0, 100), max_size=8), st.booleans())
def test_the_cut_does_not_matter(text: str, cuts: list[int], inside: bool) -> None:
    assert split(pieces_of(text, cuts), inside=inside) == split([text], inside=inside)


@given(st.text(ALPHABET, max_size=60), st.booleans())
def test_nothing_is_lost_but_tags_and_blanks(text: str, inside: bool) -> None:
    reasoning, answer = split([text], inside=inside)
    kept = "".join((reasoning + answer).split())
    everything = "".join(text.split())
    assert kept in (everything, everything.replace("<think>", "", 1).replace("</think>", "", 1)) or (
        everything.replace("</think>", "", 1) == kept
    )


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 50), max_size=6),
)
def test_a_stop_text_ends_the_text_at_its_first_place(text: str, words: list[str], cuts: list[int]) -> None:
    stop = StopWords(words)
    given_out = "".join(stop.feed(piece) for piece in pieces_of(text, cuts)) + stop.end()
    places = [text.find(word) for word in words if word in text]
    if stop.found is None:
        assert not places
        assert given_out == text
    else:
        assert text.startswith(given_out + stop.found)
        # Cut by cut, the first stop text that is complete wins; no text beyond the earliest place is given before.
        assert len(given_out) >= min(places)
        assert not any(word in given_out for word in words)


@given(st.text("ab", max_size=10), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_text(text: str, words: list[str]) -> None:
    size = held_back(text, words)
    ends = [n for n in range(1, len(text) + 1) if any(w.startswith(text[-n:]) and len(w) > n for w in words)]
    assert size == max(ends, default=0)


def test_a_stop_text_in_the_thinking_ends_the_answer_too() -> None:
    reader = AnswerReader(stop=["END"], thinking=ThinkingSplitter(*TAGS, inside=True))
    assert reader.feed("some thought EN") == [Reasoning("some thought")]
    assert reader.thinking
    assert reader.feed("D more") == []
    assert reader.stopped_at == "END"
    assert reader.feed("more") == []


def test_an_answer_without_thinking_and_tools_passes_up_to_its_stop_text() -> None:
    reader = AnswerReader(stop=["END"])
    out = [*reader.feed("one "), *reader.feed("two E"), *reader.feed("ND three"), *reader.end()]
    assert "".join(piece.text for piece in out if isinstance(piece, Text)) == "one two "
    assert (reader.stopped_at, reader.thinking, reader.calls_begun, reader.calls_complete) == ("END", False, 0, 0)


def test_what_was_held_back_comes_at_the_end() -> None:
    reader = AnswerReader(stop=["END"], thinking=ThinkingSplitter(*TAGS))
    assert reader.may_begin_to_think
    assert reader.feed("<thi") == []
    assert reader.may_begin_to_think
    assert not reader.thinking
    assert reader.end() == [Text("<thi")]
    reader = AnswerReader(stop=["END"], thinking=ThinkingSplitter(*TAGS))
    assert reader.feed("<think>hm EN") == [Reasoning("hm")]
    assert (reader.thinking, reader.may_begin_to_think) == (True, False)
    assert reader.end() == [Reasoning(" EN")]
    assert reader.stopped_at is None


def test_tools_are_called_in_the_answer_and_not_in_the_thinking() -> None:
    tools = ToolCallReader("hermes", names=("f",), new_id=lambda: "id")
    reader = AnswerReader(thinking=ThinkingSplitter(*TAGS), tools=tools)
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    out = [*reader.feed(f"<think>{call}</think>"), *reader.feed(call[:30])]
    assert out == [Reasoning(call)]
    assert (reader.calls_begun, reader.calls_complete) == (0, 0)
    assert reader.feed(call[30:39])[0] == ToolCall(0, "id", "f", "")
    assert (reader.calls_begun, reader.calls_complete) == (1, 0)
    reader.feed(call[39:])
    assert (reader.calls_begun, reader.calls_complete) == (1, 1)
    unfinished = AnswerReader(tools=ToolCallReader("hermes", names=("f",), new_id=lambda: "id"))
    assert unfinished.feed("<tool_c") == []
    assert unfinished.end() == [Text("<tool_c")]


def test_the_models_own_tags_may_be_others_than_the_usual_ones() -> None:
    splitter = ThinkingSplitter(*TAGS, others=[("[THINK]", "[/THINK]")])
    assert (splitter.undecided, splitter.inside) == (True, False)
    assert splitter.feed("[TH") == []
    assert splitter.undecided
    assert splitter.feed("INK]a</think>b") == [Reasoning("a</think>b")]
    assert (splitter.undecided, splitter.inside) == (False, True)
    assert splitter.feed("[/THINK]c") == [Text("c")]
    assert (splitter.undecided, splitter.inside) == (False, False)
    assert splitter.end() == []


def test_blanks_around_thinking_are_dropped_and_those_inside_are_kept() -> None:
    splitter = ThinkingSplitter(*TAGS, inside=True)
    assert splitter.feed(" \n") == []
    assert splitter.feed(" a ") == [Reasoning("a")]
    assert splitter.feed(" b \n") == [Reasoning("  b")]
    assert splitter.feed("</think> \n") == []
    assert splitter.feed("\n c ") == [Text("c ")]
    assert splitter.feed(" d") == [Text(" d")]
    ended = ThinkingSplitter(*TAGS, inside=True)
    assert ended.feed("a </") == [Reasoning("a")]
    assert ended.end() == [Reasoning("</")]
    assert ended.end() == []


PARTS = st.lists(st.sampled_from([" ", "\n", " " * 100, "\n" * 300, "a", *TAGS, "</thi"]), max_size=12).map("".join)


@given(PARTS, st.lists(st.integers(0, 2000), max_size=20), st.booleans())
def test_the_cut_does_not_matter_among_many_blanks_either(text: str, cuts: list[int], inside: bool) -> None:
    assert split(pieces_of(text, cuts), inside=inside) == split([text], inside=inside)


@pytest.mark.parametrize(
    "before, kind", [("", Text), ("<think>", Reasoning), ("<think>hm", Reasoning), ("<think>hm</think>", Text)]
)
def test_a_model_that_writes_blanks_alone_is_heard(before: str, kind: type[Text | Reasoning]) -> None:
    splitter = ThinkingSplitter(*TAGS)
    splitter.feed(before)
    said = [splitter.feed("\n") for _ in range(2000)]
    assert said[:MAX_HELD_BLANKS] == [[]] * MAX_HELD_BLANKS
    assert [each for deltas in said[2 * MAX_HELD_BLANKS :] for each in deltas] == [kind("\n")] * (
        2000 - 2 * MAX_HELD_BLANKS
    )


def test_of_two_stop_texts_at_one_place_the_longer_one_is_found() -> None:
    stop = StopWords(["", "EN", "END"])
    assert stop.feed("a END b") == "a "
    assert (stop.found, stop.feed("more"), stop.end()) == ("END", "", "")
    stop = StopWords(["END"])
    assert (stop.feed("a E"), stop.feed("x E"), stop.end(), stop.end()) == ("a ", "Ex ", "E", "")
    assert held_back("a", []) == held_back("ab", ["ab"]) == 0, "a whole one is found, not held back"
    assert held_back("abc", ["abcd", "c"]) == 3
