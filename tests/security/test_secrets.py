"""Where a secret could be found by whoever looks at the machine: core files, memory, arguments, environment, log, state, bus."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]

PASSWORD = "sesame-opens-89f1c"
API_KEY = "sk-engine-7d20aa"
PROMPT = "my diary of the ninth of May"


@pytest.fixture
def cores_allowed() -> Iterator[None]:
    """Whatever this test starts may write core files, as on a developer's machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("this machine allows nobody a core file")
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


def _allow_cores(pid: int) -> None:
    """Raise the limit of a process that lives, where we may."""
    with contextlib.suppress(PermissionError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_worker_that_dies_leaves_no_core_file_with_prompts_and_passwords(
    cores_allowed: None, start_worker: StartWorker, mosquitto: Mosquitto, llama_server: LlamaServer
) -> None:
    worker = start_worker(mosquitto.port, llama_server.url, mqtt__root="cores")
    limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert line.split()[4:6] == ["0", "0"], line
    # Handlers such as apport's take a core whatever the limit says: the process itself has to refuse.
    _allow_cores(worker.process.pid)
    worker.send(signal.SIGABRT)
    _, status = os.waitpid(worker.process.pid, 0)
    worker.process.returncode = -signal.SIGABRT
    assert os.WTERMSIG(status) == signal.SIGABRT
    assert not os.WCOREDUMP(status)


def test_secrets_are_neither_in_log_arguments_environment_state_nor_on_the_bus(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    start_llama_server: Callable[..., LlamaServer],
    watch: Watch,
    tmp_path: Path,
) -> None:
    broker = start_mosquitto(users={"llm-worker": PASSWORD, "alice": "alice-pass"})
    engine = start_llama_server(api_key=API_KEY)
    files = {"mqtt__password_file": PASSWORD, "engine__api_key_file": API_KEY}
    for name, secret in files.items():
        (tmp_path / name).write_text(f"{secret}\n")
        (tmp_path / name).chmod(0o600)
    worker = start_worker(
        broker.port,
        engine.url,
        mqtt__username="llm-worker",
        logging__level="debug",
        **{name: str(tmp_path / name) for name in files},
    )
    everything = watch(broker.port, username="alice", password="alice-pass", filters=["#"])
    everything.ask("a", PROMPT, request_id="r1", max_tokens=10)
    assert everything.terminal("r1")["type"] == "done"
    # What a client says of a secret is not shown to the reader of the log either.
    everything.ask("a", f"is it {PASSWORD}?", request_id="r2", max_tokens=2, bad_field=PASSWORD)
    everything.terminal("r2")
    everything.publish("llm/control/a", f'{{"action":"{API_KEY}"}}'.encode())
    everything.control("a", "ping", transaction="end")
    everything.first(transaction="end")

    own = [
        seen.payload for seen in everything.seen() if seen.topic.split("/")[1] in ("status", "health", "admin-reply")
    ]
    for secret in (PASSWORD, API_KEY):
        assert secret not in worker.log_text()
        assert not any(secret.encode() in payload for payload in own)
        for name in ("cmdline", "environ"):
            # An unprivileged user may not even look.
            with contextlib.suppress(PermissionError):
                assert secret.encode() not in Path(f"/proc/{worker.process.pid}/{name}").read_bytes()
    assert PROMPT not in worker.log_text()
    assert worker.stop() == 0
    for path in worker.folder.iterdir():
        assert path.is_dir() or API_KEY.encode() not in path.read_bytes(), path


def test_a_secret_in_what_the_engine_said_is_masked_in_the_status_that_everybody_reads(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, watch: Watch, tmp_path: Path
) -> None:
    broker = start_mosquitto(users={"llm-worker": PASSWORD, "alice": "alice-pass"})
    everything = watch(broker.port, username="alice", password="alice-pass", filters=["#"])
    start_worker(
        broker.port,
        f"unix://{tmp_path}/{PASSWORD}.sock",  # stands for any text of a library that quotes too much
        ready=False,
        mqtt__username="llm-worker",
        mqtt__password=PASSWORD,
    )
    eventually(lambda: any(b"No connection to" in seen.payload for seen in everything.seen()))
    told = b"".join(seen.payload for seen in everything.seen())
    assert b"/********.sock" in told
    assert PASSWORD.encode() not in told


def test_the_state_with_everybodys_prompts_is_readable_for_its_owner_alone(
    start_worker: StartWorker, mosquitto: Mosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    before = os.umask(0o000)
    try:
        worker = start_worker(mosquitto.port, llama_server.url, mqtt__root="state")
    finally:
        os.umask(before)
    watcher = watch(mosquitto.port, root="state")
    watcher.ask("a", PROMPT, request_id="r1", max_tokens=5)
    watcher.terminal("r1")
    state = sorted(worker.folder.glob("state.db*"))
    assert any(PROMPT.encode() in path.read_bytes() for path in state)
    assert {path.name: oct(path.stat().st_mode & 0o077) for path in state} == {path.name: "0o0" for path in state}


@pytest.mark.parametrize("key", ["mqtt.password", "engine.api_key"])
def test_a_secret_in_the_arguments_is_refused_without_repeating_it(key: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "llamacpp_mqtt_deploy", "run", "--set", f"{key}={PASSWORD}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    section, _, name = key.partition(".")
    assert f"[{section}] {name}: a secret does not belong on a command line" in ended.stderr
    assert PASSWORD not in ended.stderr + ended.stdout


def test_a_password_that_every_user_may_read_is_told(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, tmp_path: Path
) -> None:
    broker = start_mosquitto(users={"llm-worker": PASSWORD})
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    file.chmod(0o644)
    worker: DaemonProcess = start_worker(
        broker.port, llama_server.url, mqtt__username="llm-worker", mqtt__password_file=str(file)
    )
    warnings = [line for line in worker.log() if line["level"] == "warning"]
    assert any(str(file) in str(line) or "password_file" in str(line) for line in warnings), warnings
    assert PASSWORD not in worker.log_text()
