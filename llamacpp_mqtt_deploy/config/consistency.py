"""What must hold between settings that are each fine alone: contradictions that refuse the start, and warnings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from urllib.parse import parse_qsl, unquote, urlsplit

from llamacpp_mqtt_deploy.config import credentials, listen_address
from llamacpp_mqtt_deploy.config.settings import MetricsSettings, RouteSettings, Settings
from llamacpp_mqtt_deploy.core.aliases import check_aliases
from llamacpp_mqtt_deploy.core.conversation import check_tools
from llamacpp_mqtt_deploy.core.formats.plain import ANSWER_FIELDS
from llamacpp_mqtt_deploy.core.names import check_fields
from llamacpp_mqtt_deploy.core.prompt_templates import template_faults
from llamacpp_mqtt_deploy.core.routes import DEFAULT_ROUTE

_PLAIN_ROUTE = RouteSettings()
_NOT_OF_THE_PROTOCOL = ("format", "prompt_template", "empty_payload")
"""What would change the meaning of messages on the topics that every client finds."""

Finding = tuple[str, str]
"""The dotted key that a problem is reported under, and the sentence."""

# A character takes at most six bytes in an event (a control character as \u001f); the envelope around it stays below this.
_BYTES_PER_CHAR = 6
_ENVELOPE_BYTES = 1024


def problems(
    settings: Settings, *, given: Callable[[str], bool], environ: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """What contradicts itself. `given(dotted_key)` says whether the user set a key rather than leaving its default."""
    yield from _mqtt(settings, environ)
    yield from _engine(settings, environ)
    yield from _database(settings, given, environ)
    yield from _sizes(settings, given)
    yield from _metrics(settings.metrics)
    yield from (("engine.aliases", fault) for fault in check_aliases(settings.engine.aliases, models=_models(settings)))
    for name, route in settings.routes.items():
        yield from ((f"routes.{name}.fields", fault) for fault in check_fields(route.fields))
        if route.prompt_template is not None:
            faults = template_faults(route.prompt_template, route.prompt_defaults)
            yield from ((f"routes.{name}.prompt_template", fault) for fault in faults)
        elif route.prompt_template_topic is not None:
            yield f"routes.{name}.prompt_template", "is missing, and prompt_template_topic is set"
        yield from ((f"routes.{name}.answer_fields", fault) for fault in _answer_fields(route))
        for key in _NOT_OF_THE_PROTOCOL if name == DEFAULT_ROUTE else ():
            if getattr(route, key) != getattr(_PLAIN_ROUTE, key):
                yield f"routes.{name}.{key}", "cannot be set: clients of the protocol ask here; add another route"
        yield from ((f"routes.{name}.tools", fault) for fault in check_tools(route.tools))


def _answer_fields(route: RouteSettings) -> Iterator[str]:
    fields = route.answer_fields
    if fields and route.format != "json":
        yield f'has no meaning with format = "{route.format}"; remove it, or write format = "json"'
    unknown = [ours for ours in fields if ours not in ANSWER_FIELDS]
    if unknown:
        yield f'expected names for {", ".join(ANSWER_FIELDS)}, found "{unknown[0]}"'
    theirs = [*fields.values(), *({"content", "error"} - set(fields))]
    if "" in theirs or len(set(theirs)) < len(theirs):
        yield "expected a name of its own for each field (content and error are told in any case)"


def _models(settings: Settings) -> set[str]:
    engine = settings.engine
    return {name for name in (engine.model, *engine.models, *(r.model for r in settings.routes.values())) if name}


def _mqtt(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    mqtt, tls = settings.mqtt, settings.mqtt.tls
    if not mqtt.host:
        yield "mqtt.host", "expected the name or address of the broker, found nothing"
    if mqtt.transport == "unix":
        if not mqtt.host.startswith("/"):
            yield "mqtt.host", f'expected the absolute path of a socket with transport = "unix", found "{mqtt.host}"'
        if mqtt.port is not None:
            yield "mqtt.port", 'has no meaning with transport = "unix"; remove it'
        if tls.enabled:
            yield "mqtt.tls.enabled", 'has no meaning with transport = "unix"; remove it'
    elif "/" in mqtt.host or " " in mqtt.host:
        yield (
            "mqtt.host",
            f'expected a name or an address alone, found "{mqtt.host}"; port and transport have keys of their own',
        )
    if mqtt.transport == "websockets" and not mqtt.websocket_path.startswith("/"):
        yield "mqtt.websocket_path", f'expected a path that begins with "/", found "{mqtt.websocket_path}"'
    if mqtt.username is not None and (fault := credentials.fault(mqtt.username)):
        yield "mqtt.username", fault
    if mqtt.password is not None and mqtt.password_file is not None:
        yield "mqtt.password_file", "mqtt.password is set too; keep one of them"
    try:
        password = credentials.mqtt_password(settings, environ=environ)
    except credentials.CredentialError as error:
        yield error.key, str(error)
    else:
        if password is not None and not mqtt.username:
            yield "mqtt.username", "is missing, and there is a password: MQTT sends none without a user name"
    if not tls.enabled:
        # Silence here would send everything in the clear to somebody who believes it is encrypted.
        for name in ("ca_file", "cert_file", "key_file"):
            if getattr(tls, name) is not None:
                yield f"mqtt.tls.{name}", "is set, but TLS is off; add enabled = true to [mqtt.tls], or remove it"
        if tls.insecure:
            yield "mqtt.tls.insecure", "is set, but TLS is off; add enabled = true to [mqtt.tls], or remove it"
    if (tls.cert_file is None) != (tls.key_file is None):
        missing = "key_file" if tls.key_file is None else "cert_file"
        yield f"mqtt.tls.{missing}", "is missing; a client certificate needs both cert_file and key_file"
    for name in ("ca_file", "cert_file", "key_file"):
        file = getattr(tls, name)
        if tls.enabled and file is not None and not os.access(file, os.R_OK):
            yield f"mqtt.tls.{name}", f"cannot read {file}; check that it exists and that this user may read it"


def _engine(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    engine = settings.engine
    if engine.kind == "server":
        problem = _bad_url(engine.url)
        if problem:
            yield "engine.url", f"expected http://HOST:PORT, https://HOST or unix:///PATH/NAME.sock, {problem}"
    elif engine.model_path is None and engine.repo_id is None:
        yield (
            "engine.model_path",
            f'expected the path of a GGUF file (or repo_id and filename) with kind = "{engine.kind}"',
        )
    if engine.repo_id is not None and engine.filename is None:
        yield "engine.filename", "is missing; repo_id needs the name of the file in the repository"
    if engine.filename is not None and engine.repo_id is None:
        yield (
            "engine.repo_id",
            "is missing; filename names a file in a repository (a file of this machine goes into model_path)",
        )
    if engine.model_path is not None and engine.repo_id is not None:
        yield "engine.repo_id", "engine.model_path is set too; keep one of them"
    if engine.api_key is not None and engine.api_key_file is not None:
        yield "engine.api_key_file", "engine.api_key is set too; keep one of them"
    try:
        credentials.engine_api_key(settings, environ=environ)
    except credentials.CredentialError as error:
        yield error.key, str(error)


def _database(settings: Settings, given: Callable[[str], bool], environ: Mapping[str, str]) -> Iterator[Finding]:
    sessions = settings.sessions
    if settings.pool.name is not None and sessions.store != "postgres":
        yield "pool.name", 'needs store = "postgres" in [sessions]: the workers of a pool share their journal'
    if sessions.store != "postgres":
        for name in ("url", "password_file", "database_schema"):
            if given(f"sessions.{name}"):
                yield (
                    f"sessions.{name}",
                    f'has no meaning with store = "{sessions.store}"; remove it, or set store = "postgres"',
                )
        return
    if sessions.url is None:
        yield "sessions.url", 'is missing; store = "postgres" needs postgresql://USER@HOST/DATABASE'
    else:
        problem = _bad_database_url(sessions.url)
        if problem:
            yield "sessions.url", f"expected postgresql://USER@HOST/DATABASE, {problem}"
    try:
        credentials.database_password(settings, environ=environ)
    except credentials.CredentialError as error:
        yield error.key, str(error)


def _bad_database_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        options = parse_qsl(parts.query)
    except ValueError as error:
        return f"found an address that cannot be read ({error})"
    if parts.password is not None or any(name == "password" for name, _ in options):
        return "found a password in it: a secret does not belong into an address, use password_file"
    if parts.scheme not in ("postgresql", "postgres"):
        return f'found "{url}"'
    return None


def _bad_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"found an address that cannot be read ({error})"
    if parts.username is not None or parts.password is not None:
        return "found a user name in it: a secret does not belong into an address, use api_key_file"
    match parts.scheme:
        case "http" | "https":
            if not parts.hostname:
                return f'found "{url}", which names no host'
            # Some of our requests would have it resolved, others would be sent as it stands.
            if any(unquote(step) in (".", "..") for step in parts.path.split("/")):
                return f'found "{url}": write its path without "." and ".."'
            return "found port 0" if port == 0 else None
        case "unix":
            return (
                None if not parts.netloc and len(parts.path) > 1 else f'found "{url}" (three slashes: unix:///run/...)'
            )
        case _:
            return f'found "{url}"'


def _metrics(metrics: MetricsSettings) -> Iterator[Finding]:
    if metrics.listen is not None:
        try:
            listen_address.parse(metrics.listen)
        except ValueError as problem:
            yield "metrics.listen", str(problem)
    if metrics.textfile is not None and metrics.textfile.suffix != ".prom":
        yield (
            "metrics.textfile",
            f"expected a name that ends in .prom (node-exporter reads no other), found {metrics.textfile}",
        )


def _sizes(settings: Settings, given: Callable[[str], bool]) -> Iterator[Finding]:
    streaming, limits = settings.streaming, settings.limits
    most_chars = (limits.max_event_bytes - _ENVELOPE_BYTES) // _BYTES_PER_CHAR
    for name in ("chunk_chars", "coalesce_max_chars"):
        chars = getattr(streaming, name)
        if given(f"streaming.{name}") and chars > max(most_chars, 1):
            fits = f"(what fits into limits.max_event_bytes = {limits.max_event_bytes})"
            yield f"streaming.{name}", f"expected at most {max(most_chars, 1)} {fits}, found {chars}"
    for path, timeout_s in _timeouts(settings):
        if timeout_s > limits.max_timeout_s:
            yield path, f"expected at most limits.max_timeout_s = {limits.max_timeout_s:g}, found {timeout_s:g}"
    for path, tokens in _answer_lengths(settings):
        if given(path) and tokens > limits.max_tokens:
            yield path, f"expected at most limits.max_tokens = {limits.max_tokens}, found {tokens}"


def _timeouts(settings: Settings) -> Iterator[tuple[str, float]]:
    yield "generation.timeout_s", settings.generation.timeout_s
    for name, route in settings.routes.items():
        if route.timeout_s is not None:
            yield f"routes.{name}.timeout_s", route.timeout_s


def _answer_lengths(settings: Settings) -> Iterator[tuple[str, int]]:
    if settings.generation.max_tokens is not None:
        yield "generation.max_tokens", settings.generation.max_tokens
    for name, route in settings.routes.items():
        if route.max_tokens is not None:
            yield f"routes.{name}.max_tokens", route.max_tokens


def warnings(settings: Settings) -> Iterator[str]:
    """What works and is not wise; for the log at start and for `lmd check`."""
    mqtt, engine = settings.mqtt, settings.engine
    yield from credentials.exposed(
        {
            "mqtt.password_file": mqtt.password_file,
            "engine.api_key_file": engine.api_key_file,
            "mqtt.tls.key_file": mqtt.tls.key_file,
            "sessions.password_file": settings.sessions.password_file,
        }
    )
    if mqtt.tls.enabled and mqtt.tls.insecure:
        yield "mqtt.tls.insecure: the broker's certificate is not verified; anyone on the way can pose as the broker"
    if mqtt.transport != "unix" and not mqtt.tls.enabled and not _is_this_machine(mqtt.host):
        yield f"mqtt.tls.enabled: prompts, answers and the password cross the network to {mqtt.host} unencrypted"
    url = urlsplit(engine.url)
    if engine.kind == "server" and url.scheme == "http" and not _is_this_machine(url.hostname or ""):
        yield f"engine.url: prompts, answers and the API key cross the network to {url.hostname} unencrypted"
    if settings.sessions.store == "memory":
        yield "sessions.store: accepted requests and histories are lost when the worker ends (memory)"
    if settings.metrics.listen is not None and not listen_address.parse(settings.metrics.listen).is_loopback:
        yield f"metrics.listen: everybody who can reach {settings.metrics.listen} can read the metrics, which ask for no password"
    yield from _levels_of_no_route(settings)


def _levels_of_no_route(settings: Settings) -> Iterator[str]:
    for name in settings.levels:
        of_route, _, route_name = name.rpartition(":")
        route = settings.routes.get(route_name)
        if of_route and (route is None or not route.trust_payload_session):
            yield f"levels.{name}: applies to nobody: there is no route {route_name!r} with trust_payload_session"

    database = urlsplit(settings.sessions.url or "")
    if settings.sessions.store == "postgres" and not _is_encrypted(database.query):
        host = database.hostname or ""
        if host and not _is_this_machine(host):
            yield f"sessions.url: prompts and answers may cross the network to {host} unencrypted; add ?sslmode=verify-full"


def _is_encrypted(query: str) -> bool:
    return dict(parse_qsl(query)).get("sslmode") in ("require", "verify-ca", "verify-full")


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
