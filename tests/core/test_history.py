"""Histories are fitted by whole exchanges, at places that hold over many turns, with few questions to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.core.history import (
    NO_RESULT,
    Fitted,
    exchange_of,
    exchanges,
    fit,
    pending_tool_calls,
    stride_bytes,
)

Messages = tuple[Message, ...]

UNHURRIED = settings(deadline=None)
"""A loaded machine is slow, not wrong."""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def calling(*ids: str) -> Message:
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call: str, text: str = "ok") -> Message:
    return {"role": "tool", "tool_call_id": call, "content": text}


def size(messages: Sequence[Message]) -> int:
    return sum(len(orjson.dumps(m)) for m in messages)


class Counter:
    """An engine that counts a token for every `bytes_per_token` bytes of each message, and how often it was asked."""

    def __init__(self, bytes_per_token: int = 4, answers: int | None = None) -> None:
        self.bytes_per_token = bytes_per_token
        self.answers = answers
        self.asked = 0

    def __call__(self, messages: Sequence[Message]) -> int | None:
        self.asked += 1
        if self.answers is not None and self.asked > self.answers:
            return None
        return sum(len(orjson.dumps(m)) // self.bytes_per_token + 1 for m in messages)


texts = st.integers(0, 900).map(lambda n: "x" * n) | st.text(max_size=40)


@st.composite
def exchange_lists(draw: st.DrawFn) -> list[Messages]:
    """Legal exchanges: plain ones, ones with tool rounds, and ones whose last call was never answered."""
    made: list[Messages] = []
    for number in range(draw(st.integers(0, 25))):
        rounds: list[Message] = []
        for turn in range(draw(st.integers(0, 2))):
            ids = [f"c{number}-{turn}-{n}" for n in range(draw(st.integers(1, 3)))]
            rounds += [calling(*ids), *(result(i, draw(texts)) for i in ids)]
        last = assistant(draw(texts)) if draw(st.booleans()) else calling(f"open-{number}")
        made.append((user(draw(texts)), *rounds, last))
    return made


budgets = st.integers(-5, 5000)
systems = st.none() | texts


def flat(groups: Sequence[Messages]) -> Messages:
    return tuple(m for group in groups for m in group)


def test_exchanges_begin_at_user_messages_and_keep_tool_calls_with_their_results() -> None:
    first = (user("a"), calling("1"), result("1"), assistant("b"))
    second = (user("c"), assistant("d"))
    assert [e.messages for e in exchanges([*first, *second])] == [first, second]
    assert exchanges(()) == ()


@UNHURRIED
@given(exchange_lists())
def test_joining_the_exchanges_gives_the_history_again(groups: list[Messages]) -> None:
    found = exchanges(flat(groups))
    assert [e.messages for e in found] == groups
    assert [e.size for e in found] == [size(group) for group in groups]


@UNHURRIED
@given(exchange_lists(), systems, texts, budgets, st.sampled_from([1, 2, 4, 8, 16]))
def test_a_fitted_prompt_is_system_prompt_then_whole_newest_exchanges_then_the_question(
    groups: list[Messages], system: str | None, question: str, budget: int, bytes_per_token: int
) -> None:
    fitted = fit(
        flat(groups),
        system_prompt=system,
        newest=[user(question)],
        budget_tokens=budget,
        count=Counter(bytes_per_token),
    )
    head = ({"role": "system", "content": system},) if system else ()
    assert fitted.messages[: len(head)] == head
    assert fitted.messages[-1] == user(question)
    body = [m for m in fitted.messages[len(head) : -1] if m.get("content") != NO_RESULT]
    boundaries = [flat(groups[i:]) for i in range(len(groups) + 1)]
    assert tuple(body) in boundaries
    assert fitted.dropped_messages == len(flat(groups)) - len(body)


@UNHURRIED
@given(exchange_lists(), texts, budgets)
def test_two_user_messages_never_stand_in_a_row_and_no_call_lacks_its_result(
    groups: list[Messages], question: str, budget: int
) -> None:
    messages = fit(
        flat(groups), system_prompt=None, newest=[user(question)], budget_tokens=budget, count=Counter()
    ).messages
    assert all((a["role"], b["role"]) != ("user", "user") for a, b in pairwise(messages))
    assert messages[0]["role"] == "user"
    called = [c["id"] for m in messages for c in m.get("tool_calls") or ()]
    assert [m["tool_call_id"] for m in messages if m["role"] == "tool"] == called


@UNHURRIED
@given(exchange_lists(), systems, texts, budgets, st.sampled_from([2, 4, 8]))
def test_no_more_is_dropped_than_the_longest_fitting_suffix_and_one_stride(
    groups: list[Messages], system: str | None, question: str, budget: int, bytes_per_token: int
) -> None:
    counter = Counter(bytes_per_token)
    newest = [user(question)]

    def everything(cut: int) -> Messages:
        return fit(flat(groups[cut:]), system_prompt=system, newest=newest, budget_tokens=None, count=counter).messages

    fitted = fit(flat(groups), system_prompt=system, newest=newest, budget_tokens=budget, count=counter)
    longest = next((c for c in range(len(groups)) if (counter(everything(c)) or 0) <= budget), len(groups))
    cut = next(c for c in range(len(groups) + 1) if everything(c) == fitted.messages)
    assert cut >= longest
    if budget > 0:
        lost = size(everything(longest)) - size(everything(cut))
        largest = max((size(everything(c)) - size(everything(c + 1)) for c in range(len(groups))), default=0)
        assert lost <= stride_bytes(budget) + largest
    if cut < len(groups):
        assert (counter(fitted.messages) or 0) <= budget
    if fitted.tokens is not None:
        assert fitted.tokens == counter(fitted.messages)


@UNHURRIED
@given(exchange_lists(), st.integers(1, 4000), st.integers(0, 1500))
def test_a_smaller_budget_never_keeps_more_of_the_same_stride(groups: list[Messages], budget: int, less: int) -> None:
    smaller = max(1, budget - less)
    if stride_bytes(smaller) != stride_bytes(budget):
        return

    def dropped(tokens: int) -> int:
        fitted = fit(flat(groups), system_prompt=None, newest=[user("q")], budget_tokens=tokens, count=Counter())
        return fitted.dropped_messages

    assert dropped(smaller) >= dropped(budget)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=20),
    st.sampled_from([1500, 2000, 4096]),
)
def test_the_first_kept_message_changes_rarely_over_the_turns_of_a_long_conversation(
    lengths: list[int], budget: int
) -> None:
    """Each change makes the engine process the whole prompt anew; between two of them a stride's bytes are said."""
    history: list[Message] = []
    firsts: list[Message] = []
    said = 0
    for turn in range(120):
        length = lengths[turn % len(lengths)]
        newest = [user(f"{turn} " + "q" * length)]
        fitted = fit(history, system_prompt="s", newest=newest, budget_tokens=budget, count=Counter())
        firsts.append(fitted.messages[1])
        added = exchange_of(newest, assistant("a" * length * 3))
        history += added
        said += size(added)
    changes = sum(a != b for a, b in pairwise(firsts))
    assert changes <= said // stride_bytes(budget) + 1
    assert [int(m["content"].split()[0]) for m in firsts] == sorted(int(m["content"].split()[0]) for m in firsts)


def test_between_two_cuts_each_prompt_begins_with_the_whole_prompt_before() -> None:
    history: list[Message] = []
    before: Fitted | None = None
    kept_prefix = 0
    for turn in range(200):
        newest = [user(f"question {turn} " + "w" * 60)]
        fitted = fit(history, system_prompt="s", newest=newest, budget_tokens=2000, count=Counter())
        if before is not None:
            kept_prefix += orjson.dumps(fitted.messages)[1:].startswith(orjson.dumps(before.messages)[1:-1])
        before = fitted
        history += exchange_of(newest, assistant("answer " + "w" * 100))
    assert kept_prefix >= 175  # of 199; with a cut that moves each turn it is 31


@UNHURRIED
@given(exchange_lists(), texts, st.integers(1, 5000), st.sampled_from([2, 4, 8, 16]))
def test_the_engine_is_asked_seldom(groups: list[Messages], question: str, budget: int, bytes_per_token: int) -> None:
    counter = Counter(bytes_per_token)
    fit(flat(groups), system_prompt=None, newest=[user(question)], budget_tokens=budget, count=counter)
    assert counter.asked <= 10


def test_a_short_conversation_costs_no_question_and_one_that_fits_costs_one() -> None:
    short = Counter()
    fit([user("a"), assistant("b")], system_prompt="s", newest=[user("c")], budget_tokens=3000, count=short)
    assert short.asked == 0
    fits = Counter()
    history = flat([(user("q" * 100), assistant("a" * 500))] * 12)
    assert fit(history, system_prompt="s", newest=[user("c")], budget_tokens=3000, count=fits).dropped_messages == 0
    assert fits.asked == 1


def test_a_long_conversation_costs_at_most_four_questions() -> None:
    for turns in range(20, 60):
        counter = Counter()
        history = flat([(user("q" * (i * 37 % 300)), assistant("a" * (i * 91 % 900))) for i in range(turns)])
        fit(history, system_prompt="s", newest=[user("c")], budget_tokens=2000, count=counter)
        assert counter.asked <= 4


def test_four_misleading_counts_are_followed_before_the_search_goes_on_by_halves() -> None:
    asked: list[int] = []

    def one_too_many(messages: Sequence[Message]) -> int:
        asked.append(len(messages) // 2)  # exchanges that are kept
        return 1001  # hardly too much, so the next guess is hardly less

    history = flat([(user("q" * 60), assistant("a" * 60))] * 40)
    fit(history, system_prompt=None, newest=[user("c")], budget_tokens=1000, count=one_too_many)
    steps = [more - fewer for more, fewer in pairwise(asked)]
    assert asked[0] == 40  # all of it first
    assert max(steps[:3]) < 10
    assert steps[3] > 15


def test_a_history_of_megabytes_is_cut_down_before_the_engine_is_asked() -> None:
    longest = 0

    def count(messages: Sequence[Message]) -> int:
        nonlocal longest
        longest = max(longest, size(messages))
        return size(messages) // 4

    history = flat([(user("q" * 500), assistant("a" * 1500))] * 1000)
    fitted = fit(history, system_prompt=None, newest=[user("c")], budget_tokens=3000, count=count)
    assert longest <= 3000 * 16 + 100
    assert 2000 <= (fitted.tokens or 0) <= 3000


def test_what_does_not_fit_even_alone_is_returned_all_the_same() -> None:
    newest = [user("x" * 100_000)]
    for budget in (-100, 0, 1, 500):
        fitted = fit(
            [user("a"), assistant("b")], system_prompt="s", newest=newest, budget_tokens=budget, count=Counter()
        )
        assert fitted.messages == ({"role": "system", "content": "s"}, *newest)
        assert fitted.dropped_messages == 2


def test_without_a_budget_everything_is_kept_and_nothing_asked() -> None:
    counter = Counter()
    history = flat([(user("q" * 500), assistant("a" * 1500))] * 100)
    fitted = fit(history, system_prompt=None, newest=[user("c")], budget_tokens=None, count=counter)
    assert (fitted.messages, fitted.dropped_messages) == ((*history, user("c")), 0)
    assert (fitted.tokens, fitted.estimated, counter.asked) == (None, False, 0)


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_an_engine_that_cannot_count_gets_an_estimate_that_is_called_one(answers: int) -> None:
    history = flat([(user("q" * 100), assistant("a" * 500))] * 100)
    counter = Counter(answers=answers)
    fitted = fit(history, system_prompt=None, newest=[user("c")], budget_tokens=4000, count=counter)
    assert fitted.estimated
    assert fitted.tokens is None
    assert 4000 <= size(fitted.messages) <= 4000 * 4
    assert counter.asked == answers + 1


def test_the_tools_count_as_part_of_the_prompt() -> None:
    counter = Counter()
    fit([], system_prompt=None, newest=[user("c")], budget_tokens=2000, count=counter, extra_bytes=9000)
    assert counter.asked == 0  # nothing could be dropped
    fit(
        [user("a"), assistant("b")],
        system_prompt=None,
        newest=[user("c")],
        budget_tokens=2000,
        count=counter,
        extra_bytes=9000,
    )
    assert counter.asked == 1


def test_tool_results_keep_the_exchange_that_called_whatever_the_budget() -> None:
    old = (user("old"), assistant("x" * 3000))
    open_one = (user("weather?"), calling("1", "2"))
    newest = [result("1"), result("2")]
    fitted = fit([*old, *open_one], system_prompt=None, newest=newest, budget_tokens=50, count=Counter())
    assert fitted.messages == (*open_one, *newest)
    assert fitted.dropped_messages == 2


def test_a_call_that_was_never_answered_reads_the_same_at_every_later_turn() -> None:
    history = [user("weather?"), calling("1", "2"), result("1")]
    at_once = fit(history, system_prompt=None, newest=[user("never mind")], budget_tokens=None, count=Counter())
    assert at_once.messages == (*history, result("2", NO_RESULT), user("never mind"))
    later = [*history, user("never mind"), assistant("ok")]
    next_turn = fit(later, system_prompt=None, newest=[user("hello")], budget_tokens=None, count=Counter())
    assert next_turn.messages[: len(at_once.messages)] == at_once.messages
    assert at_once.dropped_messages == 0


def test_pending_tool_calls_are_those_of_the_last_answer_without_results() -> None:
    asked = [user("q"), calling("1", "2")]
    assert pending_tool_calls([]) == ()
    assert pending_tool_calls(asked) == ("1", "2")
    assert pending_tool_calls([*asked, result("1")]) == ("2",)
    assert pending_tool_calls([*asked, result("2"), result("1")]) == ()
    assert pending_tool_calls([*asked, result("1"), result("2"), assistant("done")]) == ()
    assert pending_tool_calls([*asked, user("never mind")]) == ()


def test_a_done_leaves_prompt_and_answer_and_no_reasoning() -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "4", "reasoning_content": "2+2", "refusal": None}
    assert exchange_of([user("2+2?")], answer) == (user("2+2?"), assistant("4"))
    assert exchange_of([user("hm")], {"role": "assistant", "content": None}) == (user("hm"), assistant(""))


def test_a_done_with_tool_calls_leaves_them_and_tool_results_are_followed_by_the_answer() -> None:
    assert exchange_of([user("q")], calling("1")) == (user("q"), calling("1"))
    assert exchange_of([result("1")], assistant("sunny")) == (result("1"), assistant("sunny"))


def test_a_cancelled_answer_leaves_its_text_without_half_a_tool_call_or_nothing_at_all() -> None:
    partial = {**calling("1"), "content": "Let me"}
    assert exchange_of([user("q")], partial, cancelled=True) == (user("q"), assistant("Let me"))
    assert exchange_of([user("q")], calling("1"), cancelled=True) == ()
    assert exchange_of([user("q")], assistant(""), cancelled=True) == ()
    assert exchange_of([result("1")], assistant(""), cancelled=True) == ()


@pytest.mark.parametrize(
    "budget,stride", [(0, 1), (1, 1), (1000, 1024), (4096, 4096), (5461, 4096), (5462, 8192), (32768, 32768)]
)
def test_a_stride_is_the_largest_power_of_two_up_to_one_and_a_half_bytes_a_token(budget: int, stride: int) -> None:
    assert stride_bytes(budget) == stride


def test_nothing_is_asked_as_long_as_each_byte_may_be_a_token_beside_a_template_of_512() -> None:
    history, newest = (user("one"), assistant("two")), (user("three"),)
    bytes_in_all = size((*history, *newest))
    for budget, asked in ((bytes_in_all + 512, 0), (bytes_in_all + 511, 1)):
        counter = Counter()
        fitted = fit(history, system_prompt=None, newest=newest, budget_tokens=budget, count=counter)
        assert (counter.asked, fitted.dropped_messages) == (asked, 0)


def test_an_estimate_takes_three_bytes_for_a_token() -> None:
    history = tuple(message for n in range(40) for message in (user(f"{n:03} " * 25), assistant("yes " * 25)))
    newest = (user("and now?"),)
    bytes_in_all = size((*history, *newest))
    for budget, all_kept in ((bytes_in_all // 3 + 1, True), (bytes_in_all // 3 - 1, False)):
        fitted = fit(history, system_prompt=None, newest=newest, budget_tokens=budget, count=Counter(answers=0))
        assert fitted.estimated
        assert (fitted.dropped_messages == 0) is all_kept
        assert size(fitted.messages) <= 3 * budget
