"""Writes a GGUF again with its F16 tensors as F32: the same numbers in twice the space."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_f32_copy(source: Path, copy: Path) -> Path:
    import gguf

    reader = gguf.GGUFReader(source)
    out = gguf.GGUFWriter(copy, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # the writer's own
        kind = field.types[0]
        of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        out.add_key_value(field.name, field.contents(), kind, sub_type=of)
    for tensor in reader.tensors:
        out.add_tensor(tensor.name, np.asarray(tensor.data, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return copy
