"""Proves what a worker of a pool needs of the broker: a shared subscription that delivers, and the right to tell how the pool is."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from llamacpp_mqtt_deploy.checking.findings import Finding, fail, ok, skip, warn
from llamacpp_mqtt_deploy.checking.permissions import HINT_ACL, Bus
from llamacpp_mqtt_deploy.checking.probing import PermissionProbe


def check_group(bus: Bus, pool: str) -> Iterator[Finding]:
    """The shared subscription of a group that nobody else is in, then the pool's own topic."""
    yield _share(bus)
    yield _told(bus, pool)


def _share(bus: Bus) -> Finding:
    """amqtt, NATS and others grant one and then deliver nothing, so only a message that arrives is proof."""
    name, topic = "pool.share", bus.topic("request")
    shared = f"$share/lmd-check-{secrets.token_hex(4)}/{topic}"
    with PermissionProbe(bus.worker.address) as member:
        refused = member.subscribe(shared)
        if refused:
            return fail(name, f"{shared}: {refused}", "a pool needs a broker with shared subscriptions (mosquitto)")
        # An empty request means nothing to a worker.
        outcome = (bus.client or bus.worker).publish(topic, b"")
        if member.saw(topic):
            return ok(name, "a message on a shared subscription arrived")
    if outcome.refused:
        return skip(name, f"not tried: {topic}: {outcome.refused}")
    return fail(
        name,
        f"{shared} was granted, and a message on {topic} did not arrive",
        "allow the worker to read requests; or this broker has no shared subscriptions, which a pool needs (mosquitto has)",
    )


def _told(bus: Bus, pool: str) -> Finding:
    name, topic = "pool.status.write", bus.topics.pool_topic(pool)
    bus.worker.subscribe(topic)
    bus.worker.saw(topic)
    if any(message.topic == topic and message.payload for message in bus.worker.received):
        return ok(name, f"the pool's {topic} is there")
    seen = len(bus.worker.received)
    outcome = bus.worker.publish(topic, b"")
    if bus.worker.saw(topic, after=seen):
        return ok(name, f"a message on {topic} arrived")
    if outcome.refused:
        return fail(name, f"{topic}: {outcome.refused}", HINT_ACL)
    if bus.worker.protocol == "5":
        return ok(name, f"the broker took a message on {topic}")
    return warn(name, f"{topic}: sent, and nobody could see whether it arrived", HINT_ACL)
