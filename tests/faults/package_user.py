"""A client process that asks through the package's own client: what a program that uses `llamacpp_mqtt_deploy.BusClient` sees.

It takes the arguments of `tests.faults.client` and writes down, for each request, the joined text and how it ended.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import threading
from pathlib import Path

from llamacpp_mqtt_deploy.client.bus import BusClient
from llamacpp_mqtt_deploy.client.exceptions import AnswerError, BusError
from tests.faults.client import ATTEMPTS, FOR_GOOD, allowed, options_of
from tests.faults.history import Reader, Writer
from tests.faults.wishes import MAX_TOKENS, Wish, wishes


class PackageUser:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        path = Path(options.folder) / f"{options.name}.jsonl"
        over, self._attempts = set(), {}
        for entry in Reader(path).news():
            if entry.what == "begun":
                self._attempts[entry.number] = entry.attempt + 1
            elif entry.what == "ended":
                over.add(entry.number)
        planned = wishes(
            client=options.name, seed=options.seed, count=options.count, without=options.without.split(",")
        )
        self._left: queue.SimpleQueue[tuple[int, Wish]] = queue.SimpleQueue()
        self._again: queue.SimpleQueue[tuple[int, Wish]] = queue.SimpleQueue()
        """Begun and not over: the rig waits for these."""
        for number, wish in enumerate(planned):
            if number not in over:
                (self._again if number in self._attempts else self._left).put((number, wish))
        self._begun = len(self._attempts)
        self._lock = threading.Lock()
        self._pause = threading.Event()
        self._history = Writer(path)

    def run(self) -> int:
        # Whatever hangs: what was written down is all that counts.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._options.window)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 0

    def _work(self) -> None:
        """As a program does that is told to try for ever: a new client where the old one gave up."""
        while True:
            try:
                with BusClient("127.0.0.1", self._options.port, protocol=self._options.protocol, keepalive_s=5) as bus:
                    while self._next(bus):
                        pass
                    return
            except BusError:
                self._pause.wait(0.3)

    def _next(self, bus: BusClient) -> bool:
        taken = self._take()
        if taken is None:
            return False
        number, wish = taken
        try:
            self._fulfil(bus, number, wish)
        except BusError:
            self._again.put((number, wish))
            raise
        return True

    def _take(self) -> tuple[int, Wish] | None:
        """The next wish, one that was begun before all others; None when there is none."""
        while True:
            with self._lock:
                if not self._again.empty():
                    return self._again.get()
                if self._left.empty():
                    return None
                if self._begun < allowed(self._options.folder, self._options.name):
                    self._begun += 1
                    return self._left.get()
            self._pause.wait(0.05)

    def _fulfil(self, bus: BusClient, number: int, wish: Wish) -> None:
        request_id = ""
        while (attempt := self._attempts.get(number, 0)) < ATTEMPTS:
            self._attempts[number] = attempt + 1
            request_id = f"{self._options.name}-{self._options.seed}-{number}-{attempt}"
            self._history.write("begun", request_id=request_id, number=number, attempt=attempt)
            self._history.write("sent", request_id=request_id)
            try:
                text = self._text(bus, request_id, wish)
            except AnswerError as error:
                self._history.write("failed", request_id=request_id, text=error.code)
                if error.code in FOR_GOOD:
                    break
            except BusError as error:
                self._history.write("failed", request_id=request_id, text=type(error).__name__)
                raise
            else:
                self._history.write("answer", request_id=request_id, text=text)
                break
            self._pause.wait(0.2 * min(attempt + 1, 5))
        self._history.write("ended", request_id=request_id, number=number)

    def _text(self, bus: BusClient, request_id: str, wish: Wish) -> str:
        with bus.ask(
            messages=[{"role": "user", "content": wish.prompt}],
            session=wish.session,
            request_id=request_id,
            temperature=0,
            max_tokens=MAX_TOKENS,
            **dict(wish.fields),
        ) as answer:
            joined = "".join(answer)
            done = answer.result()
        if joined != done.content:
            return f"the pieces are {joined!r}, the whole is {done.content!r}"
        return done.content


def main() -> int:
    return PackageUser(options_of()).run()


if __name__ == "__main__":
    raise SystemExit(main())
