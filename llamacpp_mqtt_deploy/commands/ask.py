"""`lmd ask`: one request over the bus, its answer streamed to the terminal or a pipe."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from llamacpp_mqtt_deploy.commands.options import finite
from llamacpp_mqtt_deploy.commands.terminal import (
    CANCELLED,
    EXIT_CODES,
    Interrupts,
    Screen,
    broker_options,
    bus_client,
    client_settings,
    closing_pipe,
    follow,
    json_text,
    leave,
    readable,
    session_path,
    tell,
    told,
)

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import Answer, BusClient
    from llamacpp_mqtt_deploy.config.settings import Settings
    from llamacpp_mqtt_deploy.core.events import Reading

MAX_STDIN_BYTES = (
    64 * 1024 * 1024
)  # far over any worker's limits.max_request_bytes; a device file must not fill the memory


def request_options(function: Any) -> Any:
    """The options that are fields of the request, for `ask` and `chat`."""
    for option in reversed(
        [
            click.option("--system", "system_prompt", metavar="TEXT", help="System prompt of this request."),
            click.option("--model", help="One of the worker's models."),
            click.option("--temperature", type=float, callback=finite, help="Randomness; 0 is always the most likely token."),
            click.option("--top-p", type=float, callback=finite, help="Keep the likeliest tokens up to this probability."),
            click.option("--top-k", type=int, help="Keep this many of the likeliest tokens."),
            click.option("--min-p", type=float, callback=finite, help="Drop tokens below this share of the likeliest one."),
            click.option("--max-tokens", type=int, help="Longest answer in tokens."),
            click.option("--seed", type=int, help="Seed of the random numbers."),
            click.option("--stop", multiple=True, metavar="TEXT", help="End the answer at this text; may be repeated."),
            click.option("--thinking/--no-thinking", default=None, help="Let a reasoning model think first, or not."),
            click.option("--priority", type=click.Choice(["interactive", "normal", "batch"]), help="Lane of the queue."),
            click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), callback=finite,
                         metavar="SECONDS", help="Overall limit, waiting included."),
            click.option("--raw", multiple=True, metavar="FIELD=JSON", callback=_raw_fields,
                         help="Any other request field, as in --raw response_format='{\"type\":\"json_object\"}'."),
            click.option("--show-reasoning/--hide-reasoning", "reasoning", default=None,
                         help="Print the model's thinking on stderr. Default: on a terminal only."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


_NOT_RAW: Mapping[str, str] = {
    "prompt": "the prompt itself",
    "session": "--session",
    "stream": "--no-stream or --sentence",
    "timeout_s": "--timeout",
}
"""What the command itself says in each request, and where it takes that from."""


def _raw_fields(context: click.Context, _parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    own = dict(_NOT_RAW)
    if "no_stream" not in (parameter.name for parameter in context.command.params):
        del own["stream"]  # `chat` says nothing of it
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"expected FIELD=JSON, found {pair!r}")
        if name in own:
            raise click.BadParameter(f"{name}: use {own[name]} instead")
        try:
            fields[name] = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise click.BadParameter(f"{name}: expected JSON (text in quotes), found {value!r}") from None
    return fields


def request_fields(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The request fields among the values of `request_options`, without those not given."""
    names = (
        "system_prompt", "model", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "thinking", "priority",
        "timeout_s",
    )  # fmt: skip
    fields = {name: flags[name] for name in names if flags[name] is not None}
    if flags["stop"]:
        fields["stop"] = list(flags["stop"])
    raw: dict[str, Any] = flags["raw"]
    return fields | raw


@click.command(
    help=f"""Ask one question and stream the answer.

    PROMPT is one or several words; `-` stands for the text on stdin, which is also read when there is no PROMPT and stdin is
    not a terminal. The answer alone goes to stdout, all else to stderr. Broker and user come from the same configuration as
    the worker's.

    \b
    Examples:
      lmd ask "Why is the sky blue?"
      lmd ask "Summarise this:" - < report.txt
      lmd ask --session kitchen "And tomorrow?"
      lmd ask --host broker.lan --username alice --password-file ~/.mqtt-password "hello"
      lmd ask --json --max-tokens 20 "Count." | jq -r 'select(.type == "chunk").content'

    {EXIT_CODES}
    """
)
@click.argument("prompt", nargs=-1)
@click.option("-s", "--session", metavar="NAME", help="Continue this session. Default: a new one, deleted afterwards.")
@click.option("--new", is_flag=True, help="Forget what was said in the session before.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as one line of JSON.")
@click.option("--no-stream", is_flag=True, help="Wait for the whole answer.")
@click.option("--sentence", is_flag=True, help="Stream whole sentences, for speech.")
@request_options
@broker_options
def command(
    prompt: tuple[str, ...],
    session: str | None,
    new: bool,
    as_json: bool,
    no_stream: bool,
    sentence: bool,
    config_file: Path | None,
    overrides: Mapping[str, str],
    **flags: Any,
) -> None:
    if no_stream and sentence:
        raise click.UsageError("--no-stream and --sentence exclude each other.")
    text = _prompt(prompt)
    settings = client_settings(config_file, overrides, flags)
    fields = request_fields(flags) | ({"new": True} if new else {})
    stream: Any = False if no_stream else "sentence" if sentence else True
    with closing_pipe():
        leave(_run(settings, text, session, fields, stream=stream, as_json=as_json, reasoning=flags["reasoning"]))


def _prompt(words: tuple[str, ...]) -> str:
    if not words and sys.stdin.isatty():
        raise click.UsageError('What is the question? Give a PROMPT: lmd ask "Why is the sky blue?"')
    text = " ".join(_stdin() if word == "-" else readable(word) for word in words or ("-",))
    if not text.strip():
        raise click.UsageError("The prompt is empty.")
    return text


def _stdin() -> str:
    raw = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(raw) > MAX_STDIN_BYTES:
        raise click.UsageError(f"The text on stdin has more than {MAX_STDIN_BYTES} bytes.")
    try:
        return raw.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"The text on stdin is not UTF-8 (at byte {error.start}).") from None


def _run(
    settings: Settings,
    prompt: str,
    session: str | None,
    fields: dict[str, Any],
    *,
    stream: Any,
    as_json: bool,
    reasoning: bool | None,
) -> int:
    username = settings.mqtt.username
    name = session_path(session or f"ask-{secrets.token_hex(6)}", username or (None if session else "cli"))
    screen = Screen.standard(reasoning=reasoning)
    outcome: list[int] = []
    try:
        with told("lmd ask", outcome), bus_client(settings) as bus, Interrupts() as interrupts:
            answer = bus.ask(prompt, session=name, stream=stream, **fields)
            try:
                outcome.append(_follow(answer, interrupts, screen, bus, as_json=as_json))
            finally:
                if session is None:
                    _forget(bus, name, answer)
    except KeyboardInterrupt:  # before the broker answered
        return CANCELLED
    return outcome[-1]


def _follow(answer: Answer, interrupts: Interrupts, screen: Screen, bus: BusClient, *, as_json: bool) -> int:
    def print_line(reading: Reading) -> None:
        screen.out.write(json_text(reading.event) + "\n")
        screen.out.flush()

    try:
        done = follow(answer, interrupts, print_line if as_json else screen.show, bus)
    finally:
        if not as_json:
            screen.finish()
    if not as_json:
        if done.tool_calls:
            tell("The model asks for tools: " + json_text(done.tool_calls))
        screen.summary(done)
    if done.cancelled:
        return interrupts.code or CANCELLED
    return 0


def _forget(bus: BusClient, session: str, answer: Answer) -> None:
    """A session that nobody can name again should not fill the worker's store. The worker's `ack` is not waited for."""
    if answer.ended:
        bus.tell(session, "delete")
