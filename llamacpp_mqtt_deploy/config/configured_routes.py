"""The topics of the configured routes, as the core knows them."""

from __future__ import annotations

from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.core.routes import RouteTopics, route_topics

TOPIC_KEYS = (
    "request",
    "reply",
    "control",
    "trust_payload_session",
    "allow_reply_topic",
    "default_session",
    "prompt_template_topic",
    "reset_topic",
    "delete_topic",
    "system_prompt_topic",
    "hint_topic",
    "session_topic",
    "session_reply_topic",
)
"""The settings of a route that its subscriptions and addresses are made of: they come into force with a restart."""


def configured_routes(settings: Settings) -> list[RouteTopics]:
    """Each configured route, with the topics that it leaves out filled in."""
    return [
        route_topics(root=settings.mqtt.root, name=name, **{key: getattr(route, key) for key in TOPIC_KEYS})
        for name, route in settings.routes.items()
    ]
