"""`lmd admin`: what an operator tells a running worker over the admin topic."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacpp_mqtt_deploy.commands.options import finite
from llamacpp_mqtt_deploy.commands.terminal import (
    CANCELLED,
    FAILED,
    TRY_LATER,
    broker_options,
    bus_client,
    client_settings,
    closing_pipe,
    leave,
    one_line,
    print_json,
    tell,
    told,
)

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import BusClient

MAX_AWAKE_S = 604800
"""As the worker takes it."""

EXIT_CODES = """\b
    Exit codes:
      0    the worker has done it
      1    the worker refused, and says why
      2    wrong usage or configuration; several workers are online and none was named
      3    the broker is out of reach, or refuses this user or topic
      4    no such worker is online, or it did not answer in time
      5    the worker cannot do it now: the same may succeed later
      130  Ctrl-C"""

_HELP: Mapping[str, str] = {
    "drain": "Take no new requests; those that are there are finished. `resume` ends it.",
    "resume": "Take requests again after `drain`.",
    "cancel-all": "Cancel every running and waiting request of every client.",
    "reload": "Read the configuration again. A wrong one changes nothing.",
    "restart-engine": "Restart the engine, where it is the worker's own (engine.kind managed or inprocess).",
    "unload": "Let the engine's model go until the next request, when nothing runs (engine.kind managed).",
    "keep-awake": "Keep the engine from falling asleep for so many seconds, and wake it: without a number until told otherwise, 0 ends it.",
    "model": "Answer requests that name no model with this one, until the worker's next start or reload.",
    "log-level": "Change how much the worker logs, until its next start.",
}


@click.group(
    help=f"""Tell a running worker what to do: drain, resume, cancel everything, reload, restart the engine or let it sleep, choose a
    model, log more or less.

    The broker decides who may: a user that writes llm/admin/# and reads llm/admin-reply/# (llm-operator in the recommended
    access list). --worker names the worker where several are online.

    \b
    Examples:
      lmd admin drain -u llm-operator --password-file ~/.operator
      lmd admin reload --worker kitchen
      lmd admin keep-awake 3600
      lmd admin log-level debug --worker kitchen
      lmd admin cancel-all --json | jq .cancelled

    {EXIT_CODES}
    """
)
def command() -> None:
    pass


def _add(name: str) -> None:
    @click.option("--worker", metavar="NAME", help="The worker. Default: the only one that is online.")
    @click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(0.1, 3600),
        callback=finite,
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for its answer.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print the worker's answer as one line of JSON.")
    @broker_options
    def act(
        worker: str | None,
        timeout_s: float,
        as_json: bool,
        config_file: Path | None,
        overrides: Mapping[str, str],
        level: str | None = None,
        seconds: float | None = None,
        model: str | None = None,
        **flags: Any,
    ) -> None:
        settings = client_settings(config_file, overrides, flags)
        action = name.replace("-", "_")
        outcome: list[int] = []
        with closing_pipe():
            try:
                with told(f"lmd admin {name}", outcome), bus_client(settings) as bus:
                    chosen = choose(bus, worker, timeout_s=timeout_s)
                    ack = bus.admin(chosen, action, timeout_s=timeout_s, level=level, seconds=seconds, model=model)
                    outcome.append(_show(chosen, name, ack, as_json=as_json))
            except KeyboardInterrupt:
                leave(CANCELLED)
            leave(outcome[-1])

    if name == "log-level":
        act = click.argument("level", type=click.Choice(["debug", "info", "warning", "error"]))(act)
    elif name == "keep-awake":
        act = click.argument("seconds", type=click.FloatRange(0, MAX_AWAKE_S), callback=finite, required=False)(act)
    elif name == "model":
        act = click.argument("model", metavar="NAME")(act)
    command.add_command(click.command(name, help=f"{_HELP[name]}\n\n{inspect.cleandoc(EXIT_CODES)}")(act))


for _name in _HELP:
    _add(_name)


def choose(bus: BusClient, worker: str | None, *, timeout_s: float) -> str:
    """The worker that is meant; raises ValueError when that is not clear and NoWorker when it is not there.

    A message to a worker that is away would wait at the broker and be obeyed when it comes back, so it is not sent.
    """
    from llamacpp_mqtt_deploy.client import NotPermitted, NoWorker

    try:
        status = bus.status(wait_s=min(2.0, timeout_s), required=True)
    except NotPermitted:
        if worker is None:
            raise
        return worker
    online = sorted(bus.workers_online())
    if worker is None and len(online) > 1:
        raise ValueError(f"Several workers are online: {', '.join(online)}. Name one: --worker {online[0]}")
    chosen = worker or (online[0] if online else None)
    if chosen in online:
        return str(chosen)
    known = ", ".join(f"{name} is {status[name].get('state')}" for name in sorted(status)[:5])
    raise NoWorker(
        f"{f'The worker {worker}' if worker else 'No worker'} is {'not ' if worker else ''}online under"
        f" {bus.root}/status/# at {bus.address}{f' ({known})' if known else ''}."
    )


def _show(worker: str, name: str, ack: Mapping[str, Any], *, as_json: bool) -> int:
    if as_json:
        print_json(ack)
    if ack.get("status") == "ok":
        if not as_json:
            click.echo(one_line(_done(worker, name, ack)))
        return 0
    code = str(ack.get("code") or "internal")
    if not as_json:
        tell(f"lmd admin {name}: {one_line(code)}: {one_line(ack.get('message') or 'The worker gave no reason.')}")
    from llamacpp_mqtt_deploy.core.errors import BY_CODE

    return TRY_LATER if code in BY_CODE and BY_CODE[code].retryable else FAILED


def _done(worker: str, name: str, ack: Mapping[str, Any]) -> str:
    match name:
        case "drain":
            return f"{worker} takes no new requests; `lmd admin resume` ends that."
        case "resume":
            return f"{worker} takes requests again."
        case "cancel-all":
            return f"{worker} told {ack.get('cancelled', '?')} requests to stop."
        case "reload":
            changed, waiting = (_names(ack.get(field)) for field in ("changed", "needs_restart"))
            told = f"{worker} read its configuration; in force now: {changed or 'nothing new'}."
            return told + (f" A restart is needed for {waiting}." if waiting else "")
        case "restart-engine":
            return f"{worker} restarts its engine."
        case "unload":
            return f"{worker} lets its model go; the next request loads it."
        case "keep-awake":
            if not ack.get("keep_awake"):
                return f"{worker} lets its engine fall asleep again."
            limit = (
                f"for {seconds:g} s"
                if isinstance(seconds := ack.get("seconds"), int | float)
                else "until `lmd admin keep-awake 0`"
            )
            return f"{worker} keeps its engine awake {limit}."
        case "model":
            return f"{worker} answers requests that name no model with {ack.get('model', '?')}."
        case _:
            return f"{worker} logs at the level {ack.get('level', '?')}."


def _names(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else ""
