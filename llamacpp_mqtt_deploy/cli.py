"""The command line: `llamacpp-mqtt-deploy`, or `lmd` for short; loads a command's code only when that command is called."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from llamacpp_mqtt_deploy import __version__

# Name -> one line for `lmd --help`. Each is `command` in llamacpp_mqtt_deploy/commands/NAME.py. Written here, so that help and
# version import none of them: together they load the whole program.
COMMANDS: Mapping[str, str] = {
    "run": "Run the daemon: connect the engine to the broker.",
    "ask": "Ask one question and stream the answer.",
    "chat": "Talk to the model.",
    "status": "Show the workers on the bus and how they are.",
    "top": "Watch all workers: slots, queues, speed, problems.",
    "usage": "Show who has spent how many tokens, by user and day.",
    "admin": "Drain a worker, resume it, reload it and the like.",
    "check": "Try configuration, broker, permissions and engine, and say what to do.",
    "bench": "Measure how fast a live deployment answers.",
    "config": "Show the effective configuration and where each value comes from.",
    "gateway": "Serve OpenAI, Anthropic and Ollama programs, a WebSocket and curl over HTTP.",
    "demo": "A broker, a small model and a daemon on this machine, to play with.",
    "completion": "Print the completion script for bash, zsh or fish.",
}


CANCELLED = 130
"""The exit code of every command after Ctrl-C; as in `commands.terminal`, which would have to be loaded for it."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        open_closed_streams()
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _ctrl_c_as_documented():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _ctrl_c_as_documented():
            try:
                return super().invoke(ctx)
            except click.NoSuchOption as error:
                key = error.option_name.lstrip("-")
                if (
                    "." in key
                    and error.ctx is not None
                    and any("--set" in each.opts for each in error.ctx.command.params)
                ):
                    told = f"{error.message} A key of the configuration is set by --set {key}=VALUE."
                    raise click.NoSuchOption(error.option_name, told, ctx=error.ctx) from None
                raise

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = f"{__package__}.commands.{cmd_name}"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                raise click.ClickException(f"this installation has no `{cmd_name}` command") from None
            raise click.ClickException(
                f"`{cmd_name}` needs the Python package {error.name!r}, which is missing"
            ) from error
        command: click.Command = module.command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and name not in COMMANDS and not name.startswith("-"):
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=1)
            ctx.fail(f"there is no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


@contextlib.contextmanager
def _ctrl_c_as_documented() -> Iterator[None]:
    """Ctrl-C where no command is there to take it, as while its modules load; click would say `Aborted!` and end with 1."""
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        raise click.exceptions.Exit(CANCELLED) from None


def open_closed_streams() -> None:
    """Have /dev/null for each standard stream that is closed (`lmd status >&-`, a careless service manager).

    The next file or socket would get its number otherwise, and what is printed would go there; Python's streams are None.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)  # for child processes too; the same number only becomes inheritable
            if opened != number:
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8", errors="replace"))  # noqa: SIM115 - for good


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="A first try without any set-up: lmd demo. Every key of the configuration: lmd config --example",
)
@click.version_option(__version__, prog_name="llamacpp-mqtt-deploy")
def main() -> None:
    """Put a local language model on an MQTT bus: requests in, token streams out."""
