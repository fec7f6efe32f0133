"""(e) the second turn of a chat: how much of the first one the engine evaluates again, with more sessions than slots."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.bench import Bench
from benchmarks.samples import Sample, prompt

_SESSIONS = 4
_SLOTS = 2
# As ChatML is for most models: the answer stands in the history as it was generated, so that it can be found in the cache.
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def second_turn(bench: Bench) -> None:
    """(e) second turn of a chat, 4 sessions on 2 slots."""
    model = bench.world.model_with(chat_template=_TEMPLATE)
    with (
        bench.world.llama_with(slots=_SLOTS, n_ctx=2048, model=model) as llama,
        bench.world.daemon(llama.url) as daemon,
    ):
        again, share = [], []
        later: list[float] = []
        for number in bench.rounds("chats", 10):
            names = [f"chat{number}-{stream}" for stream in range(_SESSIONS)]
            # A long question and a short answer, as the random words of this model are other tokens when they are read again.
            turns = [
                daemon.run(streams=_SESSIONS, requests=1, max_tokens=16, make_prompt=lambda words=words: prompt(words),
                           session=lambda stream, _, names=names: names[stream], new=False)
                for words in (300, 20)
            ]  # fmt: skip
            first, second = (turn.samples for turn in turns)
            history = sum(sample.prompt_tokens + sample.tokens for sample in first)
            again.append(max(0, history - _cached(second)) / history)
            prompts = sum(sample.prompt_tokens for sample in second)
            share.append((prompts - _cached(second)) / prompts)
            later.extend(1e3 * sample.first_token_s for sample in second)
    bench.median(
        "e", "tokens of the first turn evaluated again", [100 * each for each in again], unit="%", target="<= 20"
    )
    bench.median("e", "tokens of the second prompt evaluated", [100 * each for each in share], unit="%")
    bench.median("e", "first token of the second turn", later, unit="ms")


def _cached(samples: Sequence[Sample]) -> int:
    return sum(sample.cached_tokens for sample in samples)
