"""Looks at a model file before llama.cpp does, and turns llama.cpp's last words into what the operator should do."""

from __future__ import annotations

import os
from pathlib import Path

from llamacpp_mqtt_deploy.config.settings import EngineSettings


class Unusable(Exception):
    """The model cannot be loaded; the text is for the operator and says what to do."""


class Unreadable(Unusable):
    """The file is not there or may not be read: it may come, with a disk that is mounted late."""


def look_at(path: Path) -> None:
    """Raises Unusable or Unreadable with the reason that a person can act on; llama.cpp says the same of all of them."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise Unreadable(f"The model file {path} does not exist. Set engine.model_path{_hidden(path)}.") from error
    except IsADirectoryError as error:
        raise Unreadable(f"{path} is a directory. Set engine.model_path to the .gguf file in it.") from error
    except PermissionError as error:
        raise Unreadable(
            f"The worker's user {_user()} may not read {path}. Give it read permission for the file and the folders "
            f"above it{_hidden(path)}."
        ) from error
    except OSError as error:
        raise Unreadable(f"The model file {path} cannot be read: {error.strerror or error}.") from error
    if magic != b"GGUF":
        lfs = " It looks like a Git LFS pointer: fetch the real file." if magic == b"vers" else ""
        raise Unusable(
            f"{path} is not a GGUF file ({size} bytes).{lfs} Download it again, or convert the model to GGUF."
        )


def explain(words: str, path: Path) -> str:
    """What llama.cpp's words mean and what to do about them."""
    low = words.lower()
    name = path.name
    if "unknown model architecture" in low or "unknown architecture" in low:
        return f"llama-cpp-python is too old for {name} ({words}): pip install -U llama-cpp-python."
    if "no usable gpu" in low:
        return f"{words}. Set engine.gpu_layers = 0, or install a build of llama-cpp-python with GPU support."
    memory = ("alloc", "out of memory", "failed to fit", "cudamalloc", "oom", "buffer")
    if any(word in low for word in memory):
        return (
            f"There is too little memory for {name} ({words}). Lower engine.context_tokens or engine.gpu_layers, "
            'set engine.kv_type = "q8_0", or use a smaller model.'
        )
    if "tensor" in low and ("out of bounds" in low or "not within" in low or "corrupt" in low):
        return f"{name} is not complete ({words}). Download it again."
    if "flash" in low or "v cache" in low or "quantized" in low:
        return f'{name}: {words}. Set engine.flash_attention = "on", or engine.kv_type = "f16".'
    return f"llama.cpp cannot load {name}: {words}. See the log at level debug; try the file with llama-server."


def threads_of(settings: EngineSettings) -> int:
    """One for each core that this process may use: two threads of one core only disturb each other here."""
    if settings.threads is not None:
        return settings.threads
    try:
        usable = os.sched_getaffinity(0)
    except AttributeError:
        return max(1, (os.cpu_count() or 2) // 2)
    cores = set()
    for cpu in usable:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(
                encoding="ascii"
            )
        except (OSError, ValueError):
            siblings = str(cpu)
        cores.add(siblings.strip())
    return max(1, len(cores))


def free_memory_bytes() -> int | None:
    """Memory of this machine that can be had without swapping; None where it is not known."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _hidden(path: Path) -> str:
    if path.is_absolute() and path.parts[1:2] in (("home",), ("root",)) and "INVOCATION_ID" in os.environ:
        return (
            "; the systemd service does not see /home and /root (ProtectHome=): put models into a folder such as /srv/models, "
            "or add BindReadOnlyPaths= to the unit"
        )
    return ""


def _user() -> str:
    return f"(uid {os.geteuid()})" if hasattr(os, "geteuid") else ""
