"""What the clients ask: made from a seed; most answers are known beforehand, since the model answers greedily (pure)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SHORT = (
    "Tell me about the sea",
    "Count from 1 to 10",
    "Count from 3 to 9",
    "Hello",
    "What can you do?",
    "Name three rivers.",
)
LONG = ("Count from 7 to 60", "Count from 20 to 100", "Tell me a long story", "Write a long story about a robot")
MAX_TOKENS = 300
TURNS = 6  # prompts of one conversation, then its history is asked for

Kind = Literal["short", "long", "whole", "bare", "chat", "cancel", "history"]
_WEIGHTS: Mapping[Kind, int] = {"short": 40, "long": 16, "whole": 7, "bare": 7, "chat": 22, "cancel": 8}


@dataclass(frozen=True, slots=True)
class Wish:
    """One request without its id. A client works through its wishes in order, those of one session one after the other."""

    number: int
    kind: Kind
    session: str
    prompt: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    cancel_after: int = -1
    """Cancel at this many chunks."""

    @property
    def known(self) -> bool:
        """Whether the right answer depends on the prompt alone."""
        return self.kind in ("short", "long", "whole", "bare", "cancel")

    def payload(self, request_id: str) -> bytes:
        """The same bytes for the same id."""
        asked = (
            {"messages": [{"role": "user", "content": self.prompt}]} if self.kind != "chat" else {"prompt": self.prompt}
        )
        body = {"request_id": request_id} | asked | {"temperature": 0, "max_tokens": MAX_TOKENS} | dict(self.fields)
        return json.dumps(body, separators=(",", ":")).encode()


def wishes(*, client: str, seed: int, count: int, without: Sequence[str] = ()) -> list[Wish]:
    """`count` requests of one client; the question for a conversation's history comes on top."""
    chosen = random.Random(f"{client} {seed}")
    kinds = [kind for kind in _WEIGHTS if kind not in without]
    made: list[Wish] = []
    conversation, turn = 0, 0
    for number in range(count):
        kind = chosen.choices(kinds, weights=[_WEIGHTS[kind] for kind in kinds])[0]
        session = f"{client}/s{number % 7}"
        match kind:
            case "short":
                made.append(Wish(number, kind, session, chosen.choice(SHORT)))
            case "long":
                stream = {"stream": "sentence"} if chosen.random() < 0.2 else {}
                made.append(Wish(number, kind, session, chosen.choice(LONG), stream))
            case "whole":
                made.append(Wish(number, kind, session, chosen.choice(SHORT + LONG), {"stream": False}))
            case "bare":
                made.append(Wish(number, kind, session, chosen.choice(SHORT + LONG), {"full_content": False}))
            case "cancel":
                made.append(Wish(number, kind, session, chosen.choice(LONG), cancel_after=chosen.choice((0, 1, 5, 20))))
            case _:
                cancel_after = 3 if chosen.random() < 0.1 else -1
                prompt = chosen.choice(SHORT + LONG)
                made.append(Wish(number, "chat", f"{client}/c{conversation}", prompt, {}, cancel_after))
                turn += 1
                if turn == TURNS:
                    made.append(Wish(number, "history", f"{client}/c{conversation}"))
                    conversation, turn = conversation + 1, 0
    if turn:
        made.append(Wish(count, "history", f"{client}/c{conversation}"))
    return made
