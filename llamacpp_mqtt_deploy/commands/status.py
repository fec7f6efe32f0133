"""`lmd status`: the workers under a root, from their retained status and health."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacpp_mqtt_deploy.commands.options import finite
from llamacpp_mqtt_deploy.commands.terminal import (
    CANCELLED,
    NO_WORKER,
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

HEALTH_S = 0.5
"""Health comes right behind the status where there is any."""
LIVE_RENEWALS = 3
"""A status that was not renewed for this many periods is not live (protocol, section 1)."""
_COLOURS: Mapping[str, str] = {"online": "green", "draining": "yellow", "offline": "red", "stale": "red"}
_TITLES = ("worker", "state", "engine", "slots", "queue", "models", "problem")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """What the table says of one worker; every text is one harmless line, empty where nothing is known."""

    worker: str
    state: str
    engine: str
    slots: str
    queue: str
    models: str
    problem: str

    def cells(self) -> tuple[str, ...]:
        return (self.worker, self.state, self.engine, self.slots, self.queue, self.models, self.problem)


@click.command()
@click.option("--worker", metavar="NAME", help="Only this worker.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all that the workers tell.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 3600),
    callback=finite,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for a worker's status.",
)
@broker_options
def command(
    worker: str | None,
    as_json: bool,
    timeout_s: float,
    config_file: Path | None,
    overrides: Mapping[str, str],
    **flags: Any,
) -> None:
    """Show every worker under the root: state, engine, slots in use, waiting requests, models, and what is wrong.

    It reads what the workers keep at the broker, so it disturbs none of them, and it needs only what every client may read. On a
    terminal it is a table, on a pipe plain columns.

    \b
    Examples:
      lmd status
      lmd status --host broker.lan --username alice --password-file ~/.mqtt-password
      lmd status --json | jq '.workers[] | {worker, state, engine: .status.engine}'
      lmd status --worker kitchen > /dev/null || echo "the kitchen does not answer"

    \b
    Exit codes:
      0    a worker is online (or draining)
      2    wrong usage or configuration
      3    the broker is out of reach, or refuses this user or topic
      4    no worker is online
      130  Ctrl-C
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    settings = client_settings(config_file, overrides, flags)
    outcome: list[int] = []
    with closing_pipe():
        try:
            with told("lmd status", outcome), bus_client(settings) as bus:
                outcome.append(_show(bus, worker, timeout_s=timeout_s, as_json=as_json))
        except KeyboardInterrupt:
            leave(CANCELLED)
        leave(outcome[-1])


def _show(bus: BusClient, worker: str | None, *, timeout_s: float, as_json: bool) -> int:
    from llamacpp_mqtt_deploy.client import NotPermitted

    status = bus.status(wait_s=timeout_s, required=True)
    if worker is not None:
        status = {name: told for name, told in status.items() if name == worker}
    health: Mapping[str, Mapping[str, Any]] = {}
    if status:
        try:
            health = bus.health(wait_s=min(HEALTH_S, timeout_s))
        except NotPermitted as error:
            tell(f"lmd status: {error}")
    rows = [describe(name, status[name], health.get(name, {}), now=time.time()) for name in sorted(status)]
    if as_json:
        _print_json(rows, status, health)
    elif rows:
        _print_table(rows) if colourful() else _print_columns(rows)
    if any(row.state in ("online", "draining") for row in rows):
        return 0
    if not rows:
        named = f" called {worker}" if worker else ""
        tell(
            f"lmd status: there is no worker{named} under {bus.root}/status/# at {bus.address}."
            " Start one with `lmd run`, or look for a wrong root, user or permission with `lmd check`."
        )
    return NO_WORKER


# --- what the messages say -------------------------------------------------------------------------------------------------


def describe(worker: str, status: Mapping[str, Any], health: Mapping[str, Any], *, now: float) -> WorkerRow:
    """The row of a worker; whatever the messages hold, it can be printed. `now` is seconds since the epoch."""
    state, age_s = one_line(status.get("state") or "?"), _age_s(status, now)
    problems = []
    if state != "offline" and age_s is not None:
        state = "stale"
        problems.append(f"its status was last renewed {_ago(age_s)} ago")
    if state == "offline":
        reason = status.get("reason")
        problems.append({"lost": "its connection was lost", "stopped": "it was stopped"}.get(str(reason), ""))
        health = {}  # of the time before
    engine = _mapping(status.get("engine"))
    if engine.get("detail"):
        problems.append(one_line(engine["detail"]))
    known = [one_line(engine[name]) for name in ("state", "backend") if engine.get(name)]
    slots, queue = _mapping(health.get("slots")), health.get("queue")
    total = slots.get("total", status.get("slots"))
    models = status.get("models")
    return WorkerRow(
        worker=one_line(worker),
        state=state,
        engine="/".join(known),
        slots="" if total is None else one_line(f"{slots.get('busy', '?')}/{total}"),
        queue="" if queue is None else one_line(queue),
        models=",".join(map(one_line, models)) if isinstance(models, list) else "",
        problem="; ".join(filter(None, problems)),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _age_s(status: Mapping[str, Any], now: float) -> float | None:
    """How long ago a status was made that is no longer live; None for one that is, or that does not tell."""
    made_at, every_s = status.get("ts"), status.get("every_s")
    if not isinstance(made_at, int | float) or not isinstance(every_s, int | float) or every_s <= 0:
        return None
    age_s = now - made_at
    return age_s if age_s > LIVE_RENEWALS * every_s else None


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# --- out -------------------------------------------------------------------------------------------------------------------


def _print_json(
    rows: list[WorkerRow], status: Mapping[str, Mapping[str, Any]], health: Mapping[str, Mapping[str, Any]]
) -> None:
    told = {one_line(name): name for name in status}
    workers = [
        {
            "worker": row.worker,
            "state": row.state,
            "problem": row.problem or None,
            "status": status[told[row.worker]],
            "health": health.get(told[row.worker]),
        }
        for row in rows
    ]
    print_json({"workers": workers})


def _print_columns(rows: list[WorkerRow]) -> None:
    lines = [_TITLES, *(tuple(cell or "-" for cell in row.cells()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_table(rows: list[WorkerRow]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in _TITLES:
        table.add_column(title, overflow="fold")
    for row in rows:
        cells = [Text(cell) for cell in row.cells()]  # not markup: a name may hold [brackets]
        cells[1].stylize(_COLOURS.get(row.state, ""))
        cells[-1].stylize("yellow")
        table.add_row(*cells)
    Console().print(table)
