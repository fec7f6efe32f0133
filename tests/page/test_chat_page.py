"""The chat page in a real browser: streams, stops, comes back, is used by keyboard, and runs nothing that an answer says."""

from __future__ import annotations

from statistics import median

import pytest

from llamacpp_mqtt_deploy.core.deltas import Finished, PromptProgress, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.page.browser import ChatPage
from tests.support.mosquitto import Mosquitto

pytestmark = [
    pytest.mark.broker,
    pytest.mark.browser,
    pytest.mark.parametrize("page", ["gateway", "broker"], indirect=True),
]


def test_an_answer_streams_word_by_word_and_shows_its_figures(page: ChatPage, engine: ScriptedEngine) -> None:
    gate = Gate()
    engine.play("The sea ", "says ", gate, "little.")
    page.ask("What does the sea say?")
    page.until(lambda: page.answer() == "The sea says")
    assert page.text(".question .text") == "What does the sea say?"
    assert page.find("#stop").is_displayed()
    gate.open()
    page.ended()
    assert page.answer() == "The sea says little."
    figures = page.text(".answer .figures")
    assert "tokens/s" in figures
    assert "first token" in figures
    assert "tiny" in figures
    assert page.find("#send").is_displayed()
    assert page.log() == []


def test_the_next_question_belongs_to_the_same_conversation(page: ChatPage, engine: ScriptedEngine) -> None:
    for question in ("My name is Ada.", "What is my name?"):
        page.ask(question)
        page.ended()
    asked = [message["content"] for message in engine.calls[-1].messages if message["role"] == "user"]
    assert asked == ["My name is Ada.", "What is my name?"]
    assert page.text("#title") == "My name is Ada."


def test_the_stop_button_ends_the_answer_and_frees_the_slot(page: ChatPage, engine: ScriptedEngine) -> None:
    engine.play("One, ", "two, ", Gate())
    page.ask("Count")
    page.until(lambda: "two" in page.answer())
    page.find("#stop").click()
    page.ended()
    assert page.answer() == "One, two,"
    assert "Stopped" in page.text(".answer .figures")
    page.ask("Are you there?")
    page.ended()
    assert page.answer() == "Are you there?"


def test_a_broker_that_restarts_costs_no_word_and_doubles_none(
    page: ChatPage, engine: ScriptedEngine, broker: Mosquitto
) -> None:
    gate = Gate()
    engine.play("One, ", "two, ", gate, "three, ", "four.")
    page.ask("Count")
    page.until(lambda: "two" in page.answer())
    broker.stop()
    if page.settings:  # a gateway's WebSocket stays, whatever becomes of the broker behind it
        page.until(lambda: page.text("#connection") == "Reconnecting")
    gate.open()
    broker.start()
    page.ended()
    assert page.answer() == "One, two, three, four."
    assert page.text("#connection") == "Connected"
    assert len(engine.calls) == 1


def test_a_page_that_is_loaded_again_goes_on_with_the_answer(page: ChatPage, engine: ScriptedEngine) -> None:
    gate = Gate()
    engine.play("One, ", "two, ", gate, "three.")
    page.ask("Count")
    page.until(lambda: "two" in page.answer())
    page.browser.refresh()
    page.until(lambda: page.answer() == "One, two,")
    gate.open()
    page.ended()
    assert page.answer() == "One, two, three."
    assert len(engine.calls) == 1


def test_an_answer_that_the_worker_may_have_forgotten_is_not_asked_for_again(
    page: ChatPage, engine: ScriptedEngine
) -> None:
    engine.play("One, ", "two, ", Gate())
    page.ask("Count")
    page.until(lambda: "two" in page.answer())
    page.browser.get(f"{page.url}icon.svg")
    page.run("""
      const name = Object.keys(localStorage).find((key) => key.startsWith('lmd.chat.'));
      const turns = JSON.parse(localStorage.getItem(name));
      turns.at(-1).heardAt -= 601_000;
      localStorage.setItem(name, JSON.stringify(turns));
    """)
    page.browser.get(page.url)
    page.connected()
    assert "closed before the end" in page.text(".problem p")
    assert page.answer() == "One, two,"
    assert len(engine.calls) == 1


def test_a_waiting_question_shows_its_place_in_the_queue(page: ChatPage, engine: ScriptedEngine) -> None:
    gate = Gate()
    engine.play("busy ", gate)
    engine.play("busy ", gate)
    for _ in range(2):
        page.find("#new").click()
        page.ask("Take a slot")
        page.until(lambda: "busy" in page.answer())
    page.find("#new").click()
    page.ask("And me?")
    page.until(lambda: "place" in page.text(".answer .waiting"))
    gate.open()
    page.ended()
    assert page.answer() == "And me?"


def test_the_prompt_that_is_read_shows_how_far(page: ChatPage, engine: ScriptedEngine) -> None:
    gate = Gate()
    engine.play(PromptProgress(300, 1000, 0), gate, "Done.")
    page.ask("A long prompt")
    page.until(lambda: "30 %" in page.text(".answer .waiting"))
    gate.open()
    page.ended()


def test_thinking_is_folded_and_can_be_opened(page: ChatPage, engine: ScriptedEngine) -> None:
    gate = Gate()
    engine.play(Reasoning("First I count "), Reasoning("the waves."), gate, "Seven.")
    page.ask("How many waves?")
    page.until(lambda: page.text(".thinking summary") == "Thinking")
    assert "waves" not in page.text(".thinking")
    gate.open()
    page.ended()
    assert page.text(".thinking summary").startswith("Thought")
    page.find(".thinking summary").click()
    assert "First I count the waves." in page.text(".thinking")
    assert page.answer() == "Seven."


def test_a_tool_call_is_shown_with_its_arguments(page: ChatPage, engine: ScriptedEngine) -> None:
    calls = [ToolCall(0, "call-0", "get_time", '{"city":'), ToolCall(0, None, None, '"Bonn"}')]
    engine.play(*calls, Finished("tool_calls", TokenUsage(prompt_tokens=3, completion_tokens=2)))
    page.ask("What time is it?")
    page.ended()
    assert "get_time" in page.text(".call summary")
    page.find(".call summary").click()
    assert '"city": "Bonn"' in page.text(".call pre")


def test_markdown_is_shown_as_markdown(page: ChatPage, engine: ScriptedEngine) -> None:
    engine.play(
        *[
            "# Title\n\nSome **bold** and `code`.\n\n1. one\n2. two\n\n",
            "| a | b |\n|---|--:|\n| 1 | 2 |\n\n```python\nprint(1 < 2)\n```\n",
        ]
    )
    page.ask("Show me Markdown")
    page.ended()
    assert page.text(".prose h3") == "Title"
    assert page.text(".prose strong") == "bold"
    assert len(page.all(".prose ol > li")) == 2
    assert page.text(".prose td.to-right") == "2"
    assert page.text(".prose pre code") == "print(1 < 2)"
    assert page.text(".prose figcaption span") == "python"


def test_code_is_copied_as_it_is(page: ChatPage, engine: ScriptedEngine) -> None:
    page.command("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    engine.play("```html\n<b>&amp;</b>\n\tend\n```\n")
    page.ask("Code, please")
    page.ended()
    page.find(".copy-code").click()
    page.until(lambda: "did" in page.find(".copy-code").get_attribute("class"))
    copied = page.browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == "<b>&amp;</b>\n\tend"


def test_an_error_is_told_and_can_be_tried_again(page: ChatPage, engine: ScriptedEngine) -> None:
    engine.play(EngineFailed("The model has lost its head."))
    page.ask("Hello?")
    page.ended()
    assert page.text(".problem p")
    page.find(".again").click()
    page.ended()
    assert page.answer() == "Hello?"
    assert not page.find(".problem").is_displayed()
    assert len(page.all(".question")) == 1


def test_two_tabs_show_the_same_chats(page: ChatPage) -> None:
    page.ask("From the first tab")
    page.ended()
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    second = page.browser.current_window_handle
    page.resize(1200, 800)
    try:
        page.browser.get(page.url)
        page.connected()
        page.find("#chats .open").click()
        page.ask("From the second tab")
        page.ended()
        page.browser.switch_to.window(first)
        page.until(lambda: page.answer() == "From the second tab")
        page.ask("From the first again")
        page.ended()
        assert [turn.text for turn in page.all(".question .text")] == [
            "From the first tab",
            "From the second tab",
            "From the first again",
        ]
        page.browser.switch_to.window(second)
        page.run("document.querySelector('#chats .remove').click()")
        page.find("#remove .danger").click()
        page.until(
            lambda: page.text("#title") == "New chat"
        )  # a tab that is hidden at once tells of the dialog's end only later
        page.browser.switch_to.window(first)
        page.until(lambda: page.text("#title") == "New chat")
        page.ask("A new one")
        page.ended()
        assert page.answer() == "A new one"
    finally:
        page.browser.switch_to.window(second)
        page.browser.close()
        page.browser.switch_to.window(first)


def test_chats_are_kept_renamed_and_deleted(page: ChatPage) -> None:
    for question in ("First chat", "Second chat"):
        page.find("#new").click()
        page.ask(question)
        page.ended()
    page.browser.refresh()
    page.connected()
    assert [row.text for row in page.all("#chats .name")] == ["Second chat", "First chat"]
    assert page.answer() == "Second chat", "the chat that was shown is shown again"
    page.run("document.querySelectorAll('#chats .rename')[1].click()")
    page.run("document.querySelector('#rename-text').value = 'The first one'")
    page.find("#rename .strong").click()
    page.until(lambda: "The first one" in page.text("#chats"))
    page.run("document.querySelectorAll('#chats .remove')[0].click()")
    page.find("#remove .danger").click()
    page.until(lambda: len(page.all("#chats li")) == 1)
    assert page.text("#title") == "New chat"
    page.find("#chats .open").click()
    assert page.answer() == "First chat"


_DRAW = """
const [parts, done] = arguments;
import('./markdown.js').then(({Prose}) => {
  const prose = new Prose(document.getElementById('turns'));
  const took = [];
  let [text, first] = ['', null];
  for (const part of parts) {
    text += part;
    const began = performance.now();
    prose.update(text, false);
    took.push(performance.now() - began);
    first ??= prose.element.firstChild;
  }
  done([took, first === prose.element.firstChild, prose.element.querySelectorAll('h4').length]);
});
"""


def test_drawing_a_long_answer_again_and_again_costs_only_what_changed(page: ChatPage) -> None:
    """6 000 words in 1 600 steps; each would be a frame of its own."""
    parts = [part for at in range(200) for part in (f"## Part {at}\n\n", *["some **words** of it, "] * 6, "\n\n")]
    took_ms, kept, headings = page.browser.execute_async_script(_DRAW, parts)
    assert headings == 200
    assert kept, "what is finished stays the same element"
    quarter = len(took_ms) // 4
    assert median(took_ms[-quarter:]) < 6 * max(median(took_ms[:quarter]), 0.2), (
        "the end costs about what the beginning did"
    )
