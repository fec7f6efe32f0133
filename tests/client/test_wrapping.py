"""Streamed text on a terminal: lines end between words, whatever the pieces are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.commands.wrapping import WordWrap
from tests.client.terminal import screen


def shown(pieces: list[str], columns: int) -> list[str]:
    wrap = WordWrap()
    return screen("".join(wrap.feed(piece, columns) for piece in pieces), columns)


WORDS = st.lists(st.text("abc", min_size=1, max_size=18), min_size=1, max_size=40)


@given(WORDS, st.integers(1, 7), st.integers(20, 40))
def test_no_word_is_broken_at_the_edge_and_none_is_lost(words: list[str], size: int, columns: int) -> None:
    text = " ".join(words)
    lines = shown([text[start : start + size] for start in range(0, len(text), size)], columns)
    assert " ".join(line.rstrip() for line in lines).split() == words
    assert all(len(line) <= columns for line in lines)


@given(st.text("ab 漢字\n", max_size=200), st.integers(20, 40))
def test_every_character_but_spaces_at_the_edge_stays(text: str, columns: int) -> None:
    assert "".join(shown([text], columns)).replace(" ", "") == text.replace(" ", "").replace("\n", "")


@pytest.mark.parametrize("length", [29, 30, 31, 59, 60, 61, 200])
def test_a_word_longer_than_a_line_is_left_to_the_terminal_and_can_be_copied(length: int) -> None:
    wrap = WordWrap()
    output = wrap.feed("see " + "x" * length + " end", 30)
    assert "x" * min(length, 28) in output
    assert output.count("\n") <= 2
    assert "".join(screen(output, 30)).replace(" ", "") == "see" + "x" * length + "end"


def test_lines_of_the_text_stay_lines() -> None:
    assert shown(["one\n", "two ", "three\n\nfour"], 30) == ["one", "two three", "", "four"]
