"""Says when an engine computes on the processor of a machine that has an NVIDIA device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.ports import EngineInfo

NVIDIA_SIGNS = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia"))


def idle_gpu(engine: EngineSettings, info: EngineInfo, signs: Sequence[Path] = NVIDIA_SIGNS) -> str:
    """One sentence for the operator; empty when nothing is wrong, or when the engine does not tell what it computes on."""
    if info.state != "ready" or info.backend != "cpu" or not any(sign.exists() for sign in signs):
        return ""
    if engine.kind == "server":
        if not _is_here(engine.url):
            return ""
        advice = "start it with a build for CUDA and with its layers on the GPU (llama-server: --n-gpu-layers)"
    else:
        if engine.gpu_layers == 0:  # as was asked for
            return ""
        build = "llama-cpp-python" if engine.kind == "inprocess" else "llama-server"
        advice = f"install a build of {build} for CUDA, or set engine.gpu_layers = 0 if that is meant"
    return f"The engine computes on the CPU although this machine has an NVIDIA GPU; {advice}."


def _is_here(url: str) -> bool:
    parts = urlsplit(url)
    host = parts.hostname or ""
    return parts.scheme == "unix" or host in ("localhost", "::1") or host.startswith("127.")
