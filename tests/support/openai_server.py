"""An OpenAI-compatible server that is not llama.cpp's: llmock (FastAPI) in a child process, which breaks on demand."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from typing import Any, Self

from tests.support.ports import free_port
from tests.support.waiting import eventually

MODEL = "gpt-4o-mini"


class OpenAiServer:
    """Echoes the prompt, calls tools that it is offered, answers a JSON schema with an example."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        arguments = ["llmock.main:create_app", "--factory", "--port", str(self.port), "--log-level", "error"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *arguments], env={**os.environ, "LLMOCK_RESPONSE_STYLE": "echo"}
        )
        eventually(self._answers, 30, every_s=0.05)
        return self

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def script(self, **behavior: Any) -> None:
        """Break or change the next request: `type="stream_fault", kind="disconnect"`, `type="fail", status=429` ..."""
        self._ask("POST", "/_llmock/scenario", {"behaviors": [behavior]})

    def reset(self) -> None:
        self._ask("POST", "/_llmock/reset")

    def _ask(self, method: str, path: str, document: object = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, None if document is None else json.dumps(document))
            response = connection.getresponse()
            content = response.read()
            assert response.status < 300, content
        finally:
            connection.close()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "llmock ended"
        try:
            self._ask("GET", "/v1/models")
        except OSError:
            return False
        return True
