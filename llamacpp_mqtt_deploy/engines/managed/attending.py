"""Stays with one server process until it has ended: reads what it says, and sends it the signals that are due."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable

from llamacpp_mqtt_deploy.engines.managed.child import EXITED_LOOK_EVERY_S
from llamacpp_mqtt_deploy.engines.managed.watching import Life

SECOND_SIGNAL_AFTER_S = 1.0
"""llama-server waits for its open streams at the first SIGTERM and ends at once at the second."""

_LAST_READS = 64
"""So often is read what a server left when it ended: many times what a pipe holds. Something that it started and that has got away
may go on writing for ever."""


class Interrupt:
    """Ends the waiting of whoever selects on it."""

    def __init__(self) -> None:
        self.selectable, self._far = socket.socketpair()
        for end in (self.selectable, self._far):
            end.setblocking(False)

    def __call__(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: it has ended
            self._far.send(b"\0")

    def heard(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.selectable.recv(4096):
                pass

    def close(self) -> None:
        self.selectable.close()
        self._far.close()


class Attendant:
    """Works in the supervisor's thread.

    `heard(life)` is called when the server has said something, `due_s(life, now)` asks for how long nothing has to be decided
    about one that is to go on; it may set `life.wish`, which then is carried out.
    """

    def __init__(
        self,
        *,
        interrupt: Interrupt,
        kill_after_s: Callable[[], float],
        heard: Callable[[Life], None],
        due_s: Callable[[Life, float], float],
    ) -> None:
        self._interrupt = interrupt
        self._kill_after_s = kill_after_s
        self._heard = heard
        self._due_s = due_s

    def stay(self, life: Life) -> int:
        """The exit code of the process, once it has one."""
        child, interrupt = life.child, self._interrupt.selectable
        with selectors.DefaultSelector() as selector:
            selector.register(interrupt, selectors.EVENT_READ)
            selector.register(child.output, selectors.EVENT_READ)
            if child.ending is not None:
                selector.register(child.ending, selectors.EVENT_READ)
            while True:
                wait_s = self._remind(life)
                ready = {key.fd for key, _ in selector.select(wait_s)}
                if child.output in ready and not self._listen(life):
                    selector.unregister(child.output)
                if interrupt.fileno() in ready:
                    self._interrupt.heard()
                code = child.reap()
                if code is not None:
                    for _ in range(_LAST_READS):
                        if not self._listen(life, to_the_end=True):
                            break
                    life.log.feed(b"", time.monotonic())  # a last line without an end
                    return code

    def _listen(self, life: Life, *, to_the_end: bool = False) -> bool:
        """Read what the server wrote; False when there is no more."""
        data = life.child.read()
        if data is None:
            return not to_the_end
        life.log.feed(data, time.monotonic())
        self._heard(life)
        return bool(data)

    def _remind(self, life: Life) -> float:
        """Send the signals that are due; the seconds until the next."""
        look_s = 1.0 if life.child.ending is not None else EXITED_LOOK_EVERY_S
        now = time.monotonic()
        if not life.wish:
            look_s = min(look_s, self._due_s(life, now))
        if not life.wish:
            return look_s
        if life.wish == "hung":
            life.child.send(signal.SIGKILL)  # it did not even answer a question
            return look_s
        kill_after_s = self._kill_after_s()
        if not life.told_at:
            life.told_at.append(now)
            life.child.send(signal.SIGTERM)
        waited_s = now - life.told_at[0]
        second_s = min(SECOND_SIGNAL_AFTER_S, kill_after_s / 2)
        if waited_s >= kill_after_s:
            life.child.send(signal.SIGKILL)
        elif waited_s >= second_s and len(life.told_at) == 1:
            life.told_at.append(now)
            life.child.send(signal.SIGTERM)
        due_s = second_s if waited_s < second_s else kill_after_s
        return min(look_s, max(0.01, due_s - waited_s))
