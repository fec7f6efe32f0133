"""The thread that looks after unfinished answers: sends requests again, asks whether a worker is there, gives up."""

from __future__ import annotations

import logging
import threading
import time

from llamacpp_mqtt_deploy.client.answer import Answer
from llamacpp_mqtt_deploy.client.exceptions import AnswerLost
from llamacpp_mqtt_deploy.client.explain_end import given_up
from llamacpp_mqtt_deploy.client.retry import AskPresence, GiveUp, Send, WaitUntil, Why
from llamacpp_mqtt_deploy.client.traffic import Traffic

log = logging.getLogger(__name__)  # the host program's log: this part is a library


class Watch:
    """One thread for all answers of a client; their rules decide, it only does what is due."""

    def __init__(self, traffic: Traffic, *, offline_limit_s: float) -> None:
        self._traffic = traffic
        self._offline_limit_s = offline_limit_s
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lmd-bus-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def alive(self) -> bool:
        return not self._stopping and self._thread.is_alive()

    def stop(self) -> None:
        """Let the thread end after what it is doing; `join` waits for it."""
        self._stopping = True

    def join(self, timeout_s: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping:
            try:
                pause_s = self._look_after_all()
            except Exception:
                log.exception("bus.watch_failed")
                pause_s = 1.0
            self._traffic.changed.wait(pause_s)
            self._traffic.changed.clear()

    def _look_after_all(self) -> float:
        """Do what is due for each answer; returns the seconds until the next thing is."""
        now = time.monotonic()
        nearest = now + 1.0
        live = self._traffic.drop_ended()
        online = self._traffic.board.online()
        heartbeat_s = self._traffic.board.heartbeat_s()
        if live and not self._traffic.connection.thread_lives():
            for answer in live:
                answer.fail(AnswerLost("The network thread of the bus client has ended; open a new client."))
        for answer in live:
            match answer.decide(now, heartbeat_s=heartbeat_s, worker_online=bool(online)):
                case WaitUntil(until):
                    nearest = min(nearest, until)
                case Send():
                    self._traffic.send_again(answer)
                case AskPresence():
                    self._traffic.probe(answer, now)
                case GiveUp(why):
                    self._give_up(answer, "cut_short" if answer.cut_short and why == "lost" else why)
        return max(0.01, nearest - now)

    def _give_up(self, answer: Answer, why: Why) -> None:
        # A worker that comes later finds request and cancel in this order, and does not work for nobody.
        self._traffic.cancel(answer)
        answer.fail(
            given_up(
                why,
                broker=str(self._traffic.address),
                sends=answer.sends,
                workers=self._traffic.board.online(),
                offline_limit_s=self._offline_limit_s,
                nobody=self._traffic.nobody("The request was not answered"),
            )
        )
