"""The options that several commands share: which file, which overrides; and how configuration problems are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.config.loading import Loaded

WRONG_CONFIGURATION = 2

F = TypeVar("F", bound=Callable[..., Any])


def set_option(function: F) -> F:
    """Add `--set KEY=VALUE` (repeatable) as the argument `overrides`."""
    return click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_overrides,
        help="Set one key, as in --set engine.url=http://gpu:8080. Wins over environment and file. May be repeated.",
    )(function)


def config_options(function: F) -> F:
    """Add `--config FILE` and `--set KEY=VALUE` (repeatable) as the arguments `config_file` and `overrides`."""
    return click.option(
        "-c",
        "--config",
        "config_file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Configuration file. Else $LMD_CONFIG, ./llamacpp-mqtt-deploy.toml or /etc/llamacpp-mqtt-deploy/config.toml.",
    )(set_option(function))


def load_or_exit(config_file: Path | None, overrides: Mapping[str, str]) -> Loaded:
    """The loaded settings; a wrong configuration is told on stderr, one line for each field, and ends with exit code 2."""
    from llamacpp_mqtt_deploy.config.loading import ConfigurationError, load

    try:
        return load(config_file, overrides)
    except ConfigurationError as error:
        tell_problems(error.problems)


def tell_problems(problems: tuple[str, ...]) -> NoReturn:
    """Print the problems of a configuration and end with exit code 2."""
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    click.echo(f"The configuration has {count}:", err=True)
    for problem in problems:
        click.echo(f"  {_one_line(problem)}", err=True)
    click.echo("`lmd config --example` prints every key with its meaning.", err=True)
    raise click.exceptions.Exit(WRONG_CONFIGURATION)


def finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """The callback of every option that is a number: click takes `nan` for any range, and `inf` where no end is given."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a finite number; found {value}")
    return value


def _overrides(_: click.Context, __: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    overrides: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise click.BadParameter(f"expected KEY=VALUE, as in engine.slots=2; found {pair!r}")
        overrides[key.strip()] = value
    return overrides


def _one_line(text: str) -> str:
    """A value quoted from a file may hold anything; nothing of it may steer the terminal."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
