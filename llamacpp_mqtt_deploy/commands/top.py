"""`lmd top`: all workers under a root as they are now, live on a terminal, as lines on a pipe."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacpp_mqtt_deploy.commands.fleet import LANES, Fleet, WorkerPicture, figure, share, span
from llamacpp_mqtt_deploy.commands.options import finite
from llamacpp_mqtt_deploy.commands.terminal import (
    CANCELLED,
    NO_WORKER,
    USAGE,
    broker_options,
    bus_client,
    client_settings,
    closing_pipe,
    leave,
    print_json,
    tell,
    told,
)

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import BusClient

HEALTH_S = 0.5
"""Health comes right behind the status where there is any."""
_TITLES = ("worker", "state", "engine", "slots", "queue", "i/n/b", "tok/s", "first", "done", "failed", "problem")


@click.command()
@click.option("--worker", metavar="NAME", help="Only this worker.")
@click.option("--once", is_flag=True, help="Print one picture as lines, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of lines: one object for each picture.")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(0.1, 3600),
    callback=finite,
    default=None,
    metavar="SECONDS",
    help="How often to look. Default: 0.5 on a terminal, 5 on a pipe.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 3600),
    callback=finite,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for a worker's first status.",
)
@broker_options
def command(
    worker: str | None,
    once: bool,
    as_json: bool,
    every_s: float | None,
    timeout_s: float,
    config_file: Path | None,
    overrides: Mapping[str, str],
    **flags: Any,
) -> None:
    """Watch every worker under the root: slots, queue by lane, tokens per second, time to the first token, engine, problems.

    All of it comes from what the workers keep at the broker, so it disturbs none of them and needs only what every client may
    read. On a terminal it is a live picture (with the extra `top`: pip install 'llamacpp-mqtt-deploy[top]'); on a pipe, with
    --json or with --once it is lines. Speeds and times change when a worker tells its health, every 30 s
    (`status.health_every_s`).

    \b
    Keys:
      arrows   choose a worker
      c        cancel all of its requests, after a question
      d, r     drain it, resume it
      l        the last problems in its log
      q        quit
    The keys that do something need a user that may write to the admin topic (llm-operator in the recommended access list).

    \b
    Examples:
      lmd top
      lmd top -u llm-operator --password-file ~/.operator
      lmd top --once
      lmd top --json --every 30 >> workers.jsonl

    \b
    Exit codes:
      0    a worker is online (or draining); on a terminal: quit
      2    wrong usage or configuration, or the extra `top` is missing
      3    the broker is out of reach, or refuses this user or topic
      4    no worker is online (--once)
      130  Ctrl-C
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    live = not once and not as_json and _is_terminal()
    if live and importlib.util.find_spec("textual") is None:
        tell(
            "lmd top: the live picture needs the extra `top`: pip install 'llamacpp-mqtt-deploy[top]'."
            " Without it `lmd top --once` prints one picture, and `lmd top | cat` prints one every 5 s."
        )
        leave(USAGE)
    settings = client_settings(config_file, overrides, flags)
    outcome: list[int] = []
    with closing_pipe():
        try:
            with told("lmd top", outcome), bus_client(settings) as bus:
                if live:
                    from llamacpp_mqtt_deploy.commands.top_app import run

                    run(bus, worker, every_s=every_s or 0.5)
                    outcome.append(0)
                else:
                    outcome.append(_print(bus, worker, once, as_json, every_s or 5.0, timeout_s))
        except KeyboardInterrupt:
            leave(CANCELLED)
        leave(outcome[-1])


def _is_terminal() -> bool:
    return sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _print(bus: BusClient, worker: str | None, once: bool, as_json: bool, every_s: float, timeout_s: float) -> int:
    from llamacpp_mqtt_deploy.client import BusError

    fleet, pause = Fleet(), threading.Event()
    bus.status(wait_s=timeout_s, required=True)
    try:
        bus.health(wait_s=min(HEALTH_S, timeout_s))
    except BusError as problem:
        tell(f"lmd top: {problem}")
    show: Callable[[list[WorkerPicture]], None] = _print_json if as_json else _print_lines
    while True:
        workers, _ = look(bus, fleet, worker)
        show(workers)
        if once:
            return 0 if any(each.live for each in workers) else _nobody(bus, worker)
        pause.wait(every_s)


def look(bus: BusClient, fleet: Fleet, worker: str | None) -> tuple[list[WorkerPicture], str]:
    """The workers as they are now, or this one alone, and what the broker does not let us see; waits for nothing."""
    from llamacpp_mqtt_deploy.client import BusError, NotPermitted

    status, note = bus.status(wait_s=0.0), ""
    health: Mapping[str, Mapping[str, Any]] = {}
    if worker is not None:
        status = {name: told for name, told in status.items() if name == worker}
    try:
        health = bus.health(wait_s=0.0)
    except NotPermitted as refused:
        note = str(refused)
    except BusError:
        pass  # lost in this moment, and restored by itself
    return fleet.look(status, health, now=time.time(), steady=time.monotonic()), note


def _nobody(bus: BusClient, worker: str | None) -> int:
    named = f" called {worker}" if worker else ""
    tell(f"lmd top: no worker{named} is online under {bus.root}/status/# at {bus.address}; `lmd check` looks why.")
    return NO_WORKER


def _print_json(workers: list[WorkerPicture]) -> None:
    told = [
        {
            "worker": each.worker,
            "state": each.state,
            "engine": each.engine,
            "models": each.models,
            "slots": {"busy": each.busy, "total": each.slots},
            "queue": each.queue,
            "lanes": dict(zip(LANES, each.lanes, strict=True)),
            "tokens_per_second": each.speed,
            "first_token_ms": each.first_token_ms,
            "done": each.done,
            "failed": each.failed,
            "problem": each.problem or None,
        }
        for each in workers
    ]
    print_json({"ts": round(time.time(), 3), "workers": told})


def _print_lines(workers: list[WorkerPicture]) -> None:
    lines = [_TITLES, *map(_cells, workers)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _cells(each: WorkerPicture) -> tuple[str, ...]:
    lanes = "/".join(figure(lane) or "?" for lane in each.lanes) if any(x is not None for x in each.lanes) else ""
    cells = (
        each.name,
        each.state,
        each.engine,
        share(each.busy, each.slots),
        figure(each.queue),
        lanes,
        figure(each.speed),
        span(each.first_token_ms).replace(" ", ""),
        figure(each.done),
        figure(each.failed),
        each.problem,
    )
    return tuple(cell or "-" for cell in cells)
