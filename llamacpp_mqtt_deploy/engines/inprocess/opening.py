"""Loads the model of the in-process engine and makes its context, or says what the operator should do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.engines.inprocess import downloading, modelfile, native
from llamacpp_mqtt_deploy.engines.inprocess.downloading import GivenUp
from llamacpp_mqtt_deploy.engines.inprocess.modelfile import Unusable

__all__ = ["GivenUp", "Tell", "load", "make_context"]

log = structlog.get_logger(__name__)

Tell = Callable[[str, str, float], bool]
"""Hears what is being done (`Loading`, `Downloading`), to which file, and how much of it is done; False gives it up."""

SMALLEST_CONTEXT = 512
_MIB = 1024 * 1024


def load(settings: EngineSettings, tell: Tell) -> tuple[native.Model, str]:
    """The model and its name. Raises Unusable, native.NotInstalled, and GivenUp when `tell` said so."""
    library = native.Library.load()
    if settings.gpu_layers > 0 and not library.can_offload():
        raise Unusable(
            "engine.gpu_layers is set and this llama-cpp-python is built without GPU support. Install a build with it "
            '(CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir llama-cpp-python), or set it to 0.'
        )
    path = _find(settings, tell)
    modelfile.look_at(path)
    given_up = False

    def loaded(done: float) -> bool:
        nonlocal given_up
        given_up = not tell("Loading", path.name, done)
        return not given_up

    try:
        model = native.Model(
            library,
            str(path),
            gpu_layers=settings.gpu_layers,
            main_gpu=settings.main_gpu,
            tensor_split=settings.tensor_split,
            progress=loaded,
        )
    except native.LoadFailed as error:
        if given_up:
            raise GivenUp from error
        raise Unusable(modelfile.explain(str(error), path)) from error
    if model.has_encoder:
        model.close()
        raise Unusable(f"{path.name} is an encoder-decoder model, which this engine does not run. Use a chat model.")
    return model, settings.model or path.stem


def make_context(settings: EngineSettings, model: native.Model) -> native.Context:
    """The context as configured, or as large as fits where nothing is. Raises Unusable."""
    n_ctx = settings.context_tokens or _fitting_context(model)
    if n_ctx > model.n_ctx_train:  # beyond it a model writes nonsense; llama.cpp's server caps it too
        log.warning("engine.context_capped", asked=n_ctx, trained=model.n_ctx_train)
        n_ctx = model.n_ctx_train
    while True:
        try:
            return native.Context(
                model,
                n_ctx=n_ctx,
                batch_tokens=settings.batch_tokens,
                threads=modelfile.threads_of(settings),
                flash_attention=settings.flash_attention,
                kv_type=settings.kv_type,
            )
        except native.LoadFailed as error:
            if settings.context_tokens is None and n_ctx >= 2 * SMALLEST_CONTEXT:
                n_ctx //= 2
                log.warning("engine.context_halved", n_ctx=n_ctx, problem=str(error))
                continue
            path = settings.model_path or Path(settings.filename or "the model")
            raise Unusable(modelfile.explain(str(error), path)) from error


def _find(settings: EngineSettings, tell: Tell) -> Path:
    if settings.model_path is not None:
        return settings.model_path
    assert settings.repo_id is not None
    assert settings.filename is not None
    filename = settings.filename

    def came(done: float) -> None:
        if not tell("Downloading", filename, done):
            raise GivenUp

    return downloading.fetch(settings.repo_id, filename, came)


def _fitting_context(model: native.Model) -> int:
    """The model's own context, or what fits into half of the free memory: models of today are trained with more than most
    machines can hold."""
    wanted = model.n_ctx_train
    free = modelfile.free_memory_bytes()
    if free is not None and model.kv_bytes_per_token > 0:
        fitting = free // 2 // model.kv_bytes_per_token
        if fitting < wanted:
            wanted = max(SMALLEST_CONTEXT, fitting // 256 * 256)
            log.info("engine.context_chosen", n_ctx=wanted, trained=model.n_ctx_train, free_mib=free // _MIB)
    return wanted
