"""Serves the metrics over HTTP in one thread, so bounded that nobody who connects can cost the worker much."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus

import structlog

from llamacpp_mqtt_deploy.config.listen_address import ListenAddress
from llamacpp_mqtt_deploy.metrics.http_page import END_OF_HEAD, MOST_HEAD_BYTES, Page, answer, refusal
from llamacpp_mqtt_deploy.metrics.listening import Listening

log = structlog.get_logger(__name__)

MOST_CONNECTIONS = 16
"""A newcomer beyond it takes the place of the oldest: whoever has a request sends it at once and is gone again."""
HEAD_S = 5.0
ANSWER_S = 10.0
"""How long a request may take to arrive, and its answer to leave, however steadily they drip."""
GOODBYE_S = 1.0
"""How long the other side has to see the end: closed at once, what it still sends would destroy the answer on its way."""
ACCEPTS_PER_S = 20.0
ACCEPTS_AT_ONCE = 40.0
"""Connections beyond it wait in the kernel. An answer takes a millisecond of the processor that tokens need too."""
LISTEN_AGAIN_S = 10.0
_READ_BYTES = 4096


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    ends_at: float
    head: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None
    said: bool = False


class HttpListener:
    """One thread from `start` to `close`. An address that is taken is tried again for ever: metrics are no reason to stop a worker."""

    def __init__(self, address: ListenAddress, page: Page, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._page = page
        self._clock = clock
        self._listening: Listening | None = None
        self._selector: selectors.BaseSelector
        self._wakeup: socket.socket
        self._waker: socket.socket
        self._connections: dict[_Connection, None] = {}  # oldest first
        self._allowed, self._counted_at = ACCEPTS_AT_ONCE, clock()
        self._pause_until = 0.0
        self._told = ""
        self._page_failed = False
        self._closing = threading.Event()
        self.shown = ""
        """Where the metrics are, once the socket is open."""
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._waker = socket.socketpair()
        self._wakeup.setblocking(False)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        self._closing.set()
        if self._thread.is_alive():
            with contextlib.suppress(OSError):
                self._waker.send(b"\0")
            self._thread.join(timeout_s)

    # --- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        while not self._closing.is_set():
            try:
                self._turn()
            except Exception:
                log.exception("metrics.failed")
                self._drop_all()
                self._closing.wait(1.0)
        self._drop_all()
        if self._listening is not None:
            self._listening.close()
        self._selector.close()
        self._wakeup.close()
        self._waker.close()

    def _turn(self) -> None:
        now = self._clock()
        self._listen(now)
        for key, _ in self._selector.select(self._wait_s(now)):
            if isinstance(key.data, _Connection):
                self._serve(key.data)
            elif key.data == "accept":
                self._accept()
        now = self._clock()
        for connection in [late for late in self._connections if now >= late.ends_at]:
            self._drop(connection)

    def _wait_s(self, now: float) -> float:
        ends = [connection.ends_at for connection in self._connections]
        if self._pause_until > now:
            ends.append(self._pause_until)
        return max(0.0, min(ends, default=now + 60.0) - now)

    def _listen(self, now: float) -> None:
        """Open the socket, or look at it again after a pause."""
        if now < self._pause_until:
            return
        if self._listening is None:
            try:
                self._listening = Listening(self._address)
            except OSError as problem:
                self._pause_until = now + LISTEN_AGAIN_S
                if str(problem) != self._told:
                    self._told = str(problem)
                    log.error(
                        "metrics.not_listening",
                        address=str(self._address),
                        reason=problem.strerror or str(problem),
                        again_s=LISTEN_AGAIN_S,
                    )
                return
            self._told, self.shown = "", self._listening.shown
            log.info("metrics.listening", address=self.shown)
        if self._listening.socket not in self._selector.get_map():
            self._selector.register(self._listening.socket, selectors.EVENT_READ, "accept")

    def _accept(self) -> None:
        assert self._listening is not None
        now = self._clock()
        self._allowed = min(ACCEPTS_AT_ONCE, self._allowed + (now - self._counted_at) * ACCEPTS_PER_S)
        self._counted_at = now
        if self._allowed < 1.0:
            self._rest(now + 1.0 / ACCEPTS_PER_S)
            return
        try:
            accepted, _ = self._listening.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # no file descriptor left: the socket stays ready, and we would turn without end
            self._rest(now + 1.0)
            return
        self._allowed -= 1.0
        accepted.setblocking(False)
        if len(self._connections) >= MOST_CONNECTIONS:
            self._drop(next(iter(self._connections)))
        connection = _Connection(accepted, now + HEAD_S)
        self._connections[connection] = None
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _rest(self, until: float) -> None:
        assert self._listening is not None
        self._pause_until = until
        self._selector.unregister(self._listening.socket)

    def _serve(self, connection: _Connection) -> None:
        try:
            if connection.answer is None:
                self._receive(connection)
            elif not connection.said:
                self._send(connection)
            elif not connection.socket.recv(_READ_BYTES):
                self._drop(connection)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)

    def _receive(self, connection: _Connection) -> None:
        data = connection.socket.recv(_READ_BYTES)
        if not data:
            self._drop(connection)
            return
        head = connection.head
        head += data
        head_bytes = head.find(END_OF_HEAD)
        if head_bytes >= 0:
            response = self._answer(bytes(head[:head_bytes]))
        elif len(head) > MOST_HEAD_BYTES:
            response = refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The head of this request is too long.")
        else:
            return
        head.clear()
        connection.answer = memoryview(response)
        connection.ends_at = self._clock() + ANSWER_S
        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
        self._send(connection)

    def _answer(self, head: bytes) -> bytes:
        try:
            response = answer(head, self._page)
        except Exception:
            if not self._page_failed:
                log.exception("metrics.page_failed")
            self._page_failed = True
            return refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "The metrics cannot be read; the worker's log says why.")
        self._page_failed = False
        return response

    def _send(self, connection: _Connection) -> None:
        assert connection.answer is not None
        sent = connection.socket.send(connection.answer)
        connection.answer = connection.answer[sent:]
        if not connection.answer:
            connection.said = True
            connection.ends_at = self._clock() + GOODBYE_S
            connection.socket.shutdown(socket.SHUT_WR)
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            del self._connections[connection]
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _drop_all(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
