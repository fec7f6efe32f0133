"""A program with llama-server's flags that runs the server inside the `xllamacpp` wheel, for machines without llama-server."""

# Imports nothing of ours before something goes wrong: it is started by its path, in a child process that a crash of llama.cpp may
# take along.

from __future__ import annotations

import argparse
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from typing_extensions import override

USAGE_ERROR = 2
LOAD_ERROR = 1
LOG_LAG_S = 0.1
"""llama.cpp writes its log in a thread of its own: what it said of a model that does not load is out by then."""

_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")

Setter = Callable[[Any, Any, Any], None]
"""Takes the module, the parameters and the value."""


def _attribute(path: str) -> Setter:
    *parents, name = path.split(".")

    def put(_module: Any, params: Any, value: Any) -> None:
        for parent in parents:
            params = getattr(params, parent)
        getattr(params, name)  # an attribute that this version does not have is an error, not a new attribute
        setattr(params, name, value)

    return put


def _to(path: str, value: object) -> Setter:
    put = _attribute(path)
    return lambda module, params, _: put(module, params, value)


def _threads(_module: Any, params: Any, value: int) -> None:
    params.cpuparams.n_threads = value
    params.cpuparams_batch.n_threads = value


def _tensor_split(_module: Any, params: Any, value: str) -> None:
    shares = [float(share) for share in value.replace("/", ",").split(",")]
    params.tensor_split = shares + [0.0] * (len(params.tensor_split) - len(shares))


def _cache_type(name: str) -> Setter:
    put = _attribute(name)
    return lambda module, params, value: put(module, params, getattr(module.ggml_type, f"GGML_TYPE_{value.upper()}"))


def _flash_attention(module: Any, params: Any, value: str) -> None:
    kind = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}[value]
    params.flash_attn_type = getattr(module.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{kind}")


def _gpu_layers(_module: Any, params: Any, value: str) -> None:
    params.n_gpu_layers = {"auto": -1, "all": -2}.get(value) or int(value)


def _reasoning(_module: Any, params: Any, value: str) -> None:
    params.enable_reasoning = {"auto": -1, "on": 1, "off": 0}[value]


def _template_file(_module: Any, params: Any, value: str) -> None:
    with open(value, encoding="utf-8") as file:  # noqa: PTH123 - nothing else here needs pathlib
        params.chat_template = file.read()


def _switch_list(path: str) -> Setter:
    put = _attribute(path)
    return lambda module, params, value: put(module, params, [value])


# llama-server's flags -> what takes the value and its type; None is a flag without value.
FLAGS: tuple[tuple[tuple[str, ...], Setter, Callable[[str], Any] | None], ...] = (
    (("-m", "--model"), _attribute("model.path"), str),
    (("-a", "--alias"), lambda _module, params, value: setattr(params, "model_alias", {value}), str),
    (("-c", "--ctx-size"), _attribute("n_ctx"), int),
    (("-np", "--parallel"), _attribute("n_parallel"), int),
    (("-b", "--batch-size"), _attribute("n_batch"), int),
    (("-ub", "--ubatch-size"), _attribute("n_ubatch"), int),
    (("-kvu", "--kv-unified"), _to("kv_unified", True), None),
    (("-no-kvu", "--no-kv-unified"), _to("kv_unified", False), None),
    (("-cram", "--cache-ram"), _attribute("cache_ram_mib"), int),
    (("-ctxcp", "--ctx-checkpoints"), _attribute("n_ctx_checkpoints"), int),
    (("--cache-reuse",), _attribute("n_cache_reuse"), int),
    (("-sps", "--slot-prompt-similarity"), _attribute("slot_prompt_similarity"), float),
    (("--slot-save-path",), _attribute("slot_save_path"), str),
    (("--sse-ping-interval",), _attribute("sse_ping_interval"), int),
    (("-to", "--timeout"), lambda _module, params, value: _timeout(params, value), int),
    (("--threads-http",), _attribute("n_threads_http"), int),
    (("--host",), _switch_list("hostnames"), str),
    (("--port",), _attribute("port"), int),
    (("--ui",), _to("ui", True), None),
    (("--no-ui",), _to("ui", False), None),
    (("--offline",), _to("offline", True), None),
    (("--metrics",), _to("endpoint_metrics", True), None),
    (("--slots",), _to("endpoint_slots", True), None),
    (("--no-slots",), _to("endpoint_slots", False), None),
    (("--jinja",), _to("use_jinja", True), None),
    (("--chat-template",), _attribute("chat_template"), str),
    (("--chat-template-file",), _template_file, str),
    (("-rea", "--reasoning"), _reasoning, str),
    (("-ngl", "--gpu-layers", "--n-gpu-layers"), _gpu_layers, str),
    (("-mg", "--main-gpu"), _attribute("main_gpu"), int),
    (("-ts", "--tensor-split"), _tensor_split, str),
    (("-fa", "--flash-attn"), _flash_attention, str),
    (("-ctk", "--cache-type-k"), _cache_type("cache_type_k"), str),
    (("-ctv", "--cache-type-v"), _cache_type("cache_type_v"), str),
    (("-t", "--threads"), _threads, int),
    (("-tb", "--threads-batch"), _attribute("cpuparams_batch.n_threads"), int),
    (("-mm", "--mmproj"), _attribute("mmproj.path"), str),
    (("--no-mmproj",), _to("no_mmproj", True), None),
    (("--no-warmup",), _to("warmup", False), None),
    (("--warmup",), _to("warmup", True), None),
    (("--swa-full",), _to("swa_full", True), None),
    (("--check-tensors",), _to("check_tensors", True), None),
    (("--sleep-idle-seconds",), _attribute("sleep_idle_seconds"), int),
    (("-lv", "--verbosity", "--log-verbosity"), _attribute("verbosity"), int),
)


def _timeout(params: Any, value: int) -> None:
    params.timeout_read = params.timeout_write = value


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        _say("E", f"{message}; the server in the xllamacpp wheel knows: {' '.join(sorted(_names()))}")
        raise SystemExit(USAGE_ERROR)


def _names() -> list[str]:
    return [name for names, _, _ in FLAGS for name in names if name.startswith("--")]


def configure(module: Any, arguments: list[str]) -> Any:
    """`CommonParams` as llama-server would fill them from these arguments; a later flag wins. Exits with 2 when one is wrong."""
    parser = _Parser(prog="wheel_server", add_help=False, allow_abbrev=False)
    params = module.CommonParams()
    for index, (names, _, kind) in enumerate(FLAGS):
        # Each use is kept with its place, so that they apply in their order.
        if kind is None:
            parser.add_argument(*names, dest="used", action="append_const", const=(index, None))
        else:
            parser.add_argument(*names, dest="used", action="append", type=_tagged(index, kind))
    for index, value in parser.parse_args(arguments).used or ():
        names, put, _ = FLAGS[index]
        try:
            put(module, params, value)
        except (AttributeError, KeyError, OSError, TypeError, ValueError, OverflowError) as error:
            parser.error(f"{names[-1]} {value if value is not None else ''} does not work: {error!r}")
    if not params.model_alias:
        # As llama-server does; the wheel would tell every client the whole path.
        params.model_alias = {os.path.basename(params.model.path)}  # noqa: PTH119 - nothing else here needs pathlib
    return params


def _tagged(index: int, kind: Callable[[str], Any]) -> Callable[[str], tuple[int, Any]]:
    def convert(text: str) -> tuple[int, Any]:
        return index, kind(text)

    convert.__name__ = getattr(kind, "__name__", "value")
    return convert


def _explained(error: Exception) -> str:
    from llamacpp_mqtt_deploy.core.shared_libraries import lacking_library  # noqa: PLC0415 - only when it went wrong

    lacks = lacking_library(str(error))
    return f"{error}: {lacks}" if lacks else str(error)


def _say(level: str, text: str) -> None:
    sys.stderr.write(f"{level} wheel_server: {text}\n")
    sys.stderr.flush()


def _end_with_stdin() -> None:
    """End when the parent closes our standard input, or dies. Must not wait for the wheel, which may never come back.

    Only for a pipe: systemd gives its services /dev/null, which ends at once, and says by a signal when to go.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    while os.read(0, 4096):
        pass
    os._exit(0)


def main() -> None:
    try:
        import xllamacpp  # noqa: PLC0415 - 0.1 s and 100 MB that --help and a wrong flag need not wait for
    except (ImportError, OSError) as error:
        _say("E", f"the xllamacpp package cannot be loaded: {_explained(error)}")
        raise SystemExit(LOAD_ERROR) from None
    params = configure(xllamacpp, sys.argv[1:])
    key = os.environ.pop("LLAMA_API_KEY", "")
    if key:
        params.api_keys = [key]
    threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        time.sleep(LOG_LAG_S)
        _say("E", f"exiting due to model loading error: {error}")
        os._exit(LOAD_ERROR)  # the wheel may hang in the interpreter's own ending
    _say("I", f"xllamacpp {xllamacpp.__version__} listens on {server.listening_address}")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
