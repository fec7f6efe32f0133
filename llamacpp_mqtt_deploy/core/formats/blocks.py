"""Puts the pieces of an answer into blocks that follow each other, for APIs in which one block ends before the next begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.deltas import ToolCall
from llamacpp_mqtt_deploy.core.formats.telling import json_object


@dataclass(frozen=True, slots=True)
class BlockBegun:
    """A block begins; of a tool call, `first` holds id and name. Its text comes as `BlockGrown`."""

    number: int
    first: Spoken


@dataclass(frozen=True, slots=True)
class BlockGrown:
    """New text of the block that is open; never empty."""

    number: int
    kind: type[Spoken]
    text: str


@dataclass(frozen=True, slots=True)
class BlockEnded:
    """The block that was open is whole; of a tool call, `first` holds id and name."""

    number: int
    first: Spoken
    text: str


BlockStep = BlockBegun | BlockGrown | BlockEnded


@dataclass(slots=True)
class _OpenBlock:
    number: int
    first: Spoken
    texts: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[type[Spoken], int]:
        return _key(self.first)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def may_end(self) -> bool:
        """Text can end anywhere; a tool call when its arguments are a whole object, since no part of one is an object."""
        return not isinstance(self.first, ToolCall) or json_object(self.text) is not None


class BlockOrder:
    """Blocks are numbered from 0. Engines may write the arguments of several calls in turns: what belongs to another block waits
    until the open call is whole, or the answer ends."""

    def __init__(self) -> None:
        self._open: _OpenBlock | None = None
        self._waiting: list[Spoken] = []
        self._whole_calls: set[int] = set()
        self._count = 0

    def feed(self, pieces: Sequence[Spoken]) -> list[BlockStep]:
        return [step for piece in pieces for step in self._take(piece)]

    def end(self) -> list[BlockStep]:
        """What is left when the answer ends; each waiting call gets all of its pieces."""
        steps = list(self._close())
        while self._waiting:
            key = _key(self._waiting[0])
            of_first = [piece for piece in self._waiting if _key(piece) == key]
            self._waiting = [piece for piece in self._waiting if _key(piece) != key]
            for piece in of_first:
                steps += self._write(piece)
            steps += self._close()
        return steps

    def _take(self, piece: Spoken) -> Iterator[BlockStep]:
        if isinstance(piece, ToolCall) and piece.index in self._whole_calls:
            return  # blanks after a whole object
        if self._open is None:
            yield from self._write(piece)
        elif self._open.key == _key(piece):
            yield from self._write(piece)
            if self._waiting and self._open.may_end:
                waiting, self._waiting = self._waiting, []
                yield from self._close()
                yield from self.feed(waiting)
        elif self._waiting or not self._open.may_end:
            self._waiting.append(piece)
        else:
            yield from self._close()
            yield from self._write(piece)

    def _write(self, piece: Spoken) -> Iterator[BlockStep]:
        if self._open is None:
            self._open = _OpenBlock(self._count, piece)
            self._count += 1
            yield BlockBegun(self._open.number, piece)
        text = piece.arguments if isinstance(piece, ToolCall) else piece.text
        if text:
            self._open.texts.append(text)
            yield BlockGrown(self._open.number, type(piece), text)

    def _close(self) -> Iterator[BlockStep]:
        if self._open is None:
            return
        if isinstance(self._open.first, ToolCall):
            self._whole_calls.add(self._open.first.index)
        yield BlockEnded(self._open.number, self._open.first, self._open.text)
        self._open = None


def _key(piece: Spoken) -> tuple[type[Spoken], int]:
    return type(piece), piece.index if isinstance(piece, ToolCall) else 0
