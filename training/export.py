"""Writes a checkpoint as a GGUF that every llama.cpp engine loads: `python export.py checkpoint.pt demo.gguf`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
import torch
from dialogues import SEED
from model import DemoModel, Shape
from tokenizer import BOS, IM_END, UNK, Vocabulary

TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def load(checkpoint: Path) -> tuple[DemoModel, Vocabulary, list[dict[str, float]]]:
    """Gives the model with the weights as the GGUF will hold them (matrices rounded to F16), and its vocabulary."""
    state = torch.load(checkpoint)
    model = DemoModel(Shape(**state["shape"]))
    model.load_state_dict(state["weights"])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(weight.half().float())
    return model.eval(), Vocabulary(*state["vocabulary"]), state["log"]


def write(model: DemoModel, vocabulary: Vocabulary, path: Path) -> None:
    """Writes keys, vocabulary and tensors; matrices as F16, norms as F32 because llama.cpp wants them so."""
    shape = model.shape
    out = gguf.GGUFWriter(path, "llama")
    out.add_type(gguf.GGUFType.MODEL)
    out.add_name("llamacpp-mqtt-deploy demo")
    out.add_description("A tiny chat model that knows one project: llamacpp-mqtt-deploy")
    out.add_license("MIT")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    out.add_context_length(shape.context)
    out.add_embedding_length(shape.width)
    out.add_block_count(shape.layers)
    out.add_feed_forward_length(shape.hidden)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.heads)
    out.add_rope_dimension_count(shape.width // shape.heads)
    out.add_rope_freq_base(shape.rope_base)
    out.add_layer_norm_rms_eps(shape.norm_eps)
    out.add_vocab_size(shape.vocab)

    out.add_tokenizer_model("llama")
    out.add_token_list(vocabulary.tokens)
    out.add_token_scores(vocabulary.scores)
    out.add_token_types(vocabulary.types)
    out.add_bos_token_id(vocabulary.ids[BOS])
    out.add_eos_token_id(vocabulary.ids[IM_END])
    out.add_unk_token_id(vocabulary.ids[UNK])
    out.add_add_bos_token(True)
    out.add_add_space_prefix(False)
    out.add_chat_template(TEMPLATE.read_text())

    for name, weight in model.named_parameters():
        values = weight.detach().contiguous().numpy()
        out.add_tensor(name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> None:
    """Exports, and says how large the file became."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--figures", type=Path, help="write sizes and losses into this JSON file, beside what it holds")
    options = parser.parse_args()
    model, vocabulary, log = load(options.checkpoint)
    write(model, vocabulary, options.gguf)
    parameters = sum(weight.numel() for weight in model.parameters())
    size = options.gguf.stat().st_size
    print(f"{size} bytes, {parameters} parameters")
    if options.figures:
        known = json.loads(options.figures.read_text()) if options.figures.exists() else {}
        known["model"] = {"parameters": parameters, "bytes": size, **asdict(model.shape)}
        known["training"] = {"seed": SEED, "final_loss": log[-1]["loss"], "log": log}
        options.figures.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
