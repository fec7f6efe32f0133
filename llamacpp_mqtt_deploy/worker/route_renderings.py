"""Publishes the events of requests in the format of their route."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from llamacpp_mqtt_deploy.core.formats.asked import OWN_MODEL
from llamacpp_mqtt_deploy.core.formats.rendering import Occasion
from llamacpp_mqtt_deploy.core.formats.route_formats import OWN_FORMAT
from llamacpp_mqtt_deploy.core.formats.route_rendering import RouteRendering
from llamacpp_mqtt_deploy.ports import Delivery, EntryKey, Outbox, Published, Share
from llamacpp_mqtt_deploy.worker.policies import Policies


class RouteRenderings:
    """Knows which routes have a format."""

    def __init__(self, policies: Callable[[], Policies]) -> None:
        self._policies = policies

    def has_format(self, route: str) -> bool:
        """Whether the answers of this route are anything but events."""
        policy = self._policies().routes.get(route)
        return policy is not None and policy.format != OWN_FORMAT

    def of(self, key: EntryKey) -> RouteRendering | None:
        """A new rendering for this request; None where events go out as they are."""
        policy = self._policies().routes.get(key.route)
        if policy is None or policy.format == OWN_FORMAT:
            return None
        occasion = Occasion(
            request_id=key.request_id,
            session=key.session,
            model=policy.model or OWN_MODEL,
            now=lambda: datetime.now(UTC),
        )
        return RouteRendering(policy.format, occasion, answer_fields=policy.answer_fields)


class RenderedOutbox:
    """The outbox of one request on a route with a format: takes its events, and publishes what becomes of them.

    Called by its responder alone, one event at a time.
    """

    def __init__(self, outbox: Outbox, rendering: RouteRendering) -> None:
        self._outbox = outbox
        self._rendering = rendering

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        on_done: Callable[[bool], None] | None = None,
        share: Share = "event",
        content_type: str = "",
    ) -> Published:
        """As `ports.Outbox` has it; `on_done` runs for the last message of the event, at once where there is none.

        What answers a request that was sent again (a snapshot, chunks once more) is not told: a reader of these formats could not
        know that he has it already.
        """
        parts = [] if share == "answer" else self._rendering.parts(payload)
        for place, part in enumerate(parts):
            published = self._outbox.publish(
                topic,
                part,
                qos=qos,
                retain=retain,
                correlation=correlation,
                expiry_s=expiry_s,
                on_done=on_done if place == len(parts) - 1 else None,
                share=share,
                content_type=content_type or self._rendering.content_type,
            )
            if published != "queued":
                return published
        if not parts and on_done is not None:
            on_done(True)
        return "queued"

    def acknowledge(self, delivery: Delivery) -> None:
        self._outbox.acknowledge(delivery)
