"""The documentation's snippets in Python, JavaScript, TOML and JSON do what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.requests import RequestPolicy, parse_control
from llamacpp_mqtt_deploy.schema.document import validate_pool
from tests.docs.pages import ROOT, Block, all_blocks
from tests.docs.world import World
from tests.support.parsing import parse_request
from tests.support.services import require_program

RECIPES = ROOT / "docs" / "recipes.md"


def named(block: Block) -> str:
    return block.where


@pytest.mark.broker
@pytest.mark.engine
@pytest.mark.parametrize("block", all_blocks("python"), ids=named)
def test_a_python_snippet_prints_an_answer(block: Block, world: World) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", world.here(block.text)],
        env=world.environment,
        cwd=world.home,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.strip()) > 10


@pytest.mark.broker
@pytest.mark.engine
def test_the_least_client_opens_the_protocol_page_in_ten_lines_and_reads_an_answer(world: World) -> None:
    page = (ROOT / "docs" / "protocol.md").read_text("utf-8")
    block = next(block for block in all_blocks("python") if block.page.name == "protocol.md")
    assert page.index(block.text) < 600
    assert len([line for line in block.text.splitlines() if line]) == 10
    script = world.here(block.text)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] in {"queued ", "start "}
    text = "".join(line.removeprefix("chunk ") for line in lines if line.startswith("chunk "))
    assert lines[-1] == f"done {text}"


@pytest.mark.parametrize("block", all_blocks("toml"), ids=named)
def test_a_configuration_is_one(block: Block, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    secret.chmod(0o600)
    # Files of the reader's machine: any file will do here.
    text = re.sub(r'"/etc/[^"]+"', f'"{secret}"', block.text)
    file = tmp_path / "config.toml"
    file.write_text(text)
    environ = {}
    if "username" in text and "password_file" not in text:
        (tmp_path / "mqtt-password").write_text("secret\n")
        environ["CREDENTIALS_DIRECTORY"] = str(tmp_path)
    loaded = load(file, {}, environ=environ)
    assert any(origin.startswith("file") for origin in loaded.origins.values())


@pytest.mark.parametrize("block", all_blocks("json"), ids=named)
def test_a_message_is_one(block: Block) -> None:
    found = json.loads(block.text)
    if "action" in found:
        parse_control(block.text.encode())
    elif "told_by" in found:
        validate_pool(found)
    else:
        request = parse_request(block.text.encode(), policy=RequestPolicy())
        assert request is not None
        assert request.warnings == ()


# --- JavaScript ----------------------------------------------------------------------------------------------------------


def events() -> list[dict[str, Any]]:
    """An answer in chunks, with its end."""
    writer = EventWriter(request_id="r1", session_id="web", max_bytes=100_000)
    encoded = [writer.queued(position=1, reason="waiting"), writer.start({"worker": "w", "created": 1})]
    for word in ("The sea", " says", " little, ", "größer", " 🌊"):
        encoded += writer.chunks("content", word)
    encoded.append(
        writer.done({"full_content": "The sea says little, größer 🌊", "finish_reason": "stop", "dropped_messages": 0})
    )
    return [orjson.loads(event) for event in encoded]


WHOLE = "The sea says little, größer 🌊"


def in_node(script: str) -> Any:
    node = require_program("node")
    result = subprocess.run([node, "-e", script], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def the_pages_reader() -> str:
    found = re.search(r"^function follow\(.*?^}$", RECIPES.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert found
    return found[0]


def read_by_the_page(fed: list[dict[str, Any]]) -> Any:
    return in_node(
        f"{the_pages_reader()}\nconst reader = follow('r1'); const news = [], missing = [];"
        f"for (const event of {json.dumps(fed)}) {{ news.push(reader.feed(event)); missing.push(reader.missing); }}"
        "console.log(JSON.stringify({news: news.join(''), missing, ended: reader.end !== null, text: reader.text}));"
    )


def test_the_web_page_reads_an_answer_whatever_is_lost_or_repeated_on_the_way() -> None:
    whole = events()
    assert read_by_the_page(whole) == {"news": WHOLE, "missing": [False] * 8, "ended": True, "text": WHOLE}
    repeated = [event for event in whole for _ in range(2)] + [{"type": "chunk", "request_id": "other", "content": "x"}]
    assert read_by_the_page(repeated)["news"] == WHOLE
    assert read_by_the_page([whole[0], whole[-1]])["news"] == WHOLE
    holed = read_by_the_page(whole[:3] + whole[4:5])
    assert (holed["news"], holed["missing"][-1]) == ("The sea", True)
    snapshot = {"type": "snapshot", "request_id": "r1", "content": "The sea says little, ", "next_seq": 3}
    assert read_by_the_page([*whole[:3], whole[4], snapshot, *whole[5:]])["news"] == WHOLE
    assert read_by_the_page([*whole[:3], whole[4], snapshot])["missing"][-1] is False


def test_what_the_page_on_small_devices_says_of_sizes_is_so() -> None:
    """A `done` without its text does not fit into 256 bytes, and 8 bytes and the topic are what MQTT adds to an event."""
    writer = EventWriter(request_id="0123456789abcdef", session_id="esp32", max_bytes=131_072)
    writer.start({"model": "model.gguf", "worker": "kitchen", "created": 1795169719})
    done = writer.done(
        {
            "content_omitted": True,
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 120, "completion_tokens": 80, "total_tokens": 200, "cached_tokens": 100},
            "timings": {"queue_ms": 1.18, "first_token_ms": 211.39, "total_ms": 4018.45, "tokens_per_second": 21.77},
            "dropped_messages": 0,
        }
    )
    assert 300 < len(done) < 400
    type_and_flags, remaining_length, topic_length, packet_id = 1, 3, 2, 2
    assert type_and_flags + remaining_length + topic_length + packet_id == 8
