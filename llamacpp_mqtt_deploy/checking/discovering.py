"""Proves that the worker may tell Home Assistant of itself, without telling or removing anything."""

from __future__ import annotations

from collections.abc import Iterator

from llamacpp_mqtt_deploy.checking.findings import Finding, fail, ok, skip, warn
from llamacpp_mqtt_deploy.checking.permissions import Bus
from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.core.home_assistant import DiscoveredWorker
from llamacpp_mqtt_deploy.service.discovery import Remembered, memory_of

NAME = "home-assistant.write"


def check_discovery(bus: Bus, settings: Settings) -> Iterator[Finding]:
    """The birth topic, then the permission to write the discovery message."""
    prefix = settings.home_assistant.prefix
    birth = f"{prefix}/status"
    refused = bus.worker.subscribe(birth)
    if refused:
        yield warn("home-assistant.birth", refused, f"allow the worker to read {birth}, or a new Home Assistant waits")
    else:
        yield ok("home-assistant.birth", f"{birth} granted (not proven: Home Assistant has to publish there)")
    yield _written(bus, settings, _topic(settings, prefix))


def _topic(settings: Settings, prefix: str) -> str:
    worker = DiscoveredWorker(
        root=settings.mqtt.root,
        worker_id=settings.mqtt.worker_id,
        version="",
        level=settings.home_assistant.level,
        models=(),
        can_restart=False,
        can_unload=False,
        health_every_s=settings.status.health_every_s,
    )
    return worker.topic(prefix)


def _written(bus: Bus, settings: Settings, topic: str) -> Finding:
    """What is retained there is put there again, which changes nothing; an empty message is, where nothing can be."""
    advice = (
        f"allow the worker to write {settings.home_assistant.prefix}/device/#; config/ holds a complete access list"
    )
    bus.worker.subscribe(topic)
    bus.worker.saw(topic)
    kept = [message.payload for message in bus.worker.received if message.topic == topic and message.payload]
    if bus.topics.worker_id in bus.online:
        if kept:
            return ok(NAME, f"the running worker's message on {topic} is there")
        # An empty one would remove the device, if it is there and cannot be read.
        return warn(NAME, f"the running worker's message on {topic} is not there, or cannot be read", advice)
    if not kept and topic in Remembered(memory_of(settings)).all():
        return skip(NAME, f"not tried: the worker has written {topic}, and it cannot be read here")
    seen = len(bus.worker.received)
    outcome = bus.worker.publish(topic, kept[-1] if kept else b"", retain=True)
    if outcome.refused:
        return fail(NAME, f"{topic}: {outcome.refused}", advice)
    if bus.worker.saw(topic, after=seen):
        return ok(NAME, f"a message on {topic} arrived")
    if bus.worker.protocol == "5":
        return ok(NAME, f"the broker took a message on {topic}")
    return warn(NAME, f"{topic}: sent, and nobody could see whether it arrived", advice)
