"""`lmd completion`: what a shell needs to complete the names of commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

NAMES = ("lmd", "llamacpp-mqtt-deploy")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the lines that make SHELL complete `lmd` and `llamacpp-mqtt-deploy`.

    \b
    Examples:
      lmd completion bash > ~/.local/share/bash-completion/completions/lmd
      lmd completion zsh > ~/.zfunc/_lmd
      lmd completion fish > ~/.config/fish/completions/lmd.fish
      eval "$(lmd completion bash)"
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    make = get_completion_class(shell)
    assert make is not None
    for name in NAMES:
        variable = f"_{name.replace('-', '_')}_COMPLETE".upper()
        completion = make(context.find_root().command, {}, name, variable)
        click.echo(completion.source_template % completion.source_vars())
