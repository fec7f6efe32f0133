"""Debian's Prometheus on a port of its own, asked over its HTTP API."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError

import pytest

from tests.support.ports import free_port
from tests.support.waiting import eventually


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`; a skip where it is missing, in CI too: some 100 MB that the suite does not install."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: make test-metrics")
    return path


class PrometheusServer:
    """From `with` to its end; `config` is the text of its prometheus.yml."""

    def __init__(self, folder: Path, config: str) -> None:
        self._program = program("prometheus")
        self._folder = folder
        folder.mkdir()
        (folder / "prometheus.yml").write_text(config)
        self._url = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address={self._url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )
        eventually(self._ready, 60.0, every_s=0.1)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(20)

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except (URLError, ConnectionError, TimeoutError):
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of `/api/v1`; raises HTTPError for a query that is wrong."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{query}", timeout=20) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> Sequence[Any]:
        result = self.get("query", query=expression)["result"]
        assert isinstance(result, list)
        return result
