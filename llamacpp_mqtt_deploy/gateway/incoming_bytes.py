"""How many bytes of bodies and frames are held, in all and for one owner, so that nobody can take up the memory of all."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Self

from llamacpp_mqtt_deploy.core.errors import Busy

RETRY_AFTER_S = 2.0


class IncomingBytes:
    """`total` of them, at most `each` for one owner."""

    def __init__(self, *, total: int, each: int) -> None:
        self._total = total
        self._each = each
        self._held: Counter[str] = Counter()
        self._sum = 0

    @property
    def held(self) -> int:
        return self._sum

    def holding(self, owner: str) -> Holding:
        """For one body or connection; it holds nothing yet."""
        return Holding(self, owner)

    def change(self, owner: str, by: int) -> None:
        """Hold so many bytes more or, where negative, fewer; raises Busy."""
        if by > 0 and (self._held[owner] + by > self._each or self._sum + by > self._total):
            raise Busy("Too much is being read already; send it again later.", retry_after_s=RETRY_AFTER_S)
        self._sum += by
        self._held[owner] += by
        if not self._held[owner]:
            del self._held[owner]


class Holding:
    """The bytes of one body or connection; none any more at the end of the block."""

    def __init__(self, of: IncomingBytes, owner: str) -> None:
        self._of = of
        self._owner = owner
        self.count = 0

    def set(self, count: int) -> None:
        """Hold so many; raises Busy, and then holds as many as before."""
        self._of.change(self._owner, count - self.count)
        self.count = count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.set(0)
