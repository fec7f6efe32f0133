"""The formats that a route of MQTT may have: for each event the messages to publish, `parts` of a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.plain import EventsStream, ObjectStream, TextChunkStream, TextStream
from llamacpp_mqtt_deploy.core.formats.rendering import Occasion
from llamacpp_mqtt_deploy.core.formats.seeds import (
    ChatbotStream,
    ContentStream,
    TokenStream,
    TypedChunkStream,
    TypedEventStream,
)


class PartedStream(Protocol):
    """A stream whose parts can be sent one by one."""

    def parts(self, event: Mapping[str, Any]) -> list[bytes]:
        """What to publish for this event, in order; nothing for most."""
        ...


ROUTE_FORMATS: Mapping[str, Callable[[Asked, Occasion], PartedStream]] = {
    "events": partial(EventsStream, bare=True),
    "text": TextStream,
    "text-chunks": TextChunkStream,
    "json": ObjectStream,
    "tokens": partial(TokenStream, bare=True),
    "content": partial(ContentStream, bare=True),
    "chatbot": partial(ChatbotStream, bare=True),
    "typed-chunks": partial(TypedChunkStream, bare=True),
    "typed-events": partial(TypedEventStream, bare=True),
}
"""By the name that the configuration gives."""

OWN_FORMAT = "events"
"""Events go out as they are: nothing is rendered."""

TEXT_FORMATS = frozenset({"text", "text-chunks"})
"""Their messages are plain text, not JSON."""

WHOLE_FORMATS = frozenset({"text", "json"})
"""Nothing is told before the end."""
