"""A real llama.cpp server for tests: `xllamacpp.Server` in a child process, reached over TCP or a unix socket."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from typing_extensions import override

from tests.support.ports import free_port
from tests.support.waiting import eventually

_CHILD = r"""
import json, sys, threading
import xllamacpp as xlc
wish = json.loads(sys.argv[1])
p = xlc.CommonParams()
p.model.path = wish["model"]
p.model_alias = {wish["alias"]}
p.hostnames = [wish["host"]]
p.port = wish["port"]
p.n_ctx = wish["n_ctx"] * wish["slots"]
p.n_parallel = wish["slots"]
p.n_batch = p.n_ubatch = wish["batch"]
p.kv_unified = False
p.cache_ram_mib = 16
p.sse_ping_interval = wish["ping_s"]
p.cpuparams.n_threads = 1
p.cpuparams_batch.n_threads = 1
p.n_gpu_layers = 0
p.endpoint_slots = True
p.warmup = False
p.enable_reasoning = 0  # a request asks for thinking with chat_template_kwargs
p.verbosity = 1
if wish["api_key"]:
    p.api_keys = [wish["api_key"]]
server = xlc.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the parent closes the pipe or dies
"""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    @override
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(self._path)


@dataclass
class LlamaServer:
    """One server process. `start` may be called again after `kill`: the address stays the same."""

    model: Path
    slots: int = 4
    n_ctx: int = 8192
    """Context of one slot in tokens."""
    batch: int = 64
    api_key: str | None = None
    alias: str = "tiny"
    """Name of the model."""
    unix: bool = False
    ping_s: int = 1
    port: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _directory: tempfile.TemporaryDirectory[str] | None = None
    _socket_path: str = ""
    _log: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="llama-")  # short: a socket's path has at most 107 bytes
        self._socket_path = str(Path(self._directory.name) / "llama.sock")
        self.port = self.port or free_port()

    @property
    def url(self) -> str:
        return f"unix://{self._socket_path}" if self.unix else f"http://127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> Self:
        Path(self._socket_path).unlink(missing_ok=True)
        wish = {
            "model": str(self.model),
            "host": self._socket_path if self.unix else "127.0.0.1",
            "port": self.port,
            "n_ctx": self.n_ctx,
            "slots": self.slots,
            "batch": self.batch,
            "ping_s": self.ping_s,
            "api_key": self.api_key,
            "alias": self.alias,
        }
        assert self._directory is not None
        self._log = (Path(self._directory.name) / "log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(wish)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
        )
        if wait:
            eventually(self._answers, 60.0, every_s=0.02)
        return self

    def kill(self) -> None:
        """SIGKILL, as a crash would; every open stream ends in the middle."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(10)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None
        self._log.close()

    def close(self) -> None:
        self.kill()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET, over a connection of its own."""
        connection = (
            _UnixConnection(self._socket_path)
            if self.unix
            else http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        )
        try:
            headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"null")
        finally:
            connection.close()

    def busy_slots(self) -> int:
        """Slots at work. Do not poll it faster than twice a second: each answer puts off what the server does about a
        client that has gone."""
        return sum(bool(slot["is_processing"]) for slot in self.get("/slots")[1])

    def last_tokens(self) -> int:
        """Tokens of the request that got its slot last, prompt and answer together."""
        slots = [slot for slot in self.get("/slots")[1] if "id_task" in slot]
        return int(max(slots, key=lambda slot: slot["id_task"])["n_prompt_tokens"])

    def idle_within(self, timeout_s: float) -> float:
        """Seconds until no slot is at work; fails the test when that takes longer than `timeout_s`."""
        started = time.monotonic()
        eventually(lambda: self.busy_slots() == 0, timeout_s, every_s=0.2)
        return time.monotonic() - started

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._directory is not None
        if self._process.poll() is not None:
            log = (Path(self._directory.name) / "log").read_text(errors="replace")
            pytest.fail(f"the llama.cpp server ended with {self._process.returncode}:\n{log[-4000:]}")
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False
