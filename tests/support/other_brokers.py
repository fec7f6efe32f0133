"""Brokers that are not mosquitto, as child processes: nats-server, RabbitMQ and aedes; and which of them are to be tested."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.ports import free_port
from tests.support.services import missing
from tests.support.waiting import eventually

CHOSEN = tuple(os.environ.get("BROKERS", "").split())
"""Names of further brokers, as in BROKERS="nats rabbitmq aedes". Then gaps that are known are measured instead of skipped."""

_NATS_WAITS = "it delivers again after 30 s (`ack_wait`), not at the reconnect, and the tests wait 15 s."
_RABBIT_EXACT = (
    "it hands a retained message only to whoever subscribes to that very topic, not to a filter with wildcards. "
    "The next renewal of the status, within 30 s, reaches everybody."
)
_DOTS = "it translates `/` into `.` and back, so a dot in a name is a level more or not allowed."
_IN_MEMORY = "it keeps everything in memory."
_AMQTT_FORGETS = "it loses QoS 1 messages for a client that is away."
_AMQTT_AGAIN = "it does not deliver unacknowledged messages again."

CHOSEN_MEMBERS = tuple(f"{name}-3.1.1" for name in CHOSEN)

REASONS = {
    ("nats", "test_what_was_not_acknowledged_is_delivered_again_after_a_reconnect"): _NATS_WAITS,
    ("nats", "test_a_full_inbox_makes_the_broker_deliver_again_in_order"): _NATS_WAITS,
    ("rabbitmq", "test_a_retained_message_is_delivered_on_request_and_flagged"): _RABBIT_EXACT,
    ("rabbitmq", "test_a_client_that_comes_later_reads_the_retained_status"): _RABBIT_EXACT,
    ("rabbitmq", "test_a_session_whose_name_has_a_dot_stays_itself"): _DOTS,
    ("nats", "test_a_session_whose_name_has_a_dot_stays_itself"): _DOTS,
    ("amqtt", "test_requests_sent_while_the_worker_is_away_are_kept_for_it"): _AMQTT_FORGETS,
    ("amqtt", "test_what_was_cut_and_acknowledged_does_not_come_again"): _AMQTT_FORGETS,
    ("amqtt", "test_requests_published_while_the_worker_is_away_run_when_it_is_back"): _AMQTT_FORGETS,
    ("amqtt", "test_requests_that_wait_at_the_broker_outlive_its_restart"): _IN_MEMORY,
    ("aedes", "test_requests_that_wait_at_the_broker_outlive_its_restart"): _IN_MEMORY,
    ("amqtt", "test_what_was_not_acknowledged_is_delivered_again_after_a_reconnect"): _AMQTT_AGAIN,
    ("amqtt", "test_a_full_inbox_makes_the_broker_deliver_again_in_order"): _AMQTT_AGAIN,
    ("amqtt", "test_acknowledgements_are_sent_before_the_link_closes"): _AMQTT_AGAIN,
    ("amqtt", "test_a_callback_that_raises_ends_nothing"): "it delivers QoS 0 messages at QoS 1.",
}
"""Why a promise does not hold on a broker, by broker and test; for docs/brokers.md."""

_NODE_MODULES = Path(__file__).parents[2] / ".venv" / "node" / "node_modules"
_PATHS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/lib/rabbitmq/bin"])
_AEDES = """
import { Aedes } from 'aedes'
import { createServer } from 'node:net'
const broker = await Aedes.createBroker()
createServer(broker.handle).listen(Number(process.argv[2]), '127.0.0.1')
"""
_NATS = """
server_name: contract
listen: 127.0.0.1:{other_port}
jetstream {{ store_dir: "{folder}/jetstream" }}
mqtt {{ listen: "127.0.0.1:{port}" }}
"""
_RABBIT = """
listeners.tcp = none
mqtt.listeners.tcp.default = 127.0.0.1:{port}
mqtt.allow_anonymous = true
# A session is kept for as long as the worker asks for on MQTT 5; here an hour.
mqtt.subscription_ttl = 3600000
# Else the anonymous user, guest, is let in from this machine by luck of how localhost is written.
loopback_users = none
"""


def installed(name: str) -> bool:
    match name:
        case "nats":
            return shutil.which("nats-server", path=_PATHS) is not None
        case "rabbitmq":
            return Path("/usr/lib/rabbitmq/bin/rabbitmq-server").exists()
        case "aedes":
            return shutil.which("node") is not None and (_NODE_MODULES / "aedes").exists()
        case _:
            return False


class OtherBroker:
    """One of `nats`, `rabbitmq`, `aedes` on `port`, for anonymous clients. What it keeps on disk outlives a restart."""

    def __init__(self, name: str) -> None:
        if not installed(name):
            missing(f"the broker {name} is not installed")
        self.name = name
        self.host = "127.0.0.1"
        self.port, self._other_port, self._epmd_port = free_port(), free_port(), free_port()
        self._directory = tempfile.TemporaryDirectory(prefix=f"{name}-")
        self.folder = Path(self._directory.name)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> OtherBroker:
        match self.name:
            case "nats":
                text = _NATS.format(port=self.port, other_port=self._other_port, folder=self.folder)
                self._run("nats-server", "-c", str(self._written("nats.conf", text)))
            case "aedes":
                # A module finds its imports beside itself.
                link = self.folder / "node_modules"
                if not link.exists():
                    link.symlink_to(_NODE_MODULES)
                self._run("node", str(self._written("broker.mjs", _AEDES)), str(self.port))
            case _:
                self._start_rabbitmq()
        eventually(self._listens, 90.0, every_s=0.05)
        return self

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self._directory.cleanup()

    def _start_rabbitmq(self) -> None:
        self._written("rabbitmq.conf", _RABBIT.format(port=self.port))
        environment = {
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"n{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._other_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._written("plugins", "[rabbitmq_mqtt].\n")),
        }
        # Erlang would start this name server by itself and leave it running.
        self._run("epmd", "-port", str(self._epmd_port))
        self._run("/usr/lib/rabbitmq/bin/rabbitmq-server", environment=environment)

    def _run(self, *command: str, environment: Mapping[str, str] | None = None) -> None:
        program = shutil.which(command[0], path=_PATHS)
        assert program is not None, f"{command[0]} is not installed"
        with (self.folder / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [program, *command[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | (environment or {}),
                    start_new_session=True,  # scripts of a shell around Erlang: ended as a group
                )
            )

    def _written(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def _end(self, how: signal.Signals) -> None:
        for process in reversed(self._processes):
            os.killpg(process.pid, how)
            process.wait(60)
        self._processes.clear()

    def _listens(self) -> bool:
        log = self.folder / "log"
        assert all(process.poll() is None for process in self._processes), log.read_text(errors="replace")[-4000:]
        try:
            socket.create_connection((self.host, self.port), 1).close()
        except OSError:
            return False
        return True
