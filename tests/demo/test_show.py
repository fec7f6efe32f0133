"""How the demo shows a conversation: plain lines, two columns, one above the other; and never what steers a terminal."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from llamacpp_mqtt_deploy.client import Done
from llamacpp_mqtt_deploy.commands.demo_show import LiveTurn, PlainTurn, Turn, event_text
from llamacpp_mqtt_deploy.core.events import Reading

REQUEST = ("llm/request/demo", b'{"request_id":"demo-1","prompt":"hello"}')
EVIL = "\x1b]0;owned\x07\x1b[2J\u009b31m"


def event(kind: str, **fields: object) -> dict[str, object]:
    return {"type": kind, "request_id": "demo-1", "session_id": "demo", **fields}


def play(turn: Turn, chunks: list[str]) -> None:
    turn.feed(Reading(event("start", model="m")))
    for seq, content in enumerate(chunks):
        turn.feed(Reading(event("chunk", seq=seq, content=content), content=content))
    text = "".join(chunks)
    last = event("done", seq=len(chunks), final=True, full_content=text)
    turn.feed(Reading(last))
    turn.end(
        Done(
            request_id="demo-1",
            session="demo",
            content=text,
            finish_reason="stop",
            message={},
            usage={"completion_tokens": 7},
            timings={"first_token_ms": 12.3, "total_ms": 1400.0},
            event=last,
        )
    )


def plain(chunks: list[str]) -> str:
    out = io.StringIO()
    play(PlainTurn(out, prompt="hello", request=REQUEST, reply_topic="llm/reply/demo"), chunks)
    return out.getvalue()


def live(chunks: list[str], *, width: int, height: int = 30) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=height, color_system="truecolor")
    play(LiveTurn(console, prompt="hello", request=REQUEST, reply_topic="llm/reply/demo"), chunks)
    return out.getvalue()


def final(text: str) -> str:
    """What stays on the screen: the text after the last erased picture, without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.rpartition("\x1b[2K")[2])


def test_on_a_pipe_the_first_chunks_and_the_last_are_printed_and_the_rest_is_counted() -> None:
    text = plain([f"w{number} " for number in range(10)])
    shown = [int(seq) for seq in re.findall(r'"chunk".*"seq":(\d+)', text)]
    assert shown == [0, 1, 2, 9]
    assert "… 6 more chunks" in text
    assert "< w0 w1 w2 w3 w4 w5 w6 w7 w8 w9\n" in text
    assert "(7 tokens in 10 chunks, the first after 12 ms, complete after 1.4 s)" in text


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_few_chunks_are_all_printed(count: int) -> None:
    text = plain(["x"] * count)
    assert len(re.findall('"type":"chunk"', text)) == count
    assert "more" not in text


def test_a_wide_terminal_has_the_events_beside_the_answer() -> None:
    lines = final(live(["The ", "sea."], width=120)).splitlines()
    first = next(line for line in lines if line.startswith("> hello"))
    assert "publish llm/request/demo" in first
    assert any(line.startswith("The sea.") for line in lines)
    assert max(map(len, lines)) <= 120


def test_a_narrow_terminal_has_them_below() -> None:
    lines = final(live(["The ", "sea."], width=80)).splitlines()
    assert "The sea." in lines
    assert lines.index("The sea.") < next(at for at, line in enumerate(lines) if line.startswith("publish"))
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [40, 80, 120])
def test_while_it_grows_the_picture_stays_within_the_screen(width: int) -> None:
    text = live([f"line {number}\n" for number in range(200)], width=width, height=20)
    # rich erases a picture by going up its lines, one by one.
    heights = [len(moves) // len("\x1b[1A\x1b[2K") for moves in re.findall(r"(?:\x1b\[1A\x1b\[2K)+", text)]
    assert heights
    assert max(heights) < 20


def test_what_the_model_says_never_steers_the_terminal() -> None:
    for text in (plain([EVIL, "fine"]), live([EVIL, "fine"], width=80), live([EVIL, "fine"], width=120)):
        assert "\x1b]" not in text
        assert "\x07" not in text
        assert "\x9b" not in text
        assert "\x1b[2J" not in text
        assert "fine" in text


def test_markup_in_an_answer_is_text() -> None:
    assert "[bold]x[/bold]" in final(live(["[bold]x[/bold]"], width=120))


def test_an_event_is_its_json_with_long_texts_cut() -> None:
    text = event_text(event("done", full_content="x" * 100, usage={"total_tokens": 3}), without_ids=True)
    assert json.loads(text) == {"type": "done", "full_content": "x" * 40 + "…", "usage": {"total_tokens": 3}}
