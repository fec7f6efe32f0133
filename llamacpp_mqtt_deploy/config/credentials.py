"""Where the password and the API key come from: the setting itself, a file, or a credential that systemd hands over."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import SecretStr

from llamacpp_mqtt_deploy.config.settings import EngineSettings, Settings

MQTT_PASSWORD = "mqtt-password"  # noqa: S105 - the name of a credential
ENGINE_API_KEY = "engine-api-key"
DATABASE_PASSWORD = "database-password"  # noqa: S105 - as above


class CredentialError(Exception):
    """A file that should hold a secret cannot be read; the text says which, why and what to do."""


def mqtt_password(settings: Settings, *, environ: Mapping[str, str] = os.environ) -> str | None:
    """The password for the broker: `mqtt.password`, else `mqtt.password_file`, else the systemd credential `mqtt-password`.

    None when there is none; an empty credential counts as none. Raises CredentialError.
    """
    return _secret(settings.mqtt.password, settings.mqtt.password_file, MQTT_PASSWORD, environ)


def engine_api_key(settings: Settings, *, environ: Mapping[str, str] = os.environ) -> str | None:
    """The bearer token for the engine: `engine.api_key`, else `engine.api_key_file`, else the credential `engine-api-key`.

    None when there is none; an empty credential counts as none. Raises CredentialError.
    """
    return server_key(settings.engine, environ=environ)


def engine_key_reader(settings: Settings, *, environ: Mapping[str, str] = os.environ) -> Callable[[], str | None]:
    """Gives `engine_api_key` each time that it is called; where nothing can renew the key it is looked up only once."""
    engine = settings.engine
    if engine.api_key is None and (engine.api_key_file is not None or "CREDENTIALS_DIRECTORY" in environ):
        return lambda: engine_api_key(settings, environ=environ)
    key = engine_api_key(settings, environ=environ)
    return lambda: key


def database_password(settings: Settings, *, environ: Mapping[str, str] = os.environ) -> str | None:
    """The password for the database: `sessions.password_file`, else the systemd credential `database-password`.

    None when there is none; an empty credential counts as none. Raises CredentialError.
    """
    return _secret(None, settings.sessions.password_file, DATABASE_PASSWORD, environ)


def server_key(engine: EngineSettings, *, environ: Mapping[str, str] = os.environ) -> str | None:
    """As `engine_api_key`, for whoever knows the engine's settings alone; an empty `environ` names no credential."""
    return _secret(engine.api_key, engine.api_key_file, ENGINE_API_KEY, environ)


def _secret(value: SecretStr | None, file: Path | None, name: str, environ: Mapping[str, str]) -> str | None:
    if value is not None:
        return value.get_secret_value() or None
    if file is not None:
        # The first line as it stands: a password may begin or end with a blank, but never holds a line break.
        return (_read(file).splitlines() or [""])[0] or None
    directory = environ.get("CREDENTIALS_DIRECTORY")
    credential = Path(directory) / name if directory else None
    if credential is None or not credential.exists():
        return None
    # The unit's `SetCredential=mqtt-password:\n` is how systemd 252 spells "no credential": an empty value does not parse.
    return _read(credential).strip() or None


_PIPES: dict[tuple[Path, int], str] = {}
"""What came through pipes (`--password-file <(pass show mqtt)`): a pipe tells its secret once, and it is asked for twice."""


def _read(file: Path) -> str:
    try:
        about = file.stat()
        if not stat.S_ISFIFO(about.st_mode):
            return file.read_text(encoding="utf-8")
        pipe = (file, about.st_ino)
        if pipe not in _PIPES:
            _PIPES[pipe] = file.read_text(encoding="utf-8")
        return _PIPES[pipe]
    except UnicodeDecodeError:
        raise CredentialError(f"{file} is not UTF-8 text; write the secret into it as one line of text") from None
    except ValueError:  # a NUL or half a character in the name: no system call takes it
        raise CredentialError(f"{str(file)!r} cannot be the name of a file") from None
    except OSError as error:
        hint = "" if error.errno is None else f" ({error.strerror})"
        raise CredentialError(
            f"cannot read {file}{hint}; check that it exists and that this user may read it"
        ) from error


def exposed(files: Mapping[str, Path | None]) -> Iterator[str]:
    """One warning for each of these files (named by the key that points at it) that every user of this machine may read."""
    for key, file in files.items():
        if file is None:
            continue
        try:
            mode = file.stat().st_mode
        except (OSError, ValueError):
            continue
        if mode & stat.S_IROTH:
            yield f"{key}: {file} holds a secret and every user of this machine may read it; chmod o-r {file}"
