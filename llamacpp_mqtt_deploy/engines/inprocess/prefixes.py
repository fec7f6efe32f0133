"""Remembers the computed states of conversations, so that sessions that take turns need not compute their history anew."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from llamacpp_mqtt_deploy.engines.inprocess.native import Context

log = structlog.get_logger(__name__)

WORTH_TOKENS = 32
"""Fewer tokens are computed faster than a state is copied."""
_TOKEN_BYTES = 40  # of one token in a Python list: the pointer and, over 256, the integer


@dataclass(slots=True)
class _Saved:
    tokens: list[int]
    data: Any
    size: int


class Prefixes:
    """The states saved from one context, at most `limit_bytes` of them, the least recently used one given up first."""

    def __init__(self, context: Context, limit_bytes: int) -> None:
        self._context = context
        self._limit = limit_bytes
        self._saved: OrderedDict[int, _Saved] = OrderedDict()
        self._next = 0
        self.used_bytes = 0

    def settle(self, prompt: Sequence[int]) -> int:
        """Bring the context to hold the longest known beginning of the prompt; returns its length.

        At least the last token of the prompt is left to compute, or there would be nothing to sample from.
        """
        context = self._context
        wanted = list(prompt[:-1])
        live = common_prefix(context.tokens, wanted)
        key, best = max(
            ((key, self._usable(saved.tokens, wanted)) for key, saved in self._saved.items()),
            key=lambda found: found[1],
            default=(None, 0),
        )
        usable_live = self._usable(context.tokens, wanted)
        if key is not None and best >= usable_live + WORTH_TOKENS:
            saved = self._saved[key]
            self._saved.move_to_end(key)
            self._keep(live, not_over=key)
            if context.restore(saved.data, saved.tokens):
                return context.truncate(best)
            self._drop(key)
            return 0
        if live < len(context.tokens) // 2:
            self._keep(live)
        return context.truncate(usable_live)

    def clear(self) -> None:
        self._saved.clear()
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._saved)

    def _usable(self, tokens: list[int], wanted: list[int]) -> int:
        common = common_prefix(tokens, wanted)
        # A recurrent state is that of its last token and of no other.
        return common if common == len(tokens) or not self._context.model.keeps_whole_states else 0

    def _keep(self, live: int, not_over: int | None = None) -> None:
        """Save the present state when a good part of it is about to be lost."""
        tokens = self._context.tokens
        if self._limit == 0 or len(tokens) - live < WORTH_TOKENS:
            return
        if any(common_prefix(saved.tokens, tokens) == len(tokens) for saved in self._saved.values()):
            return  # a saved state begins with all of it
        size = self._context.state_bytes() + len(tokens) * _TOKEN_BYTES
        if size > self._limit:
            return
        for key in [
            key for key, saved in self._saved.items() if common_prefix(saved.tokens, tokens) == len(saved.tokens)
        ]:
            if key != not_over:
                self._drop(key)
        while self._saved and self.used_bytes + size > self._limit:
            oldest = next((key for key in self._saved if key != not_over), None)
            if oldest is None:
                return
            self._drop(oldest)
        data = self._context.save()
        if data is None:
            return
        self._saved[self._next] = _Saved(list(tokens), data, size)
        self._next += 1
        self.used_bytes += size
        log.debug("state.saved", tokens=len(tokens), bytes=size, states=len(self._saved), total=self.used_bytes)

    def _drop(self, key: int) -> None:
        self.used_bytes -= self._saved.pop(key).size


def common_prefix(left: list[int], right: list[int]) -> int:
    """How many items at the beginning are equal. Halves the range, because comparing slices is quick and a loop is not."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
