"""The chat page without a mouse, for who does not see it, on a phone, in the dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.page.browser import ChatPage
from tests.support.services import missing

pytestmark = [pytest.mark.broker, pytest.mark.browser]

AXE = Path(__file__).parents[1] / "js" / "node_modules" / "axe-core" / "axe.min.js"


def focused(page: ChatPage) -> str:
    """What has the focus, as a screen reader would name it."""
    return str(
        page.run(
            "const {activeElement: it} = document; return it === document.body ? '' : it.ariaLabel || it.labels?.[0]?.innerText || it.innerText || it.tagName"
        )
    )


def tab_to(page: ChatPage, name: str) -> None:
    from selenium.webdriver.common.keys import Keys

    passed = []
    for _ in range(40):
        page.press(Keys.TAB)
        passed.append(focused(page))
        if name in passed[-1]:
            assert page.run("return document.activeElement.matches(':focus-visible')"), "the focus can be seen"
            return
    raise AssertionError(f"{name} is not reached by the tab key; it passes {passed}")


def test_everything_is_done_by_keyboard(page: ChatPage, engine: ScriptedEngine) -> None:
    from selenium.webdriver.common.keys import Keys

    assert focused(page) == "Prompt"
    page.press("First line")
    page.chord(Keys.SHIFT, Keys.ENTER)
    page.press("second line")
    engine.play("One, ", "two, ", Gate())
    page.press(Keys.ENTER)
    page.until(lambda: "two" in page.answer())
    assert page.text(".question .text") == "First line\nsecond line"
    page.press(Keys.ESCAPE)
    page.ended()
    assert "Stopped" in page.text(".answer .figures")
    assert focused(page) == "Prompt"
    page.chord(Keys.CONTROL, Keys.SHIFT, "o")
    assert page.text("#title") == "New chat"
    page.press("Another")
    page.press(Keys.ENTER)
    page.ended()
    tab_to(page, "First line")
    page.press(Keys.ENTER)
    page.until(lambda: page.answer() == "One, two,")
    tab_to(page, "Delete First line")
    page.press(Keys.ENTER)
    page.until(lambda: focused(page) == "Cancel")
    page.press(Keys.TAB, Keys.ENTER)
    page.until(lambda: len(page.all("#chats li")) == 1)
    assert focused(page) == "New chat"


def test_settings_are_set_by_keyboard_and_kept(page: ChatPage, engine: ScriptedEngine) -> None:
    from selenium.webdriver.common.keys import Keys

    tab_to(page, "Settings")
    page.press(Keys.ENTER)
    page.until(lambda: page.find("#settings").is_displayed())
    tab_to(page, "System prompt")
    page.press("Answer like a sailor.")
    tab_to(page, "Temperature")
    page.press("0.5")
    page.press(Keys.ENTER)
    page.connected()
    page.until(lambda: not page.find("#settings").is_displayed())
    page.ask("Hello")
    page.ended()
    call = engine.calls[-1]
    assert call.messages[0] == {"role": "system", "content": "Answer like a sailor."}
    assert call.sampling["temperature"] == 0.5


def test_finished_paragraphs_are_announced_and_unfinished_ones_not(page: ChatPage, engine: ScriptedEngine) -> None:
    gate = Gate()
    engine.play("First paragraph.\n\n", "Second para", gate, "graph.")
    page.ask("Speak")
    page.until(lambda: "Second para" in page.answer())
    spoken = "return document.getElementById('spoken').textContent"
    page.until(lambda: page.run(spoken) == "First paragraph.")
    assert page.find("#spoken").get_attribute("aria-live") == "polite"
    gate.open()
    page.ended()
    page.until(lambda: page.run(spoken) == "First paragraph.Second paragraph.")
    gate = Gate()
    engine.play("- one\n\n", gate, "- two\n")
    page.ask("A list")
    page.until(lambda: "one" in page.answer())
    gate.open()
    page.ended()
    page.until(lambda: page.run(spoken).endswith("onetwo"))


def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_list_opens_over_the_chat(
    page: ChatPage, engine: ScriptedEngine
) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(width=360, height=700)
    engine.play(
        "`" + "x" * 300 + "`\n\n```\n" + "y" * 300 + "\n```\n\n|" + "z" * 90 + "|b|c|\n|---|---|---|\n|1|2|3|\n"
    )
    page.ask("Something wide " + "w" * 200)
    page.ended()
    wide = "return [...document.querySelectorAll('body *')].filter((it) => it.getBoundingClientRect().right > 360 && !it.closest('pre, .wide')).map((it) => it.outerHTML.slice(0, 80))"
    assert page.run(wide) == []
    assert page.run("return document.documentElement.scrollWidth") <= 360
    assert page.run("return document.getElementById('transcript').scrollWidth") <= 360
    assert page.run("return document.getElementById('sidebar').inert")
    page.find("#open-menu").click()
    page.until(lambda: page.find("#new").is_displayed())
    assert focused(page) == "Close the list of chats"
    page.press(Keys.ESCAPE)
    page.until(lambda: page.run("return document.getElementById('sidebar').inert"))
    assert focused(page) == "List of chats"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_to_complain_about(page: ChatPage, engine: ScriptedEngine, dark: bool) -> None:
    """axe-core: contrast, names, roles, order of headings, landmarks."""
    if not AXE.exists():
        missing("the npm package axe-core is not installed: make browser")
    page.open(dark=dark)
    report = "const done = arguments[0]; axe.run(document).then(({violations}) => done(violations.map(({id, nodes}) => [id, ...nodes.map((n) => n.html + ' ' + n.failureSummary)])))"
    page.run(AXE.read_text())
    assert page.browser.execute_async_script(report) == []
    engine.play(
        "# Title\n\nSome `code`, a [link](http://example.org).\n\n> quoted\n\n- [x] done\n\n```c\nint x;\n```\n\n|a|b|\n|-|-|\n|1|2|\n"
    )
    page.ask("Show me everything")
    page.ended()
    assert page.browser.execute_async_script(report) == []
    page.find("#open-settings").click()
    assert page.browser.execute_async_script(report) == []
