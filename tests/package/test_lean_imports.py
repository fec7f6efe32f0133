"""What a daemon has in memory: nothing of what its packages take in for terminals and web pages."""

from __future__ import annotations

import subprocess
import sys

RUN = """
import sys, warnings
import llamacpp_mqtt_deploy.commands.run as run
warnings.simplefilter("error")
def loaded(*_):
    import llamacpp_mqtt_deploy.service.daemon
    import llamacpp_mqtt_deploy.engines.server.server_engine
    unused = {"rich", "pygments", "charset_normalizer", "chardet", "regex", "textual", "psycopg", "prometheus_client"}
    print(sorted({name.partition(".")[0] for name in sys.modules} & unused))
    raise SystemExit
run.load_or_exit = loaded  # where the command has imported what it needs and begins to read its settings
try:
    run.command([])
except SystemExit:
    pass
"""


def _said(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_a_daemon_imports_nothing_for_terminals_web_pages_and_extras_that_are_off() -> None:
    assert _said(RUN) == "[]\n"


def test_what_was_left_out_can_be_imported_all_the_same() -> None:
    later = "import charset_normalizer, rich.console; print(charset_normalizer.__name__, rich.console.__name__)"
    assert _said(RUN + later).splitlines()[-1] == "charset_normalizer rich.console"


def test_a_body_without_a_character_set_is_read_as_utf_8() -> None:
    read = """
import llamacpp_mqtt_deploy.engines.server.http
import requests
response = requests.Response()
response._content = '{"name": "Zoë"}'.encode()
print(ascii(response.text), ascii(response.json()))
"""
    assert _said(read) == ascii('{"name": "Zoë"}') + " " + ascii({"name": "Zoë"}) + "\n"


def test_the_collector_rests_while_a_daemon_is_loaded_and_never_looks_at_what_was() -> None:
    started = """
import gc, sys, types
daemon = types.ModuleType("llamacpp_mqtt_deploy.service.daemon")
def run(_):
    rounds = sum(each["collections"] for each in gc.get_stats())
    print(rounds - before < 20, gc.isenabled(), gc.get_freeze_count() > 10_000)
    return 0
daemon.run = run
sys.modules[daemon.__name__] = daemon
from llamacpp_mqtt_deploy.commands.run import command
before = sum(each["collections"] for each in gc.get_stats())
command([], standalone_mode=False)
"""
    assert _said(started) == "True True True\n"


def test_fields_are_described_when_somebody_asks_and_not_at_each_start() -> None:
    asked = """
from llamacpp_mqtt_deploy.config.settings import MqttSettings
print(MqttSettings.model_fields["host"].description)
from llamacpp_mqtt_deploy.schema.attribute_docs import attribute_docs
print(len(attribute_docs(MqttSettings)["host"]) > 10)
"""
    assert _said(asked) == "None\nTrue\n"
