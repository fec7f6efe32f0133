"""A TCP cable between two ends that a test can cut, unplug and stall."""

from __future__ import annotations

import contextlib
import select
import socket
import threading

PUBACK, SUBACK = 4, 9
"""Kinds of packets (MQTT 5 section 2.1.2)."""


class Cable:
    """Listens on `port` and forwards to the target. One thread moves all bytes."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._leaving: list[socket.socket] = []
        """Ends at the target whose other ends have hung up: the target may still have to read what was said last."""
        self._stalled = False
        self._still = threading.Event()
        """The thread knows that it is to move nothing."""
        self._silent_hangup = False
        self._unplugged = False
        self._closed = threading.Event()
        self.connections = 0
        self.eaten = 0
        self._eats: tuple[int, ...] = ()
        self._halves: dict[socket.socket, bytearray] = {}
        self._mark = b""
        self._held: dict[socket.socket, bytes] = {}
        self._holds = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cable", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """End all connections; new ones work."""
        for pair in list(self._pairs):
            self._drop(pair)

    def is_idle(self) -> bool:
        """Whether there is no connection, and the target has read and ended all those that the other side has ended."""
        return not self._pairs and not self._leaving

    def stall(self) -> None:
        """Move no byte in either direction, as a firewall that forgot the connection; none passes once this has returned."""
        self._still.clear()
        self._stalled = True
        assert self._still.wait(10)

    def hold_from(self, mark: bytes) -> None:
        """Hold back, from now on, the first bytes of the target that have this in them, and what comes behind them."""
        self._holds.clear()
        self._mark = mark

    def wait_until_holding(self) -> None:
        assert self._holds.wait(10), f"the target has not sent {self._mark!r}"

    def resume(self) -> None:
        """What was held back comes as one with what the target has sent since, and after it nothing more: that the target has ended
        the connection comes with `cut` alone."""
        self._stalled = False
        self._mark = b""

    def hang_up_at_once(self, on: bool = True) -> None:
        """Take connections and close them at the first bytes, as a proxy does whose broker is still starting."""
        self._silent_hangup = on

    def eat(self, *kinds: int) -> None:
        """Take the packets of these kinds (PUBACK, SUBACK) out of what the target sends; the rest passes, so the connection
        looks alive. None of any kind: all passes again."""
        self._eats = kinds

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5)
        self.cut()
        for end in self._leaving:
            end.close()
        self._server.close()

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with contextlib.suppress(ValueError):
            self._pairs.remove(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            pairs = list(self._pairs)
            stalled = self._stalled
            if stalled:
                self._still.set()
            ends = [] if stalled else [end for pair in pairs for end in pair if self._moves(end)]
            # `cut` may have closed one that was on its way into this list.
            self._leaving = [end for end in self._leaving if end.fileno() >= 0]
            leaving = [] if stalled else self._leaving
            try:
                ready, _, _ = select.select([self._server, *ends, *leaving], [], [], 0.02)
            except (OSError, ValueError):
                continue
            for end in ready:
                if end is self._server:
                    self._accept()
                    continue
                if end in self._leaving:
                    self._drain(end)
                    continue
                pair = next((p for p in pairs if end in p), None)
                if pair is not None:
                    self._move(pair, end)
            if not self._mark:
                self._pass_on_held()

    def _moves(self, end: socket.socket) -> bool:
        return end.fileno() >= 0 and end not in self._held

    def _accept(self) -> None:
        near, _ = self._server.accept()
        self.connections += 1
        if self._silent_hangup:
            near.settimeout(1)
            with contextlib.suppress(OSError):
                near.recv(1024)
            near.close()
            return
        try:
            far = socket.create_connection(("127.0.0.1", self._target_port), 2)
        except OSError:
            near.close()
            return
        self._pairs.append((near, far))

    def _move(self, pair: tuple[socket.socket, socket.socket], end: socket.socket) -> None:
        other = pair[1] if end is pair[0] else pair[0]
        try:
            data = end.recv(65536)
            if not data and end is pair[0]:
                self._say_goodbye(pair)
                return
            if self._mark and end is pair[1] and self._mark in data:
                self._held[end] = data
                self._holds.set()
                return
            if self._eats and end is pair[1]:
                whole = self._without_eaten(end, data)
                if data and not whole:
                    return
                data = whole
            if data:
                other.sendall(data)
                return
        except OSError:
            pass
        self._drop(pair)

    def _say_goodbye(self, pair: tuple[socket.socket, socket.socket]) -> None:
        """Pass on that the near end has hung up, and nothing more: to close the far end as well could take from the target what it
        has not read yet."""
        near, far = pair
        far.shutdown(socket.SHUT_WR)
        self._leaving.append(far)
        with contextlib.suppress(ValueError):
            self._pairs.remove(pair)
        near.close()

    def _drain(self, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if far.recv(65536):
                return
        self._leaving.remove(far)
        far.close()

    def _pass_on_held(self) -> None:
        for near, far in list(self._pairs):
            held = self._held.get(far)
            if held:
                near.sendall(held + far.recv(65536))
                self._held[far] = b""

    def _without_eaten(self, end: socket.socket, data: bytes) -> bytes:
        """The whole MQTT packets among these bytes but those to be eaten; a part of one waits for the rest."""
        waiting = self._halves.setdefault(end, bytearray())
        waiting += data
        kept = bytearray()
        while (size := _packet_size(waiting)) is not None and size <= len(waiting):
            if waiting[0] >> 4 in self._eats:
                self.eaten += 1
            else:
                kept += waiting[:size]
            del waiting[:size]
        return bytes(kept)


def _packet_size(data: bytearray) -> int | None:
    """Bytes of the packet that begins here (MQTT 5 section 2.1.4); None when its length has not all come."""
    remaining = 0
    for place, byte in enumerate(data[1:5]):
        remaining |= (byte & 0x7F) << (7 * place)
        if not byte & 0x80:
            return 2 + place + remaining
    return None
