"""Trains the demo model on the CPU and writes a checkpoint: `python train.py --out checkpoint.pt`.

The loss counts only what the assistant writes, `<|im_end|>` included, so that the model learns to stop.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch's own documentation uses
from dialogues import SEED, Writer, render
from model import DemoModel, Shape, wire_copying
from tokenizer import BOS, BYTE_TYPE, Tokenizer, Vocabulary, learn

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY_DIALOGUES = 12_000  # enough that every frame and topic was seen many times
POOL_DIALOGUES = 1024  # sorted by length and cut into batches, so that little is padding
BATCH_TOKENS = 3072
MATRIX_LR, OTHER_LR = 0.015, 0.004  # Muon for the matrices of the blocks, AdamW for embedding and norms
WARMUP_STEPS = 60
IGNORE = -100
# Sequences that repeat themselves: first alone, until the heads of model.wire_copying are strong enough to live on
# among dialogues (without that they are lost within 300 steps, measured), then a few of them to keep the heads.
DRILL_STEPS, DRILL_SHARE = 120, 0.08


def example(writer: Writer, tokenizer: Tokenizer, limit: int) -> tuple[list[int], list[int]]:
    """Gives ids and targets of one conversation of at most `limit` tokens; later turns are left out to fit."""
    dialogue = writer.dialogue()
    while True:
        ids: list[int] = []
        learned: list[bool] = []
        for text, flag in render(dialogue):
            piece = tokenizer.encode(text)
            ids += piece
            learned += [flag] * len(piece)
        if len(ids) <= limit + 1:
            break
        dialogue.turns.pop()
    targets = [token if flag else IGNORE for token, flag in zip(ids, learned, strict=True)]
    return ids[:-1], targets[1:]


def drill(rng: random.Random, vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Gives a sequence of random tokens that repeats itself; what repeats has to be predicted."""
    first = vocabulary.types.index(BYTE_TYPE) + 256
    period = rng.randrange(4, 60)
    once = [rng.randrange(first, len(vocabulary)) for _ in range(period)]
    times = max(2, rng.randrange(60, 240) // period)
    ids = [vocabulary.ids[BOS], *(once * times)]
    targets = [IGNORE] * (period + 2) + ids[period + 2 :]
    return ids[:-1], targets[1:]


def batches(
    seed: int, tokenizer: Tokenizer, limit: int, drill_steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (ids, targets) without end, each of about BATCH_TOKENS; the first `drill_steps` hold drills alone."""
    writer, order = Writer(seed), random.Random(seed + 1)
    for _ in range(drill_steps):
        yield stacked([drill(order, tokenizer.vocabulary) for _ in range(12)])
    while True:
        pool = [example(writer, tokenizer, limit) for _ in range(POOL_DIALOGUES)]
        pool += [drill(order, tokenizer.vocabulary) for _ in range(round(DRILL_SHARE * POOL_DIALOGUES))]
        pool.sort(key=lambda item: len(item[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for item in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(item[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(item)
        order.shuffle(groups)
        for group in groups:
            yield stacked(group)


def stacked(group: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes one batch, filled up to the longest; what fills is not learned."""
    longest = max(len(ids) for ids, _ in group)
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    targets = torch.full((len(group), longest), IGNORE)
    for row, (left, right) in enumerate(group):
        ids[row, : len(left)] = torch.tensor(left)
        targets[row, : len(right)] = torch.tensor(right)
    return ids, targets


def loss_of(model: DemoModel, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Gives the mean cross entropy over what the assistant writes; the head runs only at those places."""
    with torch.autocast("cpu", torch.bfloat16):
        features = model.features(ids)
        wanted = targets != IGNORE
        logits = F.linear(features[wanted], model.token_embd.weight)
    return F.cross_entropy(logits.float(), targets[wanted])


def main() -> None:
    """Learns the vocabulary, then the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--init", type=Path, help="go on from this checkpoint, with its vocabulary")
    parser.add_argument("--lr-scale", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    shape = Shape()
    model = DemoModel(shape)
    before: list[dict[str, float]] = []
    if options.init:
        state = torch.load(options.init)
        vocabulary = Vocabulary(*state["vocabulary"])
        model.load_state_dict(state["weights"])
        before = state["log"]
    else:
        wire_copying(model)
        writer = Writer(options.seed + 2)
        vocabulary = learn(
            ("".join(text for text, _ in render(writer.dialogue())) for _ in range(VOCABULARY_DIALOGUES)), shape.vocab
        )
    tokenizer = Tokenizer(vocabulary)
    matrices = [weight for name, weight in model.named_parameters() if name.startswith("blk.") and weight.dim() > 1]
    others = [weight for name, weight in model.named_parameters() if not (name.startswith("blk.") and weight.dim() > 1)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LR * options.lr_scale, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_LR * options.lr_scale, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * min(1.0, 1.4 * (1 - step / options.steps) + 0.005),
        )
        for optimizer in optimizers
    ]

    def save(log: list[dict[str, float]]) -> None:
        rows = (vocabulary.tokens, vocabulary.scores, vocabulary.types)
        torch.save({"shape": asdict(shape), "vocabulary": rows, "weights": model.state_dict(), "log": log}, options.out)

    source = batches(options.seed + len(before), tokenizer, shape.context, 0 if options.init else DRILL_STEPS)
    log = before
    begin, tokens, total, count = time.monotonic(), 0, 0.0, 0
    for step, (ids, targets) in enumerate(source):
        if step == options.steps:
            break
        loss = loss_of(model, ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, schedule, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate.step()
        tokens += ids.numel()
        total, count = total + loss.item(), count + 1
        if step % 50 == 49:
            seconds = time.monotonic() - begin
            log.append({"step": step + 1, "loss": round(total / count, 4), "tokens": tokens, "seconds": round(seconds)})
            print(json.dumps(log[-1]), flush=True)
            total, count = 0.0, 0
        if step % 200 == 199:
            save(log)
    save(log)


if __name__ == "__main__":
    main()
