"""All checks in order, each with its own connections and its own end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.checking.discovering import check_discovery
from llamacpp_mqtt_deploy.checking.engine import check_engine
from llamacpp_mqtt_deploy.checking.findings import Finding, fail, ok, skip, warn
from llamacpp_mqtt_deploy.checking.group import check_group
from llamacpp_mqtt_deploy.checking.journal_database import check_database
from llamacpp_mqtt_deploy.checking.machine import check_clock, check_store, check_versions
from llamacpp_mqtt_deploy.checking.metrics_endpoint import check_metrics
from llamacpp_mqtt_deploy.checking.network import check_network
from llamacpp_mqtt_deploy.checking.permissions import Bus, check_permissions
from llamacpp_mqtt_deploy.checking.probing import PermissionProbe
from llamacpp_mqtt_deploy.client.address import BrokerAddress
from llamacpp_mqtt_deploy.client.exceptions import BrokerRefused, BusError
from llamacpp_mqtt_deploy.config.credentials import all_secrets, mqtt_password
from llamacpp_mqtt_deploy.config.loading import Loaded
from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.mqtt.tls import build_context
from llamacpp_mqtt_deploy.worker.policies import topic_map


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLogin:
    """The user as whom the permissions of clients are tried."""

    username: str
    password: str | None


def check_all(loaded: Loaded, *, client: ClientLogin | None = None, generate: bool = True) -> Iterator[Finding]:
    """Try everything that a worker with this configuration needs; yields each finding as soon as it is known."""
    # What brokers, engines and libraries say is quoted, and may quote a secret in turn.
    logs.hide(*all_secrets(loaded.settings), client.password if client else None)
    for found in _check_all(loaded, client=client, generate=generate):
        yield replace(found, text=logs.without_secrets(found.text), advice=logs.without_secrets(found.advice))


def _check_all(loaded: Loaded, *, client: ClientLogin | None, generate: bool) -> Iterator[Finding]:
    settings = loaded.settings
    yield ok("config.valid", str(loaded.file) if loaded.file else "no file; defaults, environment and flags")
    for warning in loaded.warnings:
        yield warn("config.wise", warning)
    bus: Bus | None = None
    with ExitStack() as stack:
        reachable = True
        for finding in check_network(settings.mqtt):
            reachable &= finding.verdict != "FAIL"
            yield finding
        if reachable:
            address = _address(settings.mqtt, settings.mqtt.username, mqtt_password(settings))
            worker, login = _log_in("broker", address, stack)
            yield login
            if worker is not None:
                yield _version(worker)
                other: PermissionProbe | None = None
                if client is not None:
                    other, login = _log_in(
                        "client", replace(address, username=client.username, password=client.password), stack
                    )
                    yield login
                elif settings.mqtt.username is None:
                    # Without user names worker and clients are the same to the broker.
                    other, _ = _log_in("client", address, stack)
                bus = Bus(topic_map(settings), worker, other, pool=settings.pool.name)
                yield from check_permissions(bus)
                if settings.pool.name is not None:
                    yield from check_group(bus, settings.pool.name)
                if settings.home_assistant.discovery:
                    yield from check_discovery(bus, settings)
        else:
            yield skip("broker.login", "not tried")
    online = bus.online if bus else {}
    yield from check_engine(settings.engine, generate=generate, running=online.get(settings.mqtt.worker_id))
    yield from check_database(settings) if settings.sessions.store == "postgres" else check_store(settings.sessions)
    yield from check_metrics(settings.metrics)
    yield check_clock(online)
    yield check_versions()


def _address(mqtt: MqttSettings, username: str | None, password: str | None) -> BrokerAddress:
    return BrokerAddress(
        host=mqtt.host,
        port=mqtt.port,
        transport=mqtt.transport,
        websocket_path=mqtt.websocket_path,
        protocol=mqtt.protocol,
        username=username,
        password=password,
        tls=build_context(mqtt.tls) if mqtt.tls.enabled else None,
    )


def _log_in(name: str, address: BrokerAddress, stack: ExitStack) -> tuple[PermissionProbe | None, Finding]:
    who = f"user {address.username}" if address.username else "without a user name"
    try:
        probe = stack.enter_context(PermissionProbe(address))
    except BrokerRefused as error:
        return None, fail(f"{name}.login", error.message)
    except BusError as error:
        return None, fail(f"{name}.login", error.message)
    return probe, ok(f"{name}.login", f"{who} is accepted")


def _version(worker: PermissionProbe) -> Finding:
    if worker.protocol == "5":
        return ok("broker.protocol", "MQTT 5")
    return warn(
        "broker.protocol",
        "MQTT 3.1.1: denied publishes look like success, and a stale `online` stays after a power cut",
        "a broker with MQTT 5 (mosquitto 1.6 or newer) does better",
    )
