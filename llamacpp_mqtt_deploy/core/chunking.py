"""Full text into pieces on grapheme borders, and running text into whole sentences."""

from __future__ import annotations

from collections.abc import Iterator

import regex

_GRAPHEME = regex.compile(r"\X")

# A sentence ends at its punctuation (also CJK, which has no blank after it), with closing quotes or brackets, before a
# blank or the end; or at a line break. "3.5" and "e.g. this" keep together as far as a blank after the dot allows.
# A run of punctuation is looked at once, as a whole: from each of its characters anew it would cost the square of its length.
_SENTENCE_END = regex.compile(
    r"""(?:(?<![.!?…])[.!?…]++["'”’»)\]]*+(?=\s)) | [。！？]+["'”’»）」』】]* | \n+""",
    regex.VERBOSE,
)
# Read backwards from its dot (`(?r)`), so that what stands before it costs nothing.
_ABBREVIATION = regex.compile(r"(?r)(?:e\.g|i\.e|etc|vs|Mr|Mrs|Ms|Dr|St|Nr|No|z\.B|d\.h|bzw|ca|\p{Lu}|\d++)\.")
_ENDS = ".!?…"
_CLOSERS = "\"'”’»)]"

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
        self._seen = 0  # so much of what is held ends no sentence, whatever follows

    def feed(self, text: str) -> list[str]:
        held = self._held + text
        sentences: list[str] = []
        start, seen = 0, self._seen
        for match in _SENTENCE_END.finditer(held, seen):
            if not _abbreviates(held, start, match.end()):
                sentences.append(held[start : match.end()])
                start = match.end()
        # Punctuation at the end may be more with what follows, or the end of a sentence.
        seen = max(start, len(held.rstrip(_CLOSERS).rstrip(_ENDS)))
        while len(held) - start > MAX_SENTENCE_CHARS:
            most = start + MAX_SENTENCE_CHARS
            cut = held.rfind(" ", start, most) + 1 or most
            sentences.append(held[start:cut])
            start = seen = cut  # what begins here is looked at as the beginning of a sentence
        self._held, self._seen = held[start:], seen - start
        return sentences

    def flush(self) -> list[str]:
        """The rest, at the end of the answer."""
        rest, self._held, self._seen = self._held, "", 0
        return [rest] if rest else []


def _abbreviates(text: str, start: int, end: int) -> bool:
    """Whether the dot before `end` ends an abbreviation or a number, not the sentence that began at `start`."""
    found = _ABBREVIATION.match(text, start, end)
    return found is not None and (found.start() == start or text[found.start() - 1].isspace())
