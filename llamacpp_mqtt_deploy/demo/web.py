"""The demo's gateway: the chat page in a browser, where the extra `gateway` is installed."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping

from llamacpp_mqtt_deploy.demo.brokers import HOST, Broker
from llamacpp_mqtt_deploy.demo.processes import DemoProcesses

USUAL_PORT = 8089
_READY_S = 20.0


def can_serve() -> bool:
    """Whether what the gateway needs is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("starlette", "uvicorn", "websockets"))


def start_gateway(processes: DemoProcesses, broker: Broker, *, root: str, environ: Mapping[str, str]) -> str:
    """Start it on the usual port, or a free one where that is taken; its address once it answers. Raises DemoFailed."""
    port = _free_port()
    settings = {
        "mqtt.host": HOST,
        "mqtt.port": str(broker.port),
        "mqtt.protocol": broker.protocol,
        "mqtt.root": root,
        "gateway.port": str(port),
        "gateway.drain_timeout_s": "1",
        "logging.format": "console",
    }
    flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-P", "-m", "llamacpp_mqtt_deploy", "gateway", "--config", os.devnull, *flags]
    child = processes.start("gateway", command, environ=environ)
    processes.wait(child, "ready", lambda: _answers(port), _READY_S)
    return f"http://{HOST}:{port}/"


def _free_port() -> int:
    for port in (USUAL_PORT, 0):
        with contextlib.suppress(OSError), socket.create_server((HOST, port)) as probe:
            return int(probe.getsockname()[1])
    raise OSError("no port of this machine can be listened on")


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2.0)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
