"""The reader of chat completions takes whatever servers send and gives clean deltas."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.completions import MAX_MESSAGE_CHARS, CompletionReader, clean, error_from
from llamacpp_mqtt_deploy.core.deltas import Delta, Finished, PromptProgress, Reasoning, Text, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed, RequestError
from llamacpp_mqtt_deploy.core.thinking import ThinkingSplitter
from llamacpp_mqtt_deploy.core.toolcalls import MAX_CALLS


def chunk(finish_reason: str | None = None, **delta: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "finish_reason": finish_reason, "delta": delta}]}).encode()


def read(*events: bytes) -> tuple[list[Delta], Finished]:
    reader = CompletionReader()
    deltas = [delta for event in events for delta in reader.read(event)]
    return deltas, reader.finished()


def joined(deltas: Iterable[Delta], kind: type[Text | Reasoning] = Text) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, kind))


# What b11434 sent for five tokens, with `return_progress` and `include_usage`.
ROLE = '{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}]'
TIMINGS = '"timings":{"cache_n":20,"prompt_n":8,"predicted_n":5,"predicted_per_second":2791.3}'
USAGE = (
    '"usage":{"completion_tokens":5,"prompt_tokens":28,"total_tokens":33,"prompt_tokens_details":{"cached_tokens":20}}'
)
RECORDED = [
    f'{ROLE},"prompt_progress":{{"total":28,"cache":20,"processed":20,"time_ms":0}}}}'.encode(),
    f'{ROLE},"prompt_progress":{{"total":28,"cache":20,"processed":28,"time_ms":3}}}}'.encode(),
    f"{ROLE}}}".encode(),
    b'{"choices":[{"finish_reason":null,"index":0,"delta":{"reasoning_content":"hm"}}]}',
    b'{"choices":[{"finish_reason":null,"index":0,"delta":{"content":" fo"}}]}',
    b'{"choices":[{"finish_reason":"length","index":0,"delta":{}}]}',
    f'{{"choices":[],{USAGE},{TIMINGS}}}'.encode(),
    b"[DONE]",
]


def test_a_recorded_stream_reads_as_it_should() -> None:
    deltas, finished = read(*RECORDED)
    assert deltas == [PromptProgress(20, 28, 20), PromptProgress(28, 28, 20), Reasoning("hm"), Text(" fo")]
    assert finished == Finished("length", TokenUsage(prompt_tokens=28, completion_tokens=5, cached_tokens=20), 2791.3)


def test_usage_comes_from_the_timings_where_there_is_none() -> None:
    event = b'{"choices":[],"timings":{"cache_n":20,"prompt_n":8,"predicted_n":5,"predicted_per_second":null}}'
    finished = read(chunk(content="a"), event)[1]
    assert finished.usage == TokenUsage(prompt_tokens=28, completion_tokens=5, cached_tokens=20)
    assert finished.tokens_per_second is None


def test_vllms_stop_reason_is_the_stop_sequence() -> None:
    event = b'{"choices":[{"finish_reason":"stop","stop_reason":"###","delta":{}}]}'
    assert read(chunk(content="a"), event)[1].stop_sequence == "###"


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_generation_that_was_broken_off_is_no_answer(reason: str) -> None:
    with pytest.raises(EngineFailed):
        read(chunk(reason))


def test_content_in_parts_is_joined() -> None:
    assert joined(read(chunk(content=[{"type": "text", "text": "a"}, {"type": "image"}, {"text": "b"}]))[0]) == "ab"


@given(st.text(min_size=1), st.data())
def test_surrogate_pairs_cut_by_the_server_come_out_whole(text: str, data: st.DataObject) -> None:
    units = text.encode("utf-16-le", "surrogatepass")
    places = data.draw(st.lists(st.integers(0, len(units) // 2), max_size=6))
    marks = [0, *sorted(2 * place for place in places), len(units)]
    pieces = [units[a:b].decode("utf-16-le", "surrogatepass") for a, b in zip(marks, marks[1:], strict=False)]  # noqa: RUF007
    deltas, _ = read(*(json.dumps({"choices": [{"delta": {"content": piece}}]}).encode() for piece in pieces))
    assert joined(deltas) == text
    assert all(isinstance(delta, Text) and delta.text for delta in deltas)


def test_half_a_pair_becomes_a_replacement_character() -> None:
    assert joined(read(chunk(content="\ud83d"), chunk(content="a\ude00"))[0]) == "\ufffda\ufffd"


HALF = "\ud83d"


def test_half_a_pair_at_the_end_becomes_a_replacement_character() -> None:
    assert joined(read(chunk(content="a" + HALF), chunk("length"), b"[DONE]")[0]) == "a\ufffd"
    reader = CompletionReader()
    assert reader.read(chunk(content=HALF)) == []
    assert reader.rest() == [Text("\ufffd")]
    assert (reader.rest(), reader.holds_half) == ([], False)


def test_half_a_pair_in_the_arguments_of_a_call_that_breaks_off_becomes_a_replacement_character() -> None:
    pieces = [
        {"index": index, "id": f"c{index}", "function": {"name": "f", "arguments": '"' + HALF}} for index in (0, 1)
    ]
    other_half = {"index": 0, "function": {"arguments": '\ude00"'}}
    deltas, _ = read(chunk(tool_calls=pieces), chunk(tool_calls=[other_half]), b"[DONE]")
    calls = [delta for delta in deltas if isinstance(delta, ToolCall)]
    told = {index: "".join(call.arguments for call in calls if call.index == index) for index in (0, 1)}
    assert told == {0: '"\U0001f600"', 1: '"\ufffd'}
    assert deltas[-1] == ToolCall(1, None, None, "\ufffd")


def test_half_a_pair_is_told_before_what_follows_it() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    assert read(chunk(reasoning_content="a" + HALF), chunk(content="b" + HALF), chunk(tool_calls=[call]))[0] == [
        Reasoning("a"),
        Reasoning("\ufffd"),
        Text("b"),
        Text("\ufffd"),
        ToolCall(0, "c", "f", "{}"),
    ]
    assert read(chunk(content=HALF), chunk(reasoning_content="a"))[0] == [Text("\ufffd"), Reasoning("a")]
    both = read(chunk(reasoning_content="a" + HALF, content="b" + HALF), b"[DONE]")[0]
    assert both == [Reasoning("a"), Reasoning("\ufffd"), Text("b"), Text("\ufffd")]


def test_half_a_pair_at_the_end_of_thinking_or_after_it_is_in_its_place() -> None:
    for text, told in (
        ("<think>hm" + HALF, [Reasoning("hm"), Reasoning("\ufffd")]),
        ("<think>hm</think>a" + HALF, [Reasoning("hm"), Text("a"), Text("\ufffd")]),
        ("<th" + HALF, [Text("<th\ufffd")]),
    ):
        reader = CompletionReader(thinking=ThinkingSplitter("<think>", "</think>"))
        assert [*reader.read(chunk(content=text)), *reader.read(b"[DONE]")] == told


def test_broken_utf8_is_read_with_replacement_characters() -> None:
    assert joined(read(b'{"choices":[{"delta":{"content":"a\xff\xfeb"}}]}')[0]) == "a\ufffd\ufffdb"


def test_a_pair_that_the_server_cut_in_the_arguments_of_a_call_comes_out_whole() -> None:
    first = chunk(tool_calls=[{"index": 0, "id": "x", "function": {"name": "f", "arguments": '"\ud83d'}}])
    second = chunk(tool_calls=[{"index": 0, "function": {"arguments": '\ude00"'}}])
    deltas, _ = read(first, second)
    assert "".join(delta.arguments for delta in deltas if isinstance(delta, ToolCall)) == '"\U0001f600"'


@pytest.mark.parametrize("unfit", ["\ud83d", "a\x00b", "i" * 200, ["x"], 1.5])
def test_an_id_that_no_client_could_send_back_is_replaced(unfit: object) -> None:
    deltas, _ = read(chunk(tool_calls=[{"index": 0, "id": unfit, "function": {"name": "f", "arguments": "{}"}}]))
    assert deltas == [ToolCall(0, "call_0", "f", "{}")]


def test_a_number_as_the_id_of_a_call_is_taken_as_text() -> None:
    deltas, _ = read(chunk(tool_calls=[{"index": 0, "id": 7, "function": {"name": "f", "arguments": "{}"}}]))
    assert deltas == [ToolCall(0, "7", "f", "{}")]


@pytest.mark.parametrize("unfit", ["\ud83d", "a\x1bb", "n" * 65, ["x"], 7])
def test_a_name_that_no_tool_can_have_is_an_engine_error(unfit: object) -> None:
    with pytest.raises(EngineFailed):
        read(chunk(tool_calls=[{"index": 0, "id": "x", "function": {"name": unfit, "arguments": "{}"}}]))


@given(st.lists(st.text(max_size=4), min_size=1, max_size=6), st.booleans())
def test_arguments_of_a_call_are_joined_whether_or_not_its_name_is_repeated(pieces: list[str], again: bool) -> None:
    named = {"id": "x", "index": 0, "type": "function"}
    calls = [
        {**(named if again or number == 0 else {"index": 0}), "function": {"name": "f", "arguments": piece}}
        for number, piece in enumerate(pieces)
    ]
    if not again:
        for call in calls[1:]:
            del call["function"]["name"]  # type: ignore[attr-defined]
    deltas, finished = read(*(chunk(tool_calls=[call]) for call in calls), chunk("tool_calls"))
    assert "".join(delta.arguments for delta in deltas if isinstance(delta, ToolCall)) == "".join(pieces)
    assert isinstance(deltas[0], ToolCall)
    assert (deltas[0].id, deltas[0].name) == ("x", "f")
    assert all(delta.id is None and delta.name is None for delta in deltas[1:] if isinstance(delta, ToolCall))
    assert all(isinstance(delta, ToolCall) and delta.index == 0 for delta in deltas)
    assert finished.finish_reason == "tool_calls"


_NAMES = (
    "choices delta content tool_calls function arguments index id name usage timings error message code type "
    "prompt_progress processed finish_reason reasoning_content predicted_n prompt_tokens_details"
)
NAMES = _NAMES.split()
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.lists(json_values | st.binary(max_size=10), max_size=4))
def test_whatever_comes_gives_deltas_or_an_error_of_ours(events: list[Any]) -> None:
    reader = CompletionReader()
    try:
        for event in events:
            for delta in reader.read(event if isinstance(event, bytes) else orjson.dumps(event)):
                if isinstance(delta, Text | Reasoning):
                    assert isinstance(delta.text, str)
                    assert delta.text
        finished = reader.finished()
    except RequestError:
        return
    assert finished.usage.completion_tokens >= 0


@given(st.text() | json_values, st.none() | st.integers(100, 599))
def test_every_error_of_an_engine_becomes_one_short_line(error: Any, status: int | None) -> None:
    made = error_from(error, status)
    assert len(made.message) < MAX_MESSAGE_CHARS + 200
    assert made.message.isprintable() or not made.message.isascii()


@pytest.mark.parametrize(
    "raw, shown",
    [
        ("failed to load /srv/models/llama.gguf", "failed to load [path]"),
        ("failed at C:\\models\\llama.gguf now", "failed at [path] now"),
        ("JSON schema error at #/properties/city/enum: bad", "JSON schema error at #/properties/city/enum: bad"),
        ("see http://10.1.2.3:80/x?y for more", "see [address] for more"),
        ("either/or and 1/2", "either/or and 1/2"),
        ("two\r\nlines\x07", "two lines"),
    ],
)
def test_an_engines_text_loses_paths_addresses_and_line_ends(raw: str, shown: str) -> None:
    assert clean(raw) == shown


CALL = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "told,called,meant",
    [
        ("stop", False, "stop"),
        ("stop", True, "tool_calls"),  # Ollama and others
        ("length", False, "length"),
        ("length", True, "length"),  # the call was cut off
        ("tool_calls", True, "tool_calls"),
    ],
)
def test_an_answer_with_calls_ends_in_tool_calls_unless_it_was_cut_off(told: str, called: bool, meant: str) -> None:
    _, finished = read(*([chunk(tool_calls=[CALL])] if called else []), chunk(told))
    assert finished.finish_reason == meant


def test_deltas_are_counted_as_tokens_where_the_engine_tells_no_number() -> None:
    call = {"index": 0, "function": {"arguments": " "}}
    _, finished = read(
        chunk(reasoning_content="hm"),
        chunk(content="one"),
        chunk(content="two"),
        chunk(tool_calls=[CALL]),
        chunk(tool_calls=[call]),
        chunk("tool_calls"),
    )
    assert (finished.usage.completion_tokens, finished.usage.prompt_tokens) == (5, 0)


@pytest.mark.parametrize("letter", ["\U00010000", "\U0010ffff", "\U0001f600"])
def test_the_first_and_the_last_of_all_pairs_come_out_whole(letter: str) -> None:
    high, low = json.dumps(letter)[1:7], json.dumps(letter)[7:13]
    events = [b'{"choices":[{"delta":{"content":"' + half.encode() + b'"}}]}' for half in (high, low)]
    deltas, _ = read(*events, chunk("stop"))
    assert joined(deltas) == letter


@pytest.mark.parametrize(
    "status,text,leaf,said",
    [
        (401, "no", "EngineUnavailable", "engine.api_key_file"),
        (403, "no", "EngineUnavailable", "engine.api_key_file"),
        (404, "no such model", "ModelNotFound", "no such model"),
        (400, "model x not found", "ModelNotFound", "model x not found"),
        (404, "Not Found", "EngineUnavailable", "engine.url"),
        (405, "Method Not Allowed", "EngineUnavailable", "engine.url"),
        (413, "too big", "PayloadTooLarge", "too big"),
        (501, "not compiled in", "Unsupported", "not compiled in"),
        (500, "image input is not supported", "Unsupported", "image input"),
        (400, "odd", "EngineFailed", "refused the request: odd"),
        (499, "", "EngineFailed", "refused the request."),
        (500, "odd", "EngineFailed", "failed: odd"),
        (None, "", "EngineFailed", "failed."),
    ],
)
def test_each_status_of_an_engine_has_its_error(status: int | None, text: str, leaf: str, said: str) -> None:
    made = error_from({"message": text}, status)
    assert type(made).__name__ == leaf
    assert said in made.message


def test_a_code_in_the_error_goes_before_the_status() -> None:
    assert type(error_from({"message": "x", "code": 501}, 500)).__name__ == "Unsupported"
    assert type(error_from({"message": "x", "code": True}, 501)).__name__ == "Unsupported"
    overflow = error_from(
        {"type": "exceed_context_size_error", "message": "x", "n_ctx": 512, "n_prompt_tokens": -1}, 400
    )
    assert (type(overflow).__name__, overflow.details) == ("ContextOverflow", {"n_ctx": 512})


# --- what servers do differently --------------------------------------------------------------------------------------


def test_a_stream_is_done_when_the_server_says_so() -> None:
    reader = CompletionReader()
    reader.read(chunk(content="a"))
    assert not reader.done
    assert reader.read(b"[DONE]") == []
    assert reader.done


def test_a_completion_that_is_not_streamed_is_read_from_its_message() -> None:
    message = {"role": "assistant", "content": "Hi", "reasoning": "hm"}
    whole = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": {"prompt_tokens": 3}}
    deltas, finished = read(json.dumps(whole).encode())
    assert deltas == [Reasoning("hm"), Text("Hi")]
    assert (finished.finish_reason, finished.usage.prompt_tokens) == ("stop", 3)


def test_thinking_that_is_no_text_is_left_out() -> None:
    assert read(chunk(reasoning_content={"text": "hm"}, content="a"))[0] == [Text("a")]


def test_parts_of_content_without_text_are_left_out() -> None:
    assert joined(read(chunk(content=[{"type": "text", "text": None}, "odd", {"text": "b"}]))[0]) == "b"


def test_what_was_held_back_as_a_tag_comes_before_what_the_server_sends_apart() -> None:
    for apart in (chunk(reasoning_content="hm"), chunk(tool_calls=[CALL])):
        reader = CompletionReader(thinking=ThinkingSplitter("<think>", "</think>"))
        assert reader.splits
        assert reader.read(chunk(content="<th")) == []
        first, second = reader.read(apart)
        assert first == Text("<th")
        assert second in (Reasoning("hm"), ToolCall(0, "c", "f", "{}"))


def test_a_server_that_sends_thinking_apart_leaves_no_tags_in_the_answer() -> None:
    reader = CompletionReader(thinking=ThinkingSplitter("<think>", "</think>"))
    reader.read(chunk(reasoning_content="hm"))
    assert not reader.splits
    assert reader.read(chunk(content="<think>")) == [Text("<think>")]


def test_thinking_that_a_server_leaves_in_the_content_is_split_off() -> None:
    reader = CompletionReader(thinking=ThinkingSplitter("<think>", "</think>"))
    assert reader.read(chunk(content="<think>hm</think>a<think>")) == [Reasoning("hm"), Text("a<think>")]
    assert reader.read(b"[DONE]") == []
    cut = CompletionReader(thinking=ThinkingSplitter("<think>", "</think>"))
    assert cut.read(chunk(content="<th")) == []
    assert cut.read(b"[DONE]") == [Text("<th")]
    assert cut.rest() == []


def test_half_a_pair_is_known_to_wait_for_the_other_half() -> None:
    reader = CompletionReader()
    halves = []
    for text in ("a", "\\ud83d", "\\ude00"):
        reader.read(f'{{"choices":[{{"delta":{{"content":"{text}"}}}}]}}'.encode())
        halves.append(reader.holds_half)
    assert halves == [False, True, False]


def test_text_that_was_read_elsewhere_is_counted_too() -> None:
    reader = CompletionReader()
    reader.read(chunk(content="a"))
    reader.count(4)
    assert reader.finished().usage.completion_tokens == 5


def test_a_reason_that_nobody_knows_is_an_ordinary_end() -> None:
    assert read(chunk("eos_token"))[1].finish_reason == "stop"
    assert read(chunk(content="a"))[1].finish_reason == "stop"
    assert read(chunk("function_call"))[1].finish_reason == "tool_calls"


def test_a_stop_reason_that_is_no_text_is_no_stop_sequence() -> None:
    assert read(b'{"choices":[{"finish_reason":"stop","stop_reason":128001,"delta":{}}]}')[1].stop_sequence is None


def test_figures_stay_when_later_events_have_none() -> None:
    figures = f'{{"choices":[],{USAGE},{TIMINGS}}}'.encode()
    assert read(figures, chunk("stop"))[1] == read(chunk("stop"), figures)[1]


# --- tool calls -------------------------------------------------------------------------------------------------------


def _calls(*pieces: dict[str, Any]) -> list[ToolCall]:
    deltas, _ = read(*(chunk(tool_calls=[piece]) for piece in pieces))
    assert all(isinstance(delta, ToolCall) for delta in deltas)
    return [delta for delta in deltas if isinstance(delta, ToolCall)]


def _piece(index: int | None, call_id: str | int | None, name: str | None, arguments: Any) -> dict[str, Any]:
    return {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}


def test_pieces_of_several_calls_may_come_in_turn() -> None:
    assert _calls(
        _piece(0, "a", "f", "1"),
        _piece(1, "b", "g", "2"),
        _piece(2, "c", "h", "3"),
        _piece(0, None, None, "4"),
        _piece(1, None, None, "5"),
        _piece(2, None, None, "6"),
    ) == [
        ToolCall(0, "a", "f", "1"),
        ToolCall(1, "b", "g", "2"),
        ToolCall(2, "c", "h", "3"),
        ToolCall(0, None, None, "4"),
        ToolCall(1, None, None, "5"),
        ToolCall(2, None, None, "6"),
    ]


@pytest.mark.parametrize("index", [None, 0])
def test_calls_without_numbers_of_their_own_are_told_apart_by_id_and_name(index: int | None) -> None:
    assert _calls(
        _piece(index, "a", "f", "1"),
        _piece(index, "a", "f", "2"),  # llama-cpp-python
        _piece(index, "b", "f", "3"),
        _piece(index, None, None, "4"),
    ) == [
        ToolCall(0, "a", "f", "1"),
        ToolCall(0, None, None, "2"),
        ToolCall(1, "b", "f", "3"),
        ToolCall(1, None, None, "4"),
    ]


def test_calls_without_numbers_and_ids_are_told_apart_by_their_names() -> None:
    whole = [_piece(None, None, name, "{}") for name in ("f", "g", "g")]
    calls = [ToolCall(0, "call_0", "f", "{}"), ToolCall(1, "call_1", "g", "{}"), ToolCall(2, "call_2", "g", "{}")]
    assert _calls(*whole) == calls
    assert read(chunk("tool_calls", tool_calls=whole))[0] == calls
    assert _calls(_piece(None, None, "f", '{"a":'), _piece(None, None, None, "1}"), whole[1]) == [
        ToolCall(0, "call_0", "f", '{"a":'),
        ToolCall(0, None, None, "1}"),
        ToolCall(1, "call_1", "g", "{}"),
    ]
    assert len({call.index for call in _calls(_piece(None, None, None, "{"), _piece(None, None, "f", "}"))}) == 1


def test_an_event_full_of_calls_is_refused_before_each_is_looked_for_among_all_others() -> None:
    calls = [_piece(number, None, "f", "{}") for number in range(MAX_CALLS)]
    assert len(_calls(*calls)) == MAX_CALLS
    with pytest.raises(EngineFailed, match="more than 128 tools"):
        read(chunk(tool_calls=[*calls, _piece(MAX_CALLS, None, "f", "{}")]))


def test_calls_with_the_same_id_get_ids_by_which_their_results_can_be_told_apart() -> None:
    assert _calls(
        _piece(0, "0", "f", "{}"), _piece(1, "0", "g", "{"), _piece(2, "0", "h", "{}"), _piece(1, "0", "g", "}")
    ) == [
        ToolCall(0, "0", "f", "{}"),
        ToolCall(1, "call_1", "g", "{"),
        ToolCall(2, "call_2", "h", "{}"),
        ToolCall(1, None, None, "}"),
    ]
    assert [call.id for call in _calls(_piece(0, "call_1", "f", "{}"), _piece(1, "call_1", "f", "{}"))] == [
        "call_1",
        "call_2",
    ]
    assert [call.id for call in _calls(_piece(0, 7, "f", "{}"), _piece(1, "7", "f", "{}"))] == ["7", "call_1"]


def test_an_id_that_comes_late_is_no_other_calls_either() -> None:
    told = _calls(_piece(0, "a", "f", "{}"), _piece(1, None, None, "{"), _piece(1, "a", "g", "}"))
    assert told[1:] == [ToolCall(1, None, None, "{"), ToolCall(1, "call_1", "g", "}")]


def test_a_call_without_an_id_gets_one_with_its_name_that_no_other_call_has() -> None:
    assert _calls(_piece(0, "call_1", "f", "{}"), _piece(1, None, "g", "{}"), _piece(2, "call_2", "h", "{}")) == [
        ToolCall(0, "call_1", "f", "{}"),
        ToolCall(1, "call_2", "g", "{}"),
        ToolCall(2, "call_3", "h", "{}"),
    ]


def test_an_id_or_a_name_alone_begins_no_new_call() -> None:
    assert _calls(_piece(0, "a", "f", "1"), _piece(0, "b", None, "2"), _piece(0, None, "g", "3")) == [
        ToolCall(0, "a", "f", "1"),
        ToolCall(0, None, None, "2"),
        ToolCall(0, None, None, "3"),
    ]


def test_an_id_and_a_name_that_come_late_are_passed_on_once() -> None:
    assert _calls(
        _piece(0, None, None, ""), _piece(0, "a", None, ""), _piece(0, "a", "f", ""), _piece(0, "", "", "1")
    ) == [
        ToolCall(0, None, None, ""),
        ToolCall(0, "a", None, ""),
        ToolCall(0, None, "f", ""),
        ToolCall(0, None, None, "1"),
    ]
    assert _calls(_piece(0, None, "f", "1"), _piece(0, "a", "f", "2"), _piece(0, "a", None, None)) == [
        ToolCall(0, "call_0", "f", "1"),
        ToolCall(0, None, None, "2"),
    ]


def test_a_piece_of_a_call_that_brings_nothing_is_left_out() -> None:
    assert _calls(_piece(0, "a", "f", None), _piece(0, "a", "f", None), _piece(0, None, None, "")) == [
        ToolCall(0, "a", "f", "")
    ]


def test_arguments_that_a_server_sends_as_an_object_become_json() -> None:
    assert _calls(_piece(0, "a", "f", {"city": "Ulm"})) == [ToolCall(0, "a", "f", '{"city":"Ulm"}')]


# --- progress and figures ---------------------------------------------------------------------------------------------


def _progress(**fields: Any) -> bytes:
    return json.dumps({"choices": [], "prompt_progress": fields}).encode()


def test_progress_is_told_when_it_moves_and_what_the_server_leaves_out_is_nothing() -> None:
    deltas, finished = read(_progress(total=9), _progress(total=9), _progress(total=9, processed=4, cache=2))
    assert deltas == [PromptProgress(0, 9, 0), PromptProgress(4, 9, 2)]
    assert finished.usage.prompt_tokens == 9, "known from the progress where no figures come"


def test_figures_come_from_the_best_that_a_server_tells() -> None:
    timed = read(b'{"choices":[],"timings":{"cache_n":20}}')[1].usage
    assert (timed.prompt_tokens, timed.cached_tokens) == (20, 20)
    timed = read(b'{"choices":[],"timings":{"prompt_n":8}}')[1].usage
    assert (timed.prompt_tokens, timed.cached_tokens) == (8, 0)
    details = {"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 3}}
    counted = {"prompt_tokens": 0, "completion_tokens": 0}
    event = {"choices": [], "usage": counted | details, "timings": {"cache_n": 20, "prompt_n": 8, "predicted_n": 5}}
    usage = read(chunk(content="a"), json.dumps(event).encode())[1].usage
    assert usage == TokenUsage(prompt_tokens=0, completion_tokens=0, cached_tokens=4, reasoning_tokens=3)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        {"error": {"message": "out of memory"}},
        {"choices": [], "error": {"message": "out of memory"}},
        {"choices": None, "error": "out of memory"},
        {"code": 500, "message": "out of memory"},
        {"type": "server_error", "message": "out of memory"},
    ],
)
def test_an_error_in_a_stream_is_an_error_in_each_of_its_shapes(event: dict[str, Any]) -> None:
    with pytest.raises(EngineFailed, match="out of memory"):
        read(json.dumps(event).encode())


@pytest.mark.parametrize(
    "event", [{"message": "hello"}, {"code": 200}, {"error": None}, {"choices": [], "error": None}]
)
def test_an_event_that_only_looks_like_an_error_is_none(event: dict[str, Any]) -> None:
    assert read(json.dumps(event).encode())[0] == []


def test_what_the_engine_wrote_is_known_to_be_its_own_words() -> None:
    assert error_from({"detail": "no such thing"}, 500).quoted == "no such thing"
    assert error_from("plain", 500).quoted == "plain"
    assert error_from({"code": "context_length_exceeded", "message": "9 of 8"}).quoted == ""


@pytest.mark.parametrize("status", [400, 413, 422, 500, None])
@pytest.mark.parametrize(
    "text",
    ["This model's maximum context length is 8 tokens, however you asked for 9", "the context size is exceeded"],
)
def test_a_prompt_that_is_too_long_is_known_by_the_words_of_the_engine(status: int | None, text: str) -> None:
    assert type(error_from(text, status)).__name__ == "ContextOverflow"


def test_words_about_the_context_alone_are_no_overflow() -> None:
    assert type(error_from("the context size is 8", 400)).__name__ == "EngineFailed"
    assert type(error_from("the queue is too long", 400)).__name__ == "EngineFailed"
    assert type(error_from("maximum context length exceeded", 503)).__name__ == "EngineFailed"
    assert type(error_from({"code": "context_length_exceeded"}, 503)).__name__ == "ContextOverflow"
    assert type(error_from({"type": "exceed_context_size_error"}, 503)).__name__ == "ContextOverflow"


@pytest.mark.parametrize("status", [400, 422])
def test_a_field_that_the_engine_refuses_is_the_clients(status: int) -> None:
    told = {"type": "invalid_request_error", "message": "Field min_p must be a number"}
    assert type(error_from(told, status)).__name__ == "BadRequest"
    assert type(error_from(told, 500)).__name__ == "EngineFailed"
    assert type(error_from(told | {"type": "server_error"}, status)).__name__ == "EngineFailed"
    assert type(error_from(told | {"message": "Bad field"}, status)).__name__ == "EngineFailed"


def test_an_engines_text_is_cut_to_five_hundred_characters() -> None:
    assert clean("x" * 500) == "x" * 500
    assert clean("x" * 501) == "x" * 499 + "…"
    assert clean("http://" + "x" * 1993 + " and more") == "[address]", "what is looked at is bounded, too"
