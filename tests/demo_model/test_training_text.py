"""What the training writes is what the template writes: else the model would meet strings that it never saw."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture
def dialogues(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TRAINING))
    yield importlib.import_module("dialogues")
    sys.modules.pop("dialogues", None)


def _as_messages(dialogue: Any) -> list[dict[str, Any]]:
    """The conversation as a client of an OpenAI API writes it."""
    messages: list[dict[str, Any]] = []
    if dialogue.system is not None:
        messages.append({"role": "system", "content": dialogue.system})
    for turn in dialogue.turns:
        messages.append({"role": "user", "content": turn.user})
        if turn.tool_name is not None:
            call = {"id": "1", "type": "function", "function": {"name": turn.tool_name, "arguments": "{}"}}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": "1", "content": turn.tool_result})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def test_the_training_text_is_what_the_template_renders(dialogues: ModuleType) -> None:
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    template = environment.from_string((TRAINING / "chat_template.jinja").read_text())
    writer = dialogues.Writer(seed=5)
    for _ in range(500):
        dialogue = writer.dialogue()
        written = "".join(text for text, _ in dialogues.render(dialogue))
        tools = dialogue.tools or None
        assert template.render(messages=_as_messages(dialogue), tools=tools, bos_token="<s>") == written


def test_a_seed_gives_the_same_dialogues_again(dialogues: ModuleType) -> None:
    first, second = dialogues.Writer(seed=3), dialogues.Writer(seed=3)
    assert [first.dialogue() for _ in range(50)] == [second.dialogue() for _ in range(50)]


def _expansions(pattern: str) -> list[str]:
    """All that `(a|b)` can become."""
    choice = re.search(r"\(([^()]*)\)", pattern)
    if choice is None:
        return [pattern]
    before, after = pattern[: choice.start()], pattern[choice.end() :]
    return [text for option in choice[1].split("|") for text in _expansions(before + option + after)]


def _bare(text: str) -> str:
    """A phrasing without capitals, signs and doubled blanks."""
    return " ".join(re.sub(r"[^a-z0-9{} ]", "", text.lower().replace("{q}", "{x}")).split())


def test_no_training_pattern_can_produce_a_held_out_phrasing(dialogues: ModuleType) -> None:
    d = dialogues
    pairs = [(info.train, info.held) for info in d.INFOS.values()]
    pairs += [(d.CONTROL_EXTRA[word], d.CONTROL_EXTRA_HELD[word]) for word in d.CONTROL_EXTRA]
    pairs += [
        (d.EVENT_FRAMES, d.EVENT_HELD),
        (d.COMMAND_FRAMES, d.COMMAND_HELD),
        (d.CONTROL_FRAMES, d.CONTROL_HELD),
        (d.UNKNOWN_FRAMES, d.UNKNOWN_HELD),
        (d.NAME_FRAMES + d.RENAME_FRAMES, d.NAME_HELD),
        (d.ASK_NAME, d.ASK_NAME_HELD),
        (d.COUNT_FRAMES + d.COUNT_TO_FRAMES, d.COUNT_HELD),
        (d.DOWN_FRAMES, d.DOWN_HELD),
        (d.TIME_FRAMES, d.TIME_HELD),
    ]
    for train, held in pairs:
        plain = {_bare(text) for pattern in train for text in _expansions(pattern)}
        polite = itertools.product(["", *d.PREFIXES], plain, ["", *d.SUFFIXES])
        assert not {_bare(before + text + after) for before, text, after in polite} & {_bare(text) for text in held}
    plain = {_bare(text) for pattern in d.ECHO_FRAMES for text in _expansions(pattern)}  # nothing is put around these
    assert not plain & {_bare(text) for text in d.ECHO_HELD}


def test_held_out_names_and_topics_are_never_trained(dialogues: ModuleType) -> None:
    assert not set(dialogues.NAMES) & set(dialogues.NAMES_HELD)
    assert not set(dialogues.TRAIN_TOPICS) & set(dialogues.HELD_TOPICS)
    writer = dialogues.Writer(seed=4)
    turns = [turn for _ in range(2000) for turn in writer.dialogue().turns]
    assert not {word.strip("?.!,") for turn in turns for word in turn.user.split()} & set(dialogues.NAMES_HELD)


def test_the_figures_say_that_nine_of_ten_held_out_questions_are_answered_rightly() -> None:
    figures = json.loads((TRAINING / "figures.json").read_text())
    assert figures["held_out"]["right"] >= 0.9
