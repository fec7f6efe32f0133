"""The messages of one request on a route with a format: from its events as they come, or from an end that was stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.rendering import JSON, PLAIN_TEXT, Occasion
from llamacpp_mqtt_deploy.core.formats.route_formats import ROUTE_FORMATS, TEXT_FORMATS, PartedStream


class RouteRendering:
    """One request's events as messages of a format. Each event is given once; nothing follows the end."""

    def __init__(self, name: str, occasion: Occasion, *, answer_fields: Mapping[str, str] | None = None) -> None:
        echo = {"session_id": occasion.session, "answer_fields": dict(answer_fields or {})}
        asked = Asked(request={}, streams=True, session=occasion.session, echo=echo)
        self._make: Callable[[], PartedStream] = lambda: ROUTE_FORMATS[name](asked, occasion)
        self._stream = self._make()
        self._is_text = name in TEXT_FORMATS
        self.content_type = PLAIN_TEXT if self._is_text else JSON

    def parts(self, event: bytes) -> list[bytes]:
        """What to publish for an event of the request, in order; nothing for most."""
        return self._stream.parts(orjson.loads(event))

    def end(self, events: Sequence[bytes], max_bytes: int) -> list[bytes]:
        """What to publish for the end, given as the terminal event with what goes before it; each at most so long.

        A text that is longer is cut, and says so. An object that is longer becomes an error.
        """
        parts = [part for event in events for part in self.parts(event)]
        return self.shortened(parts, max_bytes)

    def shortened(self, parts: Sequence[bytes], max_bytes: int) -> list[bytes]:
        """Messages of this request, none of which has more bytes than that."""
        if self._is_text:
            return [_cut(part, max_bytes) for part in parts]
        fit = next((place for place, part in enumerate(parts) if len(part) > max_bytes), None)
        if fit is None:
            return list(parts)
        return [*parts[:fit], *self._make().parts(_too_long(max_bytes))]

    def refusal(self, event: bytes) -> list[bytes]:
        """The answer to a message that was not accepted. These formats know no `rejected`: it is told as an error."""
        told: dict[str, Any] = orjson.loads(event)
        return self._make().parts(told | {"type": "error"} if told.get("type") == "rejected" else told)


def _too_long(max_bytes: int) -> dict[str, Any]:
    message = f"The answer is longer than a message may be here ({max_bytes} bytes)."
    return {"type": "error", "code": "internal", "message": message, "retryable": False}


def _cut(part: bytes, max_bytes: int) -> bytes:
    """A text of at most so many bytes; one that lacks its end must not look whole."""
    if len(part) <= max_bytes:
        return part
    mark = f"\n[cut: the answer has {len(part)} bytes, and a message may have {max_bytes} here]\n".encode()
    return part[: max(0, max_bytes - len(mark))].decode("utf-8", "ignore").encode() + mark
