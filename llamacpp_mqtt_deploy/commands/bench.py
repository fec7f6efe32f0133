"""`lmd bench`: how fast a live deployment answers, over the bus and beside it straight from the engine's server."""

from __future__ import annotations

import itertools
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacpp_mqtt_deploy.commands.bench_load import Ask, AskFailed, Round, Sampled, compared, run_round, summary
from llamacpp_mqtt_deploy.commands.options import finite
from llamacpp_mqtt_deploy.commands.terminal import (
    CANCELLED,
    FAILED,
    POLL_S,
    Interrupts,
    broker_options,
    bus_client,
    client_settings,
    closing_pipe,
    exit_code,
    leave,
    one_line,
    print_json,
    session_path,
    tell,
    told,
)

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import BusClient
    from llamacpp_mqtt_deploy.config.settings import Settings
    from llamacpp_mqtt_deploy.direct import LlamaCppClient

MAX_STREAMS = 64
MAX_REQUESTS = 10_000
MAX_PROMPTS_BYTES = 4 * 1024 * 1024
_ROUNDS = 5
"""The two ways take turns this often, so that what else the machines do falls on both."""
_CLOSE_S = 15.0
_USUAL = "Tell a story about a lighthouse keeper and the number"


@click.command()
@click.argument("prompt", nargs=-1)
@click.option("--streams", type=click.IntRange(1, MAX_STREAMS), default=1, show_default=True, help="Requests at once.")
@click.option(
    "--requests", type=click.IntRange(1, MAX_REQUESTS), default=10, show_default=True, help="Requests over the bus."
)
@click.option(
    "--max-tokens", type=click.IntRange(1, 32768), default=128, show_default=True, help="Longest answer in tokens."
)
@click.option("--prompts", type=click.File("rb"), help="File with a prompt in each line, used in turn.")
@click.option("--model", help="One of the worker's models.")
@click.option("--priority", type=click.Choice(["interactive", "normal", "batch"]), help="Lane of the queue.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), callback=finite, metavar="SECONDS",
    default=300.0, show_default=True, help="Overall limit of a request, waiting included.",
)  # fmt: skip
@click.option(
    "--direct", metavar="URL", help="Ask the engine's server as well, in turn with the bus (http://host:8080)."
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="File whose first line is the API key for --direct."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as on a pipe.")
@broker_options
def command(
    prompt: tuple[str, ...],
    streams: int,
    requests: int,
    prompts: Any,
    as_json: bool,
    config_file: Path | None,
    overrides: Mapping[str, str],
    **flags: Any,
) -> None:
    """Measure a live deployment: tokens per second, first token, pauses between chunks, errors.

    PROMPT is asked again and again, each time as the first prompt of a session. Without one it is a short text with another
    number each time, so that no prompt is found evaluated already. There are never more than --streams requests at once;
    a stream that is refused twice in a row asks no more. Ctrl-C cancels what runs and prints what there is; the sessions are
    deleted at the end. Figures of an engine that others use at the same time say little.

    \b
    Examples:
      lmd bench
      lmd bench --streams 4 --requests 40 --max-tokens 200
      lmd bench --direct http://127.0.0.1:8080 --streams 2 --requests 20
      lmd bench --prompts questions.txt --json > today.json

    \b
    Exit codes:
      0    every request was answered
      1    some requests failed (the report counts them by code)
      2    wrong usage or configuration
      3    the broker is out of reach, or refuses this user or topic
      4    no worker is online, or no answer came
      5    the worker is busy or restarting, and nothing was answered
      130  cancelled with Ctrl-C (twice leaves at once)
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    texts = _prompts(prompt, prompts)
    settings = client_settings(config_file, overrides, flags)
    plan = _Plan(streams=min(streams, requests), requests=requests, flags=flags)
    with closing_pipe():
        leave(_run(settings, plan, texts, as_json=as_json or not sys.stdout.isatty()))


class _Plan:
    """What is asked, and how often."""

    def __init__(self, *, streams: int, requests: int, flags: Mapping[str, Any]) -> None:
        self.streams, self.requests = streams, requests
        self.max_tokens: int = flags["max_tokens"]
        self.model: str | None = flags["model"]
        self.timeout_s: float = flags["timeout_s"]
        self.priority: str | None = flags["priority"]
        self.direct: str | None = flags["direct"]
        self.api_key_file: Path | None = flags["api_key_file"]

    def portions(self) -> list[int]:
        """Requests of each round: each stream has one at least."""
        rounds = max(1, min(_ROUNDS, self.requests // self.streams))
        return [self.requests // rounds + (number < self.requests % rounds) for number in range(rounds)]


def _prompts(words: Sequence[str], file: Any) -> Iterator[str]:
    if words and file is not None:
        raise click.UsageError("PROMPT and --prompts exclude each other.")
    if words:
        return itertools.repeat(" ".join(words))
    if file is None:
        start = secrets.randbelow(1_000_000)  # what the last run asked may still be in the engine's cache
        return (f"{number}: {_USUAL} {number}." for number in itertools.count(start))
    raw = file.read(MAX_PROMPTS_BYTES + 1)
    if len(raw) > MAX_PROMPTS_BYTES:
        raise click.UsageError(f"The file of --prompts has more than {MAX_PROMPTS_BYTES} bytes.")
    try:
        lines = [line.strip() for line in raw.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise click.UsageError(f"The file of --prompts is not UTF-8 (at byte {error.start}).") from None
    if not lines:
        raise click.UsageError("The file of --prompts has no prompt.")
    return itertools.cycle(lines)


def _run(settings: Settings, plan: _Plan, texts: Iterator[str], *, as_json: bool) -> int:
    outcome: list[int] = []
    try:
        with ExitStack() as stack:
            stack.enter_context(told("lmd bench", outcome))
            direct = None if plan.direct is None else stack.enter_context(_direct_client(plan))
            bus = stack.enter_context(bus_client(settings))
            interrupts = stack.enter_context(Interrupts())
            load = _BusLoad(bus, settings.mqtt.username, plan)
            try:
                ways = {"bus": load.ask} | ({} if direct is None else {"direct": _direct(direct, plan)})
                rounds = _measure(ways, plan, texts, interrupts)
            finally:
                load.forget()
            outcome.append(_report(rounds, plan, interrupts, as_json=as_json))
    except KeyboardInterrupt:  # before the broker answered
        return CANCELLED
    return outcome[-1]


def _measure(
    ways: Mapping[str, Ask], plan: _Plan, texts: Iterator[str], interrupts: Interrupts
) -> dict[str, list[Round]]:
    """Every way in turn; what is there when Ctrl-C came."""
    rounds: dict[str, list[Round]] = {way: [] for way in ways}
    progress = _Progress(plan.requests * len(ways))
    for portion in plan.portions():
        for way, ask in ways.items():
            rounds[way].append(_one_round(ask, plan, texts, portion, interrupts, progress.step))
            if interrupts.code is not None or _hopeless(rounds[way]):
                progress.end()
                return rounds
    progress.end()
    return rounds


def _hopeless(rounds: Sequence[Round]) -> bool:
    """A whole round without an answer: the next one would only add to the trouble."""
    return not rounds[-1].seen


def _one_round(
    ask: Ask, plan: _Plan, texts: Iterator[str], requests: int, interrupts: Interrupts, on_end: Callable[[], None]
) -> Round:
    """In threads, while this one looks for Ctrl-C."""
    stop, results = threading.Event(), list[Round]()

    def work() -> None:
        results.append(run_round(ask, texts, streams=plan.streams, requests=requests, stop=stop, on_end=on_end))

    thread = threading.Thread(target=work, name="lmd-bench-round")
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        if interrupts.code is not None:
            stop.set()
    return results[0]


# --- the two ways --------------------------------------------------------------------------------------------------------


class _BusLoad:
    """Requests over the bus: each stream has a session of its own, whose history every request forgets first."""

    def __init__(self, bus: BusClient, username: str | None, plan: _Plan) -> None:
        self._bus, self._plan = bus, plan
        name = f"bench-{secrets.token_hex(4)}"
        self._sessions = [session_path(f"{name}-{stream}", username or "cli") for stream in range(plan.streams)]

    def ask(self, stream: int, prompt: str, stop: threading.Event) -> Sampled | None:
        from llamacpp_mqtt_deploy.client import AnswerError, BusError

        plan = self._plan
        seen = Sampled(time.monotonic())
        try:
            answer = self._bus.ask(
                prompt, session=self._sessions[stream], new=True, max_tokens=plan.max_tokens, full_content=False,
                timeout_s=plan.timeout_s, model=plan.model, priority=plan.priority,
            )  # fmt: skip
            stopped_at: float | None = None
            while not answer.ended:
                reading = answer.poll(POLL_S)
                if reading is not None and (reading.content or reading.reasoning or reading.tool_calls):
                    seen.chunk(time.monotonic())
                if stop.is_set() and stopped_at is None:
                    stopped_at = time.monotonic()
                    answer.cancel()
                if stopped_at is not None and time.monotonic() - stopped_at > _CLOSE_S:
                    return None  # a worker that does not answer a cancel; closing the client gives it up
            ended = time.monotonic()
            # What came in one go with the end is still to be counted.
            while (reading := answer.poll(0)) is not None:
                if reading.content or reading.reasoning or reading.tool_calls:
                    seen.chunk(ended)
            done = answer.result()
        except AnswerError as error:
            raise AskFailed(error.code, error, retry_after_s=_seconds(error.details.get("retry_after_s"))) from error
        except BusError as error:
            raise AskFailed(type(error).__name__, error) from error
        seen.ended, seen.tokens = ended, int(done.usage.get("completion_tokens") or 0)
        return None if done.cancelled else seen

    def forget(self) -> None:
        """Sessions that nobody can name again should not fill the worker's store."""
        for session in self._sessions:
            if not self._bus.tell(session, "delete"):
                return


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0


def _direct_client(plan: _Plan) -> LlamaCppClient:
    from llamacpp_mqtt_deploy.direct import DeploymentConfig, LlamaCppClient

    assert plan.direct is not None
    key = None
    if plan.api_key_file is not None:
        try:
            key = plan.api_key_file.read_text("utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The API key cannot be read from {plan.api_key_file}: {error}") from error
    return LlamaCppClient(
        DeploymentConfig(server_url=plan.direct, api_key=key, model=plan.model, timeout_s=plan.timeout_s)
    )


def _direct(client: LlamaCppClient, plan: _Plan) -> Ask:
    from llamacpp_mqtt_deploy.core.errors import RequestError

    def ask(_stream: int, prompt: str, stop: threading.Event) -> Sampled | None:
        notes: dict[str, Any] = {}
        seen = Sampled(time.monotonic())
        messages = [{"role": "user", "content": prompt}]
        try:
            for _ in client.generate_stream(messages, max_tokens=plan.max_tokens, debug_info=notes):
                seen.chunk(time.monotonic())
                if stop.is_set():
                    return None
        except RequestError as error:
            raise AskFailed(error.code, error) from error
        seen.ended = time.monotonic()
        # The first thought of a reasoning model counts, as it does on the bus; `generate_stream` yields text alone.
        if (first_ms := notes.get("timings", {}).get("first_token_ms")) is not None:
            seen.first = seen.asked + first_ms / 1000
        seen.tokens = int(notes.get("usage", {}).get("completion_tokens") or 0)
        return seen

    return ask


# --- the report ----------------------------------------------------------------------------------------------------------


class _Progress:
    """How many requests have ended, on a terminal."""

    def __init__(self, total: int) -> None:
        self._total, self._ended, self._lock = total, 0, threading.Lock()
        self._live = sys.stderr.isatty()

    def step(self) -> None:
        with self._lock:
            self._ended += 1
            if self._live:
                sys.stderr.write(f"\r\x1b[2K{self._ended} of {self._total} requests")
                sys.stderr.flush()

    def end(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def _report(rounds: Mapping[str, Sequence[Round]], plan: _Plan, interrupts: Interrupts, *, as_json: bool) -> int:
    """Print it; the exit code."""
    ways = {way: summary(each) for way, each in rounds.items()}
    record: dict[str, Any] = {"streams": plan.streams, "max_tokens": plan.max_tokens, **ways}
    if "direct" in ways:
        record["ratio"] = compared(ways["bus"], ways["direct"])
    if as_json:
        print_json(record)
    else:
        click.echo("\n".join(_lines(record)))
    failures = [failure for each in rounds.values() for one in each for failure in one.failures]
    if failures:
        tell(f"lmd bench: {len(failures)} of the requests failed; the first one: {one_line(failures[0])}")
    if interrupts.code is not None:
        return interrupts.code
    if failures and not any(one.seen for each in rounds.values() for one in each):
        from llamacpp_mqtt_deploy.client import BusError

        cause = failures[0].cause
        return exit_code(cause) if isinstance(cause, BusError) else FAILED
    return FAILED if failures else 0


_ROWS: Sequence[tuple[str, Callable[[Mapping[str, Any]], object]]] = (
    ("tokens/s, all streams", lambda way: way["tokens_per_s"]),
    ("tokens/s of a stream, after its first token", lambda way: way["tokens_per_s_of_a_stream"]),
    ("first token, p50, ms", lambda way: way["first_token_ms"]["p50"]),
    ("first token, p99, ms", lambda way: way["first_token_ms"]["p99"]),
    ("pause between chunks, p50, ms", lambda way: way["chunk_pause_ms"]["p50"]),
    ("pause between chunks, p99, ms", lambda way: way["chunk_pause_ms"]["p99"]),
    ("requests answered", lambda way: way["answered"]),
    ("tokens", lambda way: way["tokens"]),
    ("chunks", lambda way: way["chunks"]),
    ("errors", lambda way: ", ".join(f"{one_line(code)} x {count}" for code, count in way["errors"].items()) or 0),
)


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    ways = [way for way in ("bus", "direct") if way in record]
    width = max(len(name) for name, _ in _ROWS)
    yield f"{'':{width}}" + "".join(f"{way:>12}" for way in ways)
    for name, value in _ROWS:
        cells = (value(record[way]) for way in ways)
        yield f"{name:{width}}" + "".join(f"{'-' if cell is None else cell:>12}" for cell in cells)
    if "ratio" in record:
        ratio, later = record["ratio"]["tokens_per_s"], record["ratio"]["first_token_later_ms"]
        yield f"tokens/s, bus / direct: {'-' if ratio is None else ratio}; first token later: p50 {later['p50']} ms, p99 {later['p99']} ms"
