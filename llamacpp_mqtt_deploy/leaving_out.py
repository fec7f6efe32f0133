"""Imports without what a package would take in where it is there, and can do without."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leaving_out(*names: str) -> Iterator[None]:
    """In here these modules cannot be imported, as if they were not installed; whoever wants one later imports it as ever.

    A daemon has less in memory so, for years. What is imported already stays. Not for threads: what another one imports at the
    same time lacks them too.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say that there is no such module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some packages complain
            yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
