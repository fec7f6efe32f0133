"""What can go wrong on the client's side of the bus, as exceptions whose text says what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BusError(Exception):
    """Any failure of the bus client; the text is one or two sentences for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BrokerUnreachable(BusError):
    """No connection to the broker: name, port, TLS or network."""


class BrokerRefused(BusError):
    """The broker answered and said no: password, protocol version, banned."""


class NotPermitted(BusError):
    """The broker's permissions forbid this user a topic; the text names it."""


class NoWorker(BusError):
    """Nobody answered, and no worker is online."""


class AnswerLost(BusError):
    """The request was published and its terminal event never came, in spite of sending it again."""


class AnswerError(BusError):
    """The request ended with an `error` event: `code`, `message` and `retryable` as in the protocol, the rest in `details`.

    `details["partial_content"]`, where present, is the text that was generated before the error.
    """

    def __init__(
        self, code: str, message: str, *, retryable: bool = False, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self.details: Mapping[str, Any] = details or {}

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class RequestRejected(AnswerError):
    """The delivery was refused without touching any request: its id belongs to another one."""
