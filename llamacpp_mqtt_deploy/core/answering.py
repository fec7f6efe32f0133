"""Turns the raw text of a model into deltas: stop texts, then thinking, then tool calls."""

from __future__ import annotations

from collections.abc import Sequence

from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.stopwords import StopWords
from llamacpp_mqtt_deploy.core.thinking import ThinkingSplitter
from llamacpp_mqtt_deploy.core.toolparse import ToolCallReader

Spoken = Text | Reasoning | ToolCall


class AnswerReader:
    """Takes the text as it is generated; gives what the client should see of it."""

    def __init__(
        self,
        *,
        stop: Sequence[str] = (),
        thinking: ThinkingSplitter | None = None,
        tools: ToolCallReader | None = None,
    ) -> None:
        self._stop = StopWords(stop)
        self._thinking = thinking
        self._tools = tools

    def feed(self, text: str) -> list[Spoken]:
        return self._read(self._stop.feed(text))

    def end(self) -> list[Spoken]:
        """What was held back when the model ended."""
        out = self._read(self._stop.end())
        if self._thinking is not None:
            for piece in self._thinking.end():
                out += self._answer(piece)
        if self._tools is not None:
            out += self._tools.end()
        return out

    @property
    def stopped_at(self) -> str | None:
        return self._stop.found

    @property
    def thinking(self) -> bool:
        """The model is thinking at this point."""
        return self._thinking is not None and self._thinking.inside

    @property
    def may_begin_to_think(self) -> bool:
        return self._thinking is not None and self._thinking.undecided

    @property
    def calls_begun(self) -> int:
        return 0 if self._tools is None else self._tools.begun

    @property
    def calls_complete(self) -> int:
        return 0 if self._tools is None else self._tools.complete

    def _read(self, text: str) -> list[Spoken]:
        if not text:
            return []
        if self._thinking is None:
            return self._answer(Text(text))
        out: list[Spoken] = []
        for piece in self._thinking.feed(text):
            out += self._answer(piece)
        return out

    def _answer(self, piece: Text | Reasoning) -> list[Spoken]:
        if self._tools is None or isinstance(piece, Reasoning):
            return [piece]
        return list(self._tools.feed(piece.text))
