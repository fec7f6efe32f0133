"""Fetches a model file from a model repository on the internet, for machines that have a network and no file yet."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from llamacpp_mqtt_deploy.engines.inprocess.modelfile import Unusable

Tell = Callable[[float], None]
"""Hears how much has come, from 0 to 1; may raise to give the download up."""


def fetch(repo_id: str, filename: str, tell: Tell) -> Path:
    """The path of the file in the local cache, downloaded when it is not there yet. Raises Unusable, and what `tell` raises."""
    try:
        import huggingface_hub  # noqa: PLC0415 - optional, and takes a second
    except ImportError as error:
        raise Unusable(
            f"engine.repo_id is set and huggingface_hub is not installed: pip install huggingface_hub, or download "
            f"{filename} from {repo_id} and set engine.model_path."
        ) from error
    hub: Any = huggingface_hub
    try:
        name = _named(hub, repo_id, filename)
        return Path(hub.hf_hub_download(repo_id=repo_id, filename=name, **_progress(hub, tell)))
    except (Unusable, GivenUp):
        raise
    except Exception as error:  # the hub's own errors, its transport's, the disk's: all mean that there is no file
        raise Unusable(_why(error, repo_id, filename)) from error


class GivenUp(Exception):
    """`tell` raises it to end a download."""


def _named(hub: Any, repo_id: str, filename: str) -> str:
    """The one file that the glob means; of a model in parts, the first."""
    if not any(char in filename for char in "*?["):
        return filename
    names = sorted(name for name in hub.list_repo_files(repo_id) if fnmatch.fnmatch(name, filename))
    if not names:
        raise Unusable(f"{repo_id} has no file that fits {filename}. Set engine.filename.")
    if len(names) > 1 and "-of-" not in names[0]:
        shown = ", ".join(names[:5])
        raise Unusable(f"{len(names)} files of {repo_id} fit {filename} ({shown}). Set engine.filename to one of them.")
    return str(names[0])


def _progress(hub: Any, tell: Tell) -> dict[str, Any]:
    """The argument that makes the hub tell its progress, where its version can."""
    if "tqdm_class" not in inspect.signature(hub.hf_hub_download).parameters:
        return {}

    class Teller:
        """What the hub needs of a tqdm bar."""

        def __init__(self, *_: object, total: float | None = None, initial: float = 0, **__: object) -> None:
            self.total = total
            self.n = float(initial or 0)

        def update(self, count: float | None = 1) -> None:
            self.n += count or 0
            if self.total:
                tell(min(1.0, self.n / self.total))

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def close(self) -> None:
            return None

        def set_description(self, *_: object, **__: object) -> None:
            return None

        def refresh(self, *_: object, **__: object) -> None:
            return None

    return {"tqdm_class": Teller}


def _why(error: Exception, repo_id: str, filename: str) -> str:
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "GatedRepoError"):
        return f"The model repository {repo_id} does not exist, is private, or asks for a licence to be accepted. Set engine.repo_id."
    if kind in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
        return f"{repo_id} has no file {filename}. Set engine.filename."
    if isinstance(error, OSError) and error.errno == 28:  # ENOSPC
        return f"The disk is full: {filename} of {repo_id} cannot be stored. Make room, or set HF_HOME to another disk."
    return (
        f"{filename} of {repo_id} cannot be downloaded ({kind}). Is there a network? Else copy the file here and set "
        "engine.model_path."
    )
