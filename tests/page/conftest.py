"""A browser for all tests of a process; a broker, a worker, a gateway and the page for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from tests.gateway.world import RunningGateway
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
def page(
    browser: Any, broker: Mosquitto, worker: LiveWorker, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[ChatPage]:
    """The page, open: through a gateway, or straight to the broker for the parameter `broker`."""
    if getattr(request, "param", "gateway") == "broker":
        url = f"ws://127.0.0.1:{broker.websocket_port}"
        with Site(brokers=[url]) as site:
            yield from opened(ChatPage(browser, site.url, {"way": "broker", "url": url}))
        return
    gateway = RunningGateway(broker.port, tmp_path / "gateway")
    try:
        gateway.wait_ready()
        yield from opened(ChatPage(browser, f"{gateway.url}/", {}))
    finally:
        gateway.close()


def opened(page: ChatPage) -> Iterator[ChatPage]:
    page.open()
    yield page
    page.browser.get("about:blank")
