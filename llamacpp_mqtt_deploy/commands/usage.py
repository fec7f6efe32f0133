"""`lmd usage`: who has spent how many tokens, by first topic level and day, from a worker's ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacpp_mqtt_deploy.commands.admin import choose
from llamacpp_mqtt_deploy.commands.options import finite
from llamacpp_mqtt_deploy.commands.terminal import (
    CANCELLED,
    FAILED,
    TRY_LATER,
    broker_options,
    bus_client,
    client_settings,
    closing_pipe,
    colourful,
    leave,
    one_line,
    print_json,
    tell,
    told,
)

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import BusClient

_PAGE = 500
_ALL = 100_000
"""More than a worker keeps."""
_TITLES = ("day", "first level", "requests", "tokens in", "tokens out", "engine", "of a day's tokens")


@click.command()
@click.option("--worker", metavar="NAME", help="The worker. Default: the only one that is online.")
@click.option(
    "--days",
    type=click.IntRange(1, 366),
    default=1,
    show_default=True,
    metavar="N",
    help="So many days, today included. A day ends at midnight UTC; the worker keeps the last 62 with requests.",
)
@click.option("--level", metavar="NAME", help="Only this first topic level: a user, or route:NAME.")
@click.option(
    "--top",
    type=click.IntRange(1, _ALL),
    default=None,
    metavar="N",
    help="At most so many rows: the newest day first, and within it who took most tokens. Default: 100, with --json all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 3600),
    callback=finite,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for each of the worker's answers.",
)
@broker_options
def command(
    worker: str | None,
    days: int,
    level: str | None,
    top: int | None,
    as_json: bool,
    timeout_s: float,
    config_file: Path | None,
    overrides: Mapping[str, str],
    **flags: Any,
) -> None:
    """Show who has asked how much: requests, tokens and engine time for each first topic level (each user of the broker) and day.

    It asks the worker over the admin topic, so it needs the user that may write there (llm-operator in the recommended access
    list). `limits.tokens_per_day` and the sections [levels."NAME"] set what a level may use. The level `*` stands for those
    beyond 500 in a day.

    \b
    Examples:
      lmd usage -u llm-operator --password-file ~/.operator
      lmd usage --days 7 --level alice
      lmd usage --days 31 --json | jq '[.usage[].tokens_out] | add'

    \b
    Exit codes:
      0    done
      1    the worker refused, and says why
      2    wrong usage or configuration; several workers are online and none was named
      3    the broker is out of reach, or refuses this user or topic
      4    no such worker is online, or it did not answer in time
      5    the worker cannot do it now: the same may succeed later
      130  Ctrl-C
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    settings = client_settings(config_file, overrides, flags)
    outcome: list[int] = []
    most = top or (_ALL if as_json else 100)
    with closing_pipe():
        try:
            with told("lmd usage", outcome), bus_client(settings) as bus:
                chosen = choose(bus, worker, timeout_s=timeout_s)
                answer = read(bus, chosen, days=days, level=level, top=most, timeout_s=timeout_s)
                outcome.append(_show(chosen, answer, as_json=as_json))
        except KeyboardInterrupt:
            leave(CANCELLED)
        leave(outcome[-1])


def read(bus: BusClient, worker: str, *, days: int, level: str | None, top: int, timeout_s: float) -> Mapping[str, Any]:
    """All rows, however many answers they take; an `ack` that refuses comes back as it is. `more` says that there are others."""
    rows: dict[tuple[str, str], Mapping[str, Any]] = {}
    offset, today = 0, ""
    while True:
        limit = min(_PAGE, top - len(rows))
        ack = bus.admin(
            worker, "usage", timeout_s=timeout_s, days=days, first_level=level, limit=limit, offset=offset or None
        )
        if ack.get("status") != "ok":
            return ack
        told = ack.get("usage")
        page = [row for row in told if isinstance(row, Mapping)] if isinstance(told, list) else []
        # Requests that end meanwhile move rows from one answer to the next.
        rows |= {(str(row.get("day")), str(row.get("first_level"))): row for row in page}
        today, following = str(ack.get("today") or ""), ack.get("next_offset")
        more = isinstance(following, int) and following > offset
        if not more or len(rows) >= top:
            return {"worker": worker, "status": "ok", "today": today, "usage": list(rows.values())[:top], "more": more}
        offset = int(following or 0)


def _show(worker: str, answer: Mapping[str, Any], *, as_json: bool) -> int:
    if answer["status"] != "ok":
        if as_json:
            print_json(answer)
        code, message = answer.get("code") or "internal", answer.get("message") or "The worker gave no reason."
        tell(f"lmd usage: {one_line(code)}: {one_line(message)}")
        from llamacpp_mqtt_deploy.core.errors import BY_CODE

        return TRY_LATER if code in BY_CODE and BY_CODE[code].retryable else FAILED
    if as_json:
        print_json({name: value for name, value in answer.items() if name != "status"})
        return 0
    rows = answer["usage"]
    if rows:
        lines = [_cells(row) for row in rows]
        _print_table(lines) if colourful() else _print_columns(lines)
    else:
        tell(f"lmd usage: {one_line(worker)} has counted no request in this time.")
    if answer["more"]:
        tell(f"lmd usage: there are more rows than these {len(rows)}; --top {10 * len(rows)} shows more.")
    return 0


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    spent = _number(row, "tokens_in") + _number(row, "tokens_out")
    most = _number(row, "tokens_per_day")
    return (
        one_line(row.get("day", "?")),
        one_line(row.get("first_level", "?")),
        f"{_number(row, 'requests'):.0f}",
        f"{_number(row, 'tokens_in'):.0f}",
        f"{_number(row, 'tokens_out'):.0f}",
        _duration(_number(row, "engine_s")),
        f"{100 * spent / most:.0f} % of {most:.0f}" if most > 0 else "",
    )


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --- out -------------------------------------------------------------------------------------------------------------------


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    lines = [tuple(title.replace(" ", "_") for title in _TITLES), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(f"{cell or '-':<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, title in enumerate(_TITLES):
        table.add_column(title, overflow="fold", justify="left" if place < 2 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # not markup: a name may hold [brackets]
    Console().print(table)
