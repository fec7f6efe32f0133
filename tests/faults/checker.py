"""Reads what all clients wrote down and holds it against the model (pure but for the entries that it is given)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.faults.history import Entry
from tests.faults.model import EXPLAINED, Broken, Story, history_of
from tests.faults.wishes import Wish

# Codes that only these faults explain.
EXPLAINED_BY: Mapping[str, Sequence[str]] = {
    "engine_error": ("engine.garbage", "engine.mid_line", "engine.usage", "line.garbage", "line.mid_line"),
    # Accepted, then the worker was away for two hours or a year, as far as it can know.
    "timeout": ("daemon.clock",),
    "internal": ("disk.full", "disk.lock"),
}

# How the package's client says that it waited long enough; its program asks again.
GIVEN_UP = frozenset({"BrokerUnreachable", "NoWorker", "AnswerLost"})


class Checker:
    """`take` follows the clients' histories while they grow; `close` tells what is broken."""

    def __init__(
        self,
        planned: Mapping[str, Sequence[Wish]],
        answers: Mapping[str, str],
        kinds: frozenset[str] = frozenset(),
        *,
        by_package: frozenset[str] = frozenset(),
    ) -> None:
        self._planned = planned
        self._by_package = by_package
        """Clients of which only the whole texts are known."""
        self._answers = answers
        self._explained = EXPLAINED | {code for code, by in EXPLAINED_BY.items() if kinds & set(by)}
        self._stories: dict[str, Story] = {}
        self._wishes: dict[str, Wish] = {}
        self._turns: dict[str, list[tuple[str, dict[str, Any] | None]]] = {}
        self._broken: list[Broken] = []
        self._over: set[tuple[str, int]] = set()
        self._told: set[str] = set()
        self._acks: list[str] = []
        self.first_sent: dict[str, float] = {}
        self.begun = 0
        self.done = 0
        self.retries = 0
        self.resends = 0
        self.repeats = 0
        self.histories = 0
        self.ends: Counter[str] = Counter()

    def take(self, client: str, entry: Entry) -> None:
        match entry.what:
            case "begun":
                self._begun(client, entry)
            case "sent":
                if entry.request_id in self.first_sent:
                    self.resends += 1
                self.first_sent.setdefault(entry.request_id, entry.at)
            case "cancel":
                self._stories[entry.request_id].cancelled = True
            case "event":
                self._event(entry)
            case "answer" | "failed":
                self._told_by_package(entry)
            case "ended":
                self._ended(client, entry)
            case "gave_up":
                self._over.add((client, entry.number))
                self._broken.append(Broken("lost", entry.request_id, "sent again and again, never answered to its end"))

    def _told_by_package(self, entry: Entry) -> None:
        """What the package's own client gave to its program: the whole text, or an error that a fault explains."""
        expected = self._answers.get(self._wishes[entry.request_id].prompt)
        if entry.what == "failed":
            self.ends[entry.text] += 1
            if entry.text not in self._explained | GIVEN_UP:
                self._broken.append(Broken("code", entry.request_id, entry.text))
        else:
            self.ends["stop"] += 1
            if entry.text != expected:
                what = f"the package's client gave {entry.text[:200]!r} where {expected!r} is right"
                self._broken.append(Broken("torn", entry.request_id, what))

    @property
    def open(self) -> int:
        """Requests begun and not over."""
        return self.begun - self.done

    def broken_so_far(self) -> list[Broken]:
        return self._broken + [broken for story in self._stories.values() for broken in story.broken]

    def close(self) -> list[Broken]:
        for story in self._stories.values():
            self._broken += story.close()
        for text in self._acks:
            if (ack := json.loads(text)).get("status") != "ok":
                self._broken.append(
                    Broken("code", str(ack.get("request_id")), f"a cancel was answered with {text[:300]}")
                )
        for client, wishes in self._planned.items():
            missing = len(wishes) - sum(1 for name, _ in self._over if name == client)
            if missing:
                self._broken.append(Broken("lost", client, f"{missing} of {len(wishes)} wishes were not fulfilled"))
        return self._broken

    # --- entries -------------------------------------------------------------------------------------------------------

    def _begun(self, client: str, entry: Entry) -> None:
        wish = self._planned[client][entry.number]
        self._wishes[entry.request_id] = wish
        if wish.kind == "history":
            return
        if entry.attempt:
            self.retries += 1
        else:
            self.begun += 1
        if client in self._by_package:
            return
        expected = self._answers.get(wish.prompt) if wish.known else None
        self._stories[entry.request_id] = Story(
            entry.request_id, wish.session, expected=expected, explained=frozenset(self._explained)
        )

    def _event(self, entry: Entry) -> None:
        wish = self._wishes.get(entry.request_id)
        if wish is None and '"type":"ack"' in entry.text:
            self._acks.append(entry.text)  # of a cancel: what counts is the end that it brings
            return
        if wish is None:
            self._broken.append(Broken("form", entry.request_id, f"an event for nobody: {entry.text[:200]}"))
            return
        if wish.kind == "history":
            self._history(entry, wish)
            return
        story = self._stories[entry.request_id]
        known = story.terminal is not None
        event = story.feed(entry.topic, entry.text)
        if event is None or not event.get("final"):
            return
        if known:
            self.repeats += 1
            return
        self.ends[event.get("code") or event["finish_reason"]] += 1
        if wish.kind == "chat":
            self._turns.setdefault(wish.session, []).append((wish.prompt, event))

    def _ended(self, client: str, entry: Entry) -> None:
        if (client, entry.number) not in self._over:
            self._over.add((client, entry.number))
            self.done += self._planned[client][entry.number].kind != "history"

    def _history(self, entry: Entry, wish: Wish) -> None:
        ack = json.loads(entry.text)
        if entry.request_id in self._told or ack.get("code") == "busy":
            return
        self._told.add(entry.request_id)
        self.histories += 1
        expected = history_of(self._turns.get(wish.session, []))
        found = ack.get("messages")
        if found != expected:
            what = f"{wish.session} remembers {_brief(found)}, its client saw {_brief(expected)}"
            self._broken.append(Broken("history", entry.request_id, what))


def _brief(messages: Any) -> str:
    if not isinstance(messages, list):
        return repr(messages)
    return " / ".join(
        f"{m.get('role', '?')[0]}:{m.get('content', '')[:24]}({len(m.get('content', ''))})" for m in messages
    )
