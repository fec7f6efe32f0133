"""For engines that give their deltas one by one: hands them on in the calling thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, cast

from llamacpp_mqtt_deploy.core.deltas import Delta, Finished
from llamacpp_mqtt_deploy.core.errors import EngineLost


def drain(deltas: Iterator[Delta], feed: Callable[[Sequence[Delta]], float]) -> Finished:
    """Give each delta to `feed`; returns the last one, which ends the answer. Raises what the deltas raise."""
    with closing(cast("Any", deltas)):
        for delta in deltas:
            if isinstance(delta, Finished):
                return delta
            feed((delta,))
    raise EngineLost("the engine ended the answer without saying that it was complete")
