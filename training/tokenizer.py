"""Trains the demo model's vocabulary and splits text exactly as llama.cpp's SPM tokenizer does.

The vocabulary is plain BPE learned inside words, written out in the SPM form: the score of a token is minus the
rank of its merge, and llama.cpp joins the adjacent pair with the highest score first.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SPACE = "\u2581"  # how SPM writes a blank
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
# Their text must stay visible to the tool-call parsers of the engines, so they are USER_DEFINED, not CONTROL.
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")

UNKNOWN_TYPE, NORMAL_TYPE, CONTROL_TYPE, USER_DEFINED_TYPE, UNUSED_TYPE, BYTE_TYPE = 2, 1, 3, 4, 5, 6

# Printable ASCII and the letters that are common in European names; any other character falls to its UTF-8 bytes.
ALPHABET = [chr(c) for c in range(33, 127)] + list("äöüßéèáíóúñçÄÖÜÉ") + [SPACE]

# A merge never crosses these borders: a word with the blank before it, one digit with its blank, a run of signs.
_WORD = re.compile(
    rf"{SPACE}?[A-Za-zäöüßéèáíóúñçÄÖÜÉ]+|{SPACE}?\d|{SPACE}?[^\sA-Za-z0-9{SPACE}äöüßéèáíóúñçÄÖÜÉ]+|{SPACE}|\n"
)


def words_of(text: str) -> list[str]:
    """Gives the pieces inside which merges are learned; joined, they are the text again."""
    return _WORD.findall(text.replace(" ", SPACE))


@dataclass(frozen=True)
class Vocabulary:
    """The token table as it is written into the GGUF."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    ids: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Builds the reverse table."""
        self.ids.update({token: index for index, token in enumerate(self.tokens)})

    def __len__(self) -> int:
        """Gives the number of rows of the embedding."""
        return len(self.tokens)


def learn(texts: Iterable[str], size: int) -> Vocabulary:
    """Learns BPE merges until the vocabulary has `size` tokens (padded with UNUSED ones if merges run out)."""
    specials = [
        (UNK, UNKNOWN_TYPE),
        (BOS, CONTROL_TYPE),
        (EOS, CONTROL_TYPE),
        (IM_START, CONTROL_TYPE),
        (IM_END, CONTROL_TYPE),
    ]
    specials += [(tag, USER_DEFINED_TYPE) for tag in TOOL_TAGS]
    rows = [(token, 0.0, kind) for token, kind in specials]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE_TYPE) for byte in range(256)]

    counts: Counter[str] = Counter()
    cut = re.compile("|".join(re.escape(token) for token, _ in specials))
    for text in texts:
        for part in cut.split(text):
            counts.update(words_of(part))
    known = set(ALPHABET)
    # Our answers repeat far more often than the words of questions: damped counts leave room for the latter.
    words = {word: (list(word), count**0.6) for word, count in counts.items() if all(char in known for char in word)}
    merges: list[str] = []
    room = size - len(rows) - len(ALPHABET)
    while len(merges) < room:
        pairs: dict[tuple[str, str], float] = {}
        for parts, count in words.values():
            for pair in pairwise(parts):
                pairs[pair] = pairs.get(pair, 0.0) + count
        pairs_left = [(count, pair) for pair, count in pairs.items() if count > 1]
        if not pairs_left:
            break
        _, (left, right) = max(pairs_left)
        joined = left + right
        if joined not in known:
            known.add(joined)
            merges.append(joined)
        for word, (parts, count) in words.items():
            if joined in word:
                words[word] = (_join(parts, left, right), count)
    rows += [(token, -float(rank), NORMAL_TYPE) for rank, token in enumerate(merges)]
    rows += [(char, -float(len(merges) + index), NORMAL_TYPE) for index, char in enumerate(ALPHABET)]
    rows += [(f"<unused{index}>", -1e6, UNUSED_TYPE) for index in range(size - len(rows))]
    tokens, scores, types = zip(*rows, strict=True)
    return Vocabulary(list(tokens), list(scores), list(types))


def _join(parts: list[str], left: str, right: str) -> list[str]:
    """Replaces each adjacent (left, right) by their joined text."""
    out: list[str] = []
    for part in parts:
        if out and part == right and out[-1] == left:
            out[-1] = left + right
        else:
            out.append(part)
    return out


class Tokenizer:
    """Text to ids and back, equal to llama.cpp's SPM tokenizer with add_space_prefix off."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Keeps the table and prepares the splitting at special tokens."""
        self.vocabulary = vocabulary
        specials = [BOS, EOS, IM_START, IM_END, *TOOL_TAGS]
        self._specials = re.compile("(" + "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True)) + ")")
        self._word_ids = lru_cache(maxsize=200_000)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Splits a rendered conversation, special tokens included."""
        ids: list[int] = []
        for index, part in enumerate(self._specials.split(text)):
            if index % 2:
                ids.append(self.vocabulary.ids[part])
            else:
                for word in words_of(part):
                    ids.extend(self._word_ids(word))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Joins tokens to text; control tokens give nothing."""
        raw = b""
        for index in ids:
            token, kind = self.vocabulary.tokens[index], self.vocabulary.types[index]
            if kind == BYTE_TYPE:
                raw += bytes([int(token[3:5], 16)])
            elif kind in (NORMAL_TYPE, USER_DEFINED_TYPE):
                raw += token.replace(SPACE, " ").encode()
        return raw.decode(errors="replace")

    def _merge(self, word: str) -> tuple[int, ...]:
        """Joins the best adjacent pair until none is a token; unknown characters become bytes."""
        ids, scores, types = self.vocabulary.ids, self.vocabulary.scores, self.vocabulary.types
        parts = list(word)
        while True:
            best, place = None, -1
            for index in range(len(parts) - 1):
                joined = ids.get(parts[index] + parts[index + 1])
                if joined is not None and types[joined] == NORMAL_TYPE and (best is None or scores[joined] > best):
                    best, place = scores[joined], index
            if best is None:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        out: list[int] = []
        for part in parts:
            index = ids.get(part)
            out.extend([index] if index is not None else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
        return tuple(out)
