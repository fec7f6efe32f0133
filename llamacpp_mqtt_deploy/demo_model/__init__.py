"""A tiny language model that comes with the package, so that a first try and the tests need no download."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Gives the GGUF file of the demo model, which llama.cpp maps into memory: it has to be a real file."""
    return Path(__file__).with_name("demo.gguf")
