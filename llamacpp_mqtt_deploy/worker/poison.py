"""Schemas and tools under which the engine died: they are not given to it again for a while."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.errors import Unsupported
from llamacpp_mqtt_deploy.core.requests import Generate

KEPT = 256
"""Most schemas that are remembered; the oldest make room."""
KEPT_S = 600.0
"""Seconds for which one is refused. Long enough that a client that repeats itself does not end the engine over and over; short
enough for tools that were only there when something else ended it. In memory only: another start of the worker may mean
another engine."""


class PoisonSchemas:
    """Remembers digests of schemas and tools; may be used from any thread. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def died(self, digest: str, *, begun: bool, now: float) -> None:
        """The engine died under it. An answer that had begun shows that the engine can bear its schema: one death of these
        is forgiven, since other requests may be the reason."""
        with self._lock:
            _, deaths = self._known.pop(digest, (now, 0))
            self._known[digest] = (now, deaths + (1 if begun else 2))
            while len(self._known) > KEPT:
                self._known.popitem(last=False)

    def is_known(self, digest: str, *, now: float) -> bool:
        with self._lock:
            at, deaths = self._known.get(digest, (now, 0))
            if now - at > KEPT_S:
                del self._known[digest]
                return False
            return deaths >= 2

    def refuse(self, digest: str, *, now: float) -> None:
        """Raises Unsupported for what is known."""
        if self.is_known(digest, now=now):
            raise Unsupported(
                "the engine died under a request with the same response_format and tools; they are not given to it again for "
                f"{KEPT_S / 60:g} minutes. Make them simpler, or leave them out"
            )


def digest_of(request: Generate) -> str | None:
    """Names what the request makes a grammar of; None for a request without a schema and tools of its own."""
    return schema_digest(response_format=request.response_format, tools=request.tools, tool_choice=request.tool_choice)


def schema_digest(
    *,
    response_format: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
) -> str | None:
    """See `digest_of`. The prompt does not count: it is not what ends engines."""
    shaped = response_format if response_format is not None and set(response_format) > {"type"} else None
    if shaped is None and not tools:
        return None
    told = [shaped, list(tools or ()), tool_choice if tools else None]
    return hashlib.sha256(orjson.dumps(told, option=orjson.OPT_SORT_KEYS)).hexdigest()
