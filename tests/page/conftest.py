"""A browser for all tests of a process; a broker, a worker and the page for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from tests.page.browser import ChatPage, chromium
from tests.page.site import Site
from tests.support.live_worker import LiveWorker
from tests.support.mosquitto import Mosquitto


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def broker(start_mosquitto: Callable[..., Mosquitto], browser: Any) -> Mosquitto:
    return start_mosquitto(websockets=True, persistence=True)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(model="tiny")


@pytest.fixture
def worker(broker: Mosquitto, engine: ScriptedEngine, tmp_path: Path) -> Iterator[LiveWorker]:
    with LiveWorker(broker.port, tmp_path, engine) as worker:
        yield worker


@pytest.fixture
def page(browser: Any, broker: Mosquitto, worker: LiveWorker) -> Iterator[ChatPage]:
    """The page, open and connected straight to the broker."""
    url = f"ws://127.0.0.1:{broker.websocket_port}"
    with Site(brokers=[url]) as site:
        page = ChatPage(browser, site.url, {"way": "broker", "url": url})
        page.open()
        yield page
        browser.get("about:blank")
