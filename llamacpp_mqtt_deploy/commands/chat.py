"""`lmd chat`: a conversation whose history the worker keeps; each line of a pipe is a prompt."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import select
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacpp_mqtt_deploy.commands.ask import request_fields, request_options
from llamacpp_mqtt_deploy.commands.terminal import (
    CANCELLED,
    EXIT_CODES,
    FAILED,
    TERMINATED,
    Interrupts,
    Screen,
    broker_options,
    bus_client,
    client_settings,
    closing_pipe,
    follow,
    harmless,
    leave,
    one_line,
    same_broker,
    session_path,
    tell,
    told,
)

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import BusClient

REMEMBERED_LINES = 1000
RECALLED_MESSAGES = 10
RECALL_S = 3.0
PASTE_S = 0.02

HELP = """\
/new            forget the conversation so far
/cancel         stop whatever this session still has running (Ctrl-C stops the answer on the screen)
/system TEXT    set the system prompt from here on; without TEXT the worker's own
/history        show what the worker remembers
/help           this text
/quit           leave (or Ctrl-D); the conversation stays on the worker
Pasted lines are one prompt. A line that ends with \\ goes on in the next one; a prompt that begins with / is written with //."""


@click.command(
    help=f"""Talk to the model; the worker remembers the conversation.

    Ctrl-C stops the running answer and keeps the conversation, Ctrl-D leaves. On a pipe each line is a prompt.

    A line that begins with / is a command: /new, /cancel, /system, /history, /quit; /help says what they do.

    \b
    Examples:
      lmd chat
      lmd chat --session kitchen --system "You are a cook."
      printf 'My name is Ada.\\nWhat is my name?\\n' | lmd chat

    {EXIT_CODES}
    On a pipe the code is that of the first prompt that failed.
    """
)
@click.option("-s", "--session", metavar="NAME", help="Continue this session. Default: a new one, told at the start.")
@click.option("--new", is_flag=True, help="Forget what was said in the session before.")
@request_options
@broker_options
def command(
    session: str | None,
    new: bool,
    config_file: Path | None,
    overrides: Mapping[str, str],
    **flags: Any,
) -> None:
    settings = client_settings(config_file, overrides, flags)
    username = settings.mqtt.username
    path = session_path(session or f"chat-{secrets.token_hex(4)}", username or (None if session else "cli"))
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    failures: list[int] = []
    with closing_pipe(), _interrupted(failures), told("lmd chat", failures), bus_client(settings) as bus:
        screen = Screen.standard(reasoning=flags["reasoning"])
        chat = Chat(bus, path, screen, fields=request_fields(flags), interactive=interactive, failures=failures)
        if new:
            chat.control("reset")
        if interactive:
            _greet(chat, f"lmd chat{same_broker(settings, config_file)} --session {path}")
            if session is not None and not new:
                chat.recall()
        for line in _typed_lines() if interactive else _piped_lines():
            if not chat.take(line):
                break
            if interactive and TERMINATED not in failures:
                failures.clear()  # they were told, and the person went on
    leave(failures[0] if failures else 0)


@contextlib.contextmanager
def _interrupted(failures: list[int]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        failures.insert(0, CANCELLED)


def _greet(chat: Chat, again: str) -> None:
    workers = [worker for worker in chat.bus.status() if worker in chat.bus.workers_online()]
    with_whom = f" with {', '.join(workers)}" if workers else " (no worker is online)"
    tell(
        f"Session {chat.session}{with_whom}. /help lists the commands, Ctrl-D leaves. To continue it later:\n  {again}"
    )


@dataclass(slots=True)
class Chat:
    """One conversation: takes lines, sends prompts and commands, shows answers."""

    bus: BusClient
    session: str
    screen: Screen
    fields: dict[str, Any] = field(default_factory=dict)
    interactive: bool = True
    failures: list[int] = field(default_factory=list)
    """Exit codes of the prompts and commands that failed."""

    def take(self, line: str) -> bool:
        """Do what this line says; false when it says to leave."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            return self.ask(line)
        if line.startswith("//"):
            return self.ask(line[1:])
        name, _, rest = line[1:].strip().partition(" ")
        match name:
            case "quit" | "exit":
                return False
            case "help":
                tell(HELP)
            case "new":
                self.control("reset", done="Forgotten; a new conversation begins.")
            case "cancel":
                self._cancel()
            case "system":
                self._system(rest.strip())
            case "history":
                self._history()
            case _:
                tell(f"There is no command /{name}. /help lists them; // begins a prompt with a slash.")
                self.failures.append(FAILED)
        return True

    def ask(self, prompt: str) -> bool:
        """Send a prompt and show its answer; false when a signal says to leave."""
        with told("lmd chat", self.failures), Interrupts() as interrupts:
            answer = self.bus.ask(prompt, session=self.session, **self.fields)
            try:
                done = follow(answer, interrupts, self.screen.show, self.bus)
            finally:
                self.screen.finish()
            if interrupts.code is not None and (not self.interactive or interrupts.code == TERMINATED):
                self.failures.insert(0, interrupts.code)
                return False
            if done.cancelled:
                tell("(cancelled)")
            self.screen.summary(done)
        return True

    def control(self, action: str, *, done: str = "") -> Mapping[str, Any] | None:
        """The worker's ack; None when it refused or did not answer, which was told."""
        with told("lmd chat", self.failures):
            ack = self.bus.control(self.session, action)
            if ack.get("status") == "ok":
                if done:
                    tell(done)
                return ack
            tell(f"{action}: {ack.get('message') or ack.get('code') or 'the worker refused'}")
            self.failures.append(FAILED)
        return None

    def _cancel(self) -> None:
        ack = self.control("cancel")
        if ack is not None:
            tell("Nothing was running or waiting." if ack.get("cancelled") == 0 else "Cancelled.")

    def _system(self, text: str) -> None:
        if text:
            self.fields["system_prompt"] = text
            tell("The system prompt is set.")
        else:
            self.fields.pop("system_prompt", None)
            tell("The worker's own system prompt is used.")

    def _history(self) -> None:
        with told("lmd chat", self.failures):
            messages = self.bus.history(self.session)
            for line in map(_message_line, messages):
                click.echo(line)
            if not messages:
                tell("The worker remembers nothing of this session.")

    def recall(self) -> None:
        """Show the last turns of a session that is continued, where the worker may tell them; a failure is no matter."""
        from llamacpp_mqtt_deploy.client import BusError

        if not self.bus.workers_online():
            return
        with contextlib.suppress(BusError):
            messages = self.bus.history(self.session, timeout_s=RECALL_S)
            if (earlier := len(messages) - RECALLED_MESSAGES) > 0:
                self.screen.note(f"({earlier} earlier messages; /history shows them)")
            for message in messages[-RECALLED_MESSAGES:]:
                self.screen.note(_message_line(message))


def _message_line(message: object) -> str:
    """A message of the history, harmless on a terminal whatever the worker says that it is."""
    fields = message if isinstance(message, Mapping) else {"content": message}
    content = fields.get("content")
    if isinstance(content, list):
        content = " ".join(_part_text(part) for part in content)
    text = content if isinstance(content, str) else str(content or fields.get("tool_calls") or "")
    return f"{one_line(fields.get('role') or '?')}: {harmless(text) if sys.stdout.isatty() else text}"


def _part_text(part: object) -> str:
    if isinstance(part, Mapping):
        return str(part.get("text") or f"({part.get('type') or 'part'})")
    return str(part)


# --- lines -------------------------------------------------------------------------------------------------------------


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "replace").rstrip("\r\n")


def _typed_lines() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a paste in another encoding: as in `_piped_lines`
    with _line_editing():
        kept = ""
        while True:
            try:
                line = input("... " if kept else "> ")
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                kept = ""
                click.echo("\n(Ctrl-D or /quit leaves)", err=True)
                continue
            line = "\n".join([line, *_rest_of_paste()])
            if line.endswith("\\"):
                kept += line[:-1] + "\n"
                continue
            yield kept + line
            kept = ""


def _rest_of_paste() -> Iterator[str]:
    """The further lines of a paste where line editing cannot mark one: what is there faster than anybody types."""
    while not _marks_pastes() and select.select([sys.stdin], [], [], PASTE_S)[0]:
        with contextlib.suppress(EOFError):
            yield input()


def _marks_pastes() -> bool:
    editing = sys.modules.get("readline")
    return editing is not None and "libedit" not in (editing.__doc__ or "")


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and a history file, where this Python has readline; prompts may be private, so only this user may read it."""
    try:
        import readline
    except ImportError:
        yield
        return
    base = os.environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    file = Path(base) / "llamacpp-mqtt-deploy" / "chat_history"
    if _marks_pastes():  # which Python switches off; then a terminal marks a paste, and the line ends in it are text
        readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(REMEMBERED_LINES)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(file)
