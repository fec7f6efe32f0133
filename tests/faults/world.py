"""Everything that can break, as processes of this machine with a network between them, and the hands that break and mend it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from llamacpp_mqtt_deploy import demo_model
from tests.faults.clock_hook import SetClock
from tests.faults.disk import SmallDisk
from tests.faults.history import Entry
from tests.faults.model import Broken
from tests.faults.pace import shared
from tests.faults.processes import ClientProcess, clean_end, ended
from tests.faults.proxy import Bend, Network, Proxy
from tests.faults.schedule import Fault
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto

HEARTBEAT_S = 1.0

# A board's 250 tokens a second instead of this machine's thousands: a stream lasts long enough to be hit.
ENGINE_BEND = Bend(down_bytes_per_s=60_000)
UPLINK_BYTES_PER_S = 60_000

# A year is more than any limit of the worker, two hours more than what it remembers.
CLOCK_JUMPS_S = (-365 * 86400.0, -7200.0, 7200.0, 365 * 86400.0)

SETTINGS = {
    "mqtt.keepalive_s": 5,
    "mqtt.reconnect_max_s": 0.5,
    "streaming.heartbeat_s": HEARTBEAT_S,
    "engine.chunk_timeout_s": 4,
    "engine.unavailable_after_s": 8,
    "limits.drain_timeout_s": 3,
    # A broker that is killed comes back with the state of its last clean end, and delivers what was answered long ago.
    "limits.remember_s": 86400,
    "status.every_s": 1,
}


PACKAGE = "tests.faults.package_user"
KINDS_OF_CLIENTS = (
    ("5", False),
    ("5", True),
    ("3.1.1", False),
    ("3.1.1", True),
    ("5", True, PACKAGE),
)
# Its program asks for known texts only; what is between ask and answer is the package's business.
NOT_FOR_PACKAGE = ("chat", "cancel", "bare")


class World:
    """`begin` lets a fault happen, `mend` ends it. Not thread-safe: one thread holds it."""

    def __init__(self, folder: Path, *, seed: int, clients: int, requests: int, window: int) -> None:
        self.folder = folder
        self.disk = SmallDisk(folder / "state")
        self.network = Network()
        self.broken: list[Broken] = []
        self.broker = Mosquitto(
            folder / "broker",
            persistence=True,
            settings=["max_queued_messages 400", "max_inflight_messages 40", "set_tcp_nodelay true"],
        )
        self.engine = LlamaServer(demo_model.path(), slots=8, n_ctx=2048, alias="demo")
        self.clock = SetClock(folder / "clock")
        self.clients = [
            ClientProcess(f"c{number}", *KINDS_OF_CLIENTS[number % len(KINDS_OF_CLIENTS)]) for number in range(clients)
        ]
        self.daemon: DaemonProcess | None = None
        self.away: set[str] = set()
        """What a fault took away; anything else that ends ended by itself."""
        self._seed, self._window = seed, window
        self.count = -(-requests // clients)
        self._chosen: dict[int, ClientProcess] = {}
        self._lives: list[DaemonProcess] = []
        self._lock: sqlite3.Connection | None = None
        self._flooder: paho.Client | None = None

    # --- life ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._begin()
        except BaseException:
            self._close()
            raise
        return self

    def _begin(self) -> None:
        self.disk.mount()
        self.broker.start()
        self.engine.start()
        self.uplink = self.network.lay(self.broker.port, mqtt=True)
        self.line = self.network.lay(self.engine.port, mqtt=False)
        self.line.change(ENGINE_BEND)
        self.wires = {client.name: self.network.lay(self.broker.port, mqtt=True) for client in self.clients}
        self.start_daemon()
        assert self.daemon is not None
        self.daemon.wait_ready()

    def __exit__(self, *_: object) -> None:
        self._calm_down()
        self._close()

    def _close(self) -> None:
        self._end_processes()
        self.network.close()
        self.broker.close()
        self.engine.close()
        self.disk.unmount()

    def _end_processes(self) -> None:
        for client in self.clients:
            if client.process is not None and client.process.poll() is None:
                client.process.send_signal(signal.SIGCONT)
                client.process.kill()
                client.process.wait(10)
        for life in self._lives:
            if life.process.poll() is None:
                life.send(signal.SIGCONT)
            life.close()

    def start_clients(self, without: Sequence[str] = ()) -> None:
        for client in self.clients:
            client.arguments = [
                *("--folder", str(self.folder), "--name", client.name, "--port", str(self.wires[client.name].port)),
                *("--seed", str(self._seed), "--count", str(self.count), "--window", str(self._window)),
                *("--protocol", client.protocol, "--heartbeat-s", str(HEARTBEAT_S)),
                *(["--clean"] if client.clean else []),
                *("--without", ",".join(self.without(client, without))),
            ]
            client.start(self.folder / f"{client.name}.log")

    def without(self, client: ClientProcess, without: Sequence[str]) -> list[str]:
        """The kinds of requests that this client does not ask."""
        return [*without, *(NOT_FOR_PACKAGE if client.module == PACKAGE else ())]

    def by_package(self) -> frozenset[str]:
        return frozenset(client.name for client in self.clients if client.module == PACKAGE)

    def allow(self, count: int) -> None:
        """So many requests may the clients begin by now, all together."""
        asking = [client.name for client in self.clients if client.process is None or client.process.poll() != 0]
        shares = shared(count, count=self.count, asking=asking, clients=[client.name for client in self.clients])
        path = self.folder / "allowed"
        fresh = self.folder / "allowed.new"
        fresh.write_text(json.dumps(shares))
        fresh.replace(path)

    def start_daemon(self) -> None:
        settings: dict[str, Any] = SETTINGS | {
            "mqtt.port": self.uplink.port,
            "engine.url": f"http://127.0.0.1:{self.line.port}",
            "sessions.path": str(self.disk.folder / "state.db"),
        }
        self.daemon = DaemonProcess(self.folder / "daemon", settings, environment=self.clock.environment).start()
        self._lives.append(self.daemon)

    def logs(self) -> list[DaemonProcess]:
        """Every life of the worker."""
        return self._lives

    def wait_ready(self) -> None:
        """Nothing is broken any more: until the worker serves again. Raises AssertionError."""
        assert self.daemon is not None
        self.daemon.wait_ready()

    def stop_workers(self) -> list[Broken]:
        """SIGTERM, in the end: what is wrong with how they went."""
        assert self.daemon is not None
        return clean_end(self.daemon)

    def at_rest(self) -> list[Broken]:
        """What is left over although every request has ended."""
        return []

    def saw(self, client: str, entry: Entry) -> None:
        """A client wrote this down."""

    def notes(self) -> list[str]:
        """Further rows of the table."""
        return []

    def watch(self) -> None:
        """Start again what ended by itself, and remember that it did."""
        self._watch_workers()
        self._watch_clients()

    def _watch_workers(self) -> None:
        assert self.daemon is not None
        code = self.daemon.process.poll()
        if code is not None and "daemon" not in self.away:
            end = " | ".join(self.daemon.log_text().splitlines()[-3:])
            self.broken.append(Broken("process", "", f"the worker ended by itself with {code}: {end[-600:]}"))
            self.start_daemon()

    def _watch_clients(self) -> None:
        for client in self.clients:
            if client.process is None or f"client {client.name}" in self.away:
                continue
            code = client.process.poll()
            if code:
                text = (self.folder / f"{client.name}.log").read_text(errors="replace")
                self.broken.append(Broken("process", "", f"the rig's client ended with {code}: {text[-1500:]}"))
                client.start(self.folder / f"{client.name}.log")

    def over(self) -> bool:
        """Whether all clients have got all that they wished."""
        return all(client.process is not None and client.process.poll() == 0 for client in self.clients)

    # --- faults --------------------------------------------------------------------------------------------------------

    def why_not(self, kind: str) -> str:
        """Why a kind of fault cannot happen on this machine; empty where it can."""
        return self.disk.why_not if kind == "disk.full" else ""

    def client_of(self, fault: Fault) -> ClientProcess:
        """The client that the fault happens to: the same from beginning to end, one that still asks if there is one."""
        if fault.number not in self._chosen:
            asking = [client for client in self.clients if client.process and client.process.poll() is None]
            among = asking or self.clients
            self._chosen[fault.number] = among[min(int(fault.choice * len(among)), len(among) - 1)]
        return self._chosen[fault.number]

    def begin(self, fault: Fault) -> bool:
        """False where there is nothing left for it to happen to."""
        part, _, kind = fault.kind.partition(".")
        match part:
            case "broker":
                self._break_broker(kind)
            case "engine":
                self._break_engine(kind)
            case "daemon":
                self._break_daemon(kind, fault)
            case "client":
                return self._break_client(kind, self.client_of(fault))
            case "net":
                self._bend(self.uplink, kind)
            case "wire":
                self._bend(self.wires[self.client_of(fault).name], kind)
            case "disk":
                self._break_disk(kind)
            case _:
                self._flood(150)
        return True

    def mend(self, fault: Fault) -> None:
        part, _, kind = fault.kind.partition(".")
        match part:
            case "broker":
                self._mend_broker(kind)
            case "engine":
                self._mend_engine(kind)
            case "daemon":
                self._mend_daemon(kind)
            case "client":
                self._mend_client(kind, self.client_of(fault))
            case "net":
                self.uplink.change(Bend())
            case "wire":
                self.wires[self.client_of(fault).name].change(Bend())
            case "disk":
                self._mend_disk(kind)
            case _:
                pass

    def _break_broker(self, kind: str) -> None:
        match kind:
            case "kill":
                self.broker.kill()
            case "term":
                self.broker.stop()
            case "stop":
                self.broker.freeze()
            case "expire":
                self._break_daemon("kill", None)
                self._forget_session()
            case "queue":
                self._break_daemon("stop", None)
                self._flood(500)

    def _mend_broker(self, kind: str) -> None:
        match kind:
            case "kill" | "term":
                self.broker.start()
            case "stop":
                self.broker.thaw()
            case "expire":
                self._mend_daemon("kill")
            case "queue":
                self._mend_daemon("stop")

    def _break_engine(self, kind: str) -> None:
        match kind:
            case "kill":
                self.engine.kill()
            case "term":
                os.kill(self.engine.pid, signal.SIGTERM)
            case "stop":
                os.kill(self.engine.pid, signal.SIGSTOP)
            case "hang":
                self.line.change(Bend(silent=True))
            case "cut":
                self.line.change(ENGINE_BEND, cut=True)
            case lie:
                self.line.change(Bend(lie=lie, down_bytes_per_s=ENGINE_BEND.down_bytes_per_s))

    def _mend_engine(self, kind: str) -> None:
        match kind:
            case "kill" | "term":
                self.engine.kill()
                self.engine.start(wait=False)
            case "stop":
                os.kill(self.engine.pid, signal.SIGCONT)
            case _:
                self.line.change(ENGINE_BEND)

    def _break_daemon(self, kind: str, fault: Fault | None) -> None:
        assert self.daemon is not None
        match kind:
            case "kill":
                self.away.add("daemon")
                self.daemon.kill()
            case "term":
                self.away.add("daemon")
                self.daemon.send(signal.SIGTERM)
            case "stop":
                self.daemon.send(signal.SIGSTOP)
            case "clock":
                assert fault is not None
                self.clock.jump(CLOCK_JUMPS_S[int(fault.choice * len(CLOCK_JUMPS_S)) % len(CLOCK_JUMPS_S)])

    def _mend_daemon(self, kind: str) -> None:
        assert self.daemon is not None
        match kind:
            case "kill" | "term":
                self.broken += ended(self.daemon, by_term=kind == "term")
                self.away.discard("daemon")
                self.start_daemon()
            case "stop":
                self.daemon.send(signal.SIGCONT)
            case "clock":
                self.clock.jump(0.0)

    def _break_client(self, kind: str, client: ClientProcess) -> bool:
        if client.process is None or client.process.poll() is not None:
            return False
        self.away.add(f"client {client.name}")
        match kind:
            case "kill":
                client.end(signal.SIGKILL)
            case "term":
                client.end(signal.SIGTERM)
            case "stop":
                client.process.send_signal(signal.SIGSTOP)
        return True

    def _mend_client(self, kind: str, client: ClientProcess) -> None:
        if f"client {client.name}" not in self.away:
            return
        if kind == "stop":
            assert client.process is not None
            client.process.send_signal(signal.SIGCONT)
        else:
            client.start(self.folder / f"{client.name}.log")
        self.away.discard(f"client {client.name}")

    def _bend(self, proxy: Proxy, kind: str) -> None:
        bends: dict[str, Bend] = {
            "cut": Bend(),
            "refuse": Bend(refuse=True),
            "silent": Bend(silent=True),
            "delay": Bend(delay_s=0.05),
            "bytewise": Bend(bytewise=True),
            "slow": Bend(bytes_per_s=UPLINK_BYTES_PER_S),
            "eat_pubacks": Bend(eat_pubacks=5),
            "eat_all_pubacks": Bend(eat_pubacks=10**9),
            "double": Bend(double=True),
        }
        proxy.change(bends[kind], cut=kind in ("cut", "refuse"))

    def _break_disk(self, kind: str) -> None:
        if kind == "full":
            self.disk.fill()
            return
        self._lock = sqlite3.connect(self.disk.folder / "state.db", timeout=5, isolation_level=None)
        with contextlib.suppress(sqlite3.OperationalError):  # the worker's own write took longer: then no fault
            self._lock.execute("BEGIN EXCLUSIVE")

    def _mend_disk(self, kind: str) -> None:
        if kind == "full":
            self.disk.empty()
        elif self._lock is not None:
            self._lock.close()
            self._lock = None

    def _forget_session(self) -> None:
        """As when its expiry passed: a clean start under the worker's own client id."""
        with contextlib.suppress(OSError):
            self._throwaway(self.uplink.client_id, lambda _: None)

    def _flood(self, count: int) -> None:
        """One client that asks for far more than its share, at once."""

        def ask(client: paho.Client) -> None:
            body = b'{"messages":[{"role":"user","content":"Hello"}],"max_tokens":2}'
            for number in range(count):
                client.publish(f"llm/request/flood/s{number % 5}", body, 1)
            client.publish("llm/control/flood/s0", b"ping", 1).wait_for_publish(5)

        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._throwaway("rig-flood", ask)

    def _throwaway(self, client_id: str, work: Callable[[paho.Client], None]) -> None:
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id, clean_session=True)
        client.connect("127.0.0.1", self.broker.port)
        client.loop_start()
        try:
            with contextlib.suppress(RuntimeError, ValueError):
                client.publish("rig/there", b"", 1).wait_for_publish(5)
            work(client)
        finally:
            client.disconnect()
            client.loop_stop()

    def _calm_down(self) -> None:
        """Whatever still hangs or waits goes on."""
        with contextlib.suppress(Exception):
            self.broker.thaw()
        with contextlib.suppress(Exception):
            os.kill(self.engine.pid, signal.SIGCONT)
        self._mend_disk("full")
        self._mend_disk("lock")
