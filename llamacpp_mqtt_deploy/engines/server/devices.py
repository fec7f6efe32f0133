"""What a server computes on, as far as it tells: most tell nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# One gauge for each device that holds weights; builds of llama-server that have it name the device there.
_WEIGHTS = re.compile(r'^llamacpp:memory_model_bytes\{device="([A-Za-z]+)\d*"\} ([\d.e+]+)$', re.MULTILINE)
_NAMES = {"mtl": "metal", "hip": "rocm", "host": "cpu"}


def backend_of_metrics(metrics: str) -> str:
    """The device that holds most of the weights; `unknown` where no gauge tells."""
    weights: dict[str, float] = {}
    for device, size in _WEIGHTS.findall(metrics):
        name = _NAMES.get(device.lower(), device.lower())
        try:
            weights[name] = weights.get(name, 0.0) + float(size)
        except ValueError:
            continue
    return max(weights, key=lambda name: (weights[name], name)) if weights else "unknown"


def backend_of_ollama(running: Mapping[str, Any], model: str | None) -> tuple[str, str | None]:
    """Backend and the model's share on the GPU, of Ollama's `/api/ps`; a model that is not loaded says nothing."""
    models = running.get("models")
    entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    named = [entry for entry in entries if model in (None, entry.get("name"), entry.get("model"))]
    for entry in named[:1]:
        size, on_gpu = entry.get("size"), entry.get("size_vram")
        if isinstance(size, int) and isinstance(on_gpu, int) and size > 0:
            share = min(100, max(0, on_gpu * 100 // size))
            return ("gpu" if share else "cpu"), f"{share}%"
    return "unknown", None
