"""The documentation as tests see it: pages, their fenced blocks, their headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")), *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NOTE = re.compile(r"<!-- ([a-z ]+): (.*?) -->\n$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `notes` are the comments right above it (`<!-- run with: NAME=value -->`)."""

    page: Path
    line: int
    language: str
    text: str
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def note(self, name: str) -> str | None:
        return dict(self.notes).get(name)


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for found in _FENCE.finditer(text):
        notes: list[tuple[str, str]] = []
        before = text[: found.start()]
        while note := _NOTE.search(before):
            notes.append((note[1], note[2]))
            before = before[: note.start()]
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2], tuple(notes))


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings as GitHub makes them."""
    made: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        made.add(plain)
    return made


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"[a-z]+://|mailto:", link)]
