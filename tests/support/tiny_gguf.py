"""Writes a tiny model file (llama architecture, random weights, ChatML) with which a real llama.cpp runs in milliseconds."""

from __future__ import annotations

import string
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    'Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and message.reasoning_content %}"
    "<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% endif %}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_TEXT = (
    "the of and to a in is it you that he was for on are with as his they be at one have this from or had by hot but some "
    "what there we can out other were all your when up use word how said an each she which do their time if will way about "
    "many then them would write like so these her long make thing see him two has look more day could go come did my sound "
    "no most number who over know water than call first people may down side been now find any new work part take get place "
    "made live where after back little only round man year came show every good me give our under name very through just "
    "form much great think say help low line before turn cause same mean differ move right boy old too does tell sentence "
    "für schön größer übung café naïve señor garçon élève слово мир дом вода 日本 言葉 漢字 水 한국 단어 😀 🚀 👩‍🚀 ✓ €"
)
WORDS = _TEXT.split()
SPECIALS = ("<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
UNLIKELY = -12.0  # logit of what a random model should not say by itself: bytes (broken UTF-8), control tokens, tags
BLANK = "\u2581"  # how SentencePiece writes a space


def vocabulary() -> tuple[list[str], list[int], list[float]]:
    """Tokens, their types and scores; every merge that builds a word is a token, or the word could not be reached."""
    tokens = ["<unk>", "<s>", "</s>"]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [gguf.TokenType.BYTE] * 256
    tokens += SPECIALS
    types += [gguf.TokenType.CONTROL] * len(SPECIALS)
    tokens += TAGS
    types += [gguf.TokenType.USER_DEFINED] * len(TAGS)
    pieces = dict.fromkeys(c for c in string.printable if c.isprintable() and c != " ")
    pieces[BLANK] = None
    for word in WORDS:
        pieces.update(dict.fromkeys(word))
    for word in WORDS:
        spaced = BLANK + word
        pieces.update(dict.fromkeys(spaced[:end] for end in range(2, len(spaced) + 1)))
    first = len(tokens)
    tokens += pieces
    types += [gguf.TokenType.NORMAL] * len(pieces)
    scores = [0.0] * first + [-float(rank) for rank in range(len(pieces))]
    while len(tokens) % 32:
        tokens.append(f"<unused{len(tokens)}>")
        types.append(gguf.TokenType.UNUSED)
        scores.append(-1e6)
    return tokens, [int(kind) for kind in types], scores


def write_tiny_gguf(
    path: Path,
    *,
    context: int = 32768,
    layers: int = 2,
    width: int = 64,
    seed: int = 1,
    chat_template: str = CHAT_TEMPLATE,
) -> Path:
    """Write the model to `path` and return it; the same arguments give the same bytes.

    It says words and characters, hardly ever a broken one, and never ends by itself: `max_tokens` ends it, or a
    `logit_bias` on `<|im_end|>`. More layers and width make it slower, for tests that cancel in a long prompt.
    """
    tokens, types, scores = vocabulary()
    rng = np.random.default_rng(seed)
    heads = width // 32

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(chat_template)

    # Channel 0 carries the constant 1 past all layers (their rows that would write it are zero), so that column 0 of the
    # output matrix is a bias on each token's logit.
    embedding = matrix(len(tokens), width) * np.float32(np.sqrt(width))
    embedding[:, 0] = 1.0
    output = matrix(len(tokens), width) * np.float32(3.0)
    speakable = np.array([kind == gguf.TokenType.NORMAL for kind in types])
    output[:, 0] = np.where(speakable, 0.0, UNLIKELY)
    ones = np.ones(width, dtype=np.float32)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", output)
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
        for name in ("attn_q", "attn_k", "attn_v"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix(width, width))
        writer.add_tensor(f"blk.{layer}.ffn_gate.weight", matrix(2 * width, width))
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", matrix(2 * width, width))
        into_channels = matrix(width, width), matrix(width, 2 * width)
        for name, weights in zip(("attn_output", "ffn_down"), into_channels, strict=True):
            weights[0, :] = 0.0
            writer.add_tensor(f"blk.{layer}.{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
