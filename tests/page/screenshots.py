"""Takes the pictures of the chat page in docs/: `make screenshots`. A person looks at them; no test compares them."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llamacpp_mqtt_deploy.core.deltas import EngineCall, Reasoning
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Step, last_user_text
from tests.page.browser import ChatPage, chromium
from tests.page.site import Site
from tests.support.live_worker import LiveWorker
from tests.support.mosquitto import Mosquitto

DOCS = Path(__file__).parents[2] / "docs"

TIDES = """The Moon pulls on the Earth, and **the sea gives way** a little. On the side that faces the Moon the water \
rises, and on the far side too, since there the Earth itself is pulled away from under it.

1. The Earth turns, so each coast passes through both bulges every day.
2. That makes two high tides and two low ones, about *six hours* apart.
3. When Sun and Moon pull in one line, the tide is highest.

> Around the Bay of Fundy the sea rises by sixteen metres, as high as a house with five floors.
"""
CODE = """Count the words, then take the most frequent ones:

```python
from collections import Counter

def most_frequent(text: str, n: int = 5) -> list[tuple[str, int]]:
    words = text.lower().split()
    return Counter(words).most_common(n)
```

| word | times |
| --- | ---: |
| the | 214 |
| sea | 87 |
| wind | 61 |

`Counter` keeps it at one pass over the text.
"""
FROST, DINNERS = "A haiku about the first frost", "Plan a week of dinners for two"
WORDS, MOON = "The most frequent words of a text, in Python", "Explain how tides work, for a ten-year-old."
SUN, SLOW = "Why not the Sun?", "How do tides work?"
ANSWERS: Mapping[str, Sequence[Step]] = {
    FROST: ["Glass on every blade.\nThe gate swings, and the whole field\nrings once, and is still."],
    DINNERS: ["Monday: lentil soup. Tuesday: omelettes with leeks."],
    WORDS: [CODE],
    MOON: [TIDES],
    SUN: [
        Reasoning("The Moon is nearer, so its pull differs more from one side of the Earth to the other."),
        "The Sun pulls harder, but from so far away that it pulls *almost equally* everywhere. A tide is the **difference**.",
    ],
    SLOW: [TIDES.partition("3. ")[0], "3. When Sun and Moon pull in one", Gate()],
}


def typed(call: EngineCall) -> Iterator[Step]:
    """The answer that belongs to the question, at the pace of a small board."""
    pause = threading.Event()
    pause.wait(0.18)
    for step in ANSWERS[last_user_text(call)]:
        if isinstance(step, str):
            for word in re.findall(r"\s*\S+|\s+$", step):
                pause.wait(0.024)
                yield word
        else:
            yield step
            pause.wait(1.2)


def shoot(page: ChatPage, name: str) -> None:
    """Write docs/NAME.png, with 256 colours where pngquant is installed."""
    picture = DOCS / f"{name}.png"
    picture.write_bytes(base64.b64decode(page.command("Page.captureScreenshot", format="png")["data"]))
    if pngquant := shutil.which("pngquant"):
        subprocess.run([pngquant, "--force", "--strip", "--output", picture, "256", picture], check=True)
    sys.stdout.write(f"{picture} {picture.stat().st_size}\n")


def talk(page: ChatPage, *questions: str) -> None:
    """A chat of its own."""
    page.find("#new").click()
    for question in questions:
        page.ask(question)
        page.ended()


def take(page: ChatPage) -> None:
    """Light, dark, and a phone while an answer comes."""
    page.open(width=1180, height=820)
    for question in (FROST, DINNERS, WORDS):
        talk(page, question)
    talk(page, MOON, SUN)
    page.find("#prompt").click()
    shoot(page, "chat-page-light")
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.run(f"[...document.querySelectorAll('#chats .open')].find((row) => row.innerText == {WORDS!r}).click()")
    shoot(page, "chat-page-dark")
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    page.command("Emulation.setDeviceMetricsOverride", width=390, height=780, deviceScaleFactor=2, mobile=True)
    page.find("#open-menu").click()
    page.find("#new").click()
    page.ask(SLOW)
    page.until(lambda: "pull in one" in page.answer())
    shoot(page, "chat-page-phone")
    page.find("#stop").click()
    page.ended()


def prefer_inter(folder: Path) -> None:
    """Let Inter be the system's font where it is installed: a bare machine has one that no desktop has chosen for years."""
    alias = "<alias binding='same'><family>{}</family><prefer><family>Inter</family></prefer></alias>"
    aliases = "".join(alias.format(name) for name in ("system-ui", "sans-serif", "DejaVu Sans"))
    fonts = folder / "fonts.conf"
    fonts.write_text(f"<fontconfig><include>/etc/fonts/fonts.conf</include>{aliases}</fontconfig>")
    os.environ["FONTCONFIG_FILE"] = str(fonts)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        prefer_inter(Path(folder))
        browser = stack.enter_context(chromium(Path(folder) / "profile"))
        broker = Mosquitto(Path(folder) / "broker", websockets=True).start()
        engine = ScriptedEngine(typed, model="qwen3-4b")
        address = f"ws://127.0.0.1:{broker.websocket_port}"
        try:
            with LiveWorker(broker.port, Path(folder), engine), Site(brokers=[address]) as site:
                take(ChatPage(browser, site.url, {"way": "broker", "url": address}))
        finally:
            broker.close()


if __name__ == "__main__":
    main()
