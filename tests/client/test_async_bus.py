"""What only the asyncio client promises: no threads for streams, one subscription for many sessions, bounds on what waits."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

import pytest

from llamacpp_mqtt_deploy.client import AnswerLost, AsyncBusClient, BrokerUnreachable, BusError
from tests.client.worker import PlayedWorker
from tests.support.cable import SUBACK, Cable
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30) as limit:
            await work()
        assert not limit.expired(), "it went on after it had been cancelled"

    asyncio.run(bounded())


def test_a_thousand_open_streams_cost_no_thread_and_all_get_their_own_answer(
    start_mosquitto: Callable[..., Mosquitto],
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 0", "max_inflight_messages 100"])
    asked: list[tuple[str, dict[str, Any]]] = []

    def hold(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        asked.append((session, request))
        if len(asked) < 1000:
            return
        for place, one in asked:
            worker.say(place, one, type="chunk", seq=0, content=one["prompt"])
            worker.done(place, one, one["prompt"], seq=1)

    async def work() -> None:
        async with AsyncBusClient("127.0.0.1", broker.port, live_answers=1000, whole_levels=True) as bus:
            before = threading.active_count()
            answers = [await bus.ask(f"text {number}", session=f"me/s{number % 50}") for number in range(1000)]
            assert threading.active_count() <= before
            with pytest.raises(BusError, match="1000 requests wait"):
                await bus.ask("one more")
            done = await asyncio.gather(*(answer.result(30) for answer in answers))
            assert [one.content for one in done] == [f"text {number}" for number in range(1000)]

    with PlayedWorker(broker.port, play=hold):
        run(work)


@pytest.mark.parametrize("transport", ["unix", "websockets"])
def test_the_other_ways_to_a_broker_work_too(start_mosquitto: Callable[..., Mosquitto], transport: Any) -> None:
    broker = start_mosquitto(unix=True, websockets=True)
    host = str(broker.unix_path) if transport == "unix" else "127.0.0.1"
    port = None if transport == "unix" else broker.websocket_port

    async def work() -> None:
        async with AsyncBusClient(host, port, transport=transport) as bus:
            assert [piece async for piece in await bus.ask("one two")] == ["one", " two"]
            long = "word" * 25_000
            assert (await (await bus.ask(long, stream=False)).result(20)).content == long

    with PlayedWorker(broker.port):
        run(work)


def test_a_client_that_is_cancelled_while_it_opens_leaves_no_connection_behind(broker: Mosquitto) -> None:
    async def work() -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5), AsyncBusClient("127.0.0.1", cable.port):
                    pass
        assert len(asyncio.all_tasks()) == 1

    with closing(Cable(broker.port)) as cable:
        cable.eat(SUBACK)
        run(work)
        eventually(cable.is_idle)
        assert cable.connections == 3


def test_a_broker_that_hangs_up_right_after_its_welcome_is_told_at_once() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(bytes.fromhex("2003000000 e00197"))  # CONNACK, and DISCONNECT: quota exceeded
        writer.close()

    async def work() -> None:
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            bus = AsyncBusClient("127.0.0.1", server.sockets[0].getsockname()[1], protocol="5")
            with pytest.raises(BrokerUnreachable, match="right after its welcome"):
                await bus.open()

    run(work)


def test_an_answer_that_is_abandoned_goes_on_and_the_same_request_brings_it(broker: Mosquitto) -> None:
    def resume(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        if len(worker.requests) == 1:
            worker.say(session, request, type="chunk", seq=0, content="before")
        else:
            worker.say(session, request, type="snapshot", content="before and", next_seq=2)
            worker.done(session, request, "before and after", seq=3)

    async def work() -> None:
        async with AsyncBusClient("127.0.0.1", broker.port) as bus:
            first = await bus.ask("hello", session="me/s", request_id="mine")
            assert await anext(aiter(first)) == "before"
            first.abandon()
            with pytest.raises(AnswerLost):
                await first.result(5)
            again = await bus.ask("hello", session="me/s", request_id="mine")
            assert "".join([piece async for piece in again]) == "before and after"

    with PlayedWorker(broker.port, play=resume) as worker:
        run(work)
        assert worker.controls == []


def test_a_cancel_without_waiting_reaches_the_worker(broker: Mosquitto) -> None:
    async def work() -> None:
        async with AsyncBusClient("127.0.0.1", broker.port) as bus:
            answer = await bus.ask("hello", request_id="mine")
            answer.cancel_soon()
            await asyncio.to_thread(eventually, lambda: worker.controls)

    with PlayedWorker(broker.port, play=lambda *_: None) as worker:
        run(work)
        assert worker.controls[0][1] == {"action": "cancel", "request_id": "mine"}


def test_a_close_that_is_cancelled_hangs_up_and_leaves_no_task_behind(broker: Mosquitto) -> None:
    async def work() -> None:
        bus = await AsyncBusClient("127.0.0.1", broker.port).open()
        await bus.ask("hello")
        closing = asyncio.create_task(bus.close())
        await asyncio.sleep(0)
        assert not closing.done(), "it waits for the broker to take the cancel"
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await asyncio.sleep(0)
        assert not [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("lmd-")]
        await bus.close()

    with PlayedWorker(broker.port, play=lambda *_: None):
        run(work)
        eventually(lambda: re.search(r"lmd-client-\S+ (disconnected|closed its connection)", broker.log()))


def test_an_answer_longer_than_the_bound_is_given_up(broker: Mosquitto) -> None:
    def flood(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        for number in range(30):
            worker.say(session, request, type="chunk", seq=number, content="x" * 1000)

    async def work() -> None:
        async with AsyncBusClient("127.0.0.1", broker.port, max_answer_chars=20_000) as bus:
            answer = await bus.ask("hello")
            with pytest.raises(AnswerLost, match="more than 20000 characters"):
                await answer.result(20)

    with PlayedWorker(broker.port, play=flood):
        run(work)


def test_one_subscription_serves_all_sessions_below_a_level(broker: Mosquitto) -> None:
    async def work() -> None:
        async with AsyncBusClient("127.0.0.1", broker.port, whole_levels=True) as bus:
            for session in ("me", "me/a", "me/b", "you/a"):
                assert (await (await bus.ask("hi", session=session)).result(10)).content == "hi"

    with PlayedWorker(broker.port):
        run(work)
    assert re.findall(r"(llm/reply/\S+) \(QoS 1\)", broker.log()) == ["llm/reply/me/#", "llm/reply/you/#"]


def test_status_and_health_are_known_without_waiting_once_they_have_come(broker: Mosquitto) -> None:
    async def work() -> None:
        async with AsyncBusClient("127.0.0.1", broker.port) as bus:
            assert (await bus.status())["played"]["state"] == "online"
            assert bus.workers()["played"]["models"] == ["a"]
            assert (await bus.health())["played"] == {"queue": 3}
            assert bus.loads()["played"] == {"queue": 3}
            assert bus.status_readable

    with PlayedWorker(broker.port) as worker:
        worker.status(models=["a"])
        worker.health(queue=3)
        run(work)
