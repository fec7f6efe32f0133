"""The parts of the managed engine that need no server: its log, its watch, its directory and its arguments."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from llamacpp_mqtt_deploy.config.settings import EngineSettings, ManagedSettings
from llamacpp_mqtt_deploy.engines.managed import launching, privatedir, serverlog, wheel_server
from llamacpp_mqtt_deploy.engines.managed.attending import Attendant, Interrupt
from llamacpp_mqtt_deploy.engines.managed.child import Child
from llamacpp_mqtt_deploy.engines.managed.launching import Abilities, Endpoint
from llamacpp_mqtt_deploy.engines.managed.privatedir import LONGEST_SOCKET_PATH, PrivateDir
from llamacpp_mqtt_deploy.engines.managed.serverlog import KEPT_LINES, MAX_LINE_CHARS, ServerLog
from llamacpp_mqtt_deploy.engines.managed.stalling import StallWatch, Vigilance
from llamacpp_mqtt_deploy.engines.managed.verdicts import End, Verdict, Verdicts
from llamacpp_mqtt_deploy.engines.managed.watching import Life
from llamacpp_mqtt_deploy.engines.server.line import ServerAddress
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine, SlotProgress

# --- the server's log ------------------------------------------------------------------------------------------------


def written(*parts: bytes, serving: bool = False) -> list[dict[str, Any]]:
    """The lines of our log that came of these pieces."""
    with structlog.testing.capture_logs() as lines:
        log = ServerLog(now=0.0, serving=lambda: serving)
        for part in parts:
            log.feed(part, 0.0)
        log.feed(b"", 0.0)
    return [dict(line) for line in lines]


def test_levels_are_the_servers_and_its_chatter_is_ours_to_debug() -> None:
    lines = written(b"0.00.001.441 I srv init: hello\n0.1 W srv x: careful\nE llama: broken\n0.00.1 D deep\nplain\n")
    assert [(line["log_level"], line["line"]) for line in lines] == [
        ("debug", "srv init: hello"),
        ("warning", "srv x: careful"),
        ("error", "llama: broken"),
        ("debug", "deep"),
        ("debug", "plain"),
    ]


def test_colours_and_control_characters_are_taken_out() -> None:
    [line] = written(b"\x1b[31mE srv: red\x1b[0m \x07bell\x00\r\n")
    assert line["line"] == "srv: red bell"


def test_a_line_may_come_in_pieces_and_be_too_long() -> None:
    [first, second] = written(b"E srv: a", b"b\nE " + b"x" * 5000, b"y" * 5000, b"\n")
    assert first["line"] == "srv: ab"
    assert second["line"] == "x" * MAX_LINE_CHARS


@pytest.mark.parametrize(
    "line",
    [
        b'E srv  operator(): got exception: {"message":"Failed to parse messages: secret"}',
        b"W common_chat_parse: Failed to parse input at pos 3: secret",
        b'I srv  log: prompt: "secret"',
        b"secret",
        b'  "content": "secret"',
    ],
)
def test_what_the_server_repeats_of_a_request_is_cut_out(line: bytes) -> None:
    assert "secret" not in str(written(line + b"\n", serving=True))


@pytest.mark.parametrize(
    "line",
    [
        b"/src/ggml/src/ggml.c:123: GGML_ASSERT(a == b) failed",
        b"ggml_cuda_compute_forward: MUL_MAT failed",
        b"CUDA error: out of memory",
        b"terminate called after throwing an instance of 'std::runtime_error'",
        b"llama-server: error while loading shared libraries: libcuda.so.1: cannot open shared object file",
    ],
)
def test_the_last_words_of_a_dying_server_are_kept(line: bytes) -> None:
    [told] = written(line + b"\n", serving=True)
    assert told["log_level"] == "error"
    assert told["line"] == line.decode()


def test_a_server_that_shouts_is_cut_short_and_the_loss_is_told() -> None:
    with structlog.testing.capture_logs() as lines:
        log = ServerLog(now=0.0, serving=lambda: True)
        for number in range(1000):
            log.feed(b"W srv: line %d\n" % number, 0.0)
        log.feed(b"W srv: later\n", 1.0)
    assert len(lines) == serverlog.BURST_LINES + 2
    assert lines[-2]["event"] == "llama_server.lines_dropped"
    assert lines[-2]["lines"] == 1000 - serverlog.BURST_LINES


def test_complaints_go_before_chatter_in_an_error_text() -> None:
    log = ServerLog(now=0.0, serving=lambda: False)
    log.feed(b"I a\nE no such tensor\nI b\nE no such tensor\nI cleaning up\n", 0.0)
    assert log.last() == log.last(from_cause=True) == "no such tensor"


def test_a_failed_load_is_told_from_its_cause_on() -> None:
    log = ServerLog(now=0.0, serving=lambda: False)
    log.feed(b"I a\nE bad magic\nE cannot load m.gguf\nE cannot fit\nE bad magic\nE no slots\nE no server\nI b\n", 0.0)
    assert log.last(from_cause=True) == "bad magic | cannot load m.gguf | [...] | no server"
    assert log.last() == "cannot fit | no slots | no server"


def test_stage_and_backend_are_read_from_the_log() -> None:
    log = ServerLog(now=0.0, serving=lambda: False)
    assert (log.stage, log.backend) == ("", "cpu")
    log.feed(b"I llama_model_load_from_file_impl: using device CUDA0 (NVIDIA H200) - 1 MiB free\n", 0.0)
    log.feed(b"I load_tensors: loading model tensors\n", 0.0)
    assert (log.stage, log.backend) == ("reads the weights", "cuda")


@given(st.lists(st.binary(max_size=300), max_size=30), st.booleans())
def test_any_bytes_in_any_pieces_give_bounded_clean_lines(parts: list[bytes], serving: bool) -> None:
    log = ServerLog(now=0.0, serving=lambda: serving)
    with structlog.testing.capture_logs() as lines:
        for part in parts:
            log.feed(part, 0.0)
    assert len(log._kept) <= KEPT_LINES
    assert len(log._rest) <= serverlog.MAX_LINE_BYTES
    for line in lines:
        assert len(line["line"]) <= MAX_LINE_CHARS
        assert line["line"].isprintable() or all(not (char < " " or "\x7f" <= char <= "\x9f") for char in line["line"])


# --- the watch -------------------------------------------------------------------------------------------------------

WATCH = Vigilance(deaf_after_s=10.0, deaf_loading_after_s=100.0, stuck_after_s=60.0)


def slot(decoded: int, *, processed: int = 5, task: int = 1, working: bool = True) -> SlotProgress:
    return SlotProgress(id=0, working=working, task=task, prompt_tokens_processed=processed, tokens_decoded=decoded)


def test_a_slot_that_works_and_does_not_move_hangs() -> None:
    watch = StallWatch(WATCH)
    assert [watch.saw([slot(3)], at, at) for at in (0, 30, 59)] == [None] * 3
    assert watch.saw([slot(3)], 60, 60) == "its slot 0 works and does not move for 60 s"


@pytest.mark.parametrize("after", [slot(4), slot(3, processed=6), slot(3, task=2)], ids=["token", "prompt", "task"])
def test_any_move_is_a_sign_of_life(after: SlotProgress) -> None:
    watch = StallWatch(WATCH)
    watch.saw([slot(3)], 0, 0)
    assert watch.saw([after], 59, 59) is None
    assert watch.saw([after], 118, 118) is None
    assert watch.saw([after], 119, 119) is not None


def test_a_slot_at_rest_may_rest_for_ever() -> None:
    watch = StallWatch(WATCH)
    assert [watch.saw([slot(3, working=False)], at, at) for at in (0, 1000)] == [None] * 2
    assert not watch.doubtful


def test_a_slot_left_at_work_is_looked_at_again() -> None:
    watch = StallWatch(WATCH)
    watch.saw([slot(3)], 0, 0)
    assert watch.doubtful


def test_silence_about_the_slots_counts_from_the_first_question() -> None:
    watch = StallWatch(WATCH)
    assert watch.saw(None, 0, 5) is None
    assert watch.doubtful
    assert watch.saw(None, 8, 59) is None
    assert watch.saw(None, 55, 60) == "its decoding thread answers nothing for 60 s"
    assert watch.saw([], 61, 61) is None
    assert watch.saw(None, 62, 67) is None


def test_a_loading_server_may_be_deaf_for_longer() -> None:
    watch = StallWatch(WATCH)
    assert watch.loading(False, 0, 20) is None
    assert watch.loading(True, 21, 21) is None
    assert watch.reached(False, 22, 27) is None
    assert watch.reached(False, 29, 34) == "it answers nothing for 12 s"


# --- the verdicts ----------------------------------------------------------------------------------------------------

SEGFAULT = End(code=-11, ready_s=5.0)


def test_the_pause_doubles_up_to_half_a_minute_and_health_forgives() -> None:
    verdicts = Verdicts()
    assert [verdicts.judge(SEGFAULT).pause_s for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert verdicts.judge(End(code=-11, ready_s=61.0)).pause_s == 0.5
    assert verdicts.judge(SEGFAULT).state == "restarting"


def test_a_server_that_refuses_to_load_is_tried_rarely_until_somebody_asks() -> None:
    verdicts = Verdicts()
    refused = End(code=1, last="bad magic")
    judged = [verdicts.judge(refused) for _ in range(7)]
    assert {verdict.state for verdict in judged} == {"failed"}
    assert [verdict.pause_s for verdict in judged] == [10, 20, 40, 80, 160, 300, 300]
    assert "bad magic" in judged[0].detail
    verdicts.forgive()
    assert verdicts.judge(refused).pause_s == 10


def test_a_server_that_was_ready_once_gets_more_chances_to_load() -> None:
    verdicts = Verdicts()
    verdicts.ready()
    assert [verdicts.judge(End(code=1)).state for _ in range(3)] == ["restarting", "restarting", "failed"]


def test_an_end_that_was_asked_for_is_no_failure() -> None:
    verdicts = Verdicts()
    assert verdicts.judge(End(code=0, wish="restart", ready_s=5)).pause_s == 0
    assert verdicts.judge(SEGFAULT).pause_s == 0.5


@pytest.mark.parametrize(
    "end, how",
    [
        (End(code=3), "ended with exit code 3"),
        (End(code=127), "a library or the program itself is missing"),
        (End(code=-11), "was ended by SIGSEGV"),
        (End(code=-9), "perhaps by the kernel for lack of memory"),
        (End(code=-9, out_of_memory=True), "was killed by the kernel for lack of memory"),
        (End(code=-9, wish="hung"), "was ended by SIGKILL"),
        (End(code=-99), "was ended by signal 99"),
    ],
)
def test_an_end_is_told_in_words(end: End, how: str) -> None:
    assert how in end.how


@pytest.mark.parametrize(
    "end", [End(code=-9), End(code=-9, out_of_memory=True), End(code=1, last="failed to allocate CPU buffer of size 9")]
)
def test_a_server_that_ended_for_lack_of_memory_is_told_for_ten_minutes(end: End) -> None:
    verdicts = Verdicts()
    assert verdicts.problem(100.0) == ""
    verdicts.remember(end, 100.0)
    assert "once for lack of memory" in verdicts.problem(101.0)
    assert end.how in verdicts.problem(101.0)
    verdicts.remember(SEGFAULT, 200.0)
    verdicts.remember(end, 300.0)
    assert "2 times" in verdicts.problem(899.0)
    assert verdicts.problem(901.0) == ""


def test_a_start_that_lacks_something_for_the_moment_is_tried_again_soon_however_often_it_failed() -> None:
    verdicts = Verdicts()
    assert verdicts.lacks("no descriptors") == Verdict("starting", "no descriptors", 2.0)
    verdicts.ready()
    for _ in range(9):
        verdicts.judge(SEGFAULT)
    assert verdicts.lacks("no descriptors") == Verdict("restarting", "no descriptors", 2.0)


def test_a_server_that_was_to_end_did_not_end_for_lack_of_memory() -> None:
    verdicts = Verdicts()
    for end in (End(code=-9, wish="hung"), End(code=-9, wish="restart"), End(code=0), SEGFAULT):
        verdicts.remember(end, 100.0)
    assert verdicts.problem(100.0) == ""


# --- the directory ---------------------------------------------------------------------------------------------------


def test_directories_of_killed_workers_are_cleared_and_those_of_living_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(os.path.relpath(tmp_path))  # short enough for a socket, whatever the test is called
    if len(os.fsencode(base)) > LONGEST_SOCKET_PATH - 40:
        monkeypatch.chdir(tmp_path)
        base = Path()
    environ = {"RUNTIME_DIRECTORY": str(base)}
    living = PrivateDir(environ)
    dead = tmp_path / f"{privatedir.PREFIX}dead"
    dead.mkdir()
    young = tmp_path / f"{privatedir.PREFIX}young"
    young.mkdir()
    other = tmp_path / "something"
    other.mkdir()
    long_ago = time.time() - 3600
    for path in (living.path, dead, other):
        os.utime(path, (long_ago, long_ago))
    second = PrivateDir(environ)
    assert {path.name for path in tmp_path.iterdir()} == {living.path.name, second.path.name, young.name, other.name}
    assert second.path.stat().st_mode & 0o777 == 0o700
    living.close()
    second.close()
    second.close()
    assert {path.name for path in tmp_path.iterdir()} == {young.name, other.name}


def test_a_path_too_long_for_a_socket_is_not_used(tmp_path: Path) -> None:
    base = tmp_path / ("x" * 90)
    base.mkdir()
    made = PrivateDir({"RUNTIME_DIRECTORY": str(base)})
    assert len(os.fsencode(made.socket_path)) <= LONGEST_SOCKET_PATH
    assert list(base.iterdir()) == []
    made.close()


# --- arguments -------------------------------------------------------------------------------------------------------

NEW = Abilities(
    frozenset(name for names, _, _ in wheel_server.FLAGS for name in names),
    unix_socket=True,
    key_from_environment=True,
    flash_attention_takes_value=True,
    fits_by_itself=True,
)


def arguments(**settings: Any) -> list[str]:
    made = EngineSettings(kind="managed", model_path=Path("/models/a.gguf"), **settings)
    return launching.arguments(made, NEW, Endpoint(socket_path=Path("/run/x/llama.sock")))


def value(made: list[str], flag: str) -> str:
    return made[made.index(flag) + 1]


def test_the_context_of_all_slots_together_is_what_each_is_promised() -> None:
    made = arguments(slots=3, context_tokens=4096)
    assert value(made, "-c") == str(3 * 4096)
    assert value(made, "-np") == "3"
    assert "--no-kv-unified" in made
    assert value(arguments(slots=2), "-c") == str(2 * launching.DEFAULT_CONTEXT_TOKENS)


def test_every_setting_becomes_its_flag() -> None:
    made = arguments(
        model="qwen",
        gpu_layers=20,
        main_gpu=1,
        tensor_split=(3, 1.5),
        flash_attention="on",
        kv_type="q8_0",
        batch_tokens=128,
        threads=6,
        managed=ManagedSettings(cache_ram_mib=64, extra_args=("--mmproj", "/models/m.gguf")),
    )
    expected = {
        "--alias": "qwen",
        "--n-gpu-layers": "20",
        "--main-gpu": "1",
        "--tensor-split": "3,1.5",
        "--flash-attn": "on",
        "--cache-type-k": "q8_0",
        "--cache-type-v": "q8_0",
        "--batch-size": "128",
        "--ubatch-size": "128",
        "--threads": "6",
        "--cache-ram": "64",
    }
    assert {flag: value(made, flag) for flag in expected} == expected
    assert made[-2:] == ["--mmproj", "/models/m.gguf"]


def test_the_choice_of_gpu_layers_is_left_to_a_server_that_can_choose() -> None:
    assert "--n-gpu-layers" not in arguments()


def test_the_flags_in_the_help_of_a_current_server_are_read() -> None:
    text = (
        "-fa,   --flash-attn [on|off|auto]  set Flash Attention\n-m, --model FNAME\n--host HOST  ... ends with .sock\n"
    )
    assert {"-fa", "--flash-attn", "-m", "--model", "--host"} <= set(launching._FLAG.findall(text))


def test_the_wheel_takes_every_flag_that_we_give() -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    made = arguments(
        model="qwen",
        slots=3,
        context_tokens=1000,
        gpu_layers=20,
        main_gpu=1,
        tensor_split=(3, 1),
        flash_attention="off",
        kv_type="q4_0",
        threads=6,
        managed=ManagedSettings(cache_ram_mib=64, extra_args=("-b", "32")),
    )
    params = wheel_server.configure(xllamacpp, made)
    assert (params.model.path, params.n_ctx, params.n_parallel) == ("/models/a.gguf", 3000, 3)
    assert (params.n_gpu_layers, params.main_gpu, params.tensor_split[:3]) == (20, 1, [3.0, 1.0, 0.0])
    assert params.flash_attn_type == xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    assert params.cache_type_k == params.cache_type_v == xllamacpp.ggml_type.GGML_TYPE_Q4_0
    assert (params.cpuparams.n_threads, params.cpuparams_batch.n_threads) == (6, 6)
    assert (params.n_batch, params.n_ubatch) == (32, 256), "a later flag wins"
    assert params.hostnames == ["/run/x/llama.sock"]
    assert params.kv_unified is False
    assert params.ui is False
    assert params.endpoint_metrics
    assert params.model_alias == {"qwen"}


def test_the_wheel_refuses_a_wrong_value(capsys: pytest.CaptureFixture[str]) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    with pytest.raises(SystemExit, match="2"):
        wheel_server.configure(xllamacpp, ["--flash-attn", "perhaps"])
    assert "--flash-attn perhaps does not work" in capsys.readouterr().err


def test_the_memory_of_the_machine_gives_the_number_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(gib: float) -> int:
        sizes = {"SC_PHYS_PAGES": int(gib * 1024**3 / 4096), "SC_PAGE_SIZE": 4096}
        monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])
        return launching.default_slots()

    assert [machine(gib) for gib in (4, 8, 64)] == [1, 2, 4]


def test_a_program_is_tied_to_us_without_a_shell() -> None:
    assert launching.tied(["/bin/x", "a b"])[:3] == [sys.executable, "-I", "-S"]
    assert launching.tied(["/bin/x", "a b"])[-3:] == [str(os.getpid()), "/bin/x", "a b"]


class Flooded(Child):
    """A server that has ended, and left behind a program that goes on writing to its output."""

    reads = 0

    @override
    def read(self) -> bytes | None:
        self.reads += 1
        assert self.reads < 1000
        return b"srv flood\n" * 100

    @override
    def reap(self) -> int | None:
        return super().reap() if self.reads else None


def test_what_a_server_left_running_cannot_hold_its_end_up_by_writing() -> None:
    child = Flooded([sys.executable, "-c", "print('srv ended', flush=True)"], os.environ)
    address = ServerAddress("http://127.0.0.1:1")
    log = ServerLog(now=0.0, serving=lambda: False)
    life = Life(
        child=child,
        log=log,
        engine=ServerEngine(EngineSettings(url=address.base)),
        address=address,
        started_at=0.0,
    )
    interrupt = Interrupt()
    attendant = Attendant(
        interrupt=interrupt, kill_after_s=lambda: 5.0, heard=lambda _: None, due_s=lambda _life, _now: 60.0
    )
    try:
        assert attendant.stay(life) == 0
    finally:
        child.close()
        interrupt.close()
