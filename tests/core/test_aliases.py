"""Aliases stand for one name of a model; a table that could mean two things is refused with a sentence."""

from __future__ import annotations

import pytest

from llamacpp_mqtt_deploy.core.aliases import MAX_NAME_CHARS, check_aliases, resolve

MODELS = ("qwen", "llama")
LONGEST = "x" * MAX_NAME_CHARS


def test_an_alias_is_resolved_once_and_other_names_are_kept() -> None:
    aliases = {"gpt-4": "qwen", "any": "default"}
    assert (resolve("gpt-4", aliases), resolve("qwen", aliases), resolve("any", aliases)) == ("qwen", "qwen", None)


@pytest.mark.parametrize("aliases", [{}, {"gpt-4": "qwen", "gpt-5": "unheard-of"}, {LONGEST: "default"}])
def test_a_table_that_can_mean_one_thing_only_is_taken(aliases: dict[str, str]) -> None:
    assert list(check_aliases(aliases, models=MODELS)) == []


@pytest.mark.parametrize(
    "aliases,said",
    [
        ({"qwen": "llama"}, "is the name of a model as well"),
        ({"default": "qwen"}, "cannot be an alias"),
        ({"b": "qwen", "a": "b"}, "an alias itself"),
        ({"": "qwen"}, "no name for a model"),
        ({"a": ""}, "no name for a model"),
        ({LONGEST + "x": "qwen"}, "no name for a model"),
    ],
)
def test_a_table_that_could_mean_two_things_is_refused_with_one_sentence(aliases: dict[str, str], said: str) -> None:
    (sentence,) = check_aliases(aliases, models=MODELS)
    assert said in sentence
