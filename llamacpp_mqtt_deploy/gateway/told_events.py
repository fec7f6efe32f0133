"""Events for clients that read the protocol themselves: numbered without a hole, also after some were merged for a slow reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamacpp_mqtt_deploy.core.events import Reading


class ToldEvents:
    """Passes on the events of one answer. Chunks that were merged become a `snapshot`, which the protocol allows at any time."""

    def __init__(self) -> None:
        self._next_seq = 0
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.ended = False

    def told(self, reading: Reading) -> Mapping[str, Any]:
        event = reading.event
        self._content.append(reading.content)
        self._reasoning.append(reading.reasoning)
        match event.get("type"):
            case "chunk":
                seq = int(event["seq"])
                merged = seq != self._next_seq
                self._next_seq = seq + 1
                return self._snapshot(event) if merged else event
            case "snapshot":
                self._next_seq = int(event["next_seq"])
                return event
            case "done" | "error":
                self.ended = True
                return event
            case _:
                return event

    def _snapshot(self, event: Mapping[str, Any]) -> dict[str, Any]:
        told = {"type": "snapshot", "request_id": event.get("request_id"), "session_id": event.get("session_id")}
        told |= {"content": "".join(self._content), "next_seq": self._next_seq}
        reasoning = "".join(self._reasoning)
        return told | ({"reasoning": reasoning} if reasoning else {})
