"""How many answers are under way at once, in all and for one owner, so that nobody can take all the places."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from llamacpp_mqtt_deploy.core.errors import Busy, ShuttingDown

RETRY_AFTER_S = 2.0


class Capacity:
    """Places for answers: `total` of them, at most `each` for one first topic level."""

    def __init__(self, *, total: int, each: int) -> None:
        self._total = total
        self._each = each
        self._taken: Counter[str] = Counter()
        self.closing = False

    @property
    def taken(self) -> int:
        return self._taken.total()

    @contextlib.contextmanager
    def place(self, level: str) -> Iterator[None]:
        """A place for as long as the block runs; raises Busy and ShuttingDown."""
        if self.closing:
            raise ShuttingDown("The gateway is shutting down.", retry_after_s=RETRY_AFTER_S)
        if self._taken[level] >= self._each:
            raise Busy(
                f"{self._each} answers of this key are under way already; that is the most.",
                retry_after_s=RETRY_AFTER_S,
            )
        if self.taken >= self._total:
            raise Busy("The gateway has as many answers under way as it may.", retry_after_s=RETRY_AFTER_S)
        self._taken[level] += 1
        try:
            yield
        finally:
            self._taken[level] -= 1
            if not self._taken[level]:
                del self._taken[level]
