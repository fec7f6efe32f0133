"""The key that a server wants, as its file has it now: one that is renewed on disk needs no restart."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from llamacpp_mqtt_deploy.config.credentials import CredentialError

log = structlog.get_logger(__name__)


def authorization(key: str) -> str:
    """The value of the header with this key. Raises ValueError, whose text does not hold the key.

    The settings are checked before; this is for keys on other ways: libraries quote the header that they refuse.
    """
    if "\r" in key or "\n" in key or not all(char <= "\xff" for char in key):
        raise ValueError("the API key holds a character that no HTTP header can carry")
    return f"Bearer {key}"


_REMEMBERED = 4
"""So many keys are kept out of error messages: requests may still run with one that has been replaced."""


class ApiKey:
    """Reads the key anew for each exchange (some 20 microseconds) and keeps the latest one while there is none to read."""

    def __init__(self, read: Callable[[], str | None]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._seen: tuple[str, ...] = ()
        """Keys, the latest first."""
        self._unreadable = ""

    def open(self) -> None:
        """Read it for the first time; raises CredentialError."""
        self._keep(self._read())

    def current(self) -> str | None:
        """The key as it is now. A file that is empty or missing is one that is just being replaced: the last key stays."""
        try:
            key, why = self._read(), ""
        except CredentialError as error:
            key, why = None, str(error)
        if key != next(iter(self._seen), None) or why != self._unreadable:
            self._changed(key, why)
        return next(iter(self._seen), None)

    def hidden(self, text: str) -> str:
        """The text without any of the keys."""
        for key in self._seen:
            text = text.replace(key, "[key]")
        return text

    def _changed(self, key: str | None, why: str) -> None:
        with self._lock:
            before, self._unreadable = self._unreadable, why
            renewed = bool(key and self._seen and key != self._seen[0])
            self._keep(key)
        if why and why != before:
            log.warning("engine.key_unreadable", why=why, advice="mend the file; until then the last key is used")
        if renewed:
            log.info("engine.key_renewed")

    def _keep(self, key: str | None) -> None:
        if key:
            self._seen = tuple(dict.fromkeys((key, *self._seen)))[:_REMEMBERED]
