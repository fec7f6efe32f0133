"""Streams of events as they reach a client over a bad line, for every reader of the protocol."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

PIECES = st.sampled_from(["a", "b ", "größer", " 🌊", "\n"])


@st.composite
def deliveries(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A stream of which parts get lost, come twice and are filled by snapshots, with or without its end."""
    pieces = draw(st.lists(PIECES, min_size=1, max_size=8))
    whole = "".join(pieces)
    events: list[dict[str, Any]] = [{"type": "start"}]
    for seq, piece in enumerate(pieces):
        events.append({"type": "chunk", "seq": seq, "content": piece})
        told = draw(st.integers(0, 9))
        if told == 0:
            text = "".join(pieces[: seq + 1])
            events.append({"type": "snapshot", "content": text, "next_seq": seq + 1})
        elif told == 1:
            events.append({"type": "snapshot", "content": "", "content_omitted": True, "next_seq": seq + 1})
        elif told == 2:
            events += [{"type": "chunk", "seq": at, "content": pieces[at]} for at in range(seq + 1)]
    end: dict[str, Any] = {"type": "done", "seq": len(pieces), "final": True, "finish_reason": "stop"}
    end |= draw(st.sampled_from([{"full_content": whole}, {"content_omitted": True}]))
    if draw(st.booleans()):
        end = {"type": "error", "seq": len(pieces), "final": True, "code": "engine_lost", "partial_content": whole}
    events.append(end)
    kept = [event for event in events if draw(st.integers(0, 4))]
    return [{"request_id": "r", **event} for event in kept for _ in range(draw(st.integers(1, 2)))]
