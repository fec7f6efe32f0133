"""What `ask` and `chat` share: the way to the broker, Ctrl-C, and an answer on a terminal or a pipe."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, TextIO, TypeVar

import click
import orjson

from llamacpp_mqtt_deploy.commands.options import config_options, load_or_exit
from llamacpp_mqtt_deploy.commands.wrapping import WordWrap

if TYPE_CHECKING:
    from types import FrameType

    from llamacpp_mqtt_deploy.client import Answer, BusClient, BusError, Done
    from llamacpp_mqtt_deploy.config.settings import Settings
    from llamacpp_mqtt_deploy.core.events import Reading

FAILED = 1
USAGE = 2
NO_BROKER = 3
NO_WORKER = 4
TRY_LATER = 5
CANCELLED = 130
TERMINATED = 143

EXIT_CODES = """\b
    Exit codes:
      0    the answer is complete
      1    the request ended with an error
      2    wrong usage or configuration
      3    the broker is out of reach, or refuses this user or topic
      4    no worker is online, or the answer did not come, whole and in time
      5    the worker is busy or restarting: the same request may succeed later
      130  cancelled with Ctrl-C (once cancels on the worker, twice leaves at once)"""

QUIET_S = 1.5  # an answer begins within a second
POLL_S = 0.1  # how late Ctrl-C may be noticed; events wake the wait at once

F = TypeVar("F", bound=Callable[..., Any])

_BROKER_FLAGS: Mapping[str, str] = {
    "host": "mqtt.host",
    "port": "mqtt.port",
    "username": "mqtt.username",
    "password_file": "mqtt.password_file",
    "tls": "mqtt.tls.enabled",
    "ca_file": "mqtt.tls.ca_file",
    "cert_file": "mqtt.tls.cert_file",
    "key_file": "mqtt.tls.key_file",
    "root": "mqtt.root",
    "protocol": "mqtt.protocol",
}


# --- the way to the broker ---------------------------------------------------------------------------------------------


def broker_options(function: F) -> F:
    """Add the options that say where the broker is; without them the configuration of the worker holds."""
    for option in reversed(
        [
            click.option("--host", help="Broker: name or address."),
            click.option("--port", type=click.IntRange(1, 65535), help="Port of the broker."),
            click.option("-u", "--username", help="User name at the broker."),
            click.option("--password-file", type=click.Path(), help="File whose first line is the password."),
            click.option("--tls/--no-tls", default=None, help="Encrypt the connection."),
            click.option("--ca-file", type=click.Path(), help="Authorities to trust (PEM); switches TLS on."),
            click.option("--cert-file", type=click.Path(), help="Client certificate (PEM)."),
            click.option("--key-file", type=click.Path(), help="Key of the client certificate (PEM)."),
            click.option("--root", help="First level of the topics."),
            click.option("--protocol", type=click.Choice(["auto", "5", "3.1.1"]), help="MQTT version."),
        ]
    ):
        function = option(function)
    return config_options(function)


def flag_overrides(flags: Mapping[str, Any]) -> dict[str, str]:
    """The flags of `broker_options` as settings (dotted key -> text)."""
    given = {key: str(flags[flag]) for flag, key in _BROKER_FLAGS.items() if flags.get(flag) is not None}
    if flags.get("ca_file") is not None and flags.get("tls") is None:
        given["mqtt.tls.enabled"] = "true"
    if flags.get("tls") is not None:
        given["mqtt.tls.enabled"] = "true" if flags["tls"] else "false"
    return given


def client_settings(config_file: Path | None, overrides: Mapping[str, str], flags: Mapping[str, Any]) -> Settings:
    """The settings with the flags of `broker_options` on top; a wrong configuration ends with exit code 2."""
    from llamacpp_mqtt_deploy.config.loading import SYSTEM_FILE, find_file

    given = flag_overrides(flags)
    if config_file is None and find_file(None, os.environ) == SYSTEM_FILE and not os.access(SYSTEM_FILE, os.R_OK):
        # The service's file holds its password and is not for every user of the machine; asking needs none of it.
        click.echo(f"({SYSTEM_FILE} is not readable by this user and left out)", err=True)
        config_file = Path(os.devnull)
    settings = load_or_exit(config_file, {**given, **overrides}).settings
    if flags.get("username") is not None and flags.get("password_file") is None:
        # The configured password belongs to the configured user; it is nobody else's business.
        configured = load_or_exit(config_file, overrides).settings.mqtt.username
        if configured is not None and configured != settings.mqtt.username:
            mqtt = settings.mqtt.model_copy(update={"password": None, "password_file": None})
            return settings.model_copy(update={"mqtt": mqtt})
    return settings


def same_broker(settings: Settings, config_file: Path | None) -> str:
    """The options, ready to be copied, that lead another `lmd` to the same broker, root and user; begins with a blank."""
    from llamacpp_mqtt_deploy.config.settings import Settings as Model

    words = [] if config_file is None else ["--config", str(config_file)]
    ours, usual = settings.mqtt, Model.model_construct().mqtt
    for flag, key in _BROKER_FLAGS.items():
        value: object = ours
        default: object = usual
        for part in key.split(".")[1:]:
            value, default = getattr(value, part), getattr(default, part)
        if value is None or value == default:
            continue
        name = f"--{flag.replace('_', '-')}"
        words += [name] if value is True else [name, str(value)]
    return "".join(f" {shlex.quote(word)}" for word in words)


def bus_client(settings: Settings, **options: Any) -> BusClient:
    """A client, not yet open, for the broker of these settings; raises ValueError for TLS files that cannot be used."""
    from llamacpp_mqtt_deploy.client import BusClient
    from llamacpp_mqtt_deploy.client.configured import bus_options

    return BusClient(**(bus_options(settings) | options))


def session_path(name: str, username: str | None) -> str:
    """`NAME` as a session path: below the user name, where the recommended access list allows this user to write."""
    return name if username is None or "/" in name else f"{username}/{name}"


def exit_code(error: BusError) -> int:
    """The exit code for an error of the bus client."""
    from llamacpp_mqtt_deploy import client

    match error:
        case client.AnswerError():
            return TRY_LATER if error.retryable else FAILED
        case client.BrokerUnreachable() | client.BrokerRefused() | client.NotPermitted():
            return NO_BROKER
        case client.NoWorker() | client.AnswerLost():
            return NO_WORKER
        case _:
            return FAILED


def colourful() -> bool:
    """Whether stdout is a terminal that shows colours, and its owner wants them."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def told(name: str, outcome: list[int]) -> Iterator[None]:
    """Errors of the bus as one line on stderr and an exit code in `outcome`."""
    from llamacpp_mqtt_deploy.client import BusError

    try:
        yield
    except BusError as error:
        tell(f"{name}: {error}")
        outcome.append(exit_code(error))
    except ValueError as error:
        tell(f"{name}: {error}")
        outcome.append(USAGE)


def tell(message: object) -> None:
    """One line on stderr; nothing that came over the wire may steer the terminal."""
    click.echo(harmless(str(message)), err=True)


# --- Ctrl-C --------------------------------------------------------------------------------------------------------------


class Interrupts:
    """While the block runs, Ctrl-C, SIGTERM and the end of the terminal (SIGHUP) only count; the second one leaves the program at
    once."""

    def __init__(self) -> None:
        self.code: int | None = None
        """The exit code to end with, once a signal came."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue  # Windows has none; under nohup it means nothing
            # Outside the main thread Python refuses handlers: a program that embeds the command keeps its own.
            with contextlib.suppress(ValueError):
                self._before[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _count(self, number: int, _frame: FrameType | None) -> None:
        if self.code is not None:
            # No lock may be taken here and no thread waited for: the first signal's cancel may be the one that hangs.
            os._exit(self.code)
        self.code = CANCELLED if number == signal.SIGINT else TERMINATED


# --- the answer ----------------------------------------------------------------------------------------------------------

# C0 but newline and tab, DEL, and C1: with them a model could move the cursor, set the title or fake a prompt. The marks for
# the direction of writing could show a command or a name in another order than the one in which it is copied.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def readable(text: str) -> str:
    """An argument as text; bytes in it that are not UTF-8 become U+FFFD, as in what comes through a pipe."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def harmless(text: str) -> str:
    """The text without control characters and marks of direction, newline and tab excepted."""
    return _CONTROL.sub("", text)


def json_text(value: object, *, indent: bool = False) -> str:
    """The value as JSON that no terminal obeys, the same for every reader: what `harmless` takes out is escaped."""
    text = orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else None).decode()
    return escaped(text)


def escaped(json: str) -> str:
    """JSON with the characters escaped that could steer a terminal; those below U+007F are in any JSON."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json)


def print_json(value: object, *, indent: bool = False) -> None:
    """One JSON document on stdout."""
    click.echo(json_text(value, indent=indent))


def one_line(value: object) -> str:
    """Something that came over the wire as one harmless line."""
    return " ".join(harmless(str(value)).split())


@dataclass(slots=True)
class Screen:
    """Where an answer goes: text to `out` (exactly as it is on a pipe, harmless on a terminal), the rest to `err`.

    `reasoning` says whether the model's thinking is shown (on `err`); None means on a terminal only.
    """

    out: TextIO
    err: TextIO
    reasoning: bool | None = None
    _status: str = ""
    _column: bool = False
    _thinking: bool = False
    _wrap: WordWrap = field(default_factory=WordWrap)

    @classmethod
    def standard(cls, *, reasoning: bool | None = None) -> Screen:
        return cls(sys.stdout, sys.stderr, reasoning)

    @property
    def live(self) -> bool:
        """Both ends are a terminal that can erase a line."""
        return self.out.isatty() and self.err.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def show(self, reading: Reading) -> None:
        """Print what one event brought."""
        if reading.reasoning and (self.out.isatty() if self.reasoning is None else self.reasoning):
            self._erase()
            if not self._thinking:
                self._wrap.word_ends()
            self._thinking = True
            self._dim(self._fitted(reading.reasoning, self.err), end="")
        if reading.content:
            self._erase()
            if self._thinking:
                self._wrap = WordWrap()
                self.err.write("\n\n")
                self.err.flush()
                self._thinking = False
            self.out.write(self._fitted(reading.content, self.out))
            self.out.flush()
            self._column = not reading.content.endswith("\n")
        elif not reading.reasoning:
            self._show_status(_status_line(reading.event))

    def _fitted(self, text: str, stream: TextIO) -> str:
        """Text for this stream: as it is on a pipe; on a terminal harmless and broken between words."""
        return self._wrap.feed(harmless(text), _columns(stream)) if stream.isatty() else text

    def finish(self, *, newline: bool = True) -> None:
        """End the line of the answer."""
        self._erase()
        if self._thinking:
            self.err.write("\n")
            self._thinking = False
        if newline and self._column:
            self.out.write("\n")
        self.out.flush()
        self._column = False
        self._wrap = WordWrap()

    def summary(self, done: Done) -> None:
        """The last, dim line of an answer on a terminal; warnings always."""
        for warning in done.warnings:
            tell(f"warning: {one_line(warning)}")
        if self.live:
            self._dim(one_line(_summary_line(done)))

    def note(self, text: str) -> None:
        """A dim line beside the conversation."""
        self._dim(self._fitted(text, self.err))
        self._wrap = WordWrap()

    def _show_status(self, line: str) -> None:
        line = one_line(line)
        if line and self.live and line != self._status:
            self._erase()
            width = max(20, _columns(self.err) - 1)
            self._dim(line[:width], end="")
            self._status = line

    def _erase(self) -> None:
        if self._status:
            self.err.write("\r\x1b[2K")
            self.err.flush()
            self._status = ""

    def _dim(self, text: str, *, end: str = "\n") -> None:
        colour = self.live and "NO_COLOR" not in os.environ
        self.err.write(f"\x1b[2m{text}\x1b[0m{end}" if colour else f"{text}{end}")
        self.err.flush()


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 80


def _status_line(event: Mapping[str, Any]) -> str:
    match event.get("type"):
        case "queued":
            reason = str(event.get("reason", "waiting")).replace("_", " ")
            return f"{reason}, place {event.get('position', '?')} in the queue" if reason == "waiting" else reason
        case "start":
            return f"{event.get('model') or 'the model'} begins"
        case "progress":
            processed, total = event.get("processed", 0), event.get("total", 0)
            return f"reading the prompt: {processed} of {total} tokens"
        case "ping":
            return f"still there ({event.get('state', 'working')})"
        case _:
            return ""


def _summary_line(done: Done) -> str:
    parts = []
    if (tokens := number(done.usage, "completion_tokens")) is not None:
        parts.append(f"{tokens:g} tokens")
    if (speed := number(done.timings, "tokens_per_second")) is not None:
        parts.append(f"{speed:.1f} tokens/s")
    if (first := number(done.timings, "first_token_ms")) is not None:
        parts.append(f"first token {first:.0f} ms")
    if (total := number(done.timings, "total_ms")) is not None:
        parts.append(f"{total / 1000:.1f} s")
    if done.model:
        parts.append(done.model)
    if done.finish_reason != "stop":
        parts.append(
            {"length": "cut at max_tokens", "tool_calls": "asks for tools"}.get(done.finish_reason, done.finish_reason)
        )
    return " · ".join(parts)


def number(fields: Mapping[str, Any], name: str) -> float | None:
    """A number that came over the wire; None where it is absent or something else."""
    value = fields.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value < 1e15 else None


def follow(
    answer: Answer, interrupts: Interrupts, show: Callable[[Reading], None], bus: BusClient | None = None
) -> Done:
    """Show an answer until it ends; a signal cancels it on the worker. Raises `BusError`.

    With `bus` a person is told that no worker is online long before the client gives the request up.
    """
    cancelled = False
    tell_absence_at = time.monotonic() + QUIET_S if bus and sys.stderr.isatty() else math.inf
    while True:
        reading = answer.poll(POLL_S)
        if reading is not None:
            tell_absence_at = math.inf
            show(reading)
        elif answer.ended:
            return answer.result()
        elif time.monotonic() >= tell_absence_at:
            tell_absence_at = math.inf
            if bus and not bus.workers_online():
                tell("No worker is online; waiting a moment for one.")
        if interrupts.code is not None and not cancelled:
            cancelled = True
            answer.cancel()


@contextlib.contextmanager
def closing_pipe() -> Iterator[None]:
    """A reader that has seen enough (`lmd ask ... | head -1`) is no error of ours."""
    try:
        yield
    except BrokenPipeError:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(FAILED)


def leave(code: int) -> NoReturn:
    raise click.exceptions.Exit(code)
