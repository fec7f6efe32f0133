"""`lmd demo`: a broker, a small model and the daemon on this machine, and a first conversation over them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llamacpp_mqtt_deploy.commands.options import set_option
from llamacpp_mqtt_deploy.commands.terminal import (
    FAILED,
    Interrupts,
    closing_pipe,
    follow,
    harmless,
    leave,
    tell,
)

if TYPE_CHECKING:
    from rich.console import Console

    from llamacpp_mqtt_deploy.client import BusClient
    from llamacpp_mqtt_deploy.commands.demo_show import Turn
    from llamacpp_mqtt_deploy.core.events import Reading
    from llamacpp_mqtt_deploy.demo.brokers import Broker, Choice
    from llamacpp_mqtt_deploy.demo.processes import DemoProcesses
    from llamacpp_mqtt_deploy.demo.worker import Facts

PROMPTS = (
    "Tell me about the sea",
    "My name is Ada.",
    "What is my name?",
    "Count from 1 to 10 slowly",
)

_LOOK_AROUND_S = 0.25


@click.command()
@click.option("--once", is_flag=True, envvar="DEMO_ONCE", show_envvar=True, help="End after the conversation.")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Port of the demo's broker on 127.0.0.1. Default: any free one."
)
@click.option(
    "--broker",
    "choice",
    type=click.Choice(["auto", "mosquitto", "amqtt"]),
    default="auto",
    show_default=True,
    help="auto takes mosquitto where it is installed, else amqtt.",
)
@click.option(
    "--model",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Your own GGUF file in place of the demo model, which is part of the package.",
)
@click.option(
    "--web/--no-web", "web", default=None, help="Serve the chat page. Default: where the extra `gateway` is installed."
)
@set_option
def command(
    once: bool, port: int | None, choice: Choice, model: Path | None, web: bool | None, overrides: Mapping[str, str]
) -> None:
    """Start a broker, a small language model and the daemon on this machine, and talk to them.

    Everything is private to the demo: the broker listens on 127.0.0.1 only, no configuration of yours is read, and all of it
    is gone when the demo ends. After a first conversation it stays up until Ctrl-C, for your own mosquitto_pub and lmd ask, and
    for a browser.

    \b
    Examples:
      lmd demo
      lmd demo --once
      lmd demo --model ~/models/qwen3-4b-q4_k_m.gguf
      lmd demo --set streaming.mode=native

    \b
    Exit codes:
      0    the conversation is complete (and Ctrl-C or SIGTERM came while it stayed up)
      1    something could not be started, or ended by itself; stderr says what to do
      2    wrong usage
      130  Ctrl-C before the conversation was complete (SIGTERM: 143)
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    from rich.console import Console

    from llamacpp_mqtt_deploy.demo.processes import DemoFailed

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Latin-1 terminal has no "…", and a model may say anything
    # The client is a library whose warnings go to the host's log, and stderr is not one.
    logging.getLogger("llamacpp_mqtt_deploy").addHandler(logging.NullHandler())
    demo = Demo(Console(highlight=False, emoji=False, markup=False), once=once, web=web)
    with closing_pipe(), Interrupts() as demo.interrupts:
        try:
            demo.run(port=port, choice=choice, model=model, overrides=overrides)
        except Leaving as leaving:
            leave(leaving.code)
        except DemoFailed as failure:
            for line in failure.lines:
                tell(f"  | {line}")
            tell(f"lmd demo: {failure}")
            leave(FAILED)
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, no more processes
            tell(f"lmd demo: {error}")
            leave(FAILED)


class Leaving(Exception):
    """A signal said so."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class Demo:
    """The course of the demo, told on `console`."""

    def __init__(self, console: Console, *, once: bool, web: bool | None) -> None:
        self.interrupts = Interrupts()
        self._console = console
        self._fancy = console.is_terminal and not console.is_dumb_terminal
        self._once = once
        self._web = web
        self._page = ""
        self._root = "llm"
        self._began_at = time.monotonic()
        self._first_text_s: float | None = None

    def run(self, *, port: int | None, choice: Choice, model: Path | None, overrides: Mapping[str, str]) -> None:
        """Set up, talk, stay, take down. Raises DemoFailed and Leaving."""
        from llamacpp_mqtt_deploy.demo import brokers, worker
        from llamacpp_mqtt_deploy.demo.processes import DemoFailed, DemoProcesses
        from llamacpp_mqtt_deploy.demo.web import can_serve

        if model is not None:
            model = Path(os.path.abspath(model.expanduser()))  # noqa: PTH100 - resolve() would hide a link's name
            worker.check_model(model)
        if ours := [key for key in worker.OURS if key in overrides]:
            raise click.UsageError(f"{ours[0]} is the demo's own and cannot be set here.")
        worker.check_engine(overrides)
        if self._web and not can_serve():
            raise DemoFailed("The chat page needs the extra `gateway`: pip install 'llamacpp-mqtt-deploy[gateway]'")
        kind = brokers.choose(choice)
        self._root = overrides.get("mqtt.root", self._root)
        self._say("A broker, a language model and the daemon, on this machine and for this demo:")
        environ = worker.clean_environment()
        with DemoProcesses(self._pause) as processes:
            with self._step("broker") as (done, _):
                broker = brokers.start_broker(processes, kind, port, environ=environ)
                done(f"{broker.name} on {brokers.HOST}:{broker.port}, no password")
            settings = worker.worker_settings(
                broker=broker, directory=processes.directory, model=model, overrides=overrides
            )
            with self._set_up(processes, broker, settings, own_model=model is not None) as (bus, facts):
                if self._web or (self._web is None and not self._once and can_serve()):
                    self._serve(processes, broker)
                self._explain_pace(facts)
                self._talk(bus)
                if self._once:
                    self._say("The demo ends here; without --once (DEMO_ONCE) it stays up for your own prompts.")
                else:
                    self._stay(processes, broker)
            began_at = time.monotonic()
        self._say(f"Stopped in {time.monotonic() - began_at:.1f} s; nothing is left running, and no file.")

    # --- set up ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _set_up(
        self, processes: DemoProcesses, broker: Broker, settings: Mapping[str, str], *, own_model: bool
    ) -> Iterator[tuple[BusClient, Facts]]:
        from llamacpp_mqtt_deploy.client import BusClient, BusError
        from llamacpp_mqtt_deploy.demo import brokers, worker
        from llamacpp_mqtt_deploy.demo.processes import DemoFailed

        try:
            with contextlib.ExitStack() as stack:
                with self._step("daemon") as (done, _):
                    child = worker.start_worker(processes, settings, environ=worker.clean_environment())
                    client = BusClient(
                        brokers.HOST, broker.port, root=self._root, protocol=broker.protocol, offline_limit_s=10.0
                    )
                    bus = stack.enter_context(client)
                    worker.wait_online(processes, child, bus)
                    done(f"lmd run (process {child.process.pid}), online over MQTT {bus.protocol}")
                with self._step("engine") as (done, detail):
                    facts = worker.wait_ready(processes, child, bus, own_model=own_model, on_detail=detail)
                    context = f" of {facts.n_ctx} tokens" if facts.n_ctx else ""
                    done(f"{facts.model} on {facts.backend}, {facts.slots} slots{context}, {facts.server}")
                yield bus, facts
        except BusError as error:
            processes.watch()  # a broker or daemon that died is the better reason
            raise DemoFailed(str(error), processes.last_lines("daemon")) from error

    def _serve(self, processes: DemoProcesses, broker: Broker) -> None:
        from llamacpp_mqtt_deploy.demo import web, worker

        with self._step("gateway") as (done, _):
            self._page = web.start_gateway(processes, broker, root=self._root, environ=worker.clean_environment())
            done(f"lmd gateway, the chat page at {self._page}")

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
        """Tells what is being started; yields what to call when it is (`done`) and with news meanwhile."""
        began_at = time.monotonic()

        def done(text: str) -> None:
            self._say(f"  {name:8} {text} ({time.monotonic() - began_at:.1f} s)")

        if not self._fancy:
            yield done, lambda text: self._say(f"  {name:8} {text}")
            return
        with self._console.status(f"{name} …") as status:
            yield done, lambda text: status.update(f"{name} … {harmless(text)}")

    def _explain_pace(self, facts: Facts) -> None:
        self._say()
        if facts.mode == "simulated":
            self._say("The demo model writes thousands of tokens a second. To let you watch, its")
            self._say("answers are paced here (streaming.mode = simulated); by default, native,")
            self._say("chunks go out as the model writes them.")
            self._say()

    # --- the conversation ------------------------------------------------------------------------------------------------

    def _talk(self, bus: BusClient) -> None:
        from llamacpp_mqtt_deploy.demo.worker import SESSION

        for number, prompt in enumerate(PROMPTS, 1):
            answer = bus.ask(prompt, session=SESSION, request_id=f"demo-{number}")
            turn = self._turn(prompt, answer.payload)
            finished = None

            def show(reading: Reading, turn: Turn = turn) -> None:
                if self._first_text_s is None and reading.content:
                    self._first_text_s = time.monotonic() - self._began_at
                turn.feed(reading)

            try:
                finished = follow(answer, self.interrupts, show)
            finally:
                turn.end(finished)
            self._pause(0)
        if self._first_text_s is not None:
            self._say(f"From the start of `lmd demo` to the first token: {self._first_text_s:.1f} s.")

    def _turn(self, prompt: str, payload: bytes) -> Turn:
        from llamacpp_mqtt_deploy.commands.demo_show import LiveTurn, PlainTurn
        from llamacpp_mqtt_deploy.demo.worker import SESSION

        request = (f"{self._root}/request/{SESSION}", payload)
        reply_topic = f"{self._root}/reply/{SESSION}"
        if self._fancy:
            return LiveTurn(self._console, prompt=prompt, request=request, reply_topic=reply_topic)
        return PlainTurn(sys.stdout, prompt=prompt, request=request, reply_topic=reply_topic)

    # --- until Ctrl-C ----------------------------------------------------------------------------------------------------

    def _stay(self, processes: DemoProcesses, broker: Broker) -> None:
        self._say()
        for line in self._suggestions(broker):
            self._say(line)
        with contextlib.suppress(Leaving):
            while True:
                self._pause(_LOOK_AROUND_S)
                processes.watch()
        self._say()

    def _suggestions(self, broker: Broker) -> Iterator[str]:
        """What to type in another terminal, ready to be copied."""
        from llamacpp_mqtt_deploy.config.loading import find_file
        from llamacpp_mqtt_deploy.demo.brokers import HOST
        from llamacpp_mqtt_deploy.demo.worker import SESSION

        if self._page:
            yield f"The chat page, for a browser on this machine: {self._page}"
            yield ""
        yield "All of it stays up until Ctrl-C. In another terminal:"
        yield ""
        where = f"-h {HOST} -p {broker.port}"
        if shutil.which("mosquitto_sub") is None:
            yield "  # mosquitto_sub and mosquitto_pub are not installed; on Debian and Ubuntu:"
            yield "  sudo apt-get install mosquitto-clients"
            yield ""
        yield "  # see every message on the bus"
        yield f"  mosquitto_sub {where} -v -t '{self._root}/#'"
        yield ""
        yield "  # publish a prompt, as plain text"
        yield f"  mosquitto_pub {where} -q 1 -t {self._root}/request/{SESSION} -m 'Tell me a short story'"
        yield ""
        yield "  # ask and read the answer; the session remembers the conversation above"
        lmd = f"{_lmd()} {{}} --host {HOST} --port {broker.port} --session {SESSION}"
        if self._root != "llm":
            lmd += f" --root {self._root}"
        if broker.protocol != "auto":
            lmd += f" --protocol {broker.protocol}"
        if find_file(None, os.environ) is not None:
            lmd += f" --config {os.devnull}"  # whose user and TLS are meant for another broker
        yield f"  {lmd.format('ask')} 'What is my name?'"
        yield f"  {lmd.format('chat')}"
        yield ""
        if self._page:
            yield "  # ask over HTTP"
            yield f"  curl -N -d 'Tell me a short story' {self._page}ask"
            yield ""

    # --- small things ----------------------------------------------------------------------------------------------------

    def _pause(self, seconds: float) -> None:
        """Wait a little. Raises Leaving as soon as a signal came."""
        if seconds:
            time.sleep(seconds)
        if self.interrupts.code is not None:
            raise Leaving(self.interrupts.code)

    def _say(self, text: str = "") -> None:
        if self._fancy:
            self._console.print(harmless(text), soft_wrap=True)
        else:
            click.echo(harmless(text))


def _lmd() -> str:
    """The command as another terminal finds it: by its path where this environment is not on its PATH."""
    beside, found = Path(sys.executable).with_name("lmd"), shutil.which("lmd")
    if found is not None and (Path(found) == beside or not beside.exists()):
        return "lmd"
    return shlex.quote(str(beside)) if beside.exists() else f"{shlex.quote(sys.executable)} -m llamacpp_mqtt_deploy"
