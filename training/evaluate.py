"""Asks the exported model held-out phrasings and writes the share of right answers: `python evaluate.py demo.gguf`.

The questions go through llama.cpp's own server (the xllamacpp wheel), so that what is measured is what is shipped:
weights as stored, the tokenizer and the template of the GGUF, the server's parser of tool calls, greedy sampling.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xllamacpp
from dialogues import COMMANDS, CONTROLS, EVENTS, INFOS, SYSTEM_HELD, Turn, Writer, random_name

SEEDS = (7, 101, 202)  # one draw of questions each; a single draw is uncertain by about one hundredth
ASKED = {
    "count": 120,
    "unknown": 160,
    "echo": 60,
    "ask_name": 120,
    "tell_name": 60,
    "time": 80,
    "time_no_tool": 20,
    "no_such": 40,
    "ask_name_none": 20,
}
ASKED_EACH = 12  # of every intent that is not named above
MAX_TOKENS = 400  # the longest answer, counting from 1 to 100, has about 300


@dataclass
class Case:
    """A conversation up to a held-out question, and the turn that it asks."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    turn: Turn
    late: bool


def cases(seed: int) -> list[Case]:
    """Draws the questions: half of them open a conversation, half come after one to three turns of another kind."""
    held, talk, rng = Writer(seed, held=True), Writer(seed + 1), random.Random(seed + 2)
    out: list[Case] = []

    def add(turn: Turn, tools: list[dict[str, Any]] | None = None, before: list[Turn] | None = None) -> None:
        late = rng.random() < 0.5
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.5:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_HELD)})
        turns = list(before or [])
        if late:
            name = before[0].answer if before else None
            for _ in range(rng.randrange(1, 4)):
                other = talk.any_turn(None, None)
                while name is not None and other.intent.startswith("ask_name"):
                    other = talk.any_turn(None, None)
                turns.append(other)
        for other in turns:
            messages += [{"role": "user", "content": other.user}, {"role": "assistant", "content": other.answer}]
        messages.append({"role": "user", "content": turn.user})
        out.append(Case(messages, tools or [], turn, late))

    for name in INFOS:
        for _ in range(ASKED_EACH):
            add(held.info(name))
    for table, ask in ((EVENTS, held.event), (COMMANDS, held.command), ([*CONTROLS, "ping"], held.control)):
        for word in table:
            for _ in range(ASKED_EACH):
                add(ask(word))
    for _ in range(ASKED["unknown"]):
        add(held.unknown())
    for _ in range(ASKED["no_such"]):
        add(held.no_such())
    for _ in range(ASKED["count"]):
        add(held.count())
    for _ in range(ASKED["echo"]):
        add(held.echo())
    for _ in range(ASKED["ask_name_none"]):
        add(held.ask_name(None))
    for _ in range(ASKED["tell_name"]):
        add(held.tell_name(random_name(held.rng, held=True), again=False))
    for _ in range(ASKED["ask_name"]):
        name = random_name(held.rng, held=True)
        add(held.ask_name(name), before=[held.tell_name(name, again=False)])
    for _ in range(ASKED["time"]):
        add(held.time("get_time"), tools=held.tool_list("get_time"))
    for _ in range(ASKED["time_no_tool"]):
        add(held.time(None))
    return out


class Engine:
    """llama.cpp's server in this process, asked one question at a time."""

    def __init__(self, path: Path, threads: int) -> None:
        """Loads the model."""
        p = xllamacpp.CommonParams()
        p.model.path = str(path)
        p.n_ctx = 1024
        p.n_parallel = 1
        p.n_gpu_layers = 0
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        p.hostnames = ["127.0.0.1"]
        p.port = 0
        p.verbosity = -1
        self._server = xllamacpp.Server(p)

    def ask(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        """Gives the assistant's message with greedy sampling."""
        body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        if tools:
            body["tools"] = tools
        answer = self._server.handle_chat_completions(body)
        if "choices" not in answer:
            raise RuntimeError(json.dumps(answer))
        message = answer["choices"][0]["message"]
        message["finish_reason"] = answer["choices"][0]["finish_reason"]
        return message


def right(case: Case, engine: Engine) -> tuple[bool, str]:
    """Judges one answer by its intent's criterion, and gives the text that was judged."""
    turn = case.turn
    message = engine.ask(case.messages, case.tools)
    if turn.tool_name is not None:
        calls = message.get("tool_calls") or []
        functions = [call["function"] for call in calls]
        if functions != [{"name": turn.tool_name, "arguments": "{}"}] or message["finish_reason"] != "tool_calls":
            return False, json.dumps(message)
        called = {"role": "assistant", "content": "", "tool_calls": calls}
        result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": turn.tool_result}
        message = engine.ask([*case.messages, called, result], case.tools)
    text = message.get("content") or ""
    if message["finish_reason"] != "stop":
        return False, text + " [" + message["finish_reason"] + "]"
    if turn.exact:
        return text == turn.answer, text
    return all(words in text for words in turn.expect), text


def main() -> None:
    """Asks, prints what went wrong, and writes the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--figures", type=Path, help="write the shares into this JSON file, beside what it holds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    engine = Engine(options.gguf, options.threads)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    late: dict[bool, list[int]] = {True: [0, 0], False: [0, 0]}
    draws: dict[int, list[int]] = {seed: [0, 0] for seed in options.seeds}
    for draw, case in ((seed, case) for seed in options.seeds for case in cases(seed)):
        good, text = right(case, engine)
        for tally in (counts[case.turn.intent], late[case.late], draws[draw]):
            tally[0] += good
            tally[1] += 1
        if not good:
            print(f"{case.turn.intent}: {case.messages[-1]['content']!r} -> {text[:160]!r}", flush=True)
    asked = sum(total for _, total in counts.values())
    figures = {
        "held_out": {
            "asked": asked,
            "right": round(sum(good for good, _ in counts.values()) / asked, 4),
            "mean_over_intents": round(sum(good / total for good, total in counts.values()) / len(counts), 4),
            "right_by_draw": {str(seed): round(good / total, 4) for seed, (good, total) in draws.items()},
            "right_in_first_turn": round(late[False][0] / late[False][1], 4),
            "right_in_later_turn": round(late[True][0] / late[True][1], 4),
            "by_intent": {name: f"{good}/{total}" for name, (good, total) in sorted(counts.items())},
        }
    }
    print(json.dumps(figures, indent=2))
    if options.figures:
        known = json.loads(options.figures.read_text()) if options.figures.exists() else {}
        options.figures.write_text(json.dumps(known | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
