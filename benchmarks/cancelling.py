"""(g) from the publishing of a cancel to the slot that is free again, while the other slot generates.

The server is not asked by `/slots`: each answer puts off by up to a second what it does about a client that has gone. Instead a
third request waits in the server's own queue; its first byte comes when the slot is free, and a step of the engine later.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator

from benchmarks.bench import Bench
from benchmarks.bus import Bus
from benchmarks.direct import body, request
from benchmarks.samples import LoadFailed, prompt
from tests.support.waiting import eventually

_PROMPT_WORDS = 6000
_LONG = 4000


def cancels(bench: Bench) -> None:
    """(g) cancel, while another slot generates."""
    model = bench.world.model_with(layers=6, width=256)
    with (
        bench.world.llama_with(slots=2, n_ctx=16384, model=model) as llama,
        # The daemon may have a request in each slot; one of them is taken by somebody else here.
        bench.world.daemon(llama.url) as daemon,
    ):
        for where, words, begun, target in (
            ("in a prompt", _PROMPT_WORDS, _in_prompt, "<= 0.3"),
            ("in generation", 20, _generating, "<= 0.05"),
        ):
            free, told = [], []
            for _ in bench.rounds(where, 15):
                freed_s, told_s = _cancel(daemon.bus, llama.port, words, begun)
                free.append(freed_s)
                told.append(told_s)
                eventually(lambda: llama.busy_slots() == 0, 30.0, every_s=0.5)
            bench.median("g", f"publish to slot free, {where}", free, unit="s", target=target)
            bench.median("g", f"publish to `done`, {where}", told, unit="s")


def _cancel(bus: Bus, port: int, words: int, begun: Callable[[Bus, str], bool]) -> tuple[float, float]:
    """Seconds from the cancel to the free slot, and to the terminal event."""
    bus.received.clear()
    with _asking(port, _LONG) as other:
        _first_byte(other)
        request_id, _ = bus.ask("s0", prompt(words), max_tokens=_LONG, new=True)
        bus.until(lambda: begun(bus, request_id), 30.0)
        with _asking(port, 1) as third:
            bus.listen(0.05)  # for the third request to be in the server's queue
            if select.select([third], [], [], 0)[0]:
                raise LoadFailed("the third request found a slot while both should be taken")
            cancelled_at = bus.tell("s0", action="cancel", request_id=request_id)
            freed_at = _first_byte(third)
        bus.until(lambda: _last(bus, request_id) == "done", 10.0)
    events = bus.events(request_id)
    if events[-1][1]["finish_reason"] != "cancelled":
        raise LoadFailed(f"the request ended before it was cancelled: {events[-1][1]}")
    return freed_at - cancelled_at, events[-1][0] - cancelled_at


def _in_prompt(bus: Bus, request_id: str) -> bool:
    return _last(bus, request_id) == "progress"


def _generating(bus: Bus, request_id: str) -> bool:
    return _last(bus, request_id) == "chunk"


def _last(bus: Bus, request_id: str) -> str:
    events = bus.events(request_id)
    return str(events[-1][1]["type"]) if events else ""


@contextlib.contextmanager
def _asking(port: int, max_tokens: int) -> Iterator[socket.socket]:
    """A request straight to the server, given up at the end of the block."""
    with socket.create_connection(("127.0.0.1", port)) as made:
        made.sendall(request(body(prompt(), max_tokens)))
        yield made


def _first_byte(connection: socket.socket) -> float:
    connection.settimeout(30.0)
    connection.recv(65536)
    return time.monotonic()
