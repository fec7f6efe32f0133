"""What the training writes is what the template writes: else the model would meet strings that it never saw."""

from __future__ import annotations

import importlib
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


def test_held_out_phrasings_and_names_are_never_trained(dialogues: ModuleType) -> None:
    writer = dialogues.Writer(seed=4)
    trained = [turn for _ in range(3000) for turn in writer.dialogue().turns]
    said = {turn.user.lower().rstrip("?.! ") for turn in trained}
    words = {word.strip("?.!,") for turn in trained for word in turn.user.split()}
    assert not words & set(dialogues.NAMES_HELD)
    for info in dialogues.INFOS.values():
        assert not said & set(info.held)
