"""The picture of `lmd top` in docs/ is what the command draws."""

from __future__ import annotations

import html
import importlib.util
import re

from tests.docs.pages import ROOT


def _words(svg: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_the_picture_shows_what_the_command_draws_today() -> None:
    spec = importlib.util.spec_from_file_location("top_picture", ROOT / "docs" / "top_picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept, drawn = (ROOT / "docs" / "top.svg").read_text("utf-8"), module.picture()
    assert _words(drawn) == _words(kept), "run `make top-picture`"
    assert "kitchen" in "".join(_words(kept))
    assert "font-face" not in kept
