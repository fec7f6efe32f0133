"""`lmd run`: loads the settings, sets up the log and hands over to the daemon."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from llamacpp_mqtt_deploy.commands.options import config_options, load_or_exit
from llamacpp_mqtt_deploy.leaving_out import leaving_out


@click.command()
@config_options
def command(config_file: Path | None, overrides: Mapping[str, str]) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT.

    On SIGTERM running requests may finish for limits.drain_timeout_s; a second signal ends them at once. SIGHUP reads the
    configuration again. The log goes to stderr: columns on a terminal, JSON elsewhere.

    \b
    Examples:
      lmd run
      lmd run --config /etc/llamacpp-mqtt-deploy/config.toml
      lmd run --set mqtt.host=broker.lan --set engine.url=unix:///run/llama-server/llama.sock
      LMD_MQTT__HOST=broker.lan LMD_LOGGING__LEVEL=debug lmd run

    \b
    Exit codes:
      0  a clean stop
      1  anything else
      2  a wrong configuration (one line for each field)
      3  broker, engine or database out of reach for limits.startup_timeout_s, or
         another worker serves the same topics
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    # Before the configuration, with which the first secret comes into memory.
    from llamacpp_mqtt_deploy.service.core_files import forbid_core_files

    forbid_core_files()
    with _kept_for_good():
        with leaving_out("rich"):  # 4 MiB with what it brings, for coloured tracebacks
            import structlog  # noqa: F401
        loaded = load_or_exit(config_file, overrides)

        from llamacpp_mqtt_deploy import logs
        from llamacpp_mqtt_deploy.config.credentials import all_secrets
        from llamacpp_mqtt_deploy.service.daemon import run as run_worker

    logs.setup(loaded.settings.logging)
    logs.hide(*all_secrets(loaded.settings))

    raise click.exceptions.Exit(run_worker(loaded))


@contextmanager
def _kept_for_good() -> Iterator[None]:
    """What is loaded in here stays until the end. The garbage collector would go through it a hundred times meanwhile, a tenth of the
    start, and again at each of its full rounds, 20 ms in which no token moves: so it rests, and never looks at it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
