"""`lmd demo` as a person runs it: it talks, it stays, it ends in many ways, and nothing of it is left."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from llamacpp_mqtt_deploy import demo_model
from llamacpp_mqtt_deploy.cli import main
from llamacpp_mqtt_deploy.commands.demo import PROMPTS
from llamacpp_mqtt_deploy.demo import brokers
from llamacpp_mqtt_deploy.demo.brokers import find_mosquitto
from tests.client.terminal import Terminal
from tests.support.services import missing
from tests.support.waiting import eventually

UNPACED = "streaming.chunk_interval_s=0"
BRIEF = "generation.max_tokens=60"  # an answer that goes astray costs time and shows nothing
UP = "until Ctrl-C"


class DemoProcess:
    """`lmd demo ...` on pipes, with a temporary directory of its own by which everything that it starts is known."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        # Short, and not pytest's: the engine's socket lies in it, whose path has at most 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="t-"))
        self.text = ""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LMD_", "DEMO_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llamacpp_mqtt_deploy", "demo", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=kept | {"TMPDIR": str(self.directory)} | environment,
            cwd=self.directory,
        )
        self._reader = threading.Thread(target=self._read, name="test-demo")
        self._reader.start()

    def shows(self, text: str, timeout_s: float = 60.0) -> None:
        eventually(lambda: text in self.text or not self._reader.is_alive(), timeout_s)
        assert text in self.text, self.text

    def wait(self, timeout_s: float = 60.0) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def processes(self) -> dict[int, str]:
        """Every process that has our directory in its environment: all that the demo started, and itself."""
        found = {}
        mark = f"={self.directory}".encode()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except (OSError, UnicodeDecodeError):  # it has ended meanwhile, or is another user's
                continue
        return found

    def nothing_is_left(self, timeout_s: float = 15.0) -> None:
        eventually(lambda: not self.processes() and not list(self.directory.iterdir()), timeout_s, every_s=0.1)

    def close(self) -> None:
        self.process.kill()
        self.wait(10)
        self.process.stdout.close()  # type: ignore[union-attr]
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            self.text += data.decode("utf-8", "replace")


@pytest.fixture
def demos() -> Iterator[list[DemoProcess]]:
    need("xllamacpp")
    started: list[DemoProcess] = []
    yield started
    for demo in started:
        demo.close()


def need(kind: str) -> None:
    if kind == "mosquitto" and find_mosquitto() is None:
        missing("the program mosquitto is not installed")
    if kind != "mosquitto" and importlib.util.find_spec(kind) is None:
        missing(f"the package {kind} is not installed")


def answers(text: str) -> list[str]:
    """What stands behind each `<`."""
    return re.findall(r"(?ms)^< (.*?)^  \(\d", text)


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["mosquitto", "amqtt"])
def test_one_command_brings_a_conversation_over_a_bus_and_leaves_nothing(kind: str, demos: list[DemoProcess]) -> None:
    need(kind)
    # Nothing that configures a worker elsewhere may reach the demo: variables, a file in the working directory.
    demo = DemoProcess(
        "--broker",
        kind,
        "--set",
        UNPACED,
        "--set",
        BRIEF,
        DEMO_ONCE="1",
        LMD_MQTT__HOST="nowhere.invalid",
        LMD_ENGINE__KIND="server",
    )
    demos.append(demo)
    (demo.directory / "llamacpp-mqtt-deploy.toml").write_text("[mqtt]\nport = 1\n")
    assert demo.wait() == 0, demo.text
    assert len(answers(demo.text)) == len(PROMPTS), demo.text
    assert "sea" in answers(demo.text)[0].lower()
    assert kind in demo.text
    for line in demo.text.splitlines():
        assert "\x1b" not in line
    for prompt, number in zip(PROMPTS, range(1, 5), strict=True):
        assert f"> {prompt}\n" in demo.text
        assert re.search(rf'"type":"done","request_id":"demo-{number}"', demo.text)
    (demo.directory / "llamacpp-mqtt-deploy.toml").unlink()
    demo.nothing_is_left(0.5)


@pytest.mark.engine
@pytest.mark.broker
def test_it_stays_up_and_its_suggestions_work_until_ctrl_c(demos: list[DemoProcess]) -> None:
    need("mosquitto")
    demo = DemoProcess("--set", UNPACED, "--set", BRIEF)
    demos.append(demo)
    demo.shows(UP)
    demo.shows("chat --host")
    commands = {words[0].rpartition("/")[2]: words for words in map(shlex.split, suggestions(demo.text))}
    subscriber = subprocess.Popen(
        [*commands["mosquitto_sub"], "-W", "30"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert subscriber.stdout is not None
    try:
        assert subscriber.stdout.readline().startswith("llm/")  # subscribed: the retained status
        subprocess.run(commands["mosquitto_pub"], check=True, timeout=30)
        heard = ""
        while '"type":"done"' not in heard:
            line = subscriber.stdout.readline()
            assert line, heard
            heard += line
        assert "llm/reply/demo" in heard
    finally:
        subscriber.kill()
        subscriber.communicate(timeout=10)
    asked = subprocess.run(
        [sys.executable, "-m", "llamacpp_mqtt_deploy", *commands["lmd"][1:]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
    assert "name" in asked.stdout
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait(30) == 0, demo.text
    assert "nothing is left" in demo.text
    demo.nothing_is_left(0.5)


@pytest.mark.engine
def test_ctrl_c_in_a_terminal_reaches_the_demo_alone_and_is_a_good_end() -> None:
    need("xllamacpp")
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        environment = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "TMPDIR": directory}
        with Terminal(["demo", "--set", UNPACED, "--set", BRIEF], environment=environment) as terminal:
            terminal.shows("chat --host", 60)
            terminal.interrupt()
            assert terminal.wait(30) == 0, terminal.text
        assert "\x1b[36m" in terminal.text  # the colour of chunks
        assert not list(Path(directory).iterdir())


def suggestions(text: str) -> list[str]:
    """The command lines between `In another terminal:` and the end, but for the second lmd one."""
    block = text.partition(UP)[2]
    return [line.strip() for line in block.splitlines() if re.match(r"  (mosquitto_|\S*lmd ask)", line)]


@pytest.mark.engine
def test_killed_outright_it_takes_everything_along(demos: list[DemoProcess]) -> None:
    demo = DemoProcess("--set", UNPACED, "--set", BRIEF)
    demos.append(demo)
    demo.shows(UP)
    assert len(demo.processes()) >= 5, "demo, cleanup, broker, daemon and engine run"
    demo.process.kill()
    demo.nothing_is_left()


@pytest.mark.engine
@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_mid_answer_ends_it_with_the_shells_exit_code(
    number: signal.Signals, code: int, demos: list[DemoProcess]
) -> None:
    demo = DemoProcess("--set", "streaming.chunk_interval_s=2")
    demos.append(demo)
    demo.shows('"type":"chunk"')
    demo.process.send_signal(number)
    assert demo.wait(30) == code, demo.text
    demo.nothing_is_left(0.5)


@pytest.mark.engine
def test_a_part_that_dies_while_it_stays_up_ends_it_with_a_sentence(demos: list[DemoProcess]) -> None:
    demo = DemoProcess("--set", UNPACED, "--set", BRIEF)
    demos.append(demo)
    demo.shows(UP)
    daemon = next(pid for pid, command in demo.processes().items() if " run --config " in command)
    os.kill(daemon, signal.SIGKILL)
    assert demo.wait(30) == 1
    assert "The daemon ended by itself (signal SIGKILL)" in demo.text
    demo.nothing_is_left()


@pytest.mark.engine
@pytest.mark.broker
def test_the_chat_page_and_curl_reach_the_model_over_the_demos_gateway(demos: list[DemoProcess]) -> None:
    demo = DemoProcess("--set", UNPACED, "--set", BRIEF)
    demos.append(demo)
    demo.shows(UP)
    assert re.search(r"\n  engine   .*\n  gateway  lmd gateway, .*\n\n", demo.text), (
        "what was started stands in one list"
    )
    found = re.search(r"chat page, for a browser on this machine: (http://127\.0\.0\.1:\d+/)", demo.text)
    assert found, demo.text
    demo.shows(f"{found[1]}ask")
    with urllib.request.urlopen(found[1], timeout=20) as page:
        assert b"<title>" in page.read()
    with urllib.request.urlopen(f"{found[1]}ask", data=b"Tell me about the sea", timeout=60) as answer:
        assert "sea" in answer.read().decode().lower()
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait(30) == 0
    demo.nothing_is_left()


@pytest.mark.engine
def test_a_model_that_does_not_load_is_told_in_the_engines_words(demos: list[DemoProcess], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(demo_model.path().read_bytes()[:2000])
    demo = DemoProcess("--once", "--model", str(broken))
    demos.append(demo)
    assert demo.wait() == 1
    assert "lmd demo: The engine does not start: " in demo.text
    assert "broken.gguf" in demo.text
    demo.nothing_is_left()


# --- what is seen before anything starts -------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["demo", "--once", *arguments])
    assert result.exit_code == 1, result.output
    return result.stderr


def test_a_model_file_that_cannot_be_one_is_refused_at_once(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    assert "cannot be read: No such file or directory" in refused("--model", str(tmp_path / "absent.gguf"))
    assert "is a directory" in refused("--model", str(tmp_path))
    assert "is no GGUF file" in refused("--model", str(text))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert f"Port {port} is taken" in refused("--port", str(port))


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokers, "find_mosquitto", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert '-m pip install "llamacpp-mqtt-deploy[demo]"' in refused()
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/bin/llama-server")
    assert "There is no MQTT broker on this machine" in refused()
    assert "amqtt is not installed" in refused("--broker", "amqtt")
    assert "apt-get install mosquitto" in refused("--broker", "mosquitto")


def test_the_address_of_its_own_broker_cannot_be_set() -> None:
    result = CliRunner().invoke(main, ["demo", "--once", "--set", "mqtt.host=elsewhere"])
    assert result.exit_code == 2
    assert "mqtt.host is the demo's own" in result.stderr
