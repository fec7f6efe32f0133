"""`lmd top`: the live picture, driven as a person would, and its lines on a pipe."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from llamacpp_mqtt_deploy.client import BusClient, NotPermitted
from llamacpp_mqtt_deploy.commands import top
from llamacpp_mqtt_deploy.commands.fleet import Fleet
from llamacpp_mqtt_deploy.commands.top_app import Look, Question, TopApp, WatchedBus
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.client.terminal import Terminal, lmd
from tests.client.test_fleet import HEALTH, NOW, STATUS
from tests.client.worker import PlayedWorker
from tests.support.live_worker import LiveWorker
from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port
from tests.support.waiting import eventually

Drive = Callable[[Pilot[None], TopApp], Awaitable[None]]


class Played:
    """Workers that a test sets, and what they were told."""

    def __init__(self, **workers: Mapping[str, Any]) -> None:
        self.status: dict[str, Mapping[str, Any]] = dict(workers)
        self.health: dict[str, Mapping[str, Any]] = dict.fromkeys(workers, HEALTH)
        self.connected = True
        self.orders: list[tuple[str, str, dict[str, Any]]] = []
        self.ack: Mapping[str, Any] | Exception = {"status": "ok"}
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.place = "llm at a broker"
        self._fleet = Fleet()

    def look(self) -> Look:
        workers = self._fleet.look(self.status, self.health, now=NOW, steady=0.0)
        return Look(workers=workers, connected=self.connected)

    def admin(self, worker: str, action: str, **fields: Any) -> Mapping[str, Any]:
        self.orders.append((worker, action, fields))
        self.may_answer.wait(10)
        if isinstance(self.ack, Exception):
            raise self.ack
        return self.ack


def drive(watched: Any, steps: Drive, *, size: tuple[int, int] = (120, 30)) -> TopApp:
    app = TopApp(watched, every_s=0.05)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await steps(pilot, app)

    asyncio.run(run())
    return app


async def until(pilot: Pilot[None], predicate: Callable[[], object], timeout_s: float = 10.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < ends_at
        await pilot.pause(0.02)


def rows(app: TopApp) -> list[list[str]]:
    table = app.query_one(DataTable)
    return [[str(cell) for cell in table.get_row_at(row)] for row in range(table.row_count)]


def titles(app: TopApp) -> list[str]:
    return [str(column.label) for column in app.query_one(DataTable).ordered_columns]


def text_of(app: TopApp, where: str) -> str:
    return str(app.query_one(where, Static).render())


def notices(app: TopApp) -> list[str]:
    return [notice.message for notice in app._notifications]


def test_every_worker_is_a_row_and_the_chosen_one_is_told_in_full() -> None:
    watched = Played(kitchen=STATUS, attic=STATUS | {"state": "offline", "reason": "lost"})

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        attic, kitchen = rows(app)
        assert kitchen[:6] == ["kitchen", "online", "ready/cuda", "1/4", "3 1/2/0", "41.5"]
        assert attic[:4] == ["attic", "offline", "ready/cuda", "?/4"]
        assert "its connection was lost" in text_of(app, "#about")
        assert "1 of 2 workers · 1/4 slots · 3 wait · 41.5 tok/s" in text_of(app, "#summary")
        await pilot.press("down")
        assert "models qwen" in text_of(app, "#about")
        assert "errors busy 2" in text_of(app, "#about")

    drive(watched, steps)


def test_the_picture_follows_what_workers_tell_and_the_cursor_stays_on_its_worker() -> None:
    watched = Played(bed=STATUS, kitchen=STATUS)

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("down")
        watched.health["kitchen"] = HEALTH | {"ts": NOW + 30, "tokens_per_second": 83.0}
        await until(pilot, lambda: rows(app)[1][5:7] == ["83", "▅█"])
        watched.status["attic"] = STATUS
        await until(pilot, lambda: [row[0] for row in rows(app)] == ["attic", "bed", "kitchen"])
        chosen = app.chosen()
        assert chosen is not None
        assert chosen.name == "kitchen"
        del watched.status["kitchen"]
        await until(pilot, lambda: [row[0] for row in rows(app)] == ["attic", "bed"])
        chosen = app.chosen()
        assert chosen is not None
        assert chosen.name == "bed", "the nearest one"
        watched.status.clear()
        await until(pilot, lambda: not rows(app))
        assert "No worker has said anything yet" in text_of(app, "#about")
        assert app.chosen() is None
        await pilot.press("d", "c", "l")
        assert watched.orders == []

    drive(watched, steps)


def test_a_lost_broker_is_told_until_it_is_back() -> None:
    watched = Played(kitchen=STATUS)

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        watched.connected = False
        await until(pilot, lambda: "broker lost, reconnecting" in text_of(app, "#summary"))
        watched.connected = True
        await until(pilot, lambda: "lost" not in text_of(app, "#summary"))

    drive(watched, steps)


def test_drain_and_resume_are_sent_to_the_chosen_worker() -> None:
    watched = Played(attic=STATUS, kitchen=STATUS)
    watched.ack = {"status": "ok", "state": "draining"}

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("down", "d")
        await until(pilot, lambda: "kitchen: draining" in notices(app))
        await pilot.press("r")
        await until(pilot, lambda: len(watched.orders) == 2)

    drive(watched, steps)
    assert watched.orders == [("kitchen", "drain", {}), ("kitchen", "resume", {})]


@pytest.mark.parametrize("answer, sent", [("y", 1), ("n", 0), ("escape", 0)])
def test_everything_is_cancelled_only_after_a_yes(answer: str, sent: int) -> None:
    watched = Played(kitchen=STATUS)
    watched.ack = {"status": "ok", "cancelled": 3}

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("c")
        await until(pilot, lambda: isinstance(app.screen, Question))
        assert watched.orders == []
        await pilot.press(answer)
        await until(pilot, lambda: not isinstance(app.screen, Question))
        await until(pilot, lambda: len(notices(app)) == sent)

    app = drive(watched, steps)
    assert [order[:2] for order in watched.orders] == [("kitchen", "cancel_all")] * sent
    assert notices(app) == ["kitchen told 3 requests to stop"] * sent


def test_a_worker_that_is_away_is_sent_nothing() -> None:
    watched = Played(attic=STATUS | {"state": "offline"})

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("d", "r", "c", "l")
        await until(pilot, lambda: len(notices(app)) == 4)

    drive(watched, steps)
    assert watched.orders == []


def test_the_last_problems_of_the_log_are_shown_and_steer_nothing() -> None:
    watched = Played(kitchen=STATUS)
    problems: list[Any] = [
        {"ts": "t1", "level": "error", "event": "journal.failed", "text": "the earlier one"},
        {"ts": "t2", "level": "warning", "event": "x\x1b[2J", "text": "[red]second[/red]"},
        7,
        {"ts": ["odd"], "text": None},
    ]
    watched.ack = {"status": "ok", "problems": problems}

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("l")
        await until(pilot, lambda: "journal.failed" in text_of(app, "#about"))
        about = text_of(app, "#about")
        assert about.index("second") < about.index("the earlier one")
        assert "[red]second[/red]" in about
        assert "\x1b" not in about

    drive(watched, steps)
    assert watched.orders == [("kitchen", "problems", {"limit": 20})]


@pytest.mark.parametrize(
    "ack, said",
    [
        (NotPermitted("You may not publish to llm/admin/kitchen."), "You may not publish"),
        (
            {"status": "error", "code": "bad_request", "message": "What\x1b[2J\nis that [bold]?" + "x" * 9000},
            "What[2J is",
        ),
        ({"status": "error"}, "gave no reason"),
        ({}, "gave no reason"),
    ],
)
def test_an_order_that_was_not_done_is_told_with_its_reason(ack: Any, said: str) -> None:
    watched = Played(kitchen=STATUS)
    watched.ack = ack

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("d")
        await until(pilot, lambda: notices(app))
        assert said in notices(app)[0]
        assert len(notices(app)[0]) <= 300

    drive(watched, steps)


def test_an_answer_that_does_not_come_holds_up_neither_the_picture_nor_who_quits() -> None:
    watched = Played(kitchen=STATUS)
    watched.may_answer.clear()

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("d", "d", "d")
        await until(pilot, lambda: watched.orders)
        watched.health["kitchen"] = HEALTH | {"queue": 9, "lanes": {}}
        await until(pilot, lambda: rows(app)[0][4] == "9")
        await pilot.press("q")

    began = time.monotonic()
    drive(watched, steps)
    assert time.monotonic() - began < 8
    assert len(watched.orders) == 1
    watched.may_answer.set()


def test_narrow_and_low_terminals_show_what_matters_most() -> None:
    watched = Played(kitchen=STATUS)

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        assert titles(app) == ["worker", "state", "slots", "tok/s"]
        assert not app.query_one("#detail").display
        assert rows(app) == [["kitchen", "online", "1/4", "41.5"]]
        await pilot.resize_terminal(140, 40)
        await until(pilot, lambda: len(titles(app)) == 11)
        assert app.query_one("#detail").display
        assert rows(app)[0][0] == "kitchen"
        await pilot.resize_terminal(10, 3)
        await until(pilot, lambda: len(titles(app)) == 4)
        await pilot.resize_terminal(70, 20)
        await until(pilot, lambda: titles(app)[2] == "engine")

    drive(watched, steps, size=(40, 10))


def test_hundreds_of_hostile_workers_are_shown_and_none_of_them_steers() -> None:
    wild: list[Any] = [None, True, "x\x1b[2J" * 99, 10**30, -5, 1e308, [[]], {"busy": "[blink]"}, "\u202e\u0301" * 50]
    workers: dict[str, Mapping[str, Any]] = {}
    for number in range(400):
        value = wild[number % len(wild)]
        workers[f"w{number}[/red]\x1b]0;t\x07"] = STATUS | {
            "engine": value,
            "slots": value,
            "models": [value],
            "ts": value,
        }
    watched = Played(**workers)
    for number, worker in enumerate(workers):
        value = wild[number % len(wild)]
        watched.health[worker] = dict.fromkeys(HEALTH, value)

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        assert len(rows(app)) == 400
        await pilot.press("end")
        assert not any("\x1b" in cell or "\u202e" in cell for row in rows(app) for cell in row)
        chosen = app.chosen()
        assert chosen is not None
        picture = app.export_screenshot()
        assert "\x1b" not in picture

    drive(watched, steps)


def test_without_colour_states_are_still_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    watched = Played(kitchen=STATUS | {"state": "draining"})

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        assert app.no_color
        assert rows(app)[0][1] == "draining"

    drive(watched, steps)


@pytest.mark.broker
def test_workers_on_a_real_broker_come_go_and_obey(broker: Mosquitto) -> None:
    with BusClient("127.0.0.1", broker.port) as bus, PlayedWorker(broker.port) as played:
        played.admin_ack = {"state": "draining"}

        async def steps(pilot: Pilot[None], app: TopApp) -> None:
            played.status(slots=2)
            played.health(slots={"busy": 1, "total": 2}, queue=0, ts=1.0, tokens_per_second=3)
            await until(pilot, lambda: rows(app) and rows(app)[0][3] == "1/2")
            await pilot.press("d")
            await until(pilot, lambda: notices(app) == ["played: draining"])
            played.raw("llm/status/huge", b'{"state":"online","x":"' + b"x" * 70_000 + b'"}')
            with PlayedWorker(broker.port, name="second"):
                await until(pilot, lambda: len(rows(app)) == 2)
            await until(pilot, lambda: len(rows(app)) == 1)
            broker.stop()
            await until(pilot, lambda: "broker lost" in text_of(app, "#summary"))
            broker.start()
            await until(pilot, lambda: "broker lost" not in text_of(app, "#summary"), 20)

        drive(WatchedBus(bus, None), steps)
        assert [order["action"] for order in played.orders] == ["drain"]


@pytest.mark.broker
def test_a_real_worker_is_watched_drained_resumed_and_cancelled(broker: Mosquitto, tmp_path: Path) -> None:
    engine = ScriptedEngine(slots=1)
    held = Gate()
    engine.play("one ", "two ", held)
    with (
        LiveWorker(broker.port, tmp_path, engine, status__health_every_s="1"),
        BusClient("127.0.0.1", broker.port) as bus,
    ):
        running, waiting = bus.ask("hold", session="alice/1"), bus.ask("wait", session="alice/2", priority="batch")
        eventually(held.reached.is_set)

        async def steps(pilot: Pilot[None], app: TopApp) -> None:
            await until(pilot, lambda: rows(app) and rows(app)[0][3:5] == ["1/1", "1 0/0/1"])
            assert rows(app)[0][:3] == ["live", "online", "ready/script"]
            await pilot.press("d")
            await until(pilot, lambda: rows(app)[0][1] == "draining")
            await pilot.press("r")
            await until(pilot, lambda: rows(app)[0][1] == "online")
            await pilot.press("l")
            await until(pilot, lambda: app.logs_of("live"))
            await pilot.press("c", "y")
            await until(pilot, lambda: "live told 2 requests to stop" in notices(app))
            await until(pilot, lambda: rows(app)[0][3:5] == ["0/1", "0"])

        drive(WatchedBus(bus, None), steps)
        assert [answer.result().finish_reason for answer in (running, waiting)] == ["cancelled", "cancelled"]


class Refusing:
    """A bus whose broker lets this user read no health."""

    root, address, connected = "llm", "broker:1883", True

    def status(self, **_: Any) -> dict[str, Mapping[str, Any]]:
        return {"kitchen": STATUS}

    def health(self, **_: Any) -> dict[str, Mapping[str, Any]]:
        raise NotPermitted("You may not subscribe to llm/health/+.")


def test_who_may_not_read_health_sees_the_rest_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    bus: Any = Refusing()

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        assert [row[0] for row in rows(app)] == ["kitchen"]
        assert "You may not subscribe to llm/health/+." in text_of(app, "#summary")

    drive(WatchedBus(bus, None), steps)
    assert top._print(bus, None, once=True, as_json=False, every_s=1.0, timeout_s=0.1) in (0, 4)
    told = capsys.readouterr()
    assert told.out.splitlines()[1].startswith("kitchen")
    assert "You may not subscribe to llm/health/+." in told.err


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.broker
def test_once_is_one_line_for_each_worker_or_one_object(broker: Mosquitto, environment: dict[str, str]) -> None:
    port = ["--port", str(broker.port)]
    with PlayedWorker(broker.port, name="kitchen") as kitchen, PlayedWorker(broker.port, name="attic") as attic:
        kitchen.status(**STATUS | {"ts": time.time()})
        kitchen.health(**HEALTH)
        attic.status(state="offline", reason="lost")
        told = lmd("top", "--once", *port, environment=environment)
        spoken = json.loads(lmd("top", "--once", "--json", *port, environment=environment).stdout)
    assert told.returncode == 0
    head, first, second = (line.split() for line in told.stdout.decode().splitlines())
    assert head == [
        "worker",
        "state",
        "engine",
        "slots",
        "queue",
        "i/n/b",
        "tok/s",
        "first",
        "done",
        "failed",
        "problem",
    ]
    assert first[:3] == ["attic", "offline", "-"]
    assert second == ["kitchen", "online", "ready/cuda", "1/4", "3", "1/2/0", "41.5", "230ms", "7", "2", "-"]
    found = {worker["worker"]: worker for worker in spoken["workers"]}
    assert found["kitchen"]["lanes"] == {"interactive": 1, "normal": 2, "batch": 0}
    assert (str(found["kitchen"]["slots"]["busy"]), found["kitchen"]["tokens_per_second"]) == ("1", 41.5)
    assert found["attic"]["problem"] == "its connection was lost"


@pytest.mark.broker
def test_without_a_broker_or_a_permission_the_codes_are_those_of_the_other_commands(
    broker: Mosquitto, guarded: Mosquitto, environment: dict[str, str]
) -> None:
    with PlayedWorker(broker.port):
        arguments = ["top", "--once", "--worker", "attic", "--port", str(broker.port), "--timeout", "0.2"]
        nobody = lmd(*arguments, environment=environment)
    assert (nobody.returncode, len(nobody.stdout.splitlines())) == (4, 1)
    assert b"no worker called attic is online" in nobody.stderr
    assert lmd("top", "--once", "--port", str(free_port()), environment=environment).returncode == 3
    assert lmd("top", "--once", "--port", str(guarded.port), environment=environment).returncode == 3


@pytest.mark.broker
def test_on_a_pipe_it_goes_on_until_the_reader_leaves(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port):
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "llamacpp_mqtt_deploy",
                "top",
                "--json",
                "--every",
                "0.1",
                "--port",
                str(broker.port),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        objects = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.stdout.close()
        assert process.wait(20) == 1
        assert b"Traceback" not in process.stderr.read()
        process.stderr.close()
    assert [found["workers"][0]["worker"] for found in objects] == ["played"] * 3


@pytest.mark.broker
@pytest.mark.parametrize("how", ["q", "term"])
def test_on_a_real_terminal_it_draws_itself_and_leaves_the_terminal_as_it_was(
    how: str, broker: Mosquitto, environment: dict[str, str]
) -> None:
    with (
        PlayedWorker(broker.port, name="kitchen") as worker,
        Terminal(["top", "--port", str(broker.port)], environment=environment) as terminal,
    ):
        worker.status(slots=3)
        eventually(lambda: "kitchen" in terminal.text and "Drain" in terminal.text, 20)
        assert "\x1b[?1049h" in terminal.text
        if how == "q":
            terminal.press("q")
        else:
            terminal.signal(15)
        assert terminal.wait() == 0
        assert terminal.text.rindex("\x1b[?1049l") > terminal.text.rindex("\x1b[?1049h")


def test_without_the_extra_it_says_what_to_install_and_once_still_works(
    broker: Mosquitto, environment: dict[str, str], tmp_path: Any
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'textual': raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'textual' else real(name, package)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    without = environment | {"PYTHONPATH": str(tmp_path)}
    with PlayedWorker(broker.port):
        with Terminal(["top", "--port", str(broker.port)], environment=without) as terminal:
            assert terminal.wait() == 2
        assert "llamacpp-mqtt-deploy[top]" in terminal.text
        assert lmd("top", "--once", "--port", str(broker.port), environment=without).returncode == 0


def test_no_other_command_loads_textual(environment: dict[str, str]) -> None:
    script = (
        "import sys, importlib\n"
        "from llamacpp_mqtt_deploy.cli import COMMANDS\n"
        "for name in COMMANDS: importlib.import_module(f'llamacpp_mqtt_deploy.commands.{name}')\n"
        "sys.exit('textual' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=60).returncode == 0
