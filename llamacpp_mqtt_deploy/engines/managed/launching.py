"""The command line of a managed llama.cpp server: which program, arguments and environment."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.shared_libraries import lacking_library
from llamacpp_mqtt_deploy.engines.managed import lifeline, wheel_server
from llamacpp_mqtt_deploy.stopping import Deadline, StopSignal

log = structlog.get_logger(__name__)

DEFAULT_CONTEXT_TOKENS = 8192
"""Of one slot. A model's own may be 131072, whose KV cache is larger than the model; 8192 are about 1 GiB for one of 8 B."""
PING_S = 5
"""Also the time after which the server notices, by writing, that a silent client has gone."""
HTTP_TIMEOUT_S = 600
HELP_WITHIN_S = 30.0
"""A first start on a slow card, with CUDA's libraries to load."""
ALL_LAYERS = "999"
SMALL_MEMORY_BYTES = 6 * 1024**3
MIDDLE_MEMORY_BYTES = 14 * 1024**3

_FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
# What the worker must know or decide itself; in `extra_args` they would cut it off from its server.
_OURS: Mapping[str, str] = {
    "-m": "engine.model_path",
    "--model": "engine.model_path",
    "-a": "engine.model",
    "--alias": "engine.model",
    "-np": "engine.slots",
    "--parallel": "engine.slots",
    "-c": "engine.context_tokens",
    "--ctx-size": "engine.context_tokens",
    "--host": "engine.managed.port",
    "--port": "engine.managed.port",
    "--api-key": "",
    "--api-key-file": "",
    "--api-prefix": "",
    "--ssl-key-file": "",
    "--ssl-cert-file": "",
}
_NOT_FOR_THE_SERVER = re.compile(
    r"LMD_.*|NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*|CREDENTIALS_DIRECTORY|LLAMA_SERVER_SLOTS_DEBUG|LLAMA_API_KEY|"
    r"LLAMA_ARG_(HOST|PORT|API_KEY.*|API_PREFIX|SSL_.*|MODEL|N_PARALLEL|CTX_SIZE|LOG_FILE|LOG_JSONL)"
)


class CannotLaunch(Exception):
    """The program does not run at all; the text says why."""


@dataclass(frozen=True, slots=True)
class Program:
    """A server program. `command` is what to execute, before our flags."""

    command: tuple[str, ...]
    shown: str
    wheel: bool = False


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a server program understands, from its `--help`."""

    flags: frozenset[str]
    unix_socket: bool
    key_from_environment: bool
    flash_attention_takes_value: bool
    fits_by_itself: bool
    """It chooses the number of layers on the GPU; before it could, the default was none."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server listens: `socket_path`, or `port` on the loopback; its key goes by the environment or by a file."""

    socket_path: Path | None = None
    port: int = 0
    key_file: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}" if self.socket_path is None else f"unix://{self.socket_path}"


def find_program(settings: EngineSettings) -> Program:
    """The configured binary, else llama-server on PATH, else the xllamacpp package. Raises ValueError."""
    binary = settings.managed.binary
    if binary is not None:
        if not binary.is_file():
            raise ValueError(f"engine.managed.binary: there is no file {binary}")
        if not os.access(binary, os.X_OK):
            raise ValueError(f"engine.managed.binary: {binary} cannot be executed by this user; try chmod +x")
        return Program((str(binary.absolute()),), str(binary))
    found = shutil.which("llama-server")
    if found:
        return Program((str(Path(found).absolute()),), found)
    if importlib.util.find_spec("xllamacpp") is not None:
        # By its path and with -P: the folder of a script would otherwise come before the standard library's modules.
        return Program((sys.executable, "-P", wheel_server.__file__), "the server in the xllamacpp package", wheel=True)
    raise ValueError(
        'engine.kind is "managed" but there is no server to start: install llama.cpp so that llama-server is on PATH, set '
        "engine.managed.binary to its path, or run: pip install 'llamacpp-mqtt-deploy[managed]'"
    )


def check(settings: EngineSettings) -> None:
    """Raise ValueError for settings with which no server can ever start."""
    path = settings.model_path
    if path is None:
        raise ValueError('engine.model_path is needed for engine.kind = "managed": the GGUF file to load')
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ValueError(
            f"engine.model_path: {path} cannot be read: {error.strerror}. A systemd unit with ProtectHome sees no /home; "
            "models belong in /var/lib or /srv"
        ) from error
    for argument in settings.managed.extra_args:
        flag = argument.partition("=")[0]
        if flag in _OURS:
            instead = f"; set {_OURS[flag]}" if _OURS[flag] else ""
            raise ValueError(f"engine.managed.extra_args: {flag} is the worker's own{instead}")


def abilities(program: Program, stop: StopSignal) -> Abilities:
    """Ask the program what it understands. Raises `CannotLaunch`."""
    if program.wheel:
        flags = frozenset(name for names, _, _ in wheel_server.FLAGS for name in names)
        return Abilities(
            flags,
            unix_socket=True,
            key_from_environment=True,
            flash_attention_takes_value=True,
            fits_by_itself=True,
        )
    text = _help(program, stop)
    return Abilities(
        frozenset(_FLAG.findall(text)),
        unix_socket=".sock" in text,
        key_from_environment="LLAMA_API_KEY" in text,
        flash_attention_takes_value=re.search(r"--flash-attn[ =]+[\[<{]", text) is not None,
        fits_by_itself="--fit" in text,
    )


def _help(program: Program, stop: StopSignal) -> str:
    deadline = Deadline(HELP_WITHIN_S)
    try:
        asked = subprocess.Popen(  # noqa: S603 - the operator's own program, without a shell
            tied([*program.command, "--help"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(None),
        )
    except OSError as error:
        raise CannotLaunch(f"{program.shown} cannot be started: {error.strerror}") from error
    with asked:
        output: bytes | None = None
        while output is None:
            try:
                output = asked.communicate(timeout=0.2)[0]
            except subprocess.TimeoutExpired:
                if deadline.passed() or stop.is_set():
                    asked.kill()
                    raise CannotLaunch(f"{program.shown} --help does not end") from None
    text = output.decode("utf-8", "replace")
    if "--model" not in text:
        lacks = lacking_library(text)
        if lacks:
            raise CannotLaunch(f"{program.shown} cannot be started: {lacks}")
        lines = " ".join(text.split())[-300:]
        raise CannotLaunch(f"{program.shown} --help ended with {asked.returncode} and says no flags: {lines}")
    return text


def default_slots() -> int:
    """Requests at once where nobody says: the KV cache of each slot must fit beside the model."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 1
    return 1 if memory < SMALL_MEMORY_BYTES else 2 if memory < MIDDLE_MEMORY_BYTES else 4


def arguments(settings: EngineSettings, known: Abilities, endpoint: Endpoint) -> list[str]:
    """The server's arguments. Optional ones that an older program does not know are left out, with a line in the log."""
    assert settings.model_path is not None
    slots = settings.slots or default_slots()
    context = settings.context_tokens or DEFAULT_CONTEXT_TOKENS
    host = ("--host", "127.0.0.1", "--port", str(endpoint.port))
    made = [
        *("-m", str(settings.model_path.absolute())),
        *("-np", str(slots)),
        *("-c", str(slots * context)),
        *(host if endpoint.socket_path is None else ("--host", str(endpoint.socket_path))),
    ]
    left_out: list[str] = []
    for names, values in _optional(settings, known, endpoint):
        name = next((name for name in names if name in known.flags), None)
        if name is None:
            left_out.append(names[0])
        else:
            made += [name, *values]
    if left_out:
        log.warning("llama_server.flags_left_out", flags=left_out, why="this llama-server does not know them")
    return [*made, *settings.managed.extra_args]


def _optional(
    settings: EngineSettings, known: Abilities, endpoint: Endpoint
) -> Iterable[tuple[Sequence[str], Sequence[str]]]:
    """Flags that a program may lack: the names in order of preference, and the values."""
    batch = str(settings.batch_tokens)
    # With one KV cache for all slots each is promised the whole, and two long requests together end every running one.
    yield ("--no-kv-unified", "-no-kvu"), ()
    yield ("--batch-size", "-b"), (batch,)
    yield ("--ubatch-size", "-ub"), (batch,)
    yield ("--cache-ram", "-cram"), (str(settings.managed.cache_ram_mib),)
    yield ("--sse-ping-interval",), (str(PING_S),)
    yield ("--timeout", "-to"), (str(HTTP_TIMEOUT_S),)
    yield ("--no-ui", "--no-webui"), ()
    yield ("--offline",), ()
    yield ("--metrics",), ()
    yield ("--slots",), ()
    yield ("--jinja",), ()
    if settings.gpu_layers >= 0:
        yield ("--n-gpu-layers", "-ngl"), (str(settings.gpu_layers),)
    elif not known.fits_by_itself:
        yield ("--n-gpu-layers", "-ngl"), (ALL_LAYERS,)
    if settings.main_gpu:
        yield ("--main-gpu", "-mg"), (str(settings.main_gpu),)
    if settings.tensor_split:
        yield ("--tensor-split", "-ts"), (",".join(f"{share:g}" for share in settings.tensor_split),)
    if settings.flash_attention != "auto":
        if known.flash_attention_takes_value:
            yield ("--flash-attn", "-fa"), (settings.flash_attention,)
        elif settings.flash_attention == "on":
            yield ("--flash-attn", "-fa"), ()
    if settings.kv_type != "f16":
        yield ("--cache-type-k", "-ctk"), (settings.kv_type,)
        yield ("--cache-type-v", "-ctv"), (settings.kv_type,)
    if settings.threads is not None:
        yield ("--threads", "-t"), (str(settings.threads),)
    if settings.model_path is not None:
        yield ("--alias", "-a"), (settings.model or settings.model_path.name,)
    if endpoint.key_file is not None:
        yield ("--api-key-file",), (str(endpoint.key_file),)


def environment(key: str | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Ours without what is not the server's business, our broker's password first of all; its key goes in here and not on the
    command line, which every user of the machine can read."""
    kept = {name: value for name, value in environ.items() if not _NOT_FOR_THE_SERVER.fullmatch(name)}
    if key is not None:
        kept["LLAMA_API_KEY"] = key
    return kept


def tied(command: Sequence[str]) -> list[str]:
    """The command, to be killed when the thread that starts it ends, however it ends."""
    return [sys.executable, "-I", "-S", lifeline.__file__, str(os.getpid()), *command]


def free_port() -> int:
    """A loopback port that nobody uses now, for servers that know no unix sockets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
