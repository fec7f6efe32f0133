"""The metrics: is the package there, who serves them, can the file be written."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from llamacpp_mqtt_deploy.checking.findings import Finding, fail, ok, warn
from llamacpp_mqtt_deploy.config import listen_address
from llamacpp_mqtt_deploy.config.listen_address import ListenAddress
from llamacpp_mqtt_deploy.config.settings import MetricsSettings

_ANSWER_S = 2.0


def check_metrics(metrics: MetricsSettings) -> Iterator[Finding]:
    """Nothing where they are switched off."""
    if metrics.listen is None and metrics.textfile is None:
        return
    if importlib.util.find_spec("prometheus_client") is None:
        yield fail(
            "metrics.package",
            "the Python package prometheus_client is not installed, and the worker does not start without it",
            "pip install 'llamacpp-mqtt-deploy[metrics]', or remove [metrics]",
        )
    if metrics.listen is not None:
        yield _listener(listen_address.parse(metrics.listen))
    if metrics.textfile is not None:
        yield _textfile(metrics.textfile)


def _listener(address: ListenAddress) -> Finding:
    where = str(address) if address.path is not None else f"http://{address}/metrics"
    try:
        sock = _connected(address)
    except (ConnectionRefusedError, FileNotFoundError):
        return ok(
            "metrics.listen", f"{where} (nobody listens there now: the worker does not run, or is to be restarted)"
        )
    except OSError as error:
        return fail(
            "metrics.listen", f"{where}: {error.strerror or error}", "check metrics.listen, or run the check as root"
        )
    with sock:
        try:
            sock.sendall(b"HEAD /metrics HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n")
            answer = sock.recv(64)
        except OSError:
            answer = b""
    if answer.startswith(b"HTTP/1.1 200 "):
        return ok("metrics.listen", f"{where} answers")
    return fail("metrics.listen", f"{where}: another program listens there", "set another metrics.listen, or end it")


def _connected(address: ListenAddress) -> socket.socket:
    family = socket.AF_UNIX if address.path is not None else socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(_ANSWER_S)
        sock.connect(str(address.path) if address.path is not None else (address.host, address.port))
    except BaseException:
        sock.close()
        raise
    return sock


def _textfile(path: Path) -> Finding:
    folder = path.parent
    if not folder.is_dir():
        return fail("metrics.textfile", f"{folder} does not exist", "make it, or set metrics.textfile")
    if not os.access(folder, os.W_OK | os.X_OK):
        return warn(
            "metrics.textfile",
            f"this user may not write into {folder}",
            "let the worker's group write there, or run the check as the user of the service",
        )
    return ok("metrics.textfile", f"{path} can be written")
