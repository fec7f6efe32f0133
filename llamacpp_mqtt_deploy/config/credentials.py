"""Where the password and the API key come from: the setting itself, a file, or a credential that systemd hands over."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from llamacpp_mqtt_deploy.config.settings import EngineSettings, Settings

MQTT_PASSWORD = "mqtt-password"  # noqa: S105 - the name of a credential
ENGINE_API_KEY = "engine-api-key"
DATABASE_PASSWORD = "database-password"  # noqa: S105 - as above
MOST_BYTES = 65535
"""Of a user name or a password in MQTT; no server takes a longer key."""


class CredentialError(Exception):
    """A secret cannot be read or used; the text, without the secret, says why and what to do. `key` is its dotted key."""

    def __init__(self, text: str, *, key: str = "") -> None:
        super().__init__(text)
        self.key = key


def mqtt_password(settings: Settings, *, environ: Mapping[str, str] = os.environ) -> str | None:
    """The password for the broker: `mqtt.password`, else `mqtt.password_file`, else the systemd credential `mqtt-password`.

    None when there is none; an empty credential counts as none. Raises CredentialError.
    """
    return _secret("mqtt.password", settings.mqtt.password, settings.mqtt.password_file, MQTT_PASSWORD, environ)


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
    return _secret("sessions.password", None, settings.sessions.password_file, DATABASE_PASSWORD, environ)


def all_secrets(settings: Settings, *, environ: Mapping[str, str] = os.environ) -> tuple[str | None, ...]:
    """What no log and no message may show. Raises CredentialError."""
    return tuple(read(settings, environ=environ) for read in (mqtt_password, engine_api_key, database_password))


def server_key(engine: EngineSettings, *, environ: Mapping[str, str] = os.environ) -> str | None:
    """As `engine_api_key`, for whoever knows the engine's settings alone; an empty `environ` names no credential."""
    return _secret("engine.api_key", engine.api_key, engine.api_key_file, ENGINE_API_KEY, environ, encoding="latin-1")


def fault(text: str, *, encoding: Literal["utf-8", "latin-1"] = "utf-8") -> str | None:
    """Why nobody can be sent this user name or secret, without quoting it; None where it is fine."""
    if any(unicodedata.category(char) == "Cc" for char in text):
        # In a header a line break would begin another one, and libraries quote the whole value when they refuse it.
        return "holds a line break or another control character inside; write it as one line of text"
    try:
        size = len(text.encode(encoding))
    except UnicodeEncodeError:
        if encoding == "latin-1":
            return "holds a character that no HTTP header can carry (a typographic dash or quote?); copy the key anew"
        return "is not UTF-8 text; write it as UTF-8"
    return f"has {size} bytes, and at most {MOST_BYTES} can be sent" if size > MOST_BYTES else None


def _secret(
    key: str,
    value: SecretStr | None,
    file: Path | None,
    name: str,
    environ: Mapping[str, str],
    *,
    encoding: Literal["utf-8", "latin-1"] = "utf-8",
) -> str | None:
    """The secret that `key`, `{key}_file` or the credential `name` gives, one line that `encoding` can write."""
    try:
        secret, where = _found(value, file, name, environ)
    except CredentialError as error:
        error.key = f"{key}_file"
        raise
    found = fault(secret, encoding=encoding)
    if found:
        raise CredentialError(f"{where}{found}", key=f"{key}_file" if where else key)
    return secret or None


def _found(value: SecretStr | None, file: Path | None, name: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The secret, empty where there is none, and where it stands as the beginning of a sentence, empty for the key itself."""
    if value is not None:
        # The line end of a .env file from Windows, of a YAML block or of a text in three quotes is nobody's password.
        return value.get_secret_value().rstrip("\r\n"), ""
    if file is not None:
        # The first line as it stands: a password may begin or end with a blank, but never holds a line break.
        return _read(file).partition("\n")[0], f"the first line of {file} "
    directory = environ.get("CREDENTIALS_DIRECTORY")
    credential = Path(directory) / name if directory else None
    if credential is None or not credential.exists():
        return "", ""
    # The unit's `SetCredential=mqtt-password:\n` is how systemd 252 spells "no credential": an empty value does not parse.
    return _read(credential).strip(), f"{credential} "


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
