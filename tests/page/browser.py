"""A headless Chromium, and the chat page as a person meets it there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import eventually


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver of selenium, or a skip where browser, its driver or selenium are missing: they are no part of what the suite installs."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("chromium and chromium-driver are not installed: make browser")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        pytest.skip("selenium is not installed: make browser")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "headless=new",
        "no-sandbox",  # as root there is none
        "disable-dev-shm-usage",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "no-first-run",
        "hide-scrollbars",
        "force-color-profile=srgb",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.set_script_timeout(20)
        yield browser
    finally:
        browser.quit()


class ChatPage:
    """One tab with the page; texts are read as a person sees them (`innerText`)."""

    def __init__(self, browser: Any, url: str, settings: Mapping[str, str]) -> None:
        self.browser = browser
        self.url = url
        self.settings = dict(settings)

    def open(self, *, width: int = 1200, height: int = 800, dark: bool = False, connected: bool = True) -> None:
        """Open the page as somebody who has set it before."""
        self.resize(width, height)
        self.command(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        # A page of the same origin that runs nothing, to leave the settings in.
        self.browser.get(f"{self.url}icon.svg")
        self.run("localStorage.clear(); sessionStorage.clear()")
        self.run("localStorage.setItem('lmd.settings', arguments[0])", json.dumps(self.settings))
        self.log()  # the browser has asked for a favicon.ico meanwhile
        self.browser.get(self.url)
        if connected:
            self.connected()

    def connected(self) -> None:
        self.until(lambda: self.run("return document.getElementById('connection')?.dataset.state") == "up")

    def resize(self, width: int, height: int) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def command(self, name: str, **arguments: Any) -> Any:
        return self.browser.execute_cdp_cmd(name, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements("css selector", selector)
        return found

    def text(self, selector: str) -> str:
        """The visible text of the last element that fits; empty when there is none."""
        return str(self.run("return [...document.querySelectorAll(arguments[0])].at(-1)?.innerText ?? ''", selector))

    def press(self, *keys: str) -> None:
        """Keys for whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def chord(self, *keys: str) -> None:
        """The last key while the others are held."""
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.browser)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()

    def ask(self, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        # Set, not typed, so that a text of several lines is not sent at its first one; the key sends it.
        self.run("const field = document.getElementById('prompt'); field.value = arguments[0]; field.focus();", text)
        self.run("document.getElementById('prompt').dispatchEvent(new Event('input', {bubbles: true}))")
        self.press(Keys.ENTER)

    def answer(self) -> str:
        return self.text(".answer .prose").strip()

    def ended(self) -> None:
        self.until(lambda: self.run("return [...document.querySelectorAll('.answer')].at(-1)?.ariaBusy") == "false")

    def until(self, predicate: Callable[[], object], timeout_s: float = 15.0) -> None:
        from selenium.common.exceptions import StaleElementReferenceException

        def holds() -> object:
            try:
                return predicate()
            except StaleElementReferenceException:
                return False  # the page was loaded anew between two questions

        try:
            eventually(holds, timeout_s, every_s=0.05)
        except AssertionError as failed:
            raise AssertionError(f"{failed}\nthe page says:\n{self.text('body')}\nlog: {self.log()}") from failed

    def log(self) -> list[str]:
        """What the browser complained about since the last look: errors, refused connections, violations of the policy."""
        entries = self.browser.get_log("browser")
        return [str(entry["message"]) for entry in entries if entry["level"] in ("WARNING", "SEVERE")]
