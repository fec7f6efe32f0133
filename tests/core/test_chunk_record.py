"""The chunks of an answer are kept so that they can be published again byte for byte."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest

from llamacpp_mqtt_deploy.core.chunk_record import Chunk, omits_text, packed, recorded, unpacked, written
from llamacpp_mqtt_deploy.core.events import EventWriter

CALLS = [{"index": 0, "id": "c", "name": "f", "arguments": "{}"}]


def test_chunks_are_written_again_as_they_were_published() -> None:
    writer = EventWriter(request_id="r1", session_id="demo", max_bytes=1024)
    writer.start({"worker": "w", "created": 1})
    published: list[bytes] = []
    record: list[Chunk] = []
    kinds: tuple[Literal["content", "reasoning"], ...] = ("reasoning", "content")
    for kind, text in zip(kinds, ("hm", "x" * 1000), strict=True):
        payloads = writer.chunks(kind, text)
        published += payloads
        record += recorded(kind, text, payloads)
    payloads = writer.tool_calls(CALLS)
    published += payloads
    record += recorded("tool_calls", CALLS, payloads)
    assert len(published) == len(record) == 4
    assert record[0] == ("reasoning", "hm")
    assert written(unpacked(packed(record)), request_id="r1", session_id="demo") == published


def test_nothing_is_recorded_of_a_text_that_made_no_chunk() -> None:
    assert recorded("content", "", []) == []
    assert unpacked(packed([])) == []


@pytest.mark.parametrize(
    "wrong", [{}, [], {"chunks": 5}, {"chunks": [[9, "x"]]}, {"chunks": [["content", "x"]]}, {"chunks": [5]}]
)
def test_what_is_no_record_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="no record of chunks"):
        unpacked(json.dumps(wrong).encode())
    with pytest.raises(ValueError, match=r"."):
        unpacked(b"no JSON")


def test_an_end_says_whether_its_text_is_left_out_and_no_text_can_say_so() -> None:
    assert omits_text(b'{"type":"done","content_omitted":true}')
    assert not omits_text(json.dumps({"full_content": '"content_omitted":true'}).encode())
