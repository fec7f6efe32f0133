"""What the documentation says of the code is so: tables, links, tests, options, keys, codes, log lines and figures."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import click
import orjson
import pytest

import llamacpp_mqtt_deploy
from llamacpp_mqtt_deploy import cli
from llamacpp_mqtt_deploy.config import keys
from llamacpp_mqtt_deploy.core.errors import BY_CODE
from llamacpp_mqtt_deploy.core.formats.route_formats import ROUTE_FORMATS, TEXT_FORMATS, WHOLE_FORMATS
from llamacpp_mqtt_deploy.core.formats.route_rendering import RouteRendering
from llamacpp_mqtt_deploy.schema.event_models import REJECTIONS
from tests.docs.pages import PAGES, ROOT, all_blocks, anchors, blocks, links
from tests.package import test_units as units
from tests.support.answer_events import answered, occasion
from tests.support.services import require_program

README = ROOT / "README.md"
DOCS = ROOT / "docs"
TROUBLE = DOCS / "troubleshooting.md"


def page_name(page: Path) -> str:
    return page.name


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_those_of_the_code() -> None:
    different = [page.name for page, wanted in generator().pages().items() if page.read_text("utf-8") != wanted]
    assert different == [], "run `make docs`"


def test_every_generated_block_stands_on_some_page() -> None:
    text = "".join(page.read_text("utf-8") for page in DOCS.glob("*.md"))
    assert [name for name in generator().BLOCKS if f"<!-- generated: {name} -->" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in links(README)}
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= linked


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_test_that_is_named_exists(page: Path) -> None:
    missing = []
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text("utf-8")):
        path = ROOT / file
        if not path.exists() or (name and f"def {name}(" not in path.read_text("utf-8")):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_the_table_of_formats_shows_what_each_publishes() -> None:
    page = (DOCS / "protocol.md").read_text("utf-8")
    table = page.partition("| format | what is published")[2].partition("\n\n")[0]
    rows = {row.split("`")[1]: row for row in table.splitlines()[2:]}
    assert set(rows) == set(ROUTE_FORMATS)
    for name in set(rows) - {"events"} - TEXT_FORMATS:
        told = RouteRendering(name, occasion(session="s1"))
        events = answered(("content", "It is"), ("content", " noon.")).events
        parts = [part.decode() for event in events for part in told.parts(orjson.dumps(event))]
        shown = [text for text in rows[name].split("`")[2:] if text.startswith("{") and "SENTENCE" not in text]
        assert len(shown) >= (1 if name in WHOLE_FORMATS else 2)
        for text in shown:
            begin, _, end = text.partition(", ...")
            assert any(part.startswith(begin.removesuffix("}")) and part.endswith(end) for part in parts), text


def test_every_promise_has_its_test() -> None:
    page = (DOCS / "proofs.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| promise"))]
    assert len(rows) > 15
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+` \|$", row)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_and_option_that_is_named_exists(page: Path) -> None:
    unknown = []
    text = re.sub(r"\\\n\s*", " ", page.read_text("utf-8"))
    for name, rest in re.findall(r"\blmd (\w+)\b([^`|\n]*)", text):
        if name not in cli.COMMANDS:
            continue  # a sentence about lmd
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown += [f"lmd {name} {option}" for option in re.findall(r"(?<=\s)--[a-z-]+", rest) if option not in known]
    assert unknown == []


def test_the_readme_is_read_in_five_minutes() -> None:
    """What is longer has a page in docs/."""
    assert len(README.read_bytes()) < 13_000


def test_the_readme_names_every_command() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert [name for name in cli.COMMANDS if f"lmd {name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_target_of_make_that_is_named_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)\b(?=[`\s]*(?:`|$|#| {2}))", page.read_text("utf-8"), re.MULTILINE))
    assert [name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_key_that_is_named_exists(page: Path) -> None:
    sections = {key.path[0] for key in keys.keys().values()}
    named = set(re.findall(rf"`((?:{'|'.join(sorted(sections))})\.[a-z_.]+)(?: = [^`]*)?`", page.read_text("utf-8")))
    named |= set(re.findall(r"--set '?([a-z_.]+)=", page.read_text("utf-8")))
    # Fields of the status, an action of Home Assistant, and the mistake that a page shows.
    named -= {"engine.detail", "engine.backend", "mqtt.publish", "engine.slot"}
    named = {name for name in named if not name.endswith((".py", ".conf", ".js")) and f'"{name}"' not in code()}
    assert [name for name in sorted(named) if keys.find(name.split(".")) is None] == []


@cache
def code() -> str:
    """All of the package as one text; log lines stand in it in quotes."""
    package = Path(llamacpp_mqtt_deploy.__file__).parent
    return "".join(file.read_text("utf-8") for file in package.rglob("*.py"))


def test_every_error_code_is_explained() -> None:
    text = TROUBLE.read_text("utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert [code for code in BY_CODE if code not in rows] == []
    assert [code for code in REJECTIONS if f"`{code}`" not in text] == []


def test_every_log_line_that_is_explained_exists() -> None:
    section = TROUBLE.read_text("utf-8").partition("## Log lines")[2].partition("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\S+?)`", row)
    }
    assert len(named) > 20
    assert [name for name in sorted(named) if f'"{name}"' not in code()] == []


def test_every_exit_code_of_run_and_ask_is_explained() -> None:
    section = TROUBLE.read_text("utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    for name in ("run", "ask"):
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None
        told = re.findall(r"^ +(\d+) {2,}", (command.help or "").partition("Exit codes")[2], re.MULTILINE)
        assert told
        assert [code for code in told if f"\n| {code} |" not in section] == []


@pytest.mark.parametrize(
    "label,unit,drop_ins",
    [
        ("`llamacpp-mqtt-deploy.service`", units.DAEMON, ()),
        ("... with `local-only.conf` (broker and engine on this machine)", units.DAEMON, ("local-only.conf",)),
        ("... with `engine-inside.conf` and `gpu.conf`", units.DAEMON, ("engine-inside.conf", "gpu.conf")),
        ("`llama-server.service`", units.SERVER, ()),
        ("... with `gpu.conf`", units.SERVER, ("gpu.conf",)),
        ("`llamacpp-mqtt-gateway.service`", units.GATEWAY, ()),
    ],
)
def test_a_figure_of_the_sandbox_is_the_measured_one(
    label: str, unit: Path, drop_ins: tuple[str, ...], tmp_path: Path
) -> None:
    require_program("systemd-analyze")
    shown = dict(re.findall(r"^\| (.+?) \| (\d\.\d) \|$", (DOCS / "service.md").read_text("utf-8"), re.MULTILINE))
    copy = units.installed(tmp_path, unit, *(units.FOLDER / "drop-ins" / name for name in drop_ins))
    # A newer systemd than the page's 252 knows more directives and may count differently.
    assert units.exposure(copy) == pytest.approx(float(shown[label]), abs=0.3)


def test_the_threads_have_the_names_that_are_listed() -> None:
    section = (DOCS / "architecture.md").read_text("utf-8").partition("## Threads")[2].partition("\n## ")[0]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\S+?)`", row)
    }
    started = set(re.findall(r'name(?:: str)? ?= ?f?"([a-z-]+?)(?:\{[^"]*)?"', code()))
    assert {"mqtt-link", "intake"} <= listed
    assert [name for name in sorted(listed) if name.removesuffix("N") not in started] == []
    # What a worker's process starts is listed; the client and the helper beside a managed server are other processes.
    ours = {
        name
        for folder in ("worker", "service", "metrics", "mqtt", "engines", "stores", ".")
        for file in (Path(llamacpp_mqtt_deploy.__file__).parent / folder).glob("**/*.py" if folder != "." else "*.py")
        for name in re.findall(r'Thread\([^)]*name=f?"([a-z-]+)', file.read_text("utf-8"))
        if file.name != "wheel_server.py"
    }
    assert [name for name in sorted(ours) if name not in {each.removesuffix("N") for each in listed}] == []


def test_files_of_the_repository_that_are_named_exist() -> None:
    """By their path in the repository, or by that in the package (`worker/intake.py`)."""
    package = Path(llamacpp_mqtt_deploy.__file__).parent
    folders = "|".join(sorted(path.name for path in [*ROOT.iterdir(), *package.iterdir()] if path.is_dir()))
    named = {
        name
        for page in PAGES
        for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text("utf-8"))
    }  # fmt: skip
    assert "core/events.py" in named
    assert [name for name in sorted(named) if not (ROOT / name).exists() and not (package / name).exists()] == []


def test_the_drawing_of_the_folders_has_every_folder() -> None:
    drawn = set(re.findall(r">([\w.]+/?)</text>", (DOCS / "architecture.svg").read_text("utf-8")))
    package = Path(llamacpp_mqtt_deploy.__file__).parent
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    files = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    assert drawn == folders | files


def test_pages_are_plain() -> None:
    """No emojis, no words of advertising, lines that a person can read in a terminal."""
    words = re.compile(
        r"\b(blazing|seamless|powerful|cutting-edge|simply|effortless|robust|awesome|revolution)", re.IGNORECASE
    )
    for page in PAGES:
        text = page.read_text("utf-8")
        assert not words.search(text), page.name
        outside = "".join(
            char
            for char in re.sub(r"```.*?```", "", text, flags=re.DOTALL)
            if ord(char) > 0x2FFF or 0x2600 <= ord(char) < 0x2800
        )
        assert outside == "", page.name


def test_fenced_blocks_are_closed_and_named() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        assert text.count("```") % 2 == 0, page.name
    assert {block.language for page in PAGES for block in blocks(page)} <= {
        "console", "sh", "python", "toml", "json", "html", "yaml", "cpp", "mermaid", "js", ""
    }  # fmt: skip
    assert all_blocks("console")
