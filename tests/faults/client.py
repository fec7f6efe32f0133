"""A client process that follows the four rules of docs/protocol.md over plain paho, and writes down everything that it sees.

    python -m tests.faults.client --folder F --name c0 --port 1883 --seed 1 --count 100 --window 3 --protocol 5 --clean

Started again with the same arguments it goes on where its history ends.
"""

from __future__ import annotations

import argparse
import json
import queue
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.faults.history import Reader, Writer
from tests.faults.model import Text
from tests.faults.wishes import Wish, wishes

SILENT_HEARTBEATS = 3
ATTEMPTS = 60  # of one wish, each under a new id, after ends that say they are retryable
FOR_GOOD = ("bad_request", "payload_too_large", "model_not_found", "unsupported", "context_overflow")
ENDS = 4  # without the text that is missing, after which it will never come
SENDS = 40  # of one id, in vain


@dataclass(slots=True)
class Ask:
    """A wish under way."""

    wish: Wish
    attempt: int
    request_id: str
    not_before: float = 0.0
    sent_at: float | None = None
    heard_at: float = 0.0
    in_vain: int = 0
    chunks: int = 0
    cancelled: bool = False
    ends: int = 0
    """How often it ended without its text, chunks missing."""
    text: Text = field(default_factory=Text)


class RuleClient:
    """Callbacks only put into the inbox; `run` does everything else in one thread."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._name: str = options.name
        self._inbox: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._open: dict[str, Ask] = {}
        self._waiting: deque[Ask] = deque()
        self._up = False
        self._path = Path(options.folder) / f"{self._name}.jsonl"
        self._begin()
        self._history = Writer(self._path)
        self._paho = self._connection()

    def _begin(self) -> None:
        """What the history of an earlier life leaves to do."""
        last: dict[int, tuple[str, int]] = {}
        over = set()
        for entry in Reader(self._path).news():
            if entry.what == "begun":
                last[entry.number] = (entry.request_id, entry.attempt)
            elif entry.what in ("ended", "gave_up"):
                over.add(entry.number)
        planned = wishes(
            client=self._name,
            seed=self._options.seed,
            count=self._options.count,
            without=self._options.without.split(","),
        )
        for position, wish in enumerate(planned):
            if position in over:
                continue
            request_id, attempt = last.get(position, ("", 0))
            ask = Ask(wish, attempt, request_id or self._id(position, attempt))
            self._waiting.append(ask)
        self._position = {id(wish): position for position, wish in enumerate(planned)}
        self._planned = planned
        self._known_begun = {request_id for request_id, _ in last.values()}
        self._begun_count = sum(planned[position].kind != "history" for position in last)

    def _id(self, position: int, attempt: int) -> str:
        return f"{self._name}-{self._options.seed}-{position}-{attempt}"

    def _connection(self) -> paho.Client:
        options = self._options
        five = options.protocol == "5"
        name = f"rig-{self._name}"
        client = (
            paho.Client(CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5)
            if five
            else paho.Client(CallbackAPIVersion.VERSION2, name, clean_session=options.clean, protocol=paho.MQTTv311)
        )
        client.reconnect_delay_set(1, 1)
        client.on_connect = self._on_connect
        client.on_disconnect = lambda *_: self._inbox.put(("down", "", ""))
        client.on_subscribe = lambda *_: self._inbox.put(("up", "", ""))
        client.on_message = lambda _client, _data, message: self._inbox.put(
            ("event", message.topic, message.payload.decode("utf-8", "replace"))
        )
        properties = None
        if five:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 0 if options.clean else 3600
        start: Any = {"clean_start": options.clean, "properties": properties} if five else {}
        client.connect_async("127.0.0.1", options.port, keepalive=5, **start)
        return client

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not reason.is_failure:
            client.subscribe(f"llm/reply/{self._name}/#", 1)

    def run(self) -> int:
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        self._paho.loop_start()
        while (self._waiting or self._open) and not self._stop.is_set():
            try:
                what, topic, payload = self._inbox.get(timeout=0.05)
            except queue.Empty:
                self._tick()
                continue
            self._take(what, topic, payload)
            if self._inbox.empty():
                self._tick()
        self._paho.disconnect()
        self._paho.loop_stop()
        self._history.close()
        return 0

    def _take(self, what: str, topic: str, payload: str) -> None:
        if what == "event":
            self._event(topic, payload)
            return
        self._history.write(what)
        self._up = what == "up"
        for ask in self._open.values():
            ask.sent_at = None  # rule 4: after a reconnect

    # --- rules ---------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if not self._up:
            return
        now = time.monotonic()
        self._begin_more(now)
        for ask in list(self._open.values()):
            if now < ask.not_before:
                continue
            quiet_s = SILENT_HEARTBEATS * self._options.heartbeat_s
            if ask.wish.fields.get("stream") is False:
                quiet_s = 10.0
            heard = max(ask.sent_at or 0.0, ask.heard_at)
            backoff_s = min(0.3 * 2**ask.in_vain, 3.0)
            hole_due = ask.text.hole and ask.sent_at is not None and now >= ask.sent_at + backoff_s
            if ask.sent_at is None or now >= heard + quiet_s or hole_due:
                self._send(ask, now)

    def _begin_more(self, now: float) -> None:
        sessions = {ask.wish.session for ask in self._open.values()}
        held: list[Ask] = []
        while self._waiting and len(self._open) < self._options.window and len(held) < 8:
            if (
                self._begun_count >= allowed(self._options.folder, self._name)
                and self._waiting[0].request_id not in self._known_begun
            ):
                break
            ask = self._waiting.popleft()
            if ask.wish.session in sessions:
                held.append(ask)
                sessions.add(ask.wish.session)
                continue
            sessions.add(ask.wish.session)
            self._open[ask.request_id] = ask
            if ask.request_id not in self._known_begun:
                self._begun(ask)
        self._waiting.extendleft(reversed(held))

    def _begun(self, ask: Ask) -> None:
        self._begun_count += ask.wish.kind != "history"
        position = self._position[id(ask.wish)]
        self._history.write("begun", request_id=ask.request_id, number=position, attempt=ask.attempt)

    def _send(self, ask: Ask, now: float) -> None:
        ask.sent_at = now
        ask.in_vain += 1
        if ask.in_vain > SENDS:
            self._over(ask, "gave_up")
            return
        self._history.write("sent", request_id=ask.request_id)
        if ask.wish.kind == "history":
            payload = json.dumps({"action": "history", "transaction": ask.request_id}).encode()
            self._paho.publish(f"llm/control/{ask.wish.session}", payload, 1)
            return
        self._paho.publish(f"llm/request/{ask.wish.session}", ask.wish.payload(ask.request_id), 1)
        if ask.cancelled:
            self._cancel(ask)

    def _cancel(self, ask: Ask) -> None:
        if not ask.cancelled:
            self._history.write("cancel", request_id=ask.request_id)
        ask.cancelled = True
        payload = json.dumps({"action": "cancel", "request_id": ask.request_id}).encode()
        self._paho.publish(f"llm/control/{ask.wish.session}", payload, 1)

    def _event(self, topic: str, payload: str) -> None:
        try:
            event = json.loads(payload)
            name = str(event.get("transaction" if event.get("type") == "ack" else "request_id", ""))
        except (ValueError, AttributeError):
            event, name = {}, ""
        self._history.write("event", request_id=name, topic=topic, text=payload)
        ask = self._open.get(name)
        if ask is None:
            return
        ask.heard_at = time.monotonic()
        if ask.wish.kind == "history":
            # A question that came twice is refused once: the other one's answer comes too.
            if event.get("type") == "ack" and event.get("code") != "busy":
                self._over(ask, "ended")
            return
        self._follow(ask, event)

    def _follow(self, ask: Ask, event: dict[str, Any]) -> None:
        before = ask.text.next_seq
        match event.get("type"):
            case "chunk":
                ask.text.chunk(event["seq"], str(event.get("content", "")))
                ask.chunks += 1
            case "snapshot":
                ask.text.snapshot(event["next_seq"], None if event.get("content_omitted") else event["content"])
            case "done" | "error":
                full = event.get("full_content", event.get("partial_content"))
                whole = ask.text.end(event.get("seq"), full)
                ask.ends += not whole
                if whole or ask.ends > ENDS:
                    self._ended(ask, event)
                    return
            case _:
                pass
        if ask.text.next_seq > before:
            ask.in_vain = 0
        after = ask.wish.cancel_after
        if 0 <= after <= ask.chunks and not ask.cancelled and event.get("type") in ("queued", "start", "chunk"):
            self._cancel(ask)

    def _ended(self, ask: Ask, event: dict[str, Any]) -> None:
        # Also after `internal` and `engine_error`, which do not say that they are retryable: here the cause goes away.
        again = event["type"] == "error" and event["code"] not in FOR_GOOD and ask.attempt < ATTEMPTS
        if not again:
            self._over(ask, "ended")
            return
        self._open.pop(ask.request_id)
        attempt = ask.attempt + 1
        position = self._position[id(ask.wish)]
        pause_s = float(event.get("retry_after_s") or 0.2 * min(attempt, 5))
        self._begun_count -= 1  # counted once as a wish
        again_ask = Ask(ask.wish, attempt, self._id(position, attempt), not_before=time.monotonic() + min(pause_s, 2.0))
        self._open[again_ask.request_id] = again_ask
        self._begun(again_ask)

    def _over(self, ask: Ask, how: str) -> None:
        self._open.pop(ask.request_id, None)
        self._history.write(how, request_id=ask.request_id, number=self._position[id(ask.wish)])


def allowed(folder: str, name: str) -> int:
    """How many wishes this client may have begun by now: the clients are kept in step with the faults."""
    try:
        return int(json.loads((Path(folder) / "allowed").read_text())[name])
    except (OSError, ValueError):
        return 10**9


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, kind in (("folder", str), ("name", str), ("port", int), ("seed", int), ("count", int), ("window", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--protocol", choices=("5", "3.1.1"), default="5")
    parser.add_argument("--without", default="", help="kinds of requests that are not asked")
    parser.add_argument("--clean", action="store_true")
    parser.add_argument("--heartbeat-s", type=float, default=1.0)
    return parser.parse_args()


def main() -> int:
    return RuleClient(options_of()).run()


if __name__ == "__main__":
    raise SystemExit(main())
