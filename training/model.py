"""The demo model in PyTorch: the llama architecture, laid out so that its weights go into a GGUF unchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch's own documentation uses
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. About 1.9 M parameters: F16 weights stay under 4 MB."""

    vocab: int = 1280
    width: int = 160
    layers: int = 6
    heads: int = 5  # head size 32: even, and a size that flash attention kernels know
    hidden: int = 384
    context: int = 1024
    rope_base: float = 10000.0
    norm_eps: float = 1e-5


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, with eps inside the root as llama.cpp has it."""

    def __init__(self, width: int, eps: float) -> None:
        """Starts with weights of one."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension in F32."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope_table(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Gives cos and sin, (length, head/2): pair i of a head turns by position * base^(-2i/head)."""
    head = shape.width // shape.heads
    inverse = shape.rope_base ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * inverse
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs (x[2i], x[2i+1]): LLAMA_ROPE_TYPE_NORM, so wq and wk are exported as they are."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Block(nn.Module):
    """One layer: attention and a gated feed-forward, both with a norm before them."""

    def __init__(self, shape: Shape) -> None:
        """Makes the seven matrices, none with a bias."""
        super().__init__()
        width, hidden = shape.width, shape.hidden
        self.heads = shape.heads
        self.attn_norm = RMSNorm(width, shape.norm_eps)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, width, bias=False)
        self.attn_v = nn.Linear(width, width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = RMSNorm(width, shape.norm_eps)
        self.ffn_gate = nn.Linear(width, hidden, bias=False)
        self.ffn_up = nn.Linear(width, hidden, bias=False)
        self.ffn_down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps (batch, length, width) to the same shape; causal."""
        batch, length, width = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            m(h).view(batch, length, self.heads, -1).transpose(1, 2) for m in (self.attn_q, self.attn_k, self.attn_v)
        )
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, length, width))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class DemoModel(nn.Module):
    """Embedding, blocks, norm, and a head that shares the embedding's weights."""

    def __init__(self, shape: Shape) -> None:
        """Draws small random weights; those that write to the residual stream start smaller."""
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocab, shape.width)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = RMSNorm(shape.width, shape.norm_eps)
        cos, sin = rope_table(shape, shape.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                deep = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.03 / ((2 * shape.layers) ** 0.5 if deep else 1))

    def features(self, ids: Tensor) -> Tensor:
        """Gives the normed output of the last block, (batch, length, width)."""
        x = self.token_embd(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output_norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Gives logits, (batch, length, vocab)."""
        return F.linear(self.features(ids), self.token_embd.weight)


def wire_copying(model: DemoModel) -> None:
    """Sets one head of block 0 to look one place back, and one of block 1 to find where the current token stood before
    and repeat what followed it.

    Copying a name needs this pair ("induction heads"). Left to itself a model of this size had not found it after
    2.3 million tokens; wired at the start, training only has to keep and refine it.
    """
    shape, head = model.shape, model.shape.width // model.shape.heads
    inverse = shape.rope_base ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    look, match, read = (
        torch.linalg.qr(torch.randn(shape.width - 1, head))[0].T for _ in range(3)
    )  # orthonormal rows that leave dimension 0 alone
    with torch.no_grad():
        model.token_embd.weight[:, 0] = 0.2  # the same for all tokens: a constant that queries and keys can use
        back, find = model.blk[0], model.blk[1]
        for block in (back, find):
            for matrix in (block.attn_q, block.attn_k, block.attn_v):
                matrix.weight[:head] = 0
            block.attn_output.weight[:, :head] = 0
        # Fast pairs of RoPE, from the constant alone: the score is highest where query and key are one place apart.
        for pair in range(4):
            turn = float(inverse[pair])
            back.attn_k.weight[2 * pair, 0] = 1.5
            back.attn_q.weight[2 * pair, 0] = 1.5 * math.cos(turn)
            back.attn_q.weight[2 * pair + 1, 0] = -1.5 * math.sin(turn)
        back.attn_v.weight[:head, 1:] = look
        back.attn_output.weight[1:, :head] = 0.1 * match.T
        # Slow pairs of RoPE, which hardly turn within a few turns: this token against the one before the key's.
        slow = 12
        find.attn_q.weight[slow:head, 1:] = 2.2 * look[slow:]
        find.attn_k.weight[slow:head, 1:] = 2.2 * match[slow:]
        find.attn_v.weight[:head, 1:] = read
        find.attn_output.weight[1:, :head] = 0.3 * read.T
