"""The live picture of `lmd top`, with textual (the extra `top`)."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.events import Resize
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Static

from llamacpp_mqtt_deploy.commands.fleet import Fleet, WorkerPicture, figure, share, span, sparkline
from llamacpp_mqtt_deploy.commands.terminal import one_line
from llamacpp_mqtt_deploy.commands.top import look

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import BusClient

ADMIN_TIMEOUT_S = 10.0
LOG_LINES = 20
_SPARKLINE_CELLS = 12
_ANSWERS_EVERY_S = 0.1
_COLOURS: Mapping[str, str] = {"online": "green", "draining": "yellow", "offline": "red", "stale": "red"}
_MANY_MESSAGES = 300
"""Characters of a message that is shown for a moment: an answer over the wire may be of any length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the broker has of the workers, at one moment."""

    workers: Sequence[WorkerPicture]
    connected: bool
    note: str = ""
    """What the broker does not let us see."""


class Watched(Protocol):
    """What the application looks at and acts on; none of `look` may wait."""

    @property
    def place(self) -> str: ...

    def look(self) -> Look: ...

    def admin(self, worker: str, action: str, **fields: Any) -> Mapping[str, Any]:
        """Tell a worker something and wait for its answer; raises BusError and ValueError."""


class WatchedBus:
    """The workers under the root of a bus client."""

    def __init__(self, bus: BusClient, worker: str | None) -> None:
        self._bus = bus
        self._worker = worker
        self._fleet = Fleet()

    @property
    def place(self) -> str:
        return f"{self._bus.root} at {self._bus.address}"

    def look(self) -> Look:
        workers, note = look(self._bus, self._fleet, self._worker)
        return Look(workers=workers, connected=self._bus.connected, note=note)

    def admin(self, worker: str, action: str, **fields: Any) -> Mapping[str, Any]:
        return self._bus.admin(worker, action, timeout_s=ADMIN_TIMEOUT_S, **fields)


def run(bus: BusClient, worker: str | None, *, every_s: float) -> None:
    """Show the live picture until somebody quits. Raises NotPermitted when not even the status may be read."""
    bus.status(wait_s=0.0, required=True)
    look(bus, Fleet(), worker)  # asks for health, which may take a moment now and takes none later
    TopApp(WatchedBus(bus, worker), every_s=every_s).run()


# --- columns -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    cell: Callable[[WorkerPicture], Text]
    from_width: int = 0
    """Left out on terminals that are narrower."""
    width: int | None = None


def _queue(each: WorkerPicture) -> Text:
    if each.queue and any(each.lanes):
        lanes = "/".join(figure(lane) or "0" for lane in each.lanes)
        return Text.assemble(figure(each.queue), (f" {lanes}", "dim"))
    return Text(figure(each.queue))


_COLUMNS = (
    _Column("worker", lambda each: Text(each.name, style="bold")),
    _Column("state", lambda each: Text(each.state, style=_COLOURS.get(each.state, ""))),
    _Column("engine", lambda each: Text(each.engine), from_width=70),
    _Column("slots", lambda each: Text(share(each.busy, each.slots), justify="right")),
    _Column("queue i/n/b", _queue, from_width=50),
    _Column("tok/s", lambda each: Text(figure(each.speed), justify="right")),
    _Column("", lambda each: Text(sparkline(each.speeds, _SPARKLINE_CELLS), style="cyan"), 90, _SPARKLINE_CELLS),
    _Column("first", lambda each: Text(span(each.first_token_ms), justify="right"), from_width=60),
    _Column("done", lambda each: Text(figure(each.done), justify="right"), from_width=100),
    _Column("failed", lambda each: Text(figure(each.failed), justify="right"), from_width=100),
    _Column("problem", lambda each: Text(each.problem, style="yellow"), from_width=80),
)


# --- the application ---------------------------------------------------------------------------------------------------


class Question(ModalScreen[bool]):
    """Yes or no, before something that cannot be taken back."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]
    CSS = """
    Question { align: center middle; }
    Question > Static { width: auto; max-width: 90%; height: auto; padding: 1 2; border: round $warning; background: $surface; }
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        yield Static(Text(f"{self._text}\n\ny  yes      n  no"))

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class TopApp(App[None]):
    """A table of all workers, and below it what there is to know of the chosen one."""

    TITLE = "lmd top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("d", "order('drain')", "Drain"),
        Binding("r", "order('resume')", "Resume"),
        Binding("c", "cancel_all", "Cancel all"),
        Binding("l", "log", "Log problems"),
    ]
    CSS = """
    #summary { height: auto; padding: 0 1; background: $panel; }
    #workers { height: 1fr; scrollbar-size: 0 1; }
    #detail { height: auto; max-height: 45%; border-top: solid $panel-lighten-2; padding: 0 1; }
    .low #detail { display: none; }
    """

    def __init__(self, watched: Watched, *, every_s: float = 0.5) -> None:
        super().__init__()
        self._watched = watched
        self._every_s = every_s
        self._look = Look(workers=(), connected=True)
        self._columns: tuple[_Column, ...] = ()
        self._shown: dict[str, tuple[Text, ...]] = {}
        self._logs: dict[str, tuple[str, ...]] = {}
        self._acting: set[tuple[str, str]] = set()
        self._answered: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Held by name: a question above them has a screen of its own.
        self._summary = Static(id="summary")
        self._table: DataTable[Text] = DataTable(id="workers", cursor_type="row", zebra_stripes=True)
        self._about = Static(id="about")

    def compose(self) -> ComposeResult:
        yield self._summary
        with Vertical():
            yield self._table
            with VerticalScroll(id="detail", can_focus=False):
                yield self._about
        yield Footer()

    def on_mount(self) -> None:
        # Ended from outside, the terminal is left as it was found.
        with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):
            for number in (signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self.exit)
        self._set_columns(self.size.width)
        self.refresh_picture()
        self.set_interval(self._every_s, self.refresh_picture)
        self.set_interval(_ANSWERS_EVERY_S, self._take_answers)
        self._table.focus()

    def on_resize(self, event: Resize) -> None:
        self.screen_stack[0].set_class(event.size.height < 14, "low")
        if self._columns:
            self._set_columns(event.size.width)
            self._show()

    # --- the picture -------------------------------------------------------------------------------------------------

    def refresh_picture(self) -> None:
        """Look again, and show what changed."""
        self._look = self._watched.look()
        self._show()

    def _set_columns(self, width: int) -> None:
        columns = tuple(column for column in _COLUMNS if width >= column.from_width)
        if columns != self._columns:
            self._columns = columns
            self._fill(self._look.workers, anew=True)

    def _show(self) -> None:
        if not self._table.is_attached:
            return  # the application ends
        self._summary.update(_summary(self._watched.place, self._look))
        workers = self._look.workers
        if [each.worker for each in workers] == list(self._shown):
            self._update(workers)
        else:
            self._fill(workers)
        self._about_the_chosen_one()

    def _fill(self, workers: Sequence[WorkerPicture], *, anew: bool = False) -> None:
        """All rows anew: a worker came or went, or the columns changed. The cursor stays on its worker, or goes to the nearest."""
        table, row = self._table, self._table.cursor_row
        before = list(self._shown)
        table.clear(columns=anew)
        if anew:
            for place, column in enumerate(self._columns):
                table.add_column(column.title, key=str(place), width=column.width)
        self._shown = {}
        for each in workers:
            self._shown[each.worker] = cells = self._cells(each)
            table.add_row(*cells, key=each.worker)
        names = list(self._shown)
        if row < len(before) and before[row] in self._shown:
            row = names.index(before[row])
        table.move_cursor(row=max(0, min(row, len(names) - 1)))

    def _update(self, workers: Sequence[WorkerPicture]) -> None:
        table = self._table
        for each in workers:
            cells, before = self._cells(each), self._shown[each.worker]
            for place, (cell, old) in enumerate(zip(cells, before, strict=True)):
                if cell != old:
                    table.update_cell(each.worker, str(place), cell, update_width=True)
            self._shown[each.worker] = cells

    def _cells(self, each: WorkerPicture) -> tuple[Text, ...]:
        return tuple(column.cell(each) for column in self._columns)

    def on_data_table_row_highlighted(self) -> None:
        self._about_the_chosen_one()

    def chosen(self) -> WorkerPicture | None:
        """The worker under the cursor; None without any."""
        names, row = list(self._shown), self._table.cursor_row
        if not 0 <= row < len(names):
            return None
        return next((each for each in self._look.workers if each.worker == names[row]), None)

    def _about_the_chosen_one(self) -> None:
        each = self.chosen()
        lines = list(_lines_about(each, self._logs.get(each.worker, ()))) if each is not None else [Text(_NOBODY)]
        self._about.update(Text("\n").join(lines))

    # --- orders ------------------------------------------------------------------------------------------------------

    def action_order(self, action: str) -> None:
        """Tell the chosen worker."""
        self._order(action, lambda name, ack: self._say(f"{name}: {one_line(ack.get('state') or 'done')}"))

    def action_cancel_all(self) -> None:
        each = self._addressed()
        if each is None:
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self._order(
                    "cancel_all",
                    lambda name, ack: self._say(f"{name} told {one_line(ack.get('cancelled', '?'))} requests to stop"),
                    to=each,
                )

        self.push_screen(
            Question(f"Cancel every running and waiting request of {each.name}, of all clients?"), answered
        )

    def action_log(self) -> None:
        def took(name: str, ack: Mapping[str, Any]) -> None:
            each = next((each for each in self._look.workers if each.name == name), None)
            if each is not None:
                self._logs[each.worker] = tuple(_log_lines(ack.get("problems")))
                self._about_the_chosen_one()

        self._order("problems", took, limit=LOG_LINES)

    def logs_of(self, worker: str) -> tuple[str, ...]:
        """What its log said when it was last asked for."""
        return self._logs.get(worker, ())

    def _addressed(self) -> WorkerPicture | None:
        """The chosen worker, if it can hear; an order to one that is away would be obeyed when it comes back."""
        each = self.chosen()
        if each is not None and not each.live:
            self._say(f"{each.name} is {each.state}: it is sent nothing", severity="warning")
            return None
        return each

    def _order(
        self,
        action: str,
        then: Callable[[str, Mapping[str, Any]], None],
        *,
        to: WorkerPicture | None = None,
        **fields: Any,
    ) -> None:
        """Send it in a thread of its own, which nobody waits for: not the picture, and not who quits meanwhile."""
        each = to or self._addressed()
        if each is None or (each.worker, action) in self._acting:
            return
        self._acting.add((each.worker, action))

        def work() -> None:
            from llamacpp_mqtt_deploy.client import BusError

            ack: Mapping[str, Any] = {}
            problem = ""
            try:
                ack = self._watched.admin(each.worker, action, **fields)
                if ack.get("status") != "ok":
                    problem = one_line(ack.get("message") or ack.get("code") or "the worker gave no reason")
            except (BusError, ValueError) as error:
                problem = one_line(error)
            self._answered.put(partial(done, ack, problem))

        def done(ack: Mapping[str, Any], problem: str) -> None:
            self._acting.discard((each.worker, action))
            if problem:
                self._say(f"{each.name}: {problem}", severity="error")
            else:
                then(each.name, ack)

        threading.Thread(target=work, name=f"top-{action}", daemon=True).start()

    def _take_answers(self) -> None:
        """Fetched, and not called into the application: it may have ended when an answer comes."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._answered.get_nowait()()

    def _say(self, message: str, severity: Any = "information") -> None:
        self.notify(message[:_MANY_MESSAGES], severity=severity, markup=False, timeout=8)


# --- texts -------------------------------------------------------------------------------------------------------------

_NOBODY = (
    "No worker has said anything yet. Start one with `lmd run`; `lmd check` looks for a wrong root, user or permission."
)


def _summary(place: str, look: Look) -> Text:
    live = [each for each in look.workers if each.live]
    busy, slots = (
        (sum(filter(None, values)) for values in zip(*((w.busy, w.slots) for w in live), strict=True))
        if live
        else (0, 0)
    )
    waiting = sum(each.queue or 0 for each in live)
    speed = sum(each.speed or 0 for each in live)
    parts = [
        place,
        f"{len(live)} of {len(look.workers)} workers",
        f"{share(busy, slots)} slots",
        f"{figure(waiting)} wait",
        f"{figure(speed)} tok/s",
    ]
    text = Text(" · ".join(parts))
    if not look.connected:
        text = Text.assemble(("broker lost, reconnecting  ", "bold red"), text)
    if look.note:
        text.append(f"\n{one_line(look.note)}", style="yellow")
    return text


def _lines_about(each: WorkerPicture, log: Sequence[str]) -> Iterator[Text]:
    yield Text.assemble((each.name, "bold"), "  ", (each.state, _COLOURS.get(each.state, "")), f"  {each.engine}")
    if each.problem:
        yield Text(each.problem, style="yellow")
    if each.models:
        yield Text.assemble(("models ", "dim"), each.models)
    if each.details:
        yield Text("  ").join(Text.assemble((f"{name} ", "dim"), text) for name, text in each.details)
    if log:
        yield Text("last problems in its log", style="dim")
        yield from map(Text, log)


def _log_lines(told: object) -> Iterator[str]:
    """The newest first; a worker from before this action, or one that was tampered with, may tell anything."""
    lines = [line for line in told if isinstance(line, Mapping)] if isinstance(told, list) else []
    if not lines:
        yield "none"
    for line in reversed(lines[-LOG_LINES:]):
        words = [one_line(line.get(name) or "")[:_MANY_MESSAGES] for name in ("ts", "level", "event", "text")]
        yield "  ".join(filter(None, words))
