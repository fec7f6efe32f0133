"""What a session remembers: whole exchanges, fitted into the engine's context, and what an answer adds to them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import orjson

from llamacpp_mqtt_deploy.core.deltas import Message

BYTES_PER_TOKEN = 3
"""For an engine that cannot count: English has about 4 UTF-8 bytes a token, Chinese 3 a character; a little too careful."""

MOST_BYTES_PER_TOKEN = 16
"""No conversation has more on average: what is longer than the budget times this is dropped without asking the engine, which
would spend seconds on the tokens of a history of megabytes."""

TEMPLATE_TOKENS = 512
"""Room for what a chat template adds by itself (gpt-oss opens with about 100 tokens, a tool preamble takes 150)."""

INFORMED_GUESSES = 4
"""Counts that follow the proportion of the last one, before the search goes on by halves."""

NO_RESULT = "No result was given."
"""Stands for the result of a tool call that the client never answered: some templates refuse a call without one."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A user message and all that followed it up to the next one; never taken apart."""

    messages: tuple[Message, ...]
    size: int
    """Bytes as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The messages for the engine. `tokens` is their count where the engine told, `estimated` says that it could not."""

    messages: tuple[Message, ...]
    dropped_messages: int = 0
    tokens: int | None = None
    estimated: bool = False


Count = Callable[[Sequence[Message]], int | None]
"""Tokens of these messages as the engine's template renders them; None when the engine cannot tell. An HTTP call."""


def exchanges(messages: Sequence[Message]) -> tuple[Exchange, ...]:
    """The messages as whole exchanges; what stands before the first user message is one too."""
    groups: list[list[Message]] = []
    for message in messages:
        if message.get("role") == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return tuple(Exchange(tuple(group), _size(group)) for group in groups)


def pending_tool_calls(messages: Sequence[Message]) -> tuple[str, ...]:
    """Ids of the tool calls that wait for their results, in the order of the calls; empty unless the last answer called."""
    answered: set[str] = set()
    for message in reversed(messages):
        match message.get("role"):
            case "tool":
                answered.add(str(message.get("tool_call_id")))
            case "assistant":
                calls = message.get("tool_calls") or ()
                return tuple(str(call["id"]) for call in calls if call.get("id") and call["id"] not in answered)
            case _:
                return ()
    return ()


def exchange_of(newest: Sequence[Message], answer: Message, *, cancelled: bool = False) -> tuple[Message, ...]:
    """What a `done` adds to the history: the prompt (or the tool results) and the answer.

    A cancelled answer leaves its text alone, since a half-written tool call is none, and without text it leaves nothing at
    all: a prompt without an answer would put two user messages in a row, which many templates refuse, and tool results can
    be sent again. Reasoning is never remembered: templates leave it out of later turns.
    """
    text = answer.get("content")
    calls = None if cancelled else answer.get("tool_calls")
    if cancelled and not text:
        return ()
    kept = {"role": "assistant", "content": text if text or calls else ""}
    if calls:
        kept["tool_calls"] = calls
    return (*newest, kept)


def fit(
    history: Sequence[Message],
    *,
    system_prompt: str | None,
    newest: Sequence[Message],
    budget_tokens: int | None,
    count: Count,
    extra_bytes: int = 0,
) -> Fitted:
    """System prompt, as much of the history as fits the budget, and the newest message or tool results.

    Only whole exchanges go, the oldest first. System prompt and newest always stay (with the exchange that called, when the
    newest are tool results): where even they do not fit, the engine says by how much. `extra_bytes` is what else goes into
    the prompt, the tools as JSON.

    Where the cut may fall: a cut that moved with each turn would change the prompt's beginning each turn, and the engine
    would process all of it anew instead of taking it from its cache. So a history is cut only where it crosses a multiple of
    a *stride*, counted in bytes from the beginning of the stored history: the same places at every later turn. The
    stride is a power of two of bytes, a fifth to two fifths of the budget for English. A cut thus holds until so much has been
    said anew, and nothing needs to be remembered between turns. A power of two, because the budget may differ between
    requests (`max_tokens`): the places of a longer stride are among those of a shorter one. Past the last such place any
    exchange may be the first, so that a huge newest message costs no more history than it must.

    `count` is called as little as possible: never when the bytes alone settle it, once when everything fits, and two or
    three times more after that. Its answers must not fall when messages are added in front.
    """
    system: tuple[Message, ...] = ({"role": "system", "content": system_prompt},) if system_prompt else ()
    stored, pinned = _split(exchanges(history), newest)
    kept = [_closed(exchange.messages) for exchange in stored]
    after = _closed((*pinned, *newest)) if pinned else tuple(newest)

    def prompt(cut: int) -> tuple[Message, ...]:
        return (*system, *(message for exchange in kept[cut:] for message in exchange), *after)

    if budget_tokens is None or not kept:
        return Fitted(messages=prompt(0))
    # Bytes in front of each exchange, and of all of them: a cut at i leaves before[-1] - before[i].
    before = list(accumulate((_size(exchange) for exchange in kept), initial=0))
    cuts = _cuts(before, budget_tokens)
    fixed = _size(system) + _size(after) + extra_bytes
    sizes = [fixed + before[-1] - before[cut] for cut in cuts]
    place, tokens, estimated = _search(sizes, budget_tokens, lambda place: count(prompt(cuts[place])))
    dropped = sum(len(exchange.messages) for exchange in stored[: cuts[place]])
    return Fitted(messages=prompt(cuts[place]), dropped_messages=dropped, tokens=tokens, estimated=estimated)


def stride_bytes(budget_tokens: int) -> int:
    """The distance between two places of a cut: the largest power of two up to one and a half bytes a token of budget."""
    return 1 << max(0, (max(budget_tokens, 1) * 3 // 2).bit_length() - 1)


def _split(stored: tuple[Exchange, ...], newest: Sequence[Message]) -> tuple[tuple[Exchange, ...], tuple[Message, ...]]:
    """The exchanges that may go, and the messages that belong to the newest: tool results need the call before them."""
    if stored and newest and newest[0].get("role") != "user":
        return stored[:-1], stored[-1].messages
    return stored, ()


def _closed(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with a result for each tool call; the same at every turn, so that the engine's cache holds."""
    closed: list[Message] = []
    for place, message in enumerate(messages):
        closed.append(message)
        followed_by = messages[place + 1].get("role") if place + 1 < len(messages) else None
        if message.get("role") in ("assistant", "tool") and followed_by != "tool":
            closed.extend(
                {"role": "tool", "tool_call_id": call, "content": NO_RESULT}
                for call in pending_tool_calls(messages[: place + 1])
            )
    return tuple(closed)


def _cuts(before: Sequence[int], budget_tokens: int) -> list[int]:
    """Where the history may begin, as numbers of exchanges left out: rising, from none to all."""
    stride = stride_bytes(budget_tokens)
    last = len(before) - 1
    coarse = [cut for cut in range(last) if cut == 0 or before[cut] // stride > before[cut - 1] // stride]
    fine = range(coarse[-1] + 1 if coarse else 0, last + 1)
    return [*coarse, *fine]


def _search(
    sizes: Sequence[int], budget_tokens: int, count_at: Callable[[int], int | None]
) -> tuple[int, int | None, bool]:
    """The first place that fits, its tokens where they were counted, and whether the engine could not tell.

    `sizes` are bytes, falling from place to place. The last place is the answer when none fits.
    """

    def first_within(size: float) -> int:
        return min(bisect_left(sizes, -size, key=lambda s: -s), len(sizes) - 1)

    # A token is at least one byte, so this one needs no asking; the places up to `misfit` are far too long.
    fits = first_within(budget_tokens - TEMPLATE_TOKENS)
    misfit = first_within(budget_tokens * MOST_BYTES_PER_TOKEN) - 1
    tokens: int | None = None
    per_byte = 1 / BYTES_PER_TOKEN
    asked = 0
    while fits - misfit > 1:
        # The whole first: most often it fits. Then where the last count says, and by halves when that leads nowhere.
        guess = misfit + 1 if asked == 0 else first_within(budget_tokens / per_byte)
        place = min(max(guess, misfit + 1), fits - 1) if asked < INFORMED_GUESSES else (fits + misfit) // 2
        counted = count_at(place)
        if counted is None:
            return min(max(first_within(budget_tokens / per_byte), misfit + 1), fits), None, True
        asked += 1
        per_byte = max(counted, 1) / sizes[place] if sizes[place] else per_byte
        if counted <= budget_tokens:
            fits, tokens = place, counted
        else:
            misfit = place
    return fits, tokens, False


def _size(messages: Sequence[Message]) -> int:
    return sum(len(orjson.dumps(message)) for message in messages)
