"""llama.cpp's server set up to compute as PyTorch did, and the names of the known answers."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

# PyTorch computed in F32: the cache has to be F32 too, and flash attention, which rounds differently, off.
_CHILD = """
import sys
import xllamacpp as xlc
p = xlc.CommonParams()
p.model.path = sys.argv[1]
p.hostnames = ["127.0.0.1"]
p.port = 0
p.n_ctx = 1024
p.n_parallel = 1
p.n_gpu_layers = 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.cache_type_k = p.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
p.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.verbosity = -1
server = xlc.Server(p)
print("at", server.listening_address, flush=True)
sys.stdin.read()  # until the parent closes the pipe
"""


class ExactServer:
    """llama.cpp's server in a child process, set up to compute as PyTorch did."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("at "):
                self.host = line.split()[1].removeprefix("http://").rstrip("/")
                break
        else:
            pytest.fail("the llama.cpp server did not start")

    def close(self) -> None:
        with self._process:  # closes the pipes and waits
            self._process.kill()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        assert response.status == 200, answer
        return answer

    def chat(self, messages: list[dict[str, Any]], **wishes: Any) -> dict[str, Any]:
        """The first choice of a greedy answer."""
        body = {"messages": messages, "temperature": 0, "max_tokens": 400, **wishes}
        choice: dict[str, Any] = self.post("/v1/chat/completions", body)["choices"][0]
        return choice


def known_names() -> list[str]:
    return list(json.loads((HERE / "known_answers.json").read_text())["single"])
