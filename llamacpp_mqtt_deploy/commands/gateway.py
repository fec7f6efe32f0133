"""`lmd gateway`: HTTP over the bus, and the keys of those who may ask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacpp_mqtt_deploy.commands.options import WRONG_CONFIGURATION, config_options, load_or_exit, tell_problems

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.config.settings import Settings

FAILED = 1


@click.group(
    invoke_without_command=True,
    help="""Serve the APIs of OpenAI, Anthropic and Ollama, a WebSocket and plain text over HTTP, until SIGTERM or SIGINT.

    The gateway needs only the broker; it connects with the user of [mqtt], best one of its own. Without keys it serves this
    machine alone. On SIGTERM answers may finish for gateway.drain_timeout_s; a second signal ends them at once.

    \b
    Examples:
      lmd gateway
      lmd gateway --set gateway.port=8000 --set mqtt.host=broker.lan
      lmd gateway key add alice

    \b
    Exit codes:
      0  a clean stop
      1  the address is in use, and anything else
      2  a wrong configuration (one line for each field)
    """,
)
@config_options
@click.pass_context
def command(context: click.Context, config_file: Path | None, overrides: Mapping[str, str]) -> None:
    context.obj = (config_file, overrides)
    if context.invoked_subcommand is None:
        raise click.exceptions.Exit(_serve(config_file, overrides))


def _serve(config_file: Path | None, overrides: Mapping[str, str]) -> int:
    # Before the configuration, with which the first secret comes into memory.
    from llamacpp_mqtt_deploy.service.core_files import forbid_core_files

    forbid_core_files()
    loaded = load_or_exit(config_file, overrides)
    settings = loaded.settings
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        click.echo(
            f"The gateway needs the Python package {error.name!r}: pip install 'llamacpp-mqtt-deploy[gateway]'",
            err=True,
        )
        return FAILED

    import asyncio

    from llamacpp_mqtt_deploy import logs
    from llamacpp_mqtt_deploy.client.configured import bus_options
    from llamacpp_mqtt_deploy.gateway.key_ring import KeyRing, KeysFileError
    from llamacpp_mqtt_deploy.gateway.serving import Gateway, listen, url_of
    from llamacpp_mqtt_deploy.service.systemd import Notifier, watchdog_interval_s

    keys = None
    if settings.gateway.keys_file is not None:
        keys = KeyRing(settings.gateway.keys_file)
        try:
            keys.load()
        except KeysFileError as error:
            tell_problems((f"[gateway] keys_file: {error}",))
    _refuse_strangers(settings)
    try:
        options = bus_options(settings)
    except ValueError as error:
        tell_problems((str(error),))
    logs.setup(settings.logging)
    logs.hide(options["password"])

    import structlog

    log = structlog.get_logger(__name__)
    for warning in loaded.warnings:
        log.warning("configuration.unwise", message=warning)
    try:
        sock = listen(settings.gateway)
    except OSError as error:
        where = f"{settings.gateway.host}:{settings.gateway.port}"
        click.echo(
            f"The gateway cannot listen on {where} ({error.strerror or error}). Choose another with --set gateway.port=...",
            err=True,
        )
        return FAILED
    if keys is None:
        log.warning(
            "gateway.without_keys",
            url=url_of(sock),
            message="only this machine is served, and everybody on it may ask; `lmd gateway key add NAME` makes a key",
        )
    log.info("gateway.listening", url=url_of(sock), keys=None if keys is None else len(keys.levels()))
    gateway = Gateway(
        settings,
        bus_options=options,
        keys=keys,
        manager=Notifier(),
        watchdog_s=watchdog_interval_s(),
    )
    asyncio.run(gateway.run(sock))
    return 0


def _refuse_strangers(settings: Settings) -> None:
    """Without keys everybody who reaches the address may ask: that must be nobody but this machine."""
    from llamacpp_mqtt_deploy.gateway.guards import is_this_machine

    gateway = settings.gateway
    if gateway.keys_file is None and not is_this_machine(gateway.host):
        problem = (
            f'[gateway] host: "{gateway.host}" is open to others, and there are no keys: set gateway.keys_file and run'
            " `lmd gateway key add NAME`, or listen on 127.0.0.1"
        )
        tell_problems((problem,))


# --- keys ----------------------------------------------------------------------------------------------------------------


@command.group()
def key() -> None:
    """Make, list and remove the keys of those who may ask.

    They are kept as hashes in gateway.keys_file, which a running gateway reads again when it changes.
    """


@key.command()
@click.argument("name")
@click.option("--level", metavar="NAME", help="First topic level of its sessions. Default: the name of the key.")
@click.option(
    "--priority",
    type=click.Choice(["interactive", "normal", "batch"]),
    default="normal",
    help="Highest lane. Default: normal.",
)
@click.option(
    "--rate", type=click.IntRange(0, 1_000_000), default=0, help="Requests in a minute; 0 is no limit of the gateway's."
)
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="A model that it may name (repeatable). Default: all."
)
@click.option("--replace", is_flag=True, help="Give an existing name a new key.")
@click.pass_obj
def add(
    given: tuple[Path | None, Mapping[str, str]],
    name: str,
    level: str | None,
    priority: Any,
    rate: int,
    models: tuple[str, ...],
    replace: bool,
) -> None:
    """Make a key, print it once, and keep its hash."""
    from pydantic import ValidationError

    from llamacpp_mqtt_deploy.gateway.key_ring import KeyEntry, check_key_name, hash_of, new_key

    file, entries = _entries(given, may_be_missing=True)
    if name in entries and not replace:
        raise click.UsageError(f"there is a key {name!r} already; --replace gives it a new one")
    made = new_key()
    try:
        check_key_name(name)
        entries[name] = KeyEntry(
            sha256=hash_of(made), level=level or name, max_priority=priority, requests_per_minute=rate, models=models
        )
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        raise click.UsageError(f"{'.'.join(map(str, found['loc']))}: {found['msg']}") from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    _write(file, entries)
    click.echo(f"The key {name!r} for the first topic level {entries[name].level!r}, shown this once:", err=True)
    click.echo(made)


@key.command(name="list")
@click.pass_obj
def list_keys(given: tuple[Path | None, Mapping[str, str]]) -> None:
    """List the keys by name, with what each may do."""
    _, entries = _entries(given)
    for name, entry in entries.items():
        rate = f"{entry.requests_per_minute}/min" if entry.requests_per_minute else "no limit"
        click.echo(
            f"{name}  level {entry.level}  {entry.max_priority}  {rate}  models {', '.join(entry.models) or 'all'}"
        )


@key.command()
@click.argument("name")
@click.pass_obj
def remove(given: tuple[Path | None, Mapping[str, str]], name: str) -> None:
    """Remove a key; requests with it are refused within a second."""
    file, entries = _entries(given)
    if name not in entries:
        raise click.UsageError(f"there is no key {name!r}")
    del entries[name]
    _write(file, entries)


def _entries(
    given: tuple[Path | None, Mapping[str, str]], *, may_be_missing: bool = False
) -> tuple[Path, dict[str, Any]]:
    from llamacpp_mqtt_deploy.gateway.key_ring import KeysFileError, read_keys

    file = load_or_exit(*given).settings.gateway.keys_file
    if file is None:
        click.echo(
            "gateway.keys_file is not set; name it in the configuration or with --set gateway.keys_file=FILE", err=True
        )
        raise click.exceptions.Exit(WRONG_CONFIGURATION)
    if may_be_missing and not file.exists():
        return file, {}
    try:
        return file, read_keys(file)
    except KeysFileError as error:
        raise click.ClickException(str(error)) from None


def _write(file: Path, entries: Mapping[str, Any]) -> None:
    from llamacpp_mqtt_deploy.gateway.key_ring import KeysFileError, write_keys

    try:
        write_keys(file, entries)
    except KeysFileError as error:
        raise click.ClickException(str(error)) from None
