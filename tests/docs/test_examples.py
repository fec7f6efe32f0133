"""Every command of the documentation's `console` blocks is run, and what it prints is what the page shows.

`LMD_DOCS=write python -m pytest tests/docs/test_examples.py` writes the outputs into the pages instead.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.docs import shell
from tests.docs.conftest import WorldWith
from tests.docs.pages import PAGES, Block, blocks
from tests.support.services import require_program

pytestmark = [pytest.mark.broker, pytest.mark.engine]

WRITES = os.environ.get("LMD_DOCS") == "write"
CONSOLE = [page for page in PAGES if any(block.language == "console" for block in blocks(page))]


@pytest.mark.parametrize("page", CONSOLE, ids=lambda page: page.name)
def test_the_commands_of_a_page_print_what_it_shows(page: Path, world_with: WorldWith, tmp_path: Path) -> None:
    problems = []
    text = page.read_text("utf-8")
    worker = "lmd run"
    for block in blocks(page):
        if block.language != "console":
            continue
        commands = [step.command for step in shell.steps(block)]
        if len(commands) == 1 and commands[0].startswith("lmd run"):
            worker = commands[0]
        if re.search(r"\bjq ", block.text):
            require_program("jq")
        outputs = _outputs(block, worker, world_with, tmp_path)
        if WRITES:
            text = text.replace(f"```console\n{block.text}```", f"```console\n{shell.written(block, outputs)}```", 1)
        elif found := shell.problem(block, outputs):
            problems.append(f"{block.where}: {found}")
    if WRITES:
        page.write_text(text, "utf-8")
    assert not problems, "\n\n".join(problems)


def _outputs(block: Block, worker: str, world_with: WorldWith, folder: Path) -> list[list[str]]:
    """What the commands print beside the worker that the page started last, or the one that the block's note asks for: some settings,
    or the configuration above."""
    note = block.note("run with")
    if note == "the configuration above":
        above = [each for each in blocks(block.page) if each.language == "toml" and each.line < block.line][-1]
        file = folder / f"{above.line}.toml"
        file.write_text(above.text, "utf-8")
        note = f"LMD_CONFIG={file}"
    world = world_with(note or worker)
    started = world.start_worker("lmd run" if note else worker)
    if block.text.startswith(f"$ {worker}\n"):
        outputs = [started]
    else:
        outputs = shell.run(block, world.environment, str(world.home))
    return [[world.at_home(line) for line in output] for output in outputs]
