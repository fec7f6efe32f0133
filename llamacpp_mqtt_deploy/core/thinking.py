"""Splits what a reasoning model writes into its thinking and its answer, at any cut of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text
from llamacpp_mqtt_deploy.core.stopwords import held_back

Where = Literal["before", "inside", "after", "answer"]

THINKING_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
"""How models in use mark their thinking."""


MAX_HELD_BLANKS = 64
"""As many blanks in a row wait for what follows them, or are dropped. Of a model that writes nothing else more is told: it is not
silent, and what is held does not grow without end."""


class ThinkingSplitter:
    """Takes text, gives `Reasoning` and `Text`; the tags and the blanks around them belong to neither.

    Thinking stands at the beginning or nowhere: a tag in the middle of an answer is part of the answer. `inside` says that
    the prompt ended with the opening tag. Where the model's own tags are unknown, `others` may open the thinking too.
    """

    def __init__(
        self, opening: str, closing: str, *, inside: bool = False, others: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._tags = ((opening, closing), *others)
        self._closing = closing
        self._where: Where = "inside" if inside else "before"
        self._begun = False  # the thinking has: blanks before it are dropped
        self._dropped = 0  # blanks before the thinking, and then before the answer
        self._held = ""

    @property
    def inside(self) -> bool:
        """The model is thinking at this point."""
        return self._where == "inside"

    @property
    def undecided(self) -> bool:
        """Nothing but blanks came yet: the next text may open the thinking."""
        return self._where == "before"

    def feed(self, text: str) -> list[Reasoning | Text]:
        self._held += text
        out: list[Reasoning | Text] = []
        if self._where == "before":
            self._begin(out)
        if self._where == "inside":
            self._think(out)
        if self._where == "after":
            self._drop_blanks()
            if self._held:
                self._where = "answer"
        if self._where == "answer" and self._held:
            out.append(Text(self._held))
            self._held = ""
        return out

    def end(self) -> list[Reasoning | Text]:
        """What was held back when the text ended."""
        held, self._held = self._held, ""
        if self._where == "before":
            return [Text(held)] if held else []
        held = held.strip() if self._where == "inside" else ""
        return [Reasoning(held)] if held else []

    def _begin(self, out: list[Reasoning | Text]) -> None:
        start = self._held.lstrip()
        if len(self._held) - len(start) > MAX_HELD_BLANKS:
            self._where = "answer"
            return
        for opening, closing in self._tags:
            if start.startswith(opening):
                self._held = start[len(opening) :]
                self._closing = closing
                self._where = "inside"
                return
        if not any(opening.startswith(start) for opening, _ in self._tags):
            self._where = "answer"

    def _think(self, out: list[Reasoning | Text]) -> None:
        if not self._begun:
            self._drop_blanks()
            self._begun = bool(self._held)
        end = self._held.find(self._closing)
        if end >= 0:
            thought, self._held = _but_last_blanks(self._held[:end]), self._held[end + len(self._closing) :]
            self._where = "after"
            self._dropped = 0
        else:
            keep = held_back(self._held, (self._closing,))
            thought = _but_last_blanks(self._held[: len(self._held) - keep])
            self._held = self._held[len(thought) :]
        if thought:
            out.append(Reasoning(thought))

    def _drop_blanks(self) -> None:
        most = MAX_HELD_BLANKS - self._dropped
        dropped = min(most, len(self._held) - len(self._held.lstrip()))
        self._dropped += dropped
        self._held = self._held[dropped:]


def _but_last_blanks(text: str) -> str:
    kept = len(text.rstrip())
    return text[: max(kept, len(text) - MAX_HELD_BLANKS)]
