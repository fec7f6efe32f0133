"""A broker for the demo: the mosquitto of this machine, else amqtt from the extra `demo`; on the loopback interface only."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llamacpp_mqtt_deploy.demo.processes import DemoFailed, DemoProcess, DemoProcesses

HOST = "127.0.0.1"
Choice = Literal["auto", "mosquitto", "amqtt"]

# Debian keeps daemons out of a user's PATH.
_SYSTEM_PATHS = ("/usr/sbin", "/usr/local/sbin", "/sbin")
# amqtt takes a second to be imported, more on a busy single-board computer.
_START_S = 20.0
_TRIES = 3

INSTALL = f'"{sys.executable}" -m pip install "llamacpp-mqtt-deploy[demo]"'


@dataclass(frozen=True, slots=True)
class Broker:
    """A running broker; `name` is for people, with its version where it tells."""

    name: str
    port: int
    protocol: Literal["auto", "3.1.1"] = "auto"
    """What to ask it for: amqtt does not answer an MQTT 5 client at all, whose fall-back would take 6 s."""


def find_mosquitto() -> str | None:
    """The path of the mosquitto program, also where a user's PATH does not look."""
    return shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM_PATHS]))


def choose(choice: Choice) -> Literal["mosquitto", "amqtt"]:
    """What can be started here; raises DemoFailed when there is nothing."""
    mosquitto, amqtt = find_mosquitto(), importlib.util.find_spec("amqtt")
    match choice:
        case "auto" | "mosquitto" if mosquitto:
            return "mosquitto"
        case "auto" | "amqtt" if amqtt:
            return "amqtt"
        case "mosquitto":
            raise DemoFailed(
                "The broker mosquitto is not installed (on Debian and Ubuntu: sudo apt-get install mosquitto)."
                " `lmd demo --broker auto` takes whatever there is."
            )
        case "amqtt":
            raise DemoFailed(f"The broker amqtt is not installed. It comes with the extra `demo`: {INSTALL}")
        case _:
            raise DemoFailed(
                f"There is no MQTT broker on this machine. The extra `demo` brings one, in pure Python: {INSTALL}\n"
                "Or install mosquitto (on Debian and Ubuntu: sudo apt-get install mosquitto)."
            )


def start_broker(
    processes: DemoProcesses, kind: Literal["mosquitto", "amqtt"], port: int | None, *, environ: Mapping[str, str]
) -> Broker:
    """Start a broker and wait until it takes connections; `port` None is any free one. Raises DemoFailed."""
    if port is not None:
        _check_free(port)
        return _start(processes, kind, port, environ)
    for _ in range(_TRIES - 1):
        try:
            return _start(processes, kind, _free_port(), environ)
        except DemoFailed as failure:
            # Somebody may take the port between our look and the broker's.
            if not any("in use" in line for line in failure.lines):
                raise
    return _start(processes, kind, _free_port(), environ)


def _start(
    processes: DemoProcesses, kind: Literal["mosquitto", "amqtt"], port: int, environ: Mapping[str, str]
) -> Broker:
    if kind == "mosquitto":
        command = [find_mosquitto() or "mosquitto", "-c", _write_config(processes, port)]
    else:
        command = [sys.executable, "-P", "-m", "llamacpp_mqtt_deploy.demo.amqtt_server", str(port)]
    child = processes.start("broker", command, environ=environ)
    try:
        processes.wait(child, "ready", lambda: _listens(port), _START_S)
    except DemoFailed:
        processes.forget(child)
        raise
    return Broker(f"{kind} {_version(kind, child)}".strip(), port, "auto" if kind == "mosquitto" else "3.1.1")


def _write_config(processes: DemoProcesses, port: int) -> str:
    """A file of our own, so that neither the system's configuration nor its port has a part in it."""
    lines = [
        f"listener {port} {HOST}",
        "allow_anonymous true",
        "persistence false",
        "log_dest stderr",
        "set_tcp_nodelay true",  # without it Nagle's algorithm holds every first event back for 40 ms
    ]
    if os.geteuid() == 0:
        # Else it changes to the user `mosquitto`, which takes the death signal away (prctl(2)): it would outlive us.
        lines.append("user root")
    path = processes.directory / "mosquitto.conf"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def _version(kind: str, child: DemoProcess) -> str:
    if kind == "mosquitto":
        found = re.search(r"mosquitto version ([\w.+-]+)", "\n".join(child.last_lines()))
        return found[1] if found else ""
    import importlib.metadata  # noqa: PLC0415 - 20 ms that mosquitto does not need

    return importlib.metadata.version("amqtt")


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), 1.0).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as brokers do; ports in TIME_WAIT are free
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError as error:
            match error.errno:
                case errno.EADDRINUSE:
                    reason = f"Port {port} is taken, perhaps by a broker that runs already."
                case errno.EACCES:
                    reason = f"Port {port} is not for this user (ports below 1024 are for root)."
                case _:
                    reason = f"Port {port} cannot be used: {error.strerror}."
            raise DemoFailed(f"{reason} Leave --port out for any free one, or name another.") from error
