"""The I/O loop: sockets, timed calls and calls from other threads, in one thread."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

from llamacpp_mqtt_deploy.io_loop import HANG_UP, READ, IoLoop
from tests.support.waiting import eventually


def test_calls_run_in_the_loops_thread_in_the_order_in_which_they_were_given(loop: IoLoop) -> None:
    heard: list[tuple[int, bool]] = []
    done = threading.Event()
    for number in range(100):
        loop.call_soon(lambda number=number: heard.append((number, loop.is_here())))  # type: ignore[misc]
    loop.call_soon(done.set)
    assert done.wait(5)
    assert heard == [(number, True) for number in range(100)]


def test_a_call_wakes_a_loop_that_waits(loop: IoLoop) -> None:
    for _ in range(200):
        done = threading.Event()
        loop.call_soon(done.set)
        assert done.wait(0.5), "the loop slept through a call"


def test_a_shorter_timer_wakes_a_loop_that_waits_for_a_longer_one(loop: IoLoop) -> None:
    loop.after(60, lambda: None)
    for _ in range(50):
        done = threading.Event()
        loop.after(0.001, done.set)
        assert done.wait(0.5), "the loop slept through a timer"


def test_timers_run_at_their_time_in_order_and_can_be_taken_back(loop: IoLoop) -> None:
    heard: list[str] = []
    done = threading.Event()
    begun = time.monotonic()
    loop.after(0.06, done.set)
    loop.after(0.04, lambda: heard.append("second"))
    loop.after(0.02, lambda: heard.append("first"))
    loop.after(0.03, lambda: heard.append("never")).cancel()
    assert done.wait(5)
    assert heard == ["first", "second"]
    assert time.monotonic() - begun >= 0.06


def test_what_comes_again_comes_again_although_it_failed_once(loop: IoLoop) -> None:
    times: list[float] = []

    def call() -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            raise ValueError("a defect")

    loop.every(lambda: 0.01, call)
    eventually(lambda: len(times) >= 3)


def test_a_call_that_fails_costs_the_others_nothing(loop: IoLoop) -> None:
    done = threading.Event()
    loop.call_soon(lambda: 1 / 0)  # type: ignore[arg-type]
    loop.call_soon(done.set)
    assert done.wait(5)


def test_a_socket_is_told_ready_until_it_is_unwatched(loop: IoLoop) -> None:
    ours, theirs = socket.socketpair()
    heard: list[bytes] = []
    fd = ours.fileno()
    with ours, theirs:
        loop.call_soon(lambda: loop.watch(fd, READ, lambda _: heard.append(ours.recv(10))))
        theirs.send(b"one")
        eventually(lambda: heard == [b"one"])
        stopped = threading.Event()
        loop.call_soon(lambda: (loop.unwatch(fd), stopped.set()))  # type: ignore[func-returns-value, arg-type]
        assert stopped.wait(5)
        theirs.send(b"two")
        again = threading.Event()
        loop.after(0.02, again.set)
        assert again.wait(5)
        assert heard == [b"one"]


def test_a_socket_that_is_not_read_still_tells_that_the_other_side_has_finished(loop: IoLoop) -> None:
    ours, theirs = socket.socketpair()
    hung_up = threading.Event()
    fd = ours.fileno()
    with ours:

        def ready(events: int) -> None:
            if events & HANG_UP:
                loop.unwatch(fd)
                hung_up.set()

        loop.call_soon(lambda: loop.watch(fd, HANG_UP, ready))
        theirs.send(b"unread")
        assert not hung_up.wait(0.05)
        theirs.close()
        assert hung_up.wait(5)


def test_the_end_of_a_turn_comes_after_all_that_is_ready_in_it(loop: IoLoop) -> None:
    heard: list[str] = []
    done = threading.Event()

    def first() -> None:
        heard.append("first")
        loop.at_end_of_turn(lambda: (heard.append("end"), done.set()))  # type: ignore[func-returns-value, arg-type]
        loop.call_soon(lambda: heard.append("next turn"))

    held = threading.Event()
    loop.call_soon(lambda: held.wait(5) and None)  # type: ignore[arg-type]
    loop.call_soon(first)
    loop.call_soon(lambda: heard.append("second"))
    held.set()
    assert done.wait(5)
    assert heard[:3] == ["first", "second", "end"]


def test_a_closed_loop_has_ended_and_leaves_no_file_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    made = IoLoop()
    made.start()
    made.call_soon(lambda: None)
    made.close()
    made.close()
    assert not made.is_alive()
    del made
    eventually(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before)
