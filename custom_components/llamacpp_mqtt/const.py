"""Names and numbers of the integration."""

from __future__ import annotations

import logging
from typing import Final

DOMAIN: Final = "llamacpp_mqtt"
LOGGER: Final = logging.getLogger(__package__)

CONF_ROOT: Final = "root"
CONF_WORKER: Final = "worker"
CONF_FIRST_LEVEL: Final = "first_level"
CONF_MAX_TOKENS: Final = "max_tokens"
CONF_THINKING: Final = "thinking"

DEFAULT_ROOT: Final = "llm"
DEFAULT_FIRST_LEVEL: Final = "homeassistant"
"""Where the broker binds clients to their own topics, this has to be Home Assistant's MQTT user."""

SUBENTRY_CONVERSATION: Final = "conversation"
SUBENTRY_AI_TASK: Final = "ai_task_data"

THINKING_ON: Final = "on"
THINKING_OFF: Final = "off"
THINKING_BY_WORKER: Final = "worker"

MAX_ROUNDS: Final = 10
"""Answers to one message, tools called between them."""
MAX_ASKINGS: Final = 16
"""Requests of one config entry that are under way."""
TIMEOUT_S: Final = 600.0
STATUS_WITHIN_S: Final = 5.0
"""How long the retained status may take to come."""
GONE_AFTER_S: Final = 120.0
"""A worker that is away longer becomes a repair issue; a restart does not."""
LIVE_RENEWALS: Final = 3
"""A status that was not renewed for so many periods is no longer live."""
