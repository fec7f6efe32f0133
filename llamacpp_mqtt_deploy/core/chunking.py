"""Full text into pieces on grapheme borders, and running text into whole sentences."""

from __future__ import annotations

from collections.abc import Iterator

import regex

_GRAPHEME = regex.compile(r"\X")

# A sentence ends at its punctuation (also CJK, which has no blank after it), with closing quotes or brackets, before a
# blank or the end; or at a line break. "3.5" and "e.g. this" keep together as far as a blank after the dot allows.
_SENTENCE_END = regex.compile(
    r"""(?:[.!?…]+["'”’»)\]]*(?=\s)) | [。！？]+["'”’»）」』】]* | \n+""",
    regex.VERBOSE,
)
_ABBREVIATION = regex.compile(r"(?:^|\s)(?:e\.g|i\.e|etc|vs|Mr|Mrs|Ms|Dr|St|Nr|No|z\.B|d\.h|bzw|ca|\p{Lu}|\d+)\.$")

# Longest text held back for a sentence that never ends (a table, code): a speech client should not wait for ever.
MAX_SENTENCE_CHARS = 1000


def pieces(text: str, chars: int) -> Iterator[str]:
    """Pieces of `chars` characters (grapheme clusters), the last one shorter; joined they are the text.

    A cluster is what a reader sees as one character (an emoji with its skin tone, a raw with its accents): it is never
    cut. One of absurd length (hundreds of combining marks) still is one piece.
    """
    piece: list[str] = []
    for match in _GRAPHEME.finditer(text):
        piece.append(match.group())
        if len(piece) == chars:
            yield "".join(piece)
            piece.clear()
    if piece:
        yield "".join(piece)


class SentenceCutter:
    """Running text in, whole sentences out; joined they are the text."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[str]:
        self._held += text
        sentences: list[str] = []
        start = 0
        for match in _SENTENCE_END.finditer(self._held):
            candidate = self._held[start : match.end()]
            if match.group()[0] == "." and _ABBREVIATION.search(candidate):
                continue
            sentences.append(candidate)
            start = match.end()
        self._held = self._held[start:]
        if len(self._held) > MAX_SENTENCE_CHARS:
            cut = self._held.rfind(" ", 0, MAX_SENTENCE_CHARS) + 1 or MAX_SENTENCE_CHARS
            sentences.append(self._held[:cut])
            self._held = self._held[cut:]
        return sentences

    def flush(self) -> list[str]:
        """The rest, at the end of the answer."""
        rest, self._held = self._held, ""
        return [rest] if rest else []
