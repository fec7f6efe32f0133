"""Writes what the tests compare the engines with: `python reference.py checkpoint.pt`.

reference_logits.json holds PyTorch's log-probabilities for one prompt of each kind, known_answers.json greedy answers.
The tests need no PyTorch then.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jinja2
import torch
from export import TEMPLATE, load
from tokenizer import BOS, IM_END, Tokenizer

TESTS = Path(__file__).parents[1] / "tests" / "demo_model"
GET_TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Returns the current time.",
        "parameters": {"type": "object", "properties": {}},
    },
}
QUESTIONS = [
    "Tell me about the sea",
    "Hello!",
    "What can you do?",
    "Who are you?",
    "What is this project?",
    "Count from 1 to 5",
    "Count from 1 to 10",
    "Count from 1 to 10 slowly",
    "Count from 1 to 100",
    "Count from 3 to 12",
    "Count down from 5 to 1",
    "Tell me a short story",
    "Write a short poem",
    "What is the queued event?",
    "What is the chunk event?",
    "What is the done event?",
    "What does lmd ask do?",
    "How do I cancel a request?",
    "How do I use mosquitto_pub?",
    "What is my name?",
    "What is the capital of France?",
    "What time is it?",
    "Repeat after me: blue river",
    "Thank you!",
    "Goodbye",
]
CONVERSATION = ["My name is Ada.", "Tell me about the sea", "What is my name?"]
MAX_TOKENS = 400
TOP = 10  # log-probabilities kept for each place of an answer: the likeliest ones


class Greedy:
    """PyTorch's own greedy answers, to compare the engines with."""

    def __init__(self, checkpoint: Path) -> None:
        """Loads the weights as the GGUF stores them."""
        self.model, self.vocabulary, _ = load(checkpoint)
        self.tokenizer = Tokenizer(self.vocabulary)
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(TEMPLATE.read_text())

    def prompt(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """Renders a conversation up to the assistant's turn."""
        return self._template.render(messages=messages, tools=tools, bos_token=BOS, add_generation_prompt=True)

    def answer(self, prompt: str) -> list[int]:
        """Gives the ids of the greedy answer, `<|im_end|>` included."""
        ids = self.tokenizer.encode(prompt)
        start = len(ids)
        end = self.vocabulary.ids[IM_END]
        while len(ids) - start < MAX_TOKENS:
            ids.append(int(self.model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == end:
                break
        return ids[start:]

    def reference(self, prompt: str) -> dict[str, object]:
        """Gives the prompt, its ids with the answer's, and for each place of the answer the likeliest tokens."""
        ids = self.tokenizer.encode(prompt)
        answer = self.answer(prompt)
        logits = self.model(torch.tensor([ids + answer]))[0].double()
        rows = []
        for place in range(len(ids) - 1, len(ids) + len(answer) - 1):
            top = torch.log_softmax(logits[place], -1).topk(TOP)
            rows.append({"ids": top.indices.tolist(), "logprobs": [round(v, 5) for v in top.values.tolist()]})
        last = [round(value, 5) for value in logits[len(ids) - 1].tolist()]
        return {"prompt": prompt, "prompt_ids": ids, "answer_ids": answer, "top": rows, "logits_after_prompt": last}


@torch.no_grad()
def main() -> None:
    """Computes and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    options = parser.parse_args()
    greedy = Greedy(options.checkpoint)

    def text(messages: list[dict]) -> str:
        return greedy.tokenizer.decode(greedy.answer(greedy.prompt(messages)))

    single = {question: text([{"role": "user", "content": question}]) for question in QUESTIONS}
    conversation: list[dict] = []
    for question in CONVERSATION:
        conversation.append({"role": "user", "content": question})
        conversation.append({"role": "assistant", "content": text(conversation)})
    known = {"single": single, "conversation": conversation}
    (TESTS / "known_answers.json").write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")

    system = {"role": "system", "content": "You are a helpful assistant."}
    ask_time = {"role": "user", "content": "What time is it?"}
    prompts = [
        greedy.prompt([{"role": "user", "content": "What is the chunk event?"}]),
        greedy.prompt([system, {"role": "user", "content": "Count from 1 to 10 slowly"}]),
        greedy.prompt(conversation[:-1]),
        greedy.prompt([system, ask_time], [GET_TIME]),
        greedy.prompt([{"role": "user", "content": "Wie heißt du, 世界? 👋\n"}]),
    ]
    (TESTS / "reference_logits.json").write_text(json.dumps([greedy.reference(p) for p in prompts]) + "\n")
    for question, answer in [*single.items(), *((m["role"], m["content"]) for m in conversation)]:
        print(f"{question} -> {answer!r}")


if __name__ == "__main__":
    main()
