"""What one load brought: when each request was asked, began and ended, and how many tokens it had."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.support.tiny_gguf import WORDS

SILENCE_S = 60.0
"""After so long without a byte a load has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answered request; times are of the monotonic clock, tokens as the engine counted them."""

    asked: float
    first: float
    ended: float
    tokens: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    chunks: int = 0
    arrivals: tuple[float, ...] = ()
    """When each token came, where that was asked for."""

    @property
    def first_token_s(self) -> float:
        return self.first - self.asked


@dataclass(slots=True)
class Load:
    """All requests of one load, and the processor time that the daemon took for them."""

    samples: list[Sample] = field(default_factory=list)
    daemon_cpu_s: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(sample.tokens for sample in self.samples)

    @property
    def chunks(self) -> int:
        return sum(sample.chunks for sample in self.samples)

    @property
    def seconds(self) -> float:
        return max(sample.ended for sample in self.samples) - min(sample.asked for sample in self.samples)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class LoadFailed(RuntimeError):
    """A request ended with an error, or nothing came any more."""


_random = random.Random(7)


def prompt(words: int = 20) -> str:
    """Words that were never sent before, so that no side finds its prompt evaluated already."""
    return " ".join(_random.choices(WORDS, k=words))
