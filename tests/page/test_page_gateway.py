"""The chat page and its gateway: keys, a gateway that dies, proxies that let no WebSocket through, no worker."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.gateway.process import GatewayProcess
from tests.gateway.world import RunningGateway
from tests.page.browser import ChatPage
from tests.support.live_worker import LiveWorker
from tests.support.mosquitto import Mosquitto

pytestmark = [pytest.mark.broker, pytest.mark.browser]

NO_WEBSOCKETS = """
window.WebSocket = class {
  constructor() { setTimeout(() => this.onclose?.({code: 1006}), 5); }
  close() {}
};
"""


@pytest.fixture
def without_websockets(browser: Any) -> Iterator[None]:
    """As behind a proxy that refuses the handshake."""
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NO_WEBSOCKETS})
    yield
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_where_no_websocket_comes_through_answers_stream_by_posts(
    without_websockets: None, page: ChatPage, engine: ScriptedEngine, tmp_path: Path
) -> None:
    gate = Gate()
    engine.play("One, ", "two, ", gate, "three.")
    page.ask("Count")
    page.until(lambda: page.answer() == "One, two,")
    gate.open()
    page.ended()
    assert page.answer() == "One, two, three."
    engine.play("One, ", "two, ", Gate())
    page.ask("Again")
    page.until(lambda: page.answer() == "One, two,")
    page.find("#stop").click()
    page.ended()
    assert "Stopped" in page.text(".answer .figures")
    page.ask("Is the slot free?")
    page.ended()
    assert page.answer() == "Is the slot free?"

    def kept() -> int:
        with contextlib.closing(sqlite3.connect(f"file:{tmp_path / 'state.db'}?mode=ro", uri=True)) as database:
            found: int = database.execute("SELECT count(*) FROM messages").fetchone()[0]
            return found

    assert kept() > 0
    page.run("document.querySelector('#chats .remove').click()")
    page.find("#remove .danger").click()
    page.until(lambda: kept() == 0)


def test_a_gateway_that_dies_and_comes_back_costs_no_word_and_doubles_none(
    browser: Any, broker: Mosquitto, worker: LiveWorker, engine: ScriptedEngine, tmp_path: Path
) -> None:
    gateway = GatewayProcess(tmp_path / "gateway", broker.port).start()
    try:
        page = ChatPage(browser, f"{gateway.url}/", {})
        page.open()
        gate = Gate()
        engine.play("One, ", "two, ", gate, "three, ", "four.")
        page.ask("Count")
        page.until(lambda: "two" in page.answer())
        gateway.kill()
        page.until(lambda: page.text("#connection") == "Reconnecting")
        gate.open()
        gateway.start()
        page.ended()
        assert page.answer() == "One, two, three, four."
        assert len(engine.calls) == 1
        browser.get("about:blank")
    finally:
        gateway.close()


def test_a_machine_that_comes_back_to_the_network_goes_on_with_the_answer(
    page: ChatPage, engine: ScriptedEngine
) -> None:
    gate = Gate()
    engine.play("One, ", "two, ", gate, "three.")
    page.ask("Count")
    page.until(lambda: "two" in page.answer())
    page.run("dispatchEvent(new Event('online'))")
    page.until(lambda: page.text("#connection") == "Connected")
    gate.open()
    page.ended()
    assert page.answer() == "One, two, three."
    assert len(engine.calls) == 1


def test_a_gateway_with_keys_is_used_with_the_key_of_the_settings(
    browser: Any, broker: Mosquitto, worker: LiveWorker, tmp_path: Path
) -> None:
    gateway = RunningGateway(broker.port, tmp_path / "gateway", keys={"ada": {}})
    try:
        gateway.wait_ready()
        page = ChatPage(browser, f"{gateway.url}/", {"key": gateway.keys["ada"]})
        page.open()
        page.ask("Hello")
        page.ended()
        assert page.answer() == "Hello"
        page.settings["key"] = f" “{gateway.keys['ada']}” "
        page.open()
        page.ask("With what was copied along")
        page.ended()
        assert page.answer() == "With what was copied along"
        page.settings["key"] = "lmd-wrong"
        page.open(connected=False)
        page.ask("Hello")
        page.ended()
        assert "key" in page.text(".problem p")
        assert page.text("#connection") == "Connected", "by posts, which tell why"
        browser.get("about:blank")
    finally:
        gateway.close()


def test_without_a_worker_the_page_says_so_and_asks_again_on_demand(
    browser: Any, broker: Mosquitto, engine: ScriptedEngine, tmp_path: Path
) -> None:
    gateway = RunningGateway(broker.port, tmp_path / "gateway")
    try:
        page = ChatPage(browser, f"{gateway.url}/", {})
        page.open()
        page.ask("Anybody?")
        page.ended()
        assert "worker" in page.text(".problem p")
        with LiveWorker(broker.port, tmp_path, engine):
            page.find(".again").click()
            page.ended()
            assert page.answer() == "Anybody?"
        browser.get("about:blank")
    finally:
        gateway.close()


def test_a_broker_that_the_gateway_does_not_name_is_refused_with_a_sentence(page: ChatPage, broker: Mosquitto) -> None:
    page.settings = {"way": "broker", "url": f"ws://127.0.0.1:{broker.websocket_port}"}
    page.open(connected=False)
    page.until(lambda: "gateway.page_brokers" in page.text("#connection"))
