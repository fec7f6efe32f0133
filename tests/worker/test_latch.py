"""What happens once and is waited for."""

from __future__ import annotations

import math
import threading
import time

import pytest

from llamacpp_mqtt_deploy.latch import Latch


def test_who_waits_in_vain_comes_back_after_his_time() -> None:
    latch = Latch()
    began = time.monotonic()
    assert not latch.wait(0.05)
    assert time.monotonic() - began >= 0.05
    assert not latch.is_set()


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 1e-9])
def test_no_time_to_wait_is_a_look(timeout_s: float) -> None:
    latch = Latch()
    assert not latch.wait(timeout_s)
    latch.set()
    assert latch.wait(timeout_s)


def test_all_that_wait_go_on_and_so_does_whoever_comes_later() -> None:
    latch, went_on = Latch(), threading.Semaphore(0)

    def wait() -> None:
        if latch.wait(math.inf):
            went_on.release()

    threads = [threading.Thread(target=wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert not went_on.acquire(timeout=0.05)
    latch.set()
    assert all(went_on.acquire(timeout=10) for _ in threads)
    for thread in threads:
        thread.join()
    assert latch.is_set()
    assert latch.wait(0.0)
