"""The command line: help, exit codes, `config` in its forms, and the files that are generated from the settings."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from llamacpp_mqtt_deploy import __version__
from llamacpp_mqtt_deploy.cli import COMMANDS, main
from llamacpp_mqtt_deploy.commands.config import _print_rich, example, schema
from llamacpp_mqtt_deploy.config import keys
from llamacpp_mqtt_deploy.config.settings import Settings
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
LMD = [sys.executable, "-m", "llamacpp_mqtt_deploy"]


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LMD_")} | {"NO_COLOR": "1"}


def lmd(
    *args: str, environ: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LMD, *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env=clean_environment() | dict(environ or {}),
    )


def uncommented(text: str) -> str:
    return re.sub(r"(?m)^#(?=[a-z\[])", "", text)


def test_version_and_help_work() -> None:
    assert lmd("--version").stdout == f"llamacpp-mqtt-deploy, version {__version__}\n"
    text = CliRunner().invoke(main, ["--help"]).stdout
    for name in COMMANDS:
        assert re.search(rf"(?m)^  {name} ", text)


def test_every_command_that_help_lists_is_there_and_explains_itself() -> None:
    for name in COMMANDS:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0, f"{name}: {result.output}"
        assert "Examples:" in result.stdout, f"{name} --help shows no example"


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e400"])
def test_no_option_takes_a_number_that_json_does_not_have(number: str) -> None:
    asked = 0
    for words, parameter in _parameters(main, ()):
        if isinstance(parameter.type, click.types.FloatParamType):
            given = [f"{parameter.opts[0]}={number}"] if isinstance(parameter, click.Option) else ["--", number]
            result = CliRunner().invoke(main, [*words, *given])
            name = parameter.opts[0] if isinstance(parameter, click.Option) else str(parameter.name).upper()
            assert result.exit_code == 2, (words, given)
            assert re.search(rf"Invalid value for '\[?{name}", result.stderr), result.stderr
            asked += 1
    assert asked > 15


def _parameters(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Parameter]]:
    """The parameters of a command and of all below it, each with the words that call its command."""
    yield from ((words, parameter) for parameter in command.params)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from _parameters(below, (*words, name))


def test_the_man_page_names_every_command_and_option() -> None:
    page = (ROOT / "docs" / "lmd.1").read_text().replace("\\-", "-")
    for name in COMMANDS:
        assert f'.SS "lmd {name} ' in page, "run `make docs`"
        command = main.get_command(click.Context(main), name)
        assert command is not None
        for parameter in command.params:
            assert all(option in page for option in parameter.opts if option.startswith("--"))
    assert '.SS "lmd admin drain ' in page


def test_a_man_page_without_mistakes() -> None:
    program = shutil.which("man")
    if program is None:
        pytest.skip("man is not installed")
    page = ROOT / "docs" / "lmd.1"
    result = subprocess.run(
        [program, "--warnings=w", "-l", str(page)], capture_output=True, text=True, timeout=60, check=True,
        env=clean_environment() | {"MANWIDTH": "80", "LC_ALL": "C.UTF-8", "MANPAGER": "cat"},
    )  # fmt: skip
    assert result.stderr == ""
    assert "lmd admin drain" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_finds_its_completion(shell: str) -> None:
    script = lmd("completion", shell)
    assert script.returncode == 0
    for name in ("lmd", "llamacpp-mqtt-deploy"):
        assert re.search(rf"(?m)(\s|^){name}\b", script.stdout)
    if program := shutil.which(shell):
        assert subprocess.run([program, "-n"], input=script.stdout, text=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "before,begun,offered",
    [
        ([], "st", "status"),
        (["admin"], "log", "log-level"),
        (["admin", "log-level"], "d", "debug"),
        (["ask"], "--no-s", "--no-stream"),
    ],
)
def test_words_are_completed(before: list[str], begun: str, offered: str) -> None:
    completion = BashComplete(main, {}, "lmd", "_LMD_COMPLETE")
    assert [found.value for found in completion.get_completions(before, begun)] == [offered]


@pytest.mark.parametrize(
    "closed,words,code",
    [
        ("<&-", ["ask"], 2),
        (">&-", ["config"], 0),
        (">&-", ["status"], 3),
        ("2>&-", ["status"], 3),
        ("<&- >&- 2>&-", ["run", "--set", "limits.startup_timeout_s=0.1"], 3),
    ],
)
def test_a_closed_stream_is_read_as_empty_and_written_to_nobody(
    closed: str, words: list[str], code: int, tmp_path: Path
) -> None:
    flags = ["--set", "mqtt.host=127.0.0.1", "--set", f"mqtt.port={free_port()}"]
    flags += ["--set", f"sessions.path={tmp_path}/state.db"] if words[0] == "run" else []
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *LMD, *words, *flags],
        capture_output=True, text=True, timeout=60, check=False, env=clean_environment() | {"LMD_CONFIG": os.devnull},
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    if words == ["ask"]:
        assert "The prompt is empty." in ended.stderr


def test_a_file_of_its_own_never_becomes_a_standard_stream(tmp_path: Path) -> None:
    program = (
        "import os; from llamacpp_mqtt_deploy.cli import open_closed_streams; open_closed_streams();"
        f"assert os.open({str(tmp_path)!r}, os.O_RDONLY) > 2; print('seen by nobody');"
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(input.__name__)'], check=True)"
    )
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        ended = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", program], check=False)
        assert ended.returncode == 0, closed


INTERRUPTING = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGINT)
sys.path.remove(os.path.dirname(os.path.dirname(__file__)))
del sys.modules["click"]
import click
"""
"""A module in front of click, in whose loading somebody presses Ctrl-C."""


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_the_command_line_loads_ends_as_documented(tmp_path: Path, ignored: bool) -> None:
    (tmp_path / "click").mkdir()
    (tmp_path / "click" / "__init__.py").write_text(INTERRUPTING)
    path = os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["lmd"]
    module, function = script.split(":")
    for program in (["-m", "llamacpp_mqtt_deploy"], ["-c", f"from {module} import {function}; {function}()"]):
        ended = subprocess.run(
            ["sh", "-c", 'trap "" INT; exec "$@"' if ignored else 'exec "$@"', "sh", sys.executable, *program, "--version"],
            capture_output=True, text=True, timeout=60, check=False, env=clean_environment() | {"PYTHONPATH": path},
        )  # fmt: skip
        assert ended.stderr == ""
        if ignored:
            assert (ended.returncode, ended.stdout.split()[-1:]) == (0, [__version__])
        else:
            assert (ended.returncode, ended.stdout) == (130, "")


def test_ctrl_c_while_a_commands_modules_load_ends_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llamacpp_mqtt_deploy.cli.importlib.import_module", interrupted)
    ended = CliRunner().invoke(main, ["status"])
    assert (ended.exit_code, ended.output) == (130, "")


def test_ctrl_c_that_a_command_does_not_take_ends_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llamacpp_mqtt_deploy.config.loading.load", interrupted)
    for words in (["status"], ["admin", "drain"], ["config"], ["ask", "hi"]):
        ended = CliRunner().invoke(main, words)
        assert (ended.exit_code, ended.output) == (130, ""), words


def test_a_mistyped_command_is_recognised() -> None:
    result = lmd("cofnig")
    assert result.returncode == 2
    assert "did you mean 'config'?" in result.stderr


def test_a_key_of_the_configuration_given_as_an_option_is_told_how_it_is_set() -> None:
    result = lmd("run", "--engine.kind", "inprocess")
    assert result.returncode == 2
    assert (
        "No such option '--engine.kind'. A key of the configuration is set by --set engine.kind=VALUE." in result.stderr
    )
    assert "--set" not in lmd("completion", "--engine.kind").stderr


def test_run_documents_its_exit_codes() -> None:
    text = CliRunner().invoke(main, ["run", "--help"]).stdout
    for code in "0123":
        assert re.search(rf"(?m)^ +{code}  ", text)


@pytest.mark.parametrize("command", ["run", "config"])
def test_a_wrong_configuration_is_exit_code_2_with_one_line_for_each_field(command: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[mqtt]\nport = "x"\nhsot = "\\u001b[31m"\n')
    result = lmd(command, "--config", str(file))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[1:3] == [
        f'  [mqtt] port: expected a whole number from 1 to 65535, found "x" (file {file}:2)',
        f"  [mqtt] hsot: unknown key; did you mean host? (file {file}:3)",
    ]


def test_config_on_a_pipe_is_plain_lines_with_origins_and_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[mqtt]\nhost = "broker"\nusername = "u"\n')
    result = lmd("config", "-c", str(file), "--set", "engine.slots=2", environ={"LMD_MQTT__PASSWORD": "hunter2"})
    rows = {line.split()[0]: line.split(None, 2)[1:] for line in result.stdout.splitlines()[1:]}
    assert rows["mqtt.host"] == ['"broker"', f"file {file}:2"]
    assert rows["mqtt.password"] == ["********", "environment LMD_MQTT__PASSWORD"]
    assert rows["engine.slots"] == ["2", "flag"]
    assert "\x1b" not in result.stdout
    assert "hunter2" not in result.stdout + result.stderr
    assert "unencrypted" in result.stderr


def test_config_as_json_can_be_read_by_programs() -> None:
    result = lmd("config", "--json", environ={"LMD_MQTT__PASSWORD": "hunter2", "LMD_MQTT__USERNAME": "u"})
    found = json.loads(result.stdout)
    assert found["mqtt.keepalive_s"] == {"value": 30, "origin": "default"}
    assert found["mqtt.password"] == {"value": "********", "origin": "environment LMD_MQTT__PASSWORD"}


def test_config_on_a_terminal_is_a_table() -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*LMD, "config"], stdout=terminal, stderr=terminal, env=clean_environment() | {"TERM": "xterm"}
    )
    os.close(terminal)
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(controller, 65536)
            except OSError:  # Linux' way to say that nobody writes any more
                return
            if not piece:
                return
            shown.append(piece)

    reader = threading.Thread(target=read, name="terminal-reader")
    reader.start()
    assert process.wait(60) == 0
    reader.join(10)
    os.close(controller)
    text = b"".join(shown).decode()
    assert "configuration file:" in text
    assert "mqtt.host" in text


def test_config_on_80_columns_breaks_no_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = '"/var/lib/llama-models/a-model-with-a-name-that-is-rather-long-q4_k_m.gguf"'
    rows = [(key, long, "file /etc/llamacpp-mqtt-deploy/config.toml:10") for key in sorted(keys.keys())]
    _print_rich(rows, "/etc/llamacpp-mqtt-deploy/config.toml")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert set(keys.keys()) <= {line.split()[0] for line in lines if line.strip()}


def test_the_example_file_is_up_to_date() -> None:
    assert (ROOT / "config" / "config.example.toml").read_text() == example(), "run `make config-example`"


def test_the_example_file_sets_nothing_until_it_is_edited() -> None:
    assert tomllib.loads(example()) == {}


def test_the_example_names_every_key_and_each_is_valid() -> None:
    found = tomllib.loads(uncommented(example()))
    names = {".".join(path) for path, _ in keys.leaves(found)}
    assert names == set(keys.keys())
    Settings(**found)


def test_every_key_has_a_description() -> None:
    assert [key.dotted for key in keys.keys().values() if len(key.description) < 10] == []
    assert [table.path for table in keys.tables() if table.path[0] not in Settings.model_fields] == []


def test_the_schema_accepts_the_example_and_refuses_what_loading_refuses() -> None:
    found = json.loads(schema())
    jsonschema.Draft202012Validator.check_schema(found)
    validator = jsonschema.Draft202012Validator(found)
    assert list(validator.iter_errors(tomllib.loads(uncommented(example())))) == []
    refused: tuple[dict[str, Any], ...] = (
        {"mqtt": {"port": 0}},
        {"mqtt": {"hsot": "x"}},
        {"wrong": {}},
        {"engine": {"kind": "x"}},
    )
    for wrong in refused:
        assert list(validator.iter_errors(wrong)) != []
