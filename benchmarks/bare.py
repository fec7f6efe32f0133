"""llama-cpp-python used as its README shows, as a process of its own: a prompt in a line, tokens and seconds in a line.

`python -m benchmarks.bare MODEL N_CTX` prints `ready` first. It ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""What both sides sample with."""


def serve(model: str, n_ctx: int) -> None:
    from llama_cpp import Llama

    llama = Llama(model, n_ctx=n_ctx, n_threads=1, n_threads_batch=1, n_batch=256, verbose=False)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted: dict[str, Any] = json.loads(line)
        started = time.monotonic()
        tokens = (_chat if wanted["way"] == "chat" else _generate)(llama, wanted["prompt"], wanted["max_tokens"])
        print(json.dumps({"tokens": tokens, "seconds": time.monotonic() - started}), flush=True)


def _chat(llama: Any, text: str, max_tokens: int) -> int:
    messages = [{"role": "user", "content": text}]
    choices = [
        piece["choices"][0]
        for piece in llama.create_chat_completion(messages, max_tokens=max_tokens, stream=True, **SAMPLING)
    ]
    # A piece may hold several tokens (of a character of several bytes); this model only ends where it must.
    assert choices[-1]["finish_reason"] == "length"
    return max_tokens


def _generate(llama: Any, text: str, max_tokens: int) -> int:
    """The loop below it: tokens and their bytes, no stop words, no events."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    # The same prompt as for a chat: the model's work grows with what it has read.
    formatter = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
    rendered = formatter(messages=[{"role": "user", "content": text}]).prompt
    tokens = llama.tokenize(rendered.encode(), special=True)
    count = 0
    sampling = {"temp" if name == "temperature" else name: value for name, value in SAMPLING.items()}
    for token in llama.generate(tokens, **sampling):
        llama.detokenize([token])
        count += 1
        if count >= max_tokens:
            break
    return count


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
