"""Sentences for the user where no answer can be had. Their texts are under `exceptions` in the translations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from homeassistant.core import HomeAssistant
from homeassistant.exceptions import HomeAssistantError
from homeassistant.helpers.translation import async_get_translations

from .const import DOMAIN
from .resend_rules import WhyEnded

if TYPE_CHECKING:
    from .bus_worker import BusWorker

OWN_SENTENCES = {
    "busy": "busy",
    "session_busy": "busy",
    "rate_limited": "busy",
    "context_overflow": "context_overflow",
    "model_not_found": "model_not_found",
    "shutting_down": "shutting_down",
    "interrupted": "broken_off",
    "engine_lost": "broken_off",
    "idle_timeout": "broken_off",
    "timeout": "timeout",
    "too_long": "broken_off",
}
"""The protocol's codes that have a sentence of their own; for the others the worker's own message is told."""


def sentence_error(key: str, **placeholders: str) -> HomeAssistantError:
    return HomeAssistantError(translation_domain=DOMAIN, translation_key=key, translation_placeholders=placeholders)


def unanswered_error(worker: BusWorker, why: WhyEnded) -> HomeAssistantError:
    """No end of the answer can be had."""
    key = {"lost": "broken_off", "cut_short": "broken_off"}.get(why, why)
    return sentence_error(key, worker=worker.name, topic=worker.topic("request"), code=why)


def ended_error(worker: BusWorker, end: Mapping[str, Any]) -> HomeAssistantError:
    """The worker ended the request with an error, or did not take it."""
    code = str(end.get("code") or "internal")
    return sentence_error(
        OWN_SENTENCES.get(code, "worker_error"),
        worker=worker.name,
        code=code,
        message=str(end.get("message") or "-")[:500],
        tokens=_told(end, "n_prompt_tokens"),
        context=_told(end, "n_ctx"),
    )


async def async_sentence(hass: HomeAssistant, language: str, error: HomeAssistantError) -> str:
    """The error in the user's language, where it is one of ours."""
    if error.translation_domain != DOMAIN or not error.translation_key:
        return str(error)
    texts = await async_get_translations(hass, language, "exceptions", [DOMAIN])
    text = texts.get(f"component.{DOMAIN}.exceptions.{error.translation_key}.message")
    return text.format(**error.translation_placeholders or {}) if text else str(error)


def _told(end: Mapping[str, Any], name: str) -> str:
    value = end.get(name)
    return str(value) if isinstance(value, int) else "?"
