"""Proves each permission of worker and client by doing what needs it.

A denied publish looks like success on MQTT 3.1.1 and mosquitto grants every subscription, so only a message that arrives is
proof. What a probe publishes means nothing to a live worker: an empty request is ignored, a `ping` is answered, events go to
a session that nobody uses. Status and health are touched only while no worker is there, with the truth (`offline`), and
leave behind what was there before.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from llamacpp_mqtt_deploy.checking.findings import Finding, fail, ok, skip, warn
from llamacpp_mqtt_deploy.checking.probing import Outcome, PermissionProbe
from llamacpp_mqtt_deploy.core.addresses import TopicMap
from llamacpp_mqtt_deploy.core.routes import is_level

HINT_ACL = "add it to the broker's access list; docs and config/ hold a complete one"
PING = {"action": "ping", "transaction": "lmd-check"}
HINT_CLIENT = "prove it with --client-username and --client-password-file"


class Bus:
    """Both ends of the bus under test. `client` is None when no credentials of a client were given."""

    def __init__(
        self, topics: TopicMap, worker: PermissionProbe, client: PermissionProbe | None, *, pool: str | None = None
    ) -> None:
        self.pool = pool
        self.topics = topics
        self.worker = worker
        self.client = client
        name = f"lmd-check-{secrets.token_hex(4)}"
        user = (client or worker).address.username
        self.session = f"{user}/{name}" if user and is_level(user) else name
        self.online: dict[str, Mapping[str, Any]] = {}
        self.answered = False
        """A worker answered our `ping`."""

    def topic(self, kind: str, session: str | None = None) -> str:
        return f"{self.topics.root}/{kind}/{session or self.session}"


def check_permissions(bus: Bus) -> Iterator[Finding]:
    """All permissions of the worker, then those of the client."""
    yield from _status_of_others(bus)
    (bus.client or bus.worker).subscribe(bus.topic("reply"))
    yield from _worker_reads(bus)
    bus.answered = any(
        _json(message.payload).get("transaction") == PING["transaction"]
        for message in (bus.client or bus.worker).received
        if message.topic == bus.topic("reply")
    )
    yield from _worker_replies(bus)
    yield from _worker_retains(bus)
    if bus.client is None:
        yield skip("client.permissions", "no credentials of a client were given", HINT_CLIENT)
    else:
        yield from _client(bus, bus.client)


# --- the worker --------------------------------------------------------------------------------------------------------


def _status_of_others(bus: Bus) -> Iterator[Finding]:
    refused = bus.worker.subscribe(bus.topics.status_filter)
    if refused:
        yield fail("worker.status.read", refused, f"allow reading {bus.topics.status_filter}")
        return
    bus.worker.subscribe(bus.topics.health_topic)
    prefix = f"{bus.topics.root}/status/"
    bus.worker.saw(prefix)
    stale = []
    for message in list(bus.worker.received):
        if not message.topic.startswith(prefix):
            continue
        status, worker = _json(message.payload), message.topic.removeprefix(prefix)
        if status.get("state") not in ("online", "draining"):
            continue
        if _is_stale(status) and message.retain:
            stale.append(worker)
        else:
            bus.online[worker] = status
    me = bus.topics.worker_id
    for worker in stale:
        yield warn(
            "bus.stale",
            f"worker {worker} is retained as online, and its last word is old",
            "it died, or its clock is wrong",
        )
    there = {worker: f"{worker} on {status.get('host') or '?'}" for worker, status in bus.online.items()}
    pools = {worker: status.get("pool") for worker, status in bus.online.items()}
    others = [told for worker, told in there.items() if worker != me and (pools[worker] or "") != (bus.pool or "-")]
    if others:
        yield fail(
            "bus.workers",
            f"another worker serves this root: {', '.join(others)}",
            "`lmd run` will not start beside it; give this one another mqtt.root, stop the other, or make a pool of both",
        )
    elif bus.pool is not None and there:
        yield ok("bus.workers", f"online in pool {bus.pool}: {', '.join(sorted(there.values()))}")
    elif me in bus.online:
        yield ok("bus.workers", f"worker {me} is {bus.online[me].get('state')} on {bus.online[me].get('host') or '?'}")
    else:
        yield ok("bus.workers", f"no worker is online under {prefix}#")


def _worker_reads(bus: Bus) -> Iterator[Finding]:
    for kind, filters in (("request", bus.topics.request_filters()), ("control", bus.topics.control_filters())):
        name = f"worker.{kind}.read"
        refusals = [reason for topic_filter in filters if (reason := bus.worker.subscribe(topic_filter))]
        if refusals:
            yield fail(name, refusals[0], HINT_ACL)
            continue
        if not any(item.startswith(f"{bus.topics.root}/{kind}/") for item in filters):
            yield ok(name, f"{', '.join(filters) or 'nothing'} granted")
            continue
        topic = bus.topic(kind)
        payload = b"" if kind == "request" else orjson.dumps(PING)
        sender = bus.client or bus.worker
        outcome = sender.publish(topic, payload)
        arrived = bus.worker.saw(topic)
        if arrived:
            yield ok(name, f"a message on {topic} arrived")
        elif bus.client is not None and outcome.refused is None and sender.protocol == "5":
            yield fail(
                name,
                f"a message on {topic} was taken by the broker and did not arrive",
                f"allow the worker to read {', '.join(filters)}",
            )
        elif bus.client is not None:
            yield warn(
                name,
                f"{', '.join(filters)} granted, but the client's message did not arrive",
                "see the client's permissions below",
            )
        else:
            yield warn(name, f"{', '.join(filters)} granted; mosquitto grants also what it then withholds", HINT_CLIENT)
    refused = bus.worker.subscribe(bus.topics.admin_topic)
    if refused:
        yield fail("worker.admin.read", refused, f"allow the worker to read {bus.topics.admin_topic}")
    else:
        yield ok(
            "worker.admin.read", f"{bus.topics.admin_topic} granted (not proven: it takes an operator to publish there)"
        )


def _worker_replies(bus: Bus) -> Iterator[Finding]:
    topic = bus.topic("reply")
    watcher = bus.client or bus.worker
    refused = watcher.subscribe(topic)
    payload = orjson.dumps({"type": "probe", "check": secrets.token_hex(4)})
    outcome = bus.worker.publish(topic, payload)
    arrived = watcher.saw(topic, payload=payload)
    yield _written("worker.reply.write", topic, outcome, arrived, bus.worker)
    if bus.client is not None:
        if arrived:
            yield ok("client.reply.read", f"a reply on {topic} arrived")
        elif refused:
            yield fail("client.reply.read", refused, "allow clients: pattern read llm/reply/%u/#")
        else:
            yield fail(
                "client.reply.read", f"a reply on {topic} did not arrive", "allow clients: pattern read llm/reply/%u/#"
            )
    admin = bus.topics.admin_reply_topic
    bus.worker.subscribe(admin)
    outcome = bus.worker.publish(admin, payload)
    arrived = bus.worker.saw(admin, payload=payload)
    yield _written("worker.admin-reply.write", admin, outcome, arrived, bus.worker)


def _written(name: str, topic: str, outcome: Outcome, arrived: bool, worker: PermissionProbe) -> Finding:
    if arrived:
        return ok(name, f"a message on {topic} arrived")
    if outcome.refused:
        return fail(name, f"{topic}: {outcome.refused}", HINT_ACL)
    if worker.protocol == "5":
        return ok(name, f"the broker took a message on {topic}")
    return warn(name, f"{topic}: sent, and nobody could see whether it arrived", HINT_CLIENT)


def _worker_retains(bus: Bus) -> Iterator[Finding]:
    for kind, topic in (("status", bus.topics.status_topic), ("health", bus.topics.health_topic)):
        name = f"worker.{kind}.write"
        before = _retained(bus, topic)
        if bus.topics.worker_id in bus.online:
            if before is not None:
                yield ok(name, f"the running worker's {topic} is there")
            else:
                yield warn(
                    name, f"the running worker's {topic} is not there yet", "run the check again in half a minute"
                )
            continue
        if bus.online or bus.answered:
            yield skip(name, "not tried: a worker is at work under this root")
            continue
        # The truth, and what the next worker overwrites at once; identical to what is there when there is something.
        payload = before or orjson.dumps({"state": "offline", "reason": "lmd check", "ts": round(time.time(), 3)})
        seen = len(bus.worker.received)
        outcome = bus.worker.publish(topic, payload, retain=True)
        arrived = bus.worker.saw(topic, after=seen)
        if before is None:
            bus.worker.publish(topic, b"", retain=True)
        yield _written(name, topic, outcome, arrived, bus.worker)


def _retained(bus: Bus, topic: str) -> bytes | None:
    found = [message.payload for message in bus.worker.received if message.topic == topic and message.payload]
    return found[-1] if found else None


# --- a client ----------------------------------------------------------------------------------------------------------


def _client(bus: Bus, client: PermissionProbe) -> Iterator[Finding]:
    for kind in ("request", "control"):
        topic = bus.topic(kind)
        payload = b"" if kind == "request" else orjson.dumps(PING)
        seen = len(bus.worker.received)
        outcome = client.publish(topic, payload)
        arrived = bus.worker.saw(topic, after=seen)
        name = f"client.{kind}.write"
        if arrived:
            yield ok(name, f"a message on {topic} reached the worker's side")
        elif outcome.refused:
            yield fail(
                name, f"{topic}: {outcome.refused}", f"allow clients: pattern write {bus.topics.root}/{kind}/%u/#"
            )
        else:
            yield fail(
                name,
                f"{topic}: sent, and it did not arrive",
                f"allow clients: pattern write {bus.topics.root}/{kind}/%u/#",
            )
    yield from _client_reads_status(bus, client)
    yield from _client_is_bound(bus, client)


def _client_reads_status(bus: Bus, client: PermissionProbe) -> Iterator[Finding]:
    topic_filter = bus.topics.status_filter
    refused = client.subscribe(topic_filter)
    if refused:
        yield warn("client.status.read", refused, f"allow clients to read {bus.topics.root}/status/#")
    elif not bus.online:
        yield ok("client.status.read", f"{topic_filter} granted (nothing is there to see)")
    elif client.saw(f"{bus.topics.root}/status/"):
        yield ok("client.status.read", "the worker's status arrived")
    else:
        yield warn(
            "client.status.read",
            "the worker's status did not arrive",
            f"allow clients to read {bus.topics.root}/status/#",
        )


def _client_is_bound(bus: Bus, client: PermissionProbe) -> Iterator[Finding]:
    """A client that may write under another's name can read and steer that one's sessions."""
    foreign = f"lmd-check-other/{secrets.token_hex(4)}"
    request, reply = bus.topic("request", foreign), bus.topic("reply", foreign)
    client.publish(request, b"")
    client.subscribe(reply)
    bus.worker.publish(reply, b'{"type":"probe"}')
    writes = bus.worker.saw(request)
    reads = client.saw(reply)
    can = " and ".join(word for word, holds in (("write", writes), ("read", reads)) if holds)
    if can:
        who = client.address.username or "a client without a user name"
        yield warn(
            "client.isolation",
            f"{who} may {can} the sessions of others",
            "bind the first level to the user: pattern ... %u",
        )
    else:
        yield ok("client.isolation", "the sessions of others are out of reach")


# --- small things ------------------------------------------------------------------------------------------------------


def _json(payload: bytes) -> Mapping[str, Any]:
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_stale(status: Mapping[str, Any]) -> bool:
    ts, every_s = status.get("ts"), status.get("every_s")
    if not isinstance(ts, int | float) or not isinstance(every_s, int | float):
        return False
    return time.time() - ts > 3 * every_s + 5  # five seconds for clocks that differ
