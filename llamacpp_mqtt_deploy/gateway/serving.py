"""Runs the gateway: uvicorn within our limits, the one connection to the broker, a stop that lets answers end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import structlog
import uvicorn
from starlette.types import ASGIApp

from llamacpp_mqtt_deploy.client.async_bus import AsyncBusClient
from llamacpp_mqtt_deploy.client.exceptions import BusError, NotPermitted
from llamacpp_mqtt_deploy.config.settings import GatewaySettings, Settings
from llamacpp_mqtt_deploy.core.routes import is_level
from llamacpp_mqtt_deploy.gateway.app import build
from llamacpp_mqtt_deploy.gateway.bodies import Bodies
from llamacpp_mqtt_deploy.gateway.bounded_http import BoundedHttp
from llamacpp_mqtt_deploy.gateway.bounded_socket import BoundedSocket
from llamacpp_mqtt_deploy.gateway.capacity import Capacity
from llamacpp_mqtt_deploy.gateway.catalog import Catalog
from llamacpp_mqtt_deploy.gateway.exchange import Services
from llamacpp_mqtt_deploy.gateway.guards import HEAD_BYTES
from llamacpp_mqtt_deploy.gateway.incoming_bytes import IncomingBytes
from llamacpp_mqtt_deploy.gateway.key_ring import KeyRing, Owner
from llamacpp_mqtt_deploy.gateway.reading_turns import ReadingTurns
from llamacpp_mqtt_deploy.gateway.running_answers import Running

log = structlog.get_logger(__name__)

IDLE_CONNECTIONS = 1024
"""Connections beside those that hold an answer: pages, probes, clients between two requests."""
BACKLOG = 1024
LONGEST_PAUSE_S = 10.0
AFTER_THE_DRAIN_S = 5.0
"""For the ends of the answers that were cut to reach their readers."""
LOOK_AT_KEYS_S = 5.0


START_WITHIN_S = 3.0
"""The longest time from the start until connections are taken."""
FIRST_STATUS_S = 0.5
"""How long a broker may take to bring the first retained status; where none comes there is no worker."""


class Manager(Protocol):
    """The service manager that is told how we are."""

    def ready(self) -> None: ...
    def stopping(self) -> None: ...
    def status(self, text: str) -> None: ...
    def watchdog(self) -> None: ...


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to us and tells when it begins to close."""

    def __init__(self, config: uvicorn.Config, *, closing: Callable[[], None]) -> None:
        super().__init__(config)
        self._closing = closing

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn would raise the signal again after its shutdown, before ours

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._closing()
        await super().shutdown(sockets)


def listen(settings: GatewaySettings) -> socket.socket:
    """The socket to serve on; raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )[0]
    # With the protocol named: asyncio switches Nagle's algorithm off only where it sees that it is TCP, and with it each piece of a
    # stream waits up to 40 ms for the acknowledgement of the one before.
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Gateway:
    """One life of the gateway. `bus_options` are the arguments of its `AsyncBusClient`; `keys` are loaded already."""

    def __init__(
        self,
        settings: Settings,
        *,
        bus_options: Mapping[str, Any],
        keys: KeyRing | None,
        manager: Manager,
        watchdog_s: float | None = None,
    ) -> None:
        self._settings = settings.gateway
        self._bus_options = bus_options
        self._root_user = settings.mqtt.username
        self._keys = keys
        self._manager = manager
        self._watchdog_s = watchdog_s
        self._server: _Server | None = None
        self._running: Running | None = None
        self._knows = asyncio.Event()
        """Who is online, or that the broker cannot be reached."""
        self._capacity = Capacity(
            total=self._settings.max_streams,
            each=min(self._settings.max_streams_per_level, self._settings.max_streams),
        )

    async def run(self, sock: socket.socket, *, signals: bool = True) -> None:
        """Serve until SIGTERM or SIGINT, or until `stop`."""
        bus = AsyncBusClient(
            **self._bus_options,
            whole_levels=True,
            live_answers=2 * self._settings.max_streams,
            max_answer_chars=self._settings.max_answer_bytes,
        )
        self._running = Running(bus, retry_grace_s=self._settings.retry_grace_s)
        bodies = Bodies(max_bytes=self._settings.max_body_bytes, timeout_s=self._settings.body_timeout_s)
        services = Services(
            settings=self._settings,
            bus=bus,
            keys=self._keys,
            anyone=Owner(name="anyone", level=self._level()),
            catalog=Catalog(bus),
            capacity=self._capacity,
            running=self._running,
            bodies=bodies,
        )
        self._server = _Server(self._config(build(services), bodies.incoming), closing=self._close)
        if signals:
            self._take_signals()
        chores = [asyncio.create_task(work) for work in (self._connect(bus), self._look_at_keys(), self._live())]
        try:
            # Whoever asks meanwhile waits in the socket's backlog: that nobody serves would be a guess, and end a page's answer that
            # was cut when the gateway was restarted.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(START_WITHIN_S):
                    await self._knows.wait()
            await self._server.serve(sockets=[sock])
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)
            await bus.close()
            bodies.close()
            log.info("gateway.stopped")

    def stop(self) -> None:
        """Begin to close; a second call cuts the drain short. Must be called in the loop."""
        self._knows.set()
        if self._server is None:
            return
        if self._server.should_exit and self._running is not None:
            self._running.end_all()
        self._server.should_exit = True

    def _level(self) -> str:
        if self._settings.level is not None:
            return self._settings.level
        user = self._root_user
        return user if user is not None and is_level(user) else "web"

    def _config(self, app: ASGIApp, incoming: IncomingBytes) -> uvicorn.Config:
        settings, turns = self._settings, ReadingTurns()
        # Every client can make it say "Invalid HTTP request received."; what fails in the app, `Journaled` tells.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        return uvicorn.Config(
            app,
            http=type(
                "_BoundedHttp",
                (BoundedHttp,),
                {
                    "head_timeout_s": settings.header_timeout_s,
                    "slow_reader_s": settings.slow_reader_s,
                    "turns": turns,
                },
            ),
            ws=type(
                "_BoundedSocket",
                (BoundedSocket,),
                {
                    "slow_reader_s": settings.slow_reader_s,
                    "frame_timeout_s": settings.body_timeout_s,
                    "incoming": incoming,
                    "turns": turns,
                },
            ),
            ws_max_size=settings.max_body_bytes,
            ws_max_queue=16,
            ws_per_message_deflate=False,  # a small frame may unpack to a giant one, and chunks are too small to gain
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=settings.max_streams + IDLE_CONNECTIONS,
            h11_max_incomplete_event_size=HEAD_BYTES,
            backlog=BACKLOG,
            timeout_keep_alive=max(1, int(settings.header_timeout_s)),
            timeout_graceful_shutdown=int(settings.drain_timeout_s + AFTER_THE_DRAIN_S),
        )

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    def _close(self) -> None:
        """The server begins to close: no new answers, and an end for those that take too long."""
        self._manager.stopping()
        self._capacity.closing = True
        assert self._running is not None
        log.info("gateway.closing", answers=self._running.count, drain_timeout_s=self._settings.drain_timeout_s)
        asyncio.get_running_loop().call_later(self._settings.drain_timeout_s, self._running.end_all)

    # --- beside the server ---------------------------------------------------------------------------------------------

    async def _connect(self, bus: AsyncBusClient) -> None:
        """Connect to the broker, however long that takes: until then requests are answered by 503."""
        pause_s = 0.5
        while True:
            try:
                await bus.open()
                break
            except BusError as error:
                log.warning("gateway.no_broker", why=str(error), next_try_s=pause_s)
                self._knows.set()
            except Exception:
                log.exception("gateway.connect_failed")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        for level in self._keys.levels() if self._keys is not None else [self._level()]:
            with contextlib.suppress(BusError):  # tried again with the first request
                await bus.listen(f"{level}/x")
        try:
            await bus.health(wait_s=0.0)
        except (NotPermitted, BusError) as error:
            log.info("gateway.no_health", why=str(error))
        await bus.status(wait_s=FIRST_STATUS_S)
        self._knows.set()
        log.info("gateway.connected", broker=str(bus.address), protocol=bus.protocol)
        self._manager.ready()
        self._manager.status(f"connected to {bus.address}")

    async def _look_at_keys(self) -> None:
        """Tell once when the keys file becomes unreadable."""
        told = ""
        while self._keys is not None:
            if self._keys.problem != told:
                told = self._keys.problem
                if told:
                    log.warning("gateway.keys_file_unfit", why=told, message="the keys known so far are in force")
            await asyncio.sleep(LOOK_AT_KEYS_S)

    async def _live(self) -> None:
        """Feed the watchdog for as long as the loop turns."""
        while self._watchdog_s is not None:
            self._manager.watchdog()
            await asyncio.sleep(self._watchdog_s)
