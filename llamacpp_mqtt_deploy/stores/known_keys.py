"""Which requests the journal may have: what is surely new need not be looked up."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from llamacpp_mqtt_deploy.ports import EntryKey

_PLACES = 1 << 20
"""Bits of the filter; 128 KiB of memory."""

MOST_ADDED = 200_000
"""With so many keys a tenth of the new ones is looked up in vain; then it is time to begin anew with those that are left."""


class KnownKeys:
    """A Bloom filter of keys: `may_have` is false only for a key that was never added. For any thread.

    A look into the journal is a transaction of its own with a dozen calls of the system: 0.1 ms of each new request.
    """

    def __init__(self, keys: Iterable[EntryKey] = ()) -> None:
        self._lock = threading.Lock()
        self._bits = bytearray(_PLACES // 8)
        self._next: bytearray | None = None
        self._added = 0
        for key in keys:
            self.add(key)
        self._full_at = self._next_full()

    def may_have(self, key: EntryKey) -> bool:
        bits = self._bits
        return all(bits[place >> 3] & (1 << (place & 7)) for place in _places(key))

    def add(self, key: EntryKey) -> None:
        """To be called before the key can be found in the journal."""
        with self._lock:
            self._added += 1
            for bits in (self._bits, self._next):
                if bits is not None:
                    _set(bits, key)

    def is_full(self) -> bool:
        return self._added >= self._full_at

    def renew(self, keys: Iterable[EntryKey]) -> None:
        """Begin anew with these keys, which are being read meanwhile, and those that are added meanwhile; one caller at a time."""
        fresh = bytearray(_PLACES // 8)
        with self._lock:
            self._next, before = fresh, self._added
        kept = 0
        try:
            for key in keys:
                kept += 1
                with self._lock:
                    _set(fresh, key)
        except BaseException:
            with self._lock:
                self._next = None
            raise
        with self._lock:
            self._bits, self._next = fresh, None
            self._added += kept - before
            self._full_at = self._next_full()

    def _next_full(self) -> int:
        # Of a journal that remembers more than that nothing would be gained by reading it all at each purge.
        return max(MOST_ADDED, 2 * self._added)


def _places(key: EntryKey) -> tuple[int, int, int]:
    number = hash(key)
    return number & (_PLACES - 1), number >> 20 & (_PLACES - 1), number >> 40 & (_PLACES - 1)


def _set(bits: bytearray, key: EntryKey) -> None:
    for place in _places(key):
        bits[place >> 3] |= 1 << (place & 7)
