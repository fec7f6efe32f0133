"""`lmd check`: what works, and what to do about what does not."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacpp_mqtt_deploy.commands.terminal import (
    CANCELLED,
    broker_options,
    closing_pipe,
    colourful,
    flag_overrides,
    harmless,
    leave,
    print_json,
    tell,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llamacpp_mqtt_deploy.checking.findings import Finding
    from llamacpp_mqtt_deploy.checking.report import ClientLogin

_COLOURS = {"ok": "32", "warn": "33", "FAIL": "31", "skip": "2"}


@click.command()
@click.option("--client-username", metavar="USER", help="Prove the permissions of clients as this user.")
@click.option("--client-password-file", type=click.Path(path_type=Path), metavar="FILE", help="Password of that user.")
@click.option("--no-generate", is_flag=True, help="Do not ask the engine for a token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: {ok, findings}.")
@broker_options
def command(
    client_username: str | None,
    client_password_file: Path | None,
    no_generate: bool,
    as_json: bool,
    config_file: Path | None,
    overrides: Mapping[str, str],
    **flags: Any,
) -> None:
    """Try configuration, broker, permissions, engine and machine, and say what to do about what does not work.

    It runs beside a working daemon without disturbing it, and leaves nothing behind at the broker. Permissions are proven by
    messages that arrive; for those of clients it needs the credentials of one.

    \b
    Examples:
      lmd check
      lmd check --config /etc/llamacpp-mqtt-deploy/config.toml
      lmd check --client-username alice --client-password-file ~/.mqtt-password
      lmd check --json | jq '.findings[] | select(.verdict == "FAIL")'

    \b
    Exit codes:
      0  everything needed works (warnings included)
      1  something does not
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    from llamacpp_mqtt_deploy.checking.findings import fail
    from llamacpp_mqtt_deploy.checking.report import check_all
    from llamacpp_mqtt_deploy.config.loading import ConfigurationError, load

    with closing_pipe():
        try:
            loaded = load(config_file, {**flag_overrides(flags), **overrides})
        except ConfigurationError as error:
            findings: Iterable[Finding] = [fail("config.valid", problem) for problem in error.problems]
        else:
            client = _client_login(client_username, client_password_file)
            findings = check_all(loaded, client=client, generate=not no_generate)
        try:
            leave(_print_json(findings) if as_json else _print_lines(findings))
        except KeyboardInterrupt:
            leave(CANCELLED)


def _client_login(username: str | None, password_file: Path | None) -> ClientLogin | None:
    from llamacpp_mqtt_deploy.checking.report import ClientLogin
    from llamacpp_mqtt_deploy.config.credentials import fault

    if username is None:
        if password_file is not None:
            raise click.UsageError("--client-password-file needs --client-username.")
        return None
    try:
        lines = [] if password_file is None else password_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--client-password-file: {error}") from None
    for name, value in (("--client-username", username), ("--client-password-file", lines[0] if lines else "")):
        if unfit := fault(value):
            raise click.UsageError(f"{name}: {unfit}")
    return ClientLogin(username=username, password=lines[0] if lines else None)


def _print_json(findings: Iterable[Finding]) -> int:
    rows = [
        {"name": found.name, "verdict": found.verdict, "text": found.text, "advice": found.advice} for found in findings
    ]
    failed = any(row["verdict"] == "FAIL" for row in rows)
    print_json({"ok": not failed, "findings": rows}, indent=True)
    return 1 if failed else 0


def _print_lines(findings: Iterable[Finding]) -> int:
    colour = colourful()
    counts = {"ok": 0, "warn": 0, "FAIL": 0, "skip": 0}
    for found in findings:
        counts[found.verdict] += 1
        verdict = f"{found.verdict:<4}"
        if colour:
            verdict = f"\x1b[{_COLOURS[found.verdict]}m{verdict}\x1b[0m"
        advice = f" -> {found.advice}" if found.advice else ""
        # Names, states and reasons come from the broker and the engine: nothing of them may steer the terminal.
        click.echo(f"{verdict} {found.name:<24} {harmless(f'{found.text}{advice}')}".replace("\n", " "), color=colour)
        sys.stdout.flush()
    tell(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    return 1 if counts["FAIL"] else 0
