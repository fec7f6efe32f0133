"""What an engine computes on, as far as it tells, and what is said when that is the processor beside an idle GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.checking import engine as checking
from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.engines.managed.serverlog import ServerLog
from llamacpp_mqtt_deploy.engines.server.devices import backend_of_metrics
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.ports import EngineInfo
from llamacpp_mqtt_deploy.service.idle_gpu import idle_gpu
from tests.support.sham_server import PROPS, ShamServer, reply

METRICS = b"""# HELP llamacpp:memory_model_bytes Weights of the model.
# TYPE llamacpp:memory_model_bytes gauge
llamacpp:memory_model_bytes{device="CUDA0"} 83349984
llamacpp:memory_model_bytes{device="CUDA1"} 1e3
llamacpp:memory_model_bytes{device="Host"} 13191648
llamacpp:memory_free_bytes{device="Host"} 99999999999
"""


@pytest.fixture
def sham() -> Iterator[ShamServer]:
    with ShamServer() as server:
        yield server


def probed(sham: ShamServer, **settings: Any) -> EngineInfo:
    engine = ServerEngine(EngineSettings(url=sham.url, **settings))
    engine.open()
    engine.probe()
    return engine.probe()


def asked(sham: ShamServer, path: str) -> int:
    return sum(each == path for each, _, _ in sham.asked)


# --- what servers tell -----------------------------------------------------------------------------------------------


def test_a_llama_server_whose_metrics_name_its_devices_is_believed_and_asked_once(sham: ShamServer) -> None:
    sham.on("/props", reply(200, {**PROPS, "endpoint_metrics": True}))
    sham.on("/metrics", reply(200, METRICS, kind="text/plain"))
    assert probed(sham).backend == "cuda"
    assert asked(sham, "/metrics") == 1


def test_a_llama_server_that_says_nothing_has_an_unknown_backend(sham: ShamServer) -> None:
    assert probed(sham).backend == "unknown"
    assert asked(sham, "/metrics") == 0


@pytest.mark.parametrize("answer", [reply(500), reply(200, b"\xff{}", kind="text/plain")])
def test_odd_metrics_do_no_harm(sham: ShamServer, answer: bytes) -> None:
    sham.on("/props", reply(200, {**PROPS, "endpoint_metrics": True}))
    sham.on("/metrics", answer)
    info = probed(sham)
    assert (info.state, info.backend) == ("ready", "unknown")


@pytest.mark.parametrize(
    "metrics, backend",
    [
        ('llamacpp:memory_model_bytes{device="Host"} 5\n', "cpu"),
        ('llamacpp:memory_model_bytes{device="CPU"} 5\n', "cpu"),
        ('llamacpp:memory_model_bytes{device="MTL0"} 5\n', "metal"),
        ('llamacpp:memory_model_bytes{device="Vulkan1"} 5\n', "vulkan"),
        ('llamacpp:memory_model_bytes{device="CUDA0"} 1.2.3\n', "unknown"),
        ("", "unknown"),
    ],
)
def test_the_device_with_most_of_the_weights_counts(metrics: str, backend: str) -> None:
    assert backend_of_metrics(metrics) == backend


@pytest.mark.parametrize(
    "size_vram, backend, share", [(0, "cpu", "0%"), (100, "gpu", "100%"), (43, "gpu", "43%"), ("x", "unknown", None)]
)
def test_ollama_tells_how_much_of_a_model_is_on_the_gpu(
    sham: ShamServer, size_vram: object, backend: str, share: str | None
) -> None:
    del sham.answers["/props"]
    sham.on("/v1/models", reply(200, {"data": [{"id": "qwen3:8b", "owned_by": "library"}]}))
    sham.on("/api/ps", reply(200, {"models": [{"name": "qwen3:8b", "size": 100, "size_vram": size_vram}]}))
    info = probed(sham, dialect="openai")
    assert (info.state, info.backend, info.gpu_layers) == ("ready", backend, share)


def test_other_servers_are_not_asked_what_only_ollama_knows(sham: ShamServer) -> None:
    del sham.answers["/props"]
    sham.on("/v1/models", reply(200, {"data": [{"id": "gpt", "owned_by": "openai"}]}))
    assert probed(sham, dialect="openai").backend == "unknown"
    assert asked(sham, "/api/ps") == 0


def test_the_layers_of_a_managed_server_are_read_from_its_log() -> None:
    log = ServerLog(now=0.0, serving=lambda: False)
    assert log.gpu_layers is None
    log.feed(b"0.01.000.000 I load_tensors: offloaded 12/25 layers to GPU\n", 0.0)
    assert log.gpu_layers == "12/25"


# --- the processor beside an idle GPU --------------------------------------------------------------------------------


@pytest.fixture
def nvidia(tmp_path: Path) -> tuple[Path, ...]:
    (tmp_path / "nvidia0").touch()
    return (tmp_path / "absent", tmp_path / "nvidia0")


def ready(backend: str) -> EngineInfo:
    return EngineInfo(state="ready", kind="server", backend=backend, n_ctx=4096)


@pytest.mark.parametrize(
    "engine, advice",
    [
        (EngineSettings(url="http://127.0.0.1:8080"), "--n-gpu-layers"),
        (EngineSettings(url="unix:///run/llama.sock"), "--n-gpu-layers"),
        (EngineSettings(kind="inprocess", model_path=Path("m.gguf")), "llama-cpp-python"),
        (EngineSettings(kind="managed", model_path=Path("m.gguf")), "build of llama-server"),
    ],
)
def test_an_engine_on_the_cpu_beside_a_gpu_is_pointed_out(
    engine: EngineSettings, advice: str, nvidia: tuple[Path, ...]
) -> None:
    assert advice in idle_gpu(engine, ready("cpu"), nvidia)


@pytest.mark.parametrize(
    "engine, backend",
    [
        (EngineSettings(url="http://127.0.0.1:8080"), "cuda"),
        (EngineSettings(url="http://127.0.0.1:8080"), "unknown"),
        (EngineSettings(url="http://gpu.example:8080"), "cpu"),
        (EngineSettings(kind="inprocess", model_path=Path("m.gguf"), gpu_layers=0), "cpu"),
    ],
)
def test_nothing_is_said_where_the_gpu_is_used_elsewhere_or_not_wanted(
    engine: EngineSettings, backend: str, nvidia: tuple[Path, ...]
) -> None:
    assert idle_gpu(engine, ready(backend), nvidia) == ""


def test_nothing_is_said_on_a_machine_without_nvidia(tmp_path: Path) -> None:
    engine = EngineSettings(url="http://127.0.0.1:8080")
    assert idle_gpu(engine, ready("cpu"), (tmp_path / "absent",)) == ""


def test_a_check_warns_of_an_idle_gpu_and_shows_the_backend_otherwise(nvidia: tuple[Path, ...]) -> None:
    engine = EngineSettings(url="http://127.0.0.1:8080")
    [finding] = checking._backend(engine, ready("cpu"), nvidia)
    assert (finding.name, finding.verdict) == ("engine.backend", "warn")
    assert "NVIDIA" in finding.text
    info = EngineInfo(state="ready", kind="server", backend="cuda", gpu_layers="25/25")
    [finding] = checking._backend(engine, info, nvidia)
    assert (finding.verdict, finding.text) == ("ok", "cuda, 25/25 of the model on the GPU")
    assert list(checking._backend(engine, ready("unknown"), nvidia)) == []
