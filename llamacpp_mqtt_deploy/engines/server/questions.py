"""Short questions to a llama.cpp server beside its work: how many tokens a request has, and what its slots do."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.counts import count
from llamacpp_mqtt_deploy.engines.server.failures import Broken, ConnectFailed, NoAnswer, Silent
from llamacpp_mqtt_deploy.engines.server.http import HttpExchange
from llamacpp_mqtt_deploy.stopping import StopSignal

COMPLETIONS = "/v1/chat/completions"
COUNT_WITHIN_S = 5.0
COUNTS_KEPT = 256
"""Token counts remembered; the same conversation is counted again while its history is fitted."""


class Questions:
    """Asks over connections of its own, one for each question, which `exchange` makes; usable from any thread."""

    def __init__(self, exchange: Callable[..., HttpExchange]) -> None:
        self._exchange = exchange
        self._lock = threading.Lock()  # held for arithmetic only
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self.can_count = True
        """False once the server turned out to have no endpoint for it; whoever describes a server sets it again."""

    def count_tokens(self, content: bytes, stop: StopSignal) -> int | None:
        """The tokens of the prompt that this body of a completion request makes; None when the server cannot tell."""
        key = hashlib.blake2b(content, digest_size=16).digest()
        with self._lock:
            if key in self._counts:
                self._counts.move_to_end(key)
                return self._counts[key]
        counted = self._count(content, stop)
        stop.raise_if_set()
        if counted is not None:
            with self._lock:
                self._counts[key] = counted
                while len(self._counts) > COUNTS_KEPT:
                    self._counts.popitem(last=False)
        return counted

    def _count(self, content: bytes, stop: StopSignal) -> int | None:
        """Ask the server to count; servers older than that endpoint render the template and tokenize it."""
        status, answer = self.ask(f"{COMPLETIONS}/input_tokens", content, stop)
        if status == 200:
            return count(answer.get("input_tokens"))
        if status not in (404, 405, 501):
            return None
        status, answer = self.ask("/apply-template", content, stop)
        prompt = answer.get("prompt")
        if status != 200 or not isinstance(prompt, str):
            self.can_count = status not in (404, 405, 501)  # until the next probe finds a server
            return None
        asked = orjson.dumps({"content": prompt, "add_special": True, "parse_special": True})
        status, answer = self.ask("/tokenize", asked, stop)
        tokens = answer.get("tokens")
        return len(tokens) if status == 200 and isinstance(tokens, list) else None

    def slots_progress(self) -> tuple[SlotProgress, ...] | None:
        """What each slot of a llama.cpp server has done, to tell a long prompt from a hang; None when it does not answer.

        Not more than once in a few seconds: each answer puts off what the server does about a client that has gone.
        """
        status, answer = self.ask("/slots", None, None)
        slots = answer.get("")
        if status != 200 or not isinstance(slots, list):
            return None
        return tuple(_slot_progress(slot) for slot in slots if isinstance(slot, dict))

    def ask(self, path: str, content: bytes | None, stop: StopSignal | None) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of a short request, a list under the key ""; status 0 when there is none."""
        stops = () if stop is None else (stop,)
        try:
            with self._exchange(*stops) as exchange:
                exchange.send("GET" if content is None else "POST", path, content, timeout_s=COUNT_WITHIN_S)
                content = exchange.read_all(timeout_s=COUNT_WITHIN_S)
                try:
                    document = orjson.loads(content)
                except orjson.JSONDecodeError:
                    return exchange.status, {}  # a proxy's page
                return exchange.status, document if isinstance(document, dict) else {"": document}
        except (ConnectFailed, NoAnswer, Broken, Silent, ValueError):
            return 0, {}


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotProgress:
    """The work of one slot of a llama.cpp server; a slot that works and does not move is stuck."""

    id: int
    working: bool
    task: int | None
    prompt_tokens_processed: int
    tokens_decoded: int


def _slot_progress(slot: dict[str, Any]) -> SlotProgress:
    following = slot.get("next_token")
    first = following[0] if isinstance(following, list) and following else following
    decoded = first.get("n_decoded") if isinstance(first, dict) else None
    return SlotProgress(
        id=count(slot.get("id")) or 0,
        working=bool(slot.get("is_processing")),
        task=count(slot.get("id_task")),
        prompt_tokens_processed=count(slot.get("n_prompt_tokens_processed")) or 0,
        tokens_decoded=count(decoded) or 0,
    )
