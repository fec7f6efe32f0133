"""Looks after unfinished answers: sends requests again, asks whether a worker is there, gives up."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from llamacpp_mqtt_deploy.client.acks import PendingAck
from llamacpp_mqtt_deploy.client.answer import Answer
from llamacpp_mqtt_deploy.client.connection import Connection
from llamacpp_mqtt_deploy.client.exceptions import AnswerLost
from llamacpp_mqtt_deploy.client.explain_end import given_up
from llamacpp_mqtt_deploy.client.followed import FollowedAnswer
from llamacpp_mqtt_deploy.client.retry import AskPresence, GiveUp, Send, WaitUntil, Why
from llamacpp_mqtt_deploy.client.traffic import Traffic

log = logging.getLogger(__name__)  # the host program's log: this part is a library


def look_after(traffic: Traffic[Any, Any, Any], *, offline_limit_s: float) -> float:
    """Do what is due for each answer, as its rules decide; returns the seconds until the next thing is."""
    now = time.monotonic()
    nearest = now + 1.0
    online = traffic.board.online()
    heartbeat_s = traffic.board.heartbeat_s()
    for answer in traffic.drop_ended():
        try:
            match answer.decide(now, heartbeat_s=heartbeat_s, worker_online=bool(online)):
                case WaitUntil(until):
                    nearest = min(nearest, until)
                case Send():
                    traffic.send_again(answer)
                case AskPresence():
                    traffic.probe(answer, now)
                case GiveUp(why):
                    why = "cut_short" if answer.cut_short and why == "lost" else why
                    _give_up(traffic, answer, why, offline_limit_s=offline_limit_s)
        except Exception as error:
            # The others are looked after all the same.
            log.exception("bus.answer_failed request=%s session=%s", answer.request_id, answer.session)
            answer.fail(AnswerLost(f"The request could not be followed ({type(error).__name__}: {error})."))
    traffic.repeat_cancels(now)
    return max(0.01, nearest - now)


def _give_up(traffic: Traffic[Any, Any, Any], answer: FollowedAnswer, why: Why, *, offline_limit_s: float) -> None:
    # A worker that comes later finds request and cancel in this order, and does not work for nobody.
    traffic.cancel(answer)
    answer.fail(
        given_up(
            why,
            broker=str(traffic.address),
            sends=answer.sends,
            workers=traffic.board.online(),
            offline_limit_s=offline_limit_s,
            nobody=traffic.nobody("The request was not answered"),
        )
    )


class Watch:
    """One thread for all answers of a client; `changed` wakes it."""

    def __init__(
        self, traffic: Traffic[Connection, Answer, PendingAck], *, changed: threading.Event, offline_limit_s: float
    ) -> None:
        self._traffic = traffic
        self._changed = changed
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
                self._notice_a_dead_connection()
                pause_s = look_after(self._traffic, offline_limit_s=self._offline_limit_s)
            except Exception:
                log.exception("bus.watch_failed")
                pause_s = 1.0
            self._changed.wait(pause_s)
            self._changed.clear()

    def _notice_a_dead_connection(self) -> None:
        live = self._traffic.live()
        if live and not self._traffic.connection.thread_lives():
            for answer in live:
                answer.fail(AnswerLost("The network thread of the bus client has ended; open a new client."))
