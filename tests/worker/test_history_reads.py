"""Histories are large: how many of them one client may have under way, and in a minute."""

from __future__ import annotations

import time

import pytest

from llamacpp_mqtt_deploy.core.errors import Busy, RateLimited
from llamacpp_mqtt_deploy.worker.history_reads import HistoryReads


def _session(number: int, level: str = "ada") -> tuple[str, str]:
    return ("default", f"{level}/{number}")


def test_a_client_has_four_histories_on_their_way_and_another_client_his_own() -> None:
    reads = HistoryReads()
    for number in range(4):
        reads.begin(_session(number), "ada")
    with pytest.raises(Busy, match="4 histories") as told:
        reads.begin(_session(4), "ada")
    assert told.value.details["retry_after_s"] == 1.0
    reads.begin(_session(0, "bob"), "bob")
    reads.end(_session(2))
    reads.begin(_session(4), "ada")


def test_a_session_has_one_history_on_its_way() -> None:
    reads = HistoryReads()
    reads.begin(_session(0), "ada")
    with pytest.raises(Busy, match="on its way to you") as told:
        reads.begin(_session(0), "ada")
    assert told.value.details["retry_after_s"] == 1.0
    reads.end(_session(0))
    reads.end(_session(0))  # told twice, by the broker and by the end of the connection
    reads.begin(_session(0), "ada")


def test_a_client_gets_sixty_histories_in_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    reads = HistoryReads()
    for number in range(60):
        reads.begin(_session(number), "ada")
        reads.end(_session(number))
    with pytest.raises(RateLimited):
        reads.begin(_session(60), "ada")
    reads.begin(_session(0, "bob"), "bob")
    monkeypatch.setattr(time, "monotonic", lambda: 1001.0)
    reads.begin(_session(60), "ada")
