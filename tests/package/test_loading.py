"""Loading the settings: who wins, where a value came from, and what a person reads when something is wrong."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from llamacpp_mqtt_deploy.config import foreign_variables, keys
from llamacpp_mqtt_deploy.config.credentials import engine_key_reader
from llamacpp_mqtt_deploy.config.loading import (
    ConfigurationError,
    Loaded,
    engine_api_key,
    find_file,
    load,
    mqtt_password,
)
from llamacpp_mqtt_deploy.config.settings import EngineSettings, MqttSettings, Settings

NOTHING: Mapping[str, str] = {}


@pytest.fixture
def write(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def problems(
    file: Path | None = None, overrides: Mapping[str, str] = NOTHING, environ: Mapping[str, str] = NOTHING
) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load(file, overrides, environ=environ)
    return list(caught.value.problems)


def loaded(
    text: str, file: Path, overrides: Mapping[str, str] = NOTHING, environ: Mapping[str, str] = NOTHING
) -> Loaded:
    file.write_text(text)
    return load(file, overrides, environ=environ)


def test_later_sources_win_and_each_value_knows_its_origin(write: Path) -> None:
    result = loaded(
        '[mqtt]\nhost = "from-file"\nport = 1000\nroot = "filed"\n',
        write,
        {"mqtt.port": "3000"},
        {"LMD_MQTT__PORT": "2000", "LMD_MQTT__ROOT": "env", "UNRELATED": "x"},
    )
    assert (result.settings.mqtt.host, result.settings.mqtt.port, result.settings.mqtt.root) == (
        "from-file",
        3000,
        "env",
    )
    assert result.origins["mqtt.host"] == f"file {write}:2"
    assert result.origins["mqtt.port"] == "flag"
    assert result.origins["mqtt.root"] == "environment LMD_MQTT__ROOT"
    assert result.origins["mqtt.transport"] == "default"


def test_every_value_has_an_origin(write: Path) -> None:
    result = loaded('[routes.maze]\nmode = "off"\n[routes.maze.fields]\nprompt = "message"\n', write)
    assert {".".join(path) for path, _ in keys.leaves(result.settings.model_dump())} == set(result.origins)
    assert result.origins["routes.maze.fields"].startswith("file")


def test_without_any_file_the_defaults_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if Path("/etc/llamacpp-mqtt-deploy/config.toml").exists():
        pytest.skip("this machine has a configuration of its own")
    result = load(environ={})
    assert result.file is None
    assert set(result.origins.values()) == {"default"}


def test_the_file_is_looked_for_in_the_promised_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llamacpp-mqtt-deploy.toml").touch()
    assert find_file(Path("named.toml"), {"LMD_CONFIG": "variable.toml"}) == Path("named.toml")
    assert find_file(None, {"LMD_CONFIG": "variable.toml"}) == Path("variable.toml")
    assert find_file(None, {}) == Path("llamacpp-mqtt-deploy.toml")


def test_a_named_file_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    assert problems(tmp_path / "gone.toml") == [
        f"{tmp_path}/gone.toml: cannot read this configuration file: No such file or directory"
    ]
    assert "Is a directory" in problems(tmp_path)[0]


def test_a_syntax_error_names_its_line(write: Path) -> None:
    write.write_text('[mqtt]\nhost = "a"\nport = broker\n')
    assert problems(write) == [f'{write}:3: is not valid TOML: Invalid value (text needs quotes: key = "value")']
    write.write_bytes(b'[mqtt]\nhost = "\xff"\n')
    assert problems(write) == [f"{write}:2: is not UTF-8 text"]


def test_a_model_named_as_the_configuration_is_refused_without_reading_it_all(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with file.open("wb") as stream:
        stream.truncate(5 * 1024**3)  # sparse
    assert "this is no configuration file" in problems(file)[0]


def test_all_problems_are_told_at_once_each_with_section_key_expectation_and_place(write: Path) -> None:
    write.write_text(
        '[mqtt]\nport = "abc"\nhsot = "x"\nkeepalive_s = 1\n[mqtt.tls]\nenabled = "maybe"\n'
        '[engine]\nkind = "foo"\n[routes.maze]\nreqest = "y"\n[routes."bad name"]\nmode = "off"\n[wrong]\nx = 1\n'
    )
    assert sorted(problems(write)) == sorted(
        [
            f'[mqtt] port: expected a whole number from 1 to 65535, found "abc" (file {write}:2)',
            f"[mqtt] hsot: unknown key; did you mean host? (file {write}:3)",
            f"[mqtt] keepalive_s: expected a whole number from 5 to 3600, found 1 (file {write}:4)",
            f'[mqtt.tls] enabled: expected true or false, found "maybe" (file {write}:6)',
            f'[engine] kind: expected one of "server", "managed", "inprocess", found "foo" (file {write}:8)',
            f"[routes.maze] reqest: unknown key; did you mean request? (file {write}:10)",
            f"[routes] bad name: the name of a route is 1 to 64 letters, digits, _ . or - (file {write}:12)",
            f"[wrong]: unknown key (file {write}:14)",
        ]
    )


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e400"])
def test_no_key_takes_a_number_that_json_does_not_have(number: str) -> None:
    floats = [key for table in keys.tables() for key in table.keys if "a number" in key.expected]
    assert len(floats) > 30
    for key in floats:
        name = ".".join(key.path).replace(keys.ANY_NAME, "maze")
        found = problems(overrides={name: number})
        section, last = name.rsplit(".", 1)
        place = f"[{name}] 0" if "a list" in key.expected else f"[{section}] {last}"
        assert [problem.split(": expected ")[0] for problem in found] == [place]


def test_a_level_is_a_user_or_a_route(write: Path) -> None:
    write.write_text(
        '[levels.alice]\ntokens_per_day = 5\n[levels."route:maze"]\nmax_priority = "batch"\n'
        '[levels."a/b"]\ntokens_per_day = 1\n[levels.bob]\nmax_priority = "first"\ntoken_per_day = 1\n'
    )
    name = 'the name of a first topic level is 1 to 64 letters, digits, _ . or -, or "route:NAME"'
    assert sorted(problems(write)) == sorted(
        [
            f"[levels] a/b: {name} (file {write}:6)",
            f'[levels.bob] max_priority: expected one of "interactive", "normal", "batch", found "first" (file {write}:8)',
            f"[levels.bob] token_per_day: unknown key; did you mean tokens_per_day? (file {write}:9)",
        ]
    )


def test_the_level_of_a_route_that_takes_no_session_from_the_payload_is_warned_about(write: Path) -> None:
    write.write_text('[levels."route:maze"]\ntokens_per_day = 5\n')
    assert any(
        "no route 'maze' with trust_payload_session" in warning for warning in load(write, {}, environ={}).warnings
    )


def test_two_letters_that_changed_places_are_recognised(write: Path) -> None:
    write.write_text("[mqtt]\nprot = 1883\n")
    assert problems(write) == [f"[mqtt] prot: unknown key; did you mean port? (file {write}:2)"]


def test_a_key_in_the_wrong_section_is_pointed_to_its_own(write: Path) -> None:
    write.write_text('[mqtt]\nurl = "http://127.0.0.1:8080"\n')
    assert problems(write) == [f"[mqtt] url: unknown key; did you mean engine.url? (file {write}:2)"]


def test_an_unknown_variable_is_a_problem_and_an_empty_one_is_not_set() -> None:
    assert problems(environ={"LMD_MQTT__HOTS": "x"}) == [
        "[mqtt] hots: unknown key; did you mean host? (environment LMD_MQTT__HOTS)"
    ]
    assert problems(environ={"LMD_MQQT": "x"}) == [
        "LMD_MQQT: this environment variable names no setting; did you mean LMD_MQTT?"
    ]
    assert problems(environ={"LMD_MQTT__HOTS": ""}) != []
    assert load(environ={"LMD_MQTT__HOST": "", "LMD_ENGINE__SLOTS": ""}).settings.mqtt.host == "localhost"


@pytest.mark.parametrize("text", ["a,b", '["a", "b"]', "['a', 'b']", " a , b "])
def test_lists_come_from_the_environment_as_json_toml_or_with_commas(text: str) -> None:
    assert load(environ={"LMD_ENGINE__MODELS": text}).settings.engine.models == ("a", "b")


def test_a_broken_list_is_told_with_its_variable() -> None:
    assert problems(environ={"LMD_ENGINE__MODELS": '["a"'}) == [
        "[engine] models: expected a list, each item text, written as JSON (environment LMD_ENGINE__MODELS)"
    ]


def test_routes_can_be_set_from_everywhere(write: Path) -> None:
    result = loaded(
        "[routes.Maze]\nmax_tokens = 5\n",
        write,
        {"routes.Maze.fields": '{prompt = "message"}'},
        {"LMD_ROUTES__SMALL__MODE": "off"},
    )
    assert result.settings.routes["Maze"].fields == {"prompt": "message"}
    assert result.settings.routes["Maze"].max_tokens == 5
    assert result.settings.routes["small"].mode == "off"


def test_overlapping_routes_are_refused(write: Path) -> None:
    write.write_text(
        '[routes.maze]\nrequest = "llm/request/{session}"\nreply = "maze/reply/{session}"\ncontrol = "maze/control/{session}"\n'
    )
    assert "routes.maze.request" in problems(write)[0]


@pytest.mark.parametrize("levels", [5000, 900, 150])
@pytest.mark.parametrize(
    "key,beginning,end",
    [
        ("engine.models", "[", "]"),
        ("engine.aliases", '{"a":', "}"),
        ("routes.x.tools", "[", "]"),
    ],
)
def test_a_value_that_is_nested_too_deeply_is_named(key: str, beginning: str, end: str, levels: int) -> None:
    value = beginning * levels + "1" + end * levels
    *section, name = key.split(".")
    expected = f"[{'.'.join(section)}] {name}: is nested too deeply"
    [told] = problems(overrides={key: value})
    assert told.startswith(expected)
    [told] = problems(environ={f"LMD_{key.upper().replace('.', '__')}": value})
    assert told.startswith(expected)


@pytest.mark.parametrize("levels", [5000, 150])
@pytest.mark.parametrize("table", ["engine.aliases", "routes.x.fields"])
def test_dotted_keys_that_are_nested_too_deeply_are_named(table: str, levels: int, write: Path) -> None:
    write.write_text(f"[{table}]\n{'.'.join(['a'] * levels)} = 1\n")
    [told] = problems(write)
    assert told.startswith(
        "[engine.aliases] a: is nested" if table == "engine.aliases" else "[routes.x] fields: is nested"
    )
    assert str(write) in told
    assert len(told) < 400


# --- secrets -----------------------------------------------------------------------------------------------------------

SECRET = "hunter2-hunter2"


def test_no_problem_ever_shows_a_secret(write: Path) -> None:
    write.write_text(
        f'[mqtt]\npassword = ["{SECRET}"]\npasword = "{SECRET}"\n[engine]\napi_key = {{a = "{SECRET}"}}\n'
        f'url = "http://user:{SECRET}@host"\n'
    )
    told = problems(write)
    assert len(told) >= 3
    assert SECRET not in "\n".join(told)
    assert SECRET not in "\n".join(problems(overrides={"engine.url": f"http://user:{SECRET}@host"}))


def test_a_secret_on_the_command_line_is_refused() -> None:
    assert problems(overrides={"mqtt.password": SECRET}) == [
        "[mqtt] password: a secret does not belong on a command line; use a file or the environment (flag)"
    ]


def test_no_text_of_the_settings_holds_a_secret() -> None:
    result = load(environ={"LMD_MQTT__PASSWORD": SECRET, "LMD_MQTT__USERNAME": "u", "LMD_ENGINE__API_KEY": SECRET})
    assert SECRET not in f"{result!r} {result} {result.settings.model_dump_json()}"
    assert mqtt_password(result.settings, environ={}) == SECRET


@pytest.mark.parametrize("content,found", [("pw\n", "pw"), (" pw \r\nsecond\n", " pw "), ("", None), ("\n", None)])
def test_a_password_file_gives_its_first_line(tmp_path: Path, content: str, found: str | None) -> None:
    file = tmp_path / "password"
    file.write_bytes(content.encode())
    assert mqtt_password(Settings(mqtt=MqttSettings(password_file=file)), environ={}) == found


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_the_line_end_behind_a_secret_is_no_part_of_it(write: Path, end: str) -> None:
    # Of a .env file with Windows line ends, of a block in YAML, of a TOML text in three quotes.
    environ = {"LMD_MQTT__USERNAME": "u", "LMD_MQTT__PASSWORD": SECRET + end, "LMD_ENGINE__API_KEY": SECRET + end}
    settings = load(environ=environ).settings
    assert (mqtt_password(settings, environ={}), engine_api_key(settings, environ={})) == (SECRET, SECRET)
    text = f'[mqtt]\nusername = "u"\npassword = """\n{SECRET}\n"""\n[engine]\napi_key = """\n{SECRET}\n"""\n'
    settings = loaded(text, write).settings
    assert (mqtt_password(settings, environ={}), engine_api_key(settings, environ={})) == (SECRET, SECRET)


@pytest.mark.parametrize("char", ["\n", "\r", "\x07", "\x7f", "\x85", "\udcff"])
def test_a_secret_that_cannot_be_one_is_named_by_its_field_and_not_shown(char: str) -> None:
    bad = f"{SECRET}{char}{SECRET}"
    told = problems(environ={"LMD_MQTT__USERNAME": "u", "LMD_MQTT__PASSWORD": bad, "LMD_ENGINE__API_KEY": bad})
    assert [line.partition(":")[0] for line in told] == ["[mqtt] password", "[engine] api_key"]
    assert "LMD_ENGINE__API_KEY" in told[1]
    assert SECRET not in "".join(told)


@pytest.mark.parametrize("bad", ["p\udce4ss", "pa\x00ss", "pa\rss", "x" * 65536, "\u20ac" * 21846])
def test_a_user_or_password_that_mqtt_cannot_send_is_named(bad: str, tmp_path: Path) -> None:
    assert problems(environ={"LMD_MQTT__USERNAME": bad})[0].startswith("[mqtt] username: ")
    assert problems(overrides={"mqtt.username": bad})[0].startswith("[mqtt] username: ")
    by_value = problems(environ={"LMD_MQTT__USERNAME": "u", "LMD_MQTT__PASSWORD": bad})
    assert by_value[0].startswith("[mqtt] password: ")
    file = tmp_path / "password"
    file.write_bytes(bad.replace("\r", "\x0b").encode("utf-8", "surrogateescape"))
    by_file = problems(environ={"LMD_MQTT__USERNAME": "u", "LMD_MQTT__PASSWORD_FILE": str(file)})
    assert by_file[0].startswith("[mqtt] password_file: ")
    assert all(len(told) < 400 for told in [*by_value, *by_file])


def test_the_longest_user_and_password_of_mqtt_are_fine() -> None:
    most = "x" * 65535
    settings = load(environ={"LMD_MQTT__USERNAME": most, "LMD_MQTT__PASSWORD": most}).settings
    assert (settings.mqtt.username, mqtt_password(settings, environ={})) == (most, most)


@pytest.mark.parametrize("by_systemd", [False, True])
def test_a_key_in_a_file_that_no_header_can_carry_is_named_with_its_file(tmp_path: Path, by_systemd: bool) -> None:
    file = tmp_path / "engine-api-key"
    file.write_text(f"{SECRET}\u2013{SECRET}\n")
    file.chmod(0o600)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)} if by_systemd else {"LMD_ENGINE__API_KEY_FILE": str(file)}
    [told] = problems(environ=environ)
    assert told.startswith("[engine] api_key_file: ")
    assert str(file) in told
    assert "HTTP header" in told
    assert SECRET not in told


def test_a_password_through_a_pipe_can_be_asked_for_twice(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("pw\n",), name="writer", daemon=True)
    writer.start()
    settings = Settings(mqtt=MqttSettings(password_file=pipe))
    assert [mqtt_password(settings, environ={}) for _ in range(2)] == ["pw", "pw"]
    writer.join(10)


def test_a_credential_of_systemd_is_stripped_and_an_empty_one_counts_as_none(tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert mqtt_password(Settings(), environ=environ) is None
    (tmp_path / "mqtt-password").write_text("\n")  # what SetCredential=mqtt-password:\n leaves
    (tmp_path / "engine-api-key").write_text(" key \n")
    assert mqtt_password(Settings(), environ=environ) is None
    assert engine_api_key(Settings(), environ=environ) == "key"


@pytest.mark.parametrize("by_systemd", [False, True])
def test_the_engines_key_is_read_anew_wherever_it_may_be_renewed(tmp_path: Path, by_systemd: bool) -> None:
    file = tmp_path / "engine-api-key"
    engine = EngineSettings() if by_systemd else EngineSettings(api_key_file=file)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)} if by_systemd else {}
    read = engine_key_reader(Settings(engine=engine), environ=environ)
    for key in ("first", "second"):
        file.write_text(f"{key}\n")
        assert read() == key


@pytest.mark.parametrize("key", ["key", None])
def test_an_engines_key_that_nothing_renews_is_what_the_settings_say(key: str | None) -> None:
    engine = EngineSettings(api_key=None if key is None else SecretStr(key))
    read = engine_key_reader(Settings(engine=engine), environ={})
    assert [read(), read()] == [key, key]


def test_an_empty_table_in_a_file_that_everybody_may_read_is_no_secret(write: Path) -> None:
    write.write_text("[mqtt]\n[engine]\n[mqtt.tls]\n")
    write.chmod(0o644)
    assert load(write, environ={}).warnings == ()
    write.write_text(f'[mqtt]\nusername = "u"\npassword = "{SECRET}"\n[engine]\n')
    assert [warning.partition(":")[0] for warning in load(write, environ={}).warnings] == ["mqtt.password"]


def test_a_readable_secret_file_is_warned_about_and_a_missing_one_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("pw")
    file.chmod(0o644)
    environ = {"LMD_MQTT__PASSWORD_FILE": str(file), "LMD_MQTT__USERNAME": "u"}
    assert any("every user of this machine may read it" in warning for warning in load(environ=environ).warnings)
    file.chmod(0o600)
    assert not any("every user" in warning for warning in load(environ=environ).warnings)
    file.unlink()
    assert "cannot read" in problems(environ=environ)[0]


# --- what contradicts itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,key",
    [
        ({"engine.kind": "managed"}, "[engine] model_path"),
        ({"engine.kind": "inprocess", "engine.repo_id": "a/b"}, "[engine] filename"),
        ({"engine.url": "ftp://host"}, "[engine] url"),
        ({"engine.url": "http://"}, "[engine] url"),
        ({"engine.url": "http://host:99999"}, "[engine] url"),
        ({"engine.url": "http://host/a/../b"}, "[engine] url"),
        ({"engine.url": "http://host/%2e%2E/b"}, "[engine] url"),
        ({"engine.url": "http://host/./b"}, "[engine] url"),
        ({"engine.url": "unix://run/llama.sock"}, "[engine] url"),
        ({"mqtt.transport": "unix"}, "[mqtt] host"),
        ({"mqtt.transport": "unix", "mqtt.host": "/run/m.sock", "mqtt.port": "1883"}, "[mqtt] port"),
        ({"mqtt.host": "mqtt://broker"}, "[mqtt] host"),
        ({"mqtt.tls.ca_file": "/ca.pem"}, "[mqtt.tls] ca_file"),
        ({"mqtt.tls.enabled": "true", "mqtt.tls.cert_file": "/etc/hostname"}, "[mqtt.tls] key_file"),
        ({"mqtt.tls.enabled": "true", "mqtt.tls.ca_file": "/nowhere/ca.pem"}, "[mqtt.tls] ca_file"),
        ({"streaming.chunk_chars": "10000", "limits.max_event_bytes": "1024"}, "[streaming] chunk_chars"),
        ({"generation.timeout_s": "7200"}, "[generation] timeout_s"),
        ({"generation.max_tokens": "40000"}, "[generation] max_tokens"),
    ],
)
def test_contradictions_refuse_the_start(flags: dict[str, str], key: str) -> None:
    assert any(problem.startswith(f"{key}:") for problem in problems(overrides=flags))


@pytest.mark.parametrize(
    "flags",
    [
        {"engine.url": "unix:///run/llama-server/llama.sock"},
        {"engine.url": "https://host/v1"},
        {"engine.url": "https://host/v1.5/..b"},
        {"engine.url": "http://[::1]:8080"},
        {"mqtt.transport": "unix", "mqtt.host": "/run/mosquitto.sock"},
        {"engine.kind": "managed", "engine.model_path": "/m.gguf"},
        {"engine.kind": "inprocess", "engine.repo_id": "a/b", "engine.filename": "*Q4_K_M.gguf"},
        {"limits.max_event_bytes": "4096"},
    ],
)
def test_sensible_settings_are_taken(flags: dict[str, str]) -> None:
    load(overrides=flags, environ={})


def test_home_is_expanded_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    result = load(overrides={"engine.kind": "managed", "engine.model_path": "~/m.gguf"}, environ={})
    assert result.settings.engine.model_path == Path("/home/ada/m.gguf")


def test_settings_built_by_hand_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMD_MQTT__HOST", "elsewhere")
    assert Settings().mqtt.host == "localhost"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(max_size=200))
def test_whatever_the_file_holds_loading_ends_in_settings_or_in_problems(text: str, tmp_path: Path) -> None:
    file = tmp_path / "any.toml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert ends_properly(file, {})


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(sorted(keys.keys()))
    | st.text(st.characters(codec="utf-8", exclude_characters="\0="), min_size=1, max_size=30),
    value=st.text(max_size=40),
)
@example(key="engine.api_key_file", value="\0")
@example(key="mqtt.password_file", value="\0")
def test_whatever_a_flag_holds_loading_ends_in_settings_or_in_problems(key: str, value: str) -> None:
    assert ends_properly(Path("/dev/null"), {key: value})


def ends_properly(file: Path, overrides: Mapping[str, str]) -> bool:
    try:
        return bool(load(file, overrides, environ={}).origins)
    except ConfigurationError as error:
        return len(error.problems) > 0


# --- aliases of models -------------------------------------------------------------------------------------------------


def test_aliases_come_from_the_file_and_from_the_environment(write: Path) -> None:
    text = '[engine]\nmodel = "qwen"\n[engine.aliases]\n"gpt-4" = "qwen"\n"gpt-4.1-mini" = "default"\n'
    assert loaded(text, write).settings.engine.aliases == {"gpt-4": "qwen", "gpt-4.1-mini": "default"}
    given = load(None, environ={"LMD_CONFIG": str(write), "LMD_ENGINE__ALIASES": '{"gpt-4":"default"}'})
    assert given.settings.engine.aliases == {"gpt-4": "default"}


@pytest.mark.parametrize(
    "aliases, words",
    [
        ('"qwen" = "default"', '"qwen" is the name of a model as well'),
        ('"spare" = "qwen"', '"spare" is the name of a model as well'),
        ('"maze-model" = "qwen"', '"maze-model" is the name of a model as well'),
        ('"a" = "b"\n"b" = "qwen"', '"a" stands for "b", which is an alias itself'),
        ('"a" = "a"', '"a" stands for "a", which is an alias itself'),
        ('"default" = "qwen"', '"default" cannot be an alias'),
        ('"" = "qwen"', "expected 1 to 256 characters"),
        ('"a" = ""', "expected 1 to 256 characters"),
    ],
)
def test_aliases_that_clash_are_refused(write: Path, aliases: str, words: str) -> None:
    routes = '[routes.maze]\nmodel = "maze-model"\n'
    write.write_text(f'[engine]\nmodel = "qwen"\nmodels = ["spare"]\n[engine.aliases]\n{aliases}\n{routes}')
    found = problems(write)
    assert len(found) == 1
    assert found[0].startswith("[engine] aliases: ")
    assert words in found[0]


# --- variables of other programs ---------------------------------------------------------------------------------------


def test_variables_of_other_programs_are_answered_with_our_names() -> None:
    secret = "hunter2"
    names = [
        *("LLM_SERVER_URL", "LLM_TIMEOUT", "LLM_TEMPERATURE", "LLM_MAX_TOKENS", "LLM_COMM_MODE", "MQTT_BROKER_HOST"),
        *("MQTT_PASSWORD", "AGENT_MODEL", "STREAM_TIMEOUT", "BUFFER_SIZE", "LOG_LEVEL"),
    ]
    result = load(environ=dict.fromkeys(names, secret))
    told = [warning for warning in result.warnings if "is set but not read" in warning]
    assert sorted(warning.split(" ")[0] for warning in told) == sorted(names)
    assert "LLM_SERVER_URL is set but not read; ours is LMD_ENGINE__URL" in told
    assert "MQTT_BROKER_HOST is set but not read; ours is LMD_MQTT__HOST" in told
    assert secret not in str(result.warnings)
    assert result.settings == Settings()


def test_our_variables_that_are_hinted_at_exist() -> None:
    for known in (foreign_variables._SPECIFIC, foreign_variables._COMMON):
        assert all(keys.find(dotted.split(".")) for dotted in known.values())


def test_a_variable_of_another_program_is_no_matter_where_ours_is_set_or_nothing_is_meant() -> None:
    ours = load(environ={"LLM_SERVER_URL": "http://a", "LMD_ENGINE__URL": "http://127.0.0.1:1"})
    empty = load(environ={"LLM_SERVER_URL": ""})
    common = load(environ={"LOG_LEVEL": "debug", "BUFFER_SIZE": "5", "LLM_UNKNOWN": "x"})
    for result in (ours, empty, common):
        assert not [warning for warning in result.warnings if "is set but not read" in warning]


@pytest.mark.parametrize("key", ["mqtt.password_file", "engine.api_key_file", "engine.model_path", "sessions.path"])
def test_a_path_with_a_null_character_is_a_problem_of_its_key(key: str) -> None:
    section, name = key.split(".")
    assert problems(None, {key: "a\x00b"})[0].startswith(f"[{section}] {name}: expected the path of a file")
