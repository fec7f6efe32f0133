"""Bodies that take long to understand: others have their turns meanwhile, and what is only made to take long is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from llamacpp_mqtt_deploy.core.errors import BadRequest, Busy
from llamacpp_mqtt_deploy.core.payloads import MAX_MARKS
from llamacpp_mqtt_deploy.gateway.bodies import LONG_BYTES, LONG_MARKS, Bodies
from llamacpp_mqtt_deploy.gateway.long_bodies import LongBodies
from tests.gateway.world import World

LONG = "a" * LONG_BYTES
MANY = {"messages": [{"role": "user", "content": "a"}], "user": [[]] * (MAX_MARKS // 3)}


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


@pytest.mark.parametrize(
    "raw, beside",
    [
        (b"a question", False),
        (b'{"prompt":"' + b"a" * (LONG_BYTES - 13) + b'"}', False),
        (b'{"prompt":"' + b"a" * LONG_BYTES + b'"}', True),
        (b'{"prompt":"a","user":[' + b"[]," * (LONG_MARKS // 3) + b"1]}", True),
    ],
)
def test_a_long_body_is_understood_in_a_thread_and_a_short_one_at_once(raw: bytes, beside: bool) -> None:
    async def test() -> None:
        bodies = Bodies(max_bytes=10 * LONG_BYTES, timeout_s=10)
        assert await bodies.content("a", raw)
        worked_in = await bodies.work("a", raw, threading.get_ident)
        assert (worked_in != threading.get_ident()) is beside
        bodies.close()

    in_a_loop(test)


def test_the_loop_turns_while_a_long_body_is_understood() -> None:
    async def test() -> None:
        bodies = LongBodies(within_s=20)
        may_end = threading.Event()
        working = asyncio.create_task(bodies.understand("a", lambda: may_end.wait(15)))
        await asyncio.sleep(0)
        may_end.set()
        assert await working
        bodies.close()

    in_a_loop(test)


def test_one_is_understood_at_a_time_and_owners_take_turns() -> None:
    async def test() -> None:
        bodies = LongBodies(within_s=20)
        begun: list[str] = []
        at_once = 0

        def work(name: str) -> str:
            nonlocal at_once
            at_once += 1
            assert at_once == 1
            begun.append(name)
            at_once -= 1
            return name.upper()

        names = ["a1", "a2", "a3", "a4", "b1", "c1"]
        done = await asyncio.gather(*(bodies.understand(name[0], partial(work, name)) for name in names))
        assert done == [name.upper() for name in names]
        assert begun == ["a1", "a2", "b1", "c1", "a3", "a4"]
        bodies.close()

    in_a_loop(test)


def test_whoever_waits_too_long_is_told_to_come_back_and_the_others_go_on() -> None:
    async def test() -> None:
        bodies = LongBodies(within_s=0.2)
        may_end, worked = threading.Event(), []
        with pytest.raises(Busy):
            await bodies.understand("a", lambda: may_end.wait(15))
        with pytest.raises(Busy):
            await bodies.understand("b", lambda: worked.append("nobody waits for this"))
        may_end.set()
        while True:
            try:
                assert await bodies.understand("c", lambda: "understood") == "understood"
                break
            except Busy:  # the first one has not ended yet
                continue
        assert worked == []
        bodies.close()

    in_a_loop(test)


def test_one_who_leaves_is_passed_over_and_an_error_is_told() -> None:
    async def test() -> None:
        bodies = LongBodies(within_s=20)
        may_end, worked = threading.Event(), []

        def refuse() -> None:
            raise BadRequest("no")

        first = asyncio.create_task(bodies.understand("a", lambda: may_end.wait(15)))
        leaving = asyncio.create_task(bodies.understand("b", lambda: worked.append("nobody waits for this")))
        last = asyncio.create_task(bodies.understand("c", refuse))
        await asyncio.sleep(0)
        for task in (first, leaving):
            task.cancel()
        may_end.set()
        with pytest.raises(BadRequest):
            await last
        assert worked == []
        bodies.close()

    in_a_loop(test)


# --- the gateway itself ------------------------------------------------------------------------------------------------


@pytest.mark.broker
def test_long_requests_are_answered_and_what_has_too_many_values_is_refused(world: World) -> None:
    world.worker()
    gateway = world.gateway()
    assert httpx.post(f"{gateway.url}/ask", json={"prompt": LONG}, timeout=20).text == LONG
    for path in ("/v1/chat/completions", "/v1/messages/count_tokens", "/control", "/api/show"):
        refused = httpx.post(gateway.url + path, json=MANY, timeout=20)
        assert refused.status_code == 400, path
        assert f"{MAX_MARKS} brackets and commas" in refused.text, path
    with connect(f"ws://127.0.0.1:{gateway.port}/ws") as socket:
        socket.send(json.dumps({"request_id": "r0", **MANY}))
        error = json.loads(socket.recv(20))
        assert (error["code"], error["final"]) == ("bad_request", True)
        socket.send(json.dumps({"request_id": "r1", "prompt": LONG, "stream": False}))
        socket.send(json.dumps({"request_id": "r2", "prompt": LONG, "temperature": 9}))
        ends: dict[str, Any] = {}
        text = ""
        while len(ends) < 2:
            event = json.loads(socket.recv(20))
            text += event["content"] if event["type"] == "chunk" else ""
            if event["type"] in ("done", "error"):
                ends[event["request_id"]] = event
    assert ends["r1"]["type"] == "done"
    assert text == LONG
    assert list(ends["r2"]["fields"]) == ["temperature"]
