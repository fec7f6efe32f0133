"""A worker that a test plays by hand: it records what arrives and publishes what it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

ACCESS_LIST = """
pattern write llm/request/%u/#
pattern write llm/control/%u/#
pattern read llm/reply/%u/#
pattern read llm/status/#
pattern read llm/health/#

user worker
topic read llm/request/#
topic read llm/control/#
topic read llm/admin/#
topic write llm/reply/#
topic write llm/admin-reply/#
topic readwrite llm/status/#
topic readwrite llm/health/#

user operator
topic write llm/admin/#
topic read llm/admin-reply/#
"""

PASSWORDS = {name: f"{name}-secret" for name in ("worker", "operator", "alice", "bob")}

Play = Callable[["PlayedWorker", str, dict[str, Any]], None]


def answer_in_words(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
    """Echo the prompt word by word, as a well behaved worker does."""
    words = str(request.get("prompt") or request["messages"][-1]["content"]).split(" ")
    pieces = [word if number == 0 else f" {word}" for number, word in enumerate(words)]
    worker.say(session, request, type="start", protocol=1, model="played", worker="played", created=0)
    for number, piece in enumerate(pieces):
        worker.say(session, request, type="chunk", seq=number, content=piece)
    worker.done(session, request, "".join(pieces), seq=len(pieces))


class PlayedWorker:
    """Answers each request with `play`; `requests` holds (session, payload), `controls` (session, message), `orders` what an
    operator said, which is answered with the fields of `admin_ack`."""

    def __init__(
        self,
        port: int,
        *,
        play: Play = answer_in_words,
        username: str | None = None,
        online: bool = True,
        protocol: str = "5",
        name: str = "played",
    ) -> None:
        self.play = play
        self.name = name
        self.orders: list[dict[str, Any]] = []
        self.admin_ack: dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]] | None = {}
        self.requests: list[tuple[str, bytes]] = []
        self.controls: list[tuple[str, dict[str, Any]]] = []
        self.history: dict[str, list[dict[str, str]]] = {}
        self.answers_control = True
        self.counted: dict[str, Any] = {"prompt_tokens": 7}
        """What an ack of `count_tokens` says."""
        self.running = 1
        """What a cancel says that it stopped."""
        self._online = online
        self._subscribed = threading.Event()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            protocol=MQTTProtocolVersion.MQTTv5 if protocol == "5" else MQTTProtocolVersion.MQTTv311,
        )
        if username is not None:
            self._client.username_pw_set(username, f"{username}-secret")
        self._client.on_connect = self._connected
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._received
        self._client.reconnect_delay_set(1, 1)
        self._port = port

    def __enter__(self) -> Self:
        self._client.connect("127.0.0.1", self._port)
        self._client.loop_start()
        assert self._subscribed.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        if self._client.is_connected():
            for kind in ("status", "health"):
                self._publish(f"llm/{kind}/{self.name}", b"", retain=True).wait_for_publish(5)
        self._client.disconnect()
        self._client.loop_stop()

    def say(self, session: str, request: dict[str, Any], **event: Any) -> None:
        event = {"type": event.pop("type"), "request_id": request.get("request_id"), "session_id": session, **event}
        self._publish(f"llm/reply/{session}", json.dumps(event).encode())

    def done(self, session: str, request: dict[str, Any], text: str, *, seq: int, reason: str = "stop") -> None:
        self.say(
            session,
            request,
            type="done",
            seq=seq,
            final=True,
            full_content=text,
            message={"role": "assistant", "content": text},
            finish_reason=reason,
            usage={"prompt_tokens": 3, "completion_tokens": seq, "total_tokens": 3 + seq, "cached_tokens": 0},
            timings={"queue_ms": 0, "first_token_ms": 12, "total_ms": 40, "tokens_per_second": 25.0},
            dropped_messages=0,
        )

    def status(self, **fields: Any) -> None:
        status = {"state": "online", "protocol": 1, "heartbeat_s": 15, **fields}
        self._publish(f"llm/status/{self.name}", json.dumps(status).encode(), retain=True).wait_for_publish(5)

    def health(self, **fields: Any) -> None:
        self._publish(f"llm/health/{self.name}", json.dumps(fields).encode(), retain=True).wait_for_publish(5)

    def raw(self, topic: str, payload: bytes) -> None:
        self._publish(topic, payload)

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> paho.MQTTMessageInfo:
        return self._client.publish(topic, payload, qos=1, retain=retain)

    def _connected(self, client: paho.Client, *_: object) -> None:
        if self._online:
            self._publish(f"llm/status/{self.name}", b'{"state":"online","protocol":1,"heartbeat_s":15}', retain=True)
        client.subscribe([("llm/request/#", 1), ("llm/control/#", 1), (f"llm/admin/{self.name}", 1)])

    def _received(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        _, kind, session = message.topic.split("/", 2)
        if kind == "request":
            self.requests.append((session, bytes(message.payload)))
            if message.payload:  # an empty request is ignored
                self.play(self, session, json.loads(message.payload))
            return
        control = json.loads(message.payload)
        if kind == "admin":
            self._obey(control)
            return
        self.controls.append((session, control))
        if self.answers_control:
            extra: dict[str, Any] = (
                {"messages": self.history.get(session, [])} if control["action"] == "history" else {}
            )
            if control["action"] == "cancel":
                extra = {"cancelled": self.running}
            if control["action"] == "count_tokens":
                extra = self.counted
            ack = {"type": "ack", "action": control["action"], "status": "ok", **extra}
            ack |= {name: control[name] for name in ("transaction", "request_id") if name in control}
            self._publish(f"llm/reply/{session}", json.dumps(ack).encode())

    def _obey(self, order: dict[str, Any]) -> None:
        self.orders.append(order)
        if self.admin_ack is not None:
            told = self.admin_ack(order) if callable(self.admin_ack) else self.admin_ack
            ack = {"type": "ack", "worker": self.name, "action": order["action"], "status": "ok", **told}
            for transaction in ("somebody-else", order["transaction"]):
                self._publish(f"llm/admin-reply/{self.name}", json.dumps(ack | {"transaction": transaction}).encode())
