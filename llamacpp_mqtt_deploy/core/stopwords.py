"""Finds the texts at which an answer ends, also when they come in pieces, and holds back what may become one."""

from __future__ import annotations

from collections.abc import Sequence


def held_back(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of the words."""
    longest = min(len(text), max((len(word) for word in words), default=0) - 1)
    for size in range(longest, 0, -1):
        tail = text[-size:]
        if any(word.startswith(tail) for word in words if len(word) > size):
            return size
    return 0


class StopWords:
    """Passes text on up to the first stop text; the stop text itself is never given."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(word for word in words if word)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is safe to give; empty once a stop text was found."""
        if not self._words:
            return text
        if self.found is not None:
            return ""
        self._held += text
        places = [(place, word) for word in self._words if (place := self._held.find(word)) >= 0]
        if places:
            place, self.found = min(places, key=lambda found: (found[0], -len(found[1])))
        else:
            place = len(self._held) - held_back(self._held, self._words)
        safe, self._held = self._held[:place], self._held[place:]
        return safe

    def end(self) -> str:
        """What was held back when the text ended without a stop text."""
        held, self._held = self._held, ""
        return "" if self.found is not None else held
