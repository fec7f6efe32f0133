"""Both bus clients, the one with threads and the one for asyncio, against a real mosquitto and a worker that the test plays."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, Literal

import pytest

from llamacpp_mqtt_deploy.client import (
    AnswerError,
    AnswerLost,
    BrokerRefused,
    BrokerUnreachable,
    BusClient,
    BusError,
    NotPermitted,
    NoWorker,
    RequestRejected,
    tls_context,
)
from llamacpp_mqtt_deploy.client.async_connection import AsyncConnection
from llamacpp_mqtt_deploy.client.connection import Connection
from tests.client.looped import LoopedBusClient, LoopThread
from tests.client.worker import PlayedWorker
from tests.support.amqtt_broker import AmqttBroker
from tests.support.cable import SUBACK, Cable
from tests.support.certificates import Authority
from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port
from tests.support.waiting import eventually
from tests.support.websocket_proxy import WebsocketProxy

Start = Callable[..., Mosquitto]

pytestmark = pytest.mark.broker

Client: Any = BusClient
"""What the test at hand is about; each test runs with both."""


@pytest.fixture(autouse=True, params=["threads", "asyncio"])
def kind_of_client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "threads":
        yield
        return
    thread = LoopThread()
    monkeypatch.setitem(globals(), "Client", partial(LoopedBusClient, thread))
    yield
    thread.close()


def test_a_prompt_larger_than_every_buffer_goes_over_a_websocket_at_once(start_mosquitto: Start) -> None:
    broker = start_mosquitto(websockets=True)
    came: list[int] = []

    def count(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        came.append(len(request["prompt"]))
        worker.say(session, request, type="chunk", seq=0, content="ok")
        worker.done(session, request, "ok", seq=1)

    with (
        PlayedWorker(broker.port, play=count),
        Client("127.0.0.1", broker.websocket_port, transport="websockets") as bus,
    ):
        # The request is sent again when nobody takes it up for 10 s, which would hide that the rest of the first was left behind.
        assert bus.ask("x" * 8_000_000).result(9).content == "ok"
    assert came == [8_000_000]


def test_a_websocket_that_pings_and_cuts_frames_anywhere_is_kept(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port), WebsocketProxy(broker.port) as proxy:
        with Client("127.0.0.1", proxy.port, transport="websockets") as bus:
            for number in range(20):
                answer = bus.ask(f"{number} two " + "x" * number * 1000)
                assert answer.result(9).content == f"{number} two " + "x" * number * 1000
            before = proxy.pongs
            eventually(lambda: proxy.pongs > before + 2)
            assert proxy.ends == [], "all of it on one connection"
        eventually(lambda: proxy.ends)
        assert ["1000" in end for end in proxy.ends] == [True]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("transport", ["tcp", "websockets"])
def test_large_events_and_small_ones_in_turn_come_in_order_and_are_acknowledged(
    start_mosquitto: Start, protocol: str, transport: str
) -> None:
    # What does not come in one read takes another way than the rest.
    pieces = ["x" * (200_000 if number % 3 == 0 else number) for number in range(60)]

    def answer(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        for number, piece in enumerate(pieces):
            worker.say(session, request, type="chunk", seq=number, content=piece)
        worker.done(session, request, "".join(pieces), seq=len(pieces))

    # One message that is not acknowledged would be the last one.
    broker = start_mosquitto(settings=["max_inflight_messages 1"])
    # mosquitto's own websockets take three seconds for a message of 200 kB, whoever reads it.
    with PlayedWorker(broker.port, play=answer), WebsocketProxy(broker.port, largest_frame=50_000) as proxy:
        port = proxy.port if transport == "websockets" else broker.port
        with Client("127.0.0.1", port, transport=transport, protocol=protocol) as bus:
            answered = bus.ask("hello")
            assert list(answered) == [piece for piece in pieces if piece]
            assert answered.result(20).content == "".join(pieces)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_message_that_no_worker_would_send_is_passed_over_and_told(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.client.paho_client.MOST_INCOMING_BYTES", 100_000)

    def answer(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="chunk", seq=0, content="well")
        worker.say(session, {"request_id": "another"}, type="chunk", seq=0, content="x" * 3_000_000)
        worker.done(session, request, "well", seq=1)

    with PlayedWorker(broker.port, play=answer), Client("127.0.0.1", broker.port, protocol=protocol) as bus:
        assert bus.ask("hello").result(20).content == "well"
    (told,) = [record.getMessage() for record in caplog.records if "message.too_long" in record.getMessage()]
    assert told.startswith("message.too_long topic='llm/reply/")
    assert int(told.partition("bytes=")[2]) > 3_000_000


def test_a_wrong_path_of_a_websocket_is_named(broker: Mosquitto) -> None:
    with (
        WebsocketProxy(broker.port) as proxy,
        pytest.raises(BrokerUnreachable, match=r"answered 404 Not Found\. Check mqtt\.port"),
        Client("127.0.0.1", proxy.port, transport="websockets", websocket_path="/other"),
    ):
        pass


VERSIONS = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


@VERSIONS
def test_the_pieces_of_an_answer_arrive_in_order_and_join_to_the_whole(
    broker: Mosquitto, protocol: Literal["5", "3.1.1"]
) -> None:
    with PlayedWorker(broker.port), Client("127.0.0.1", broker.port, protocol=protocol) as bus:
        answer = bus.ask("one two three")
        pieces = list(answer)
        done = answer.result()
    assert pieces == ["one", " two", " three"]
    assert done.content == "one two three"
    assert done.finish_reason == "stop"
    assert done.model == "played"
    assert done.usage["completion_tokens"] == 3
    assert bus.protocol == protocol


def test_events_come_decoded_with_the_terminal_one_last(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port), Client("127.0.0.1", broker.port) as bus:
        kinds = [event["type"] for event in bus.ask("a b").events()]
    assert kinds == ["start", "chunk", "chunk", "done"]


def test_an_error_event_becomes_an_exception_with_its_code(broker: Mosquitto) -> None:
    def refuse(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(
            session,
            request,
            type="error",
            seq=0,
            final=True,
            code="busy",
            message="Full.",
            retryable=True,
            retry_after_s=7,
        )

    with PlayedWorker(broker.port, play=refuse), Client("127.0.0.1", broker.port) as bus:
        answer = bus.ask("hello")
        with pytest.raises(AnswerError, match="busy: Full") as caught:
            list(answer)
        assert [event["type"] for event in bus.ask("hello").events()] == ["error"]
    assert caught.value.retryable
    assert caught.value.details["retry_after_s"] == 7


def test_a_missing_chunk_makes_the_client_send_the_same_bytes_again(broker: Mosquitto) -> None:
    def lose_one(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        if len(worker.requests) == 1:
            worker.say(session, request, type="start", model="played")
            worker.say(session, request, type="chunk", seq=0, content="one")
            worker.say(session, request, type="chunk", seq=2, content=" three")
            return
        worker.say(session, request, type="snapshot", content="one two three", next_seq=3)
        worker.say(session, request, type="chunk", seq=2, content=" three")
        worker.say(session, request, type="chunk", seq=3, content=" four")
        worker.done(session, request, "one two three four", seq=4)

    with PlayedWorker(broker.port, play=lose_one) as worker, Client("127.0.0.1", broker.port) as bus:
        answer = bus.ask("hello")
        assert list(answer) == ["one", " two three", " four"]
        assert answer.sends == 2
        assert len({payload for _, payload in worker.requests}) == 1
        assert answer.result().complete


def test_a_request_id_may_be_used_again_as_soon_as_its_answer_is_there(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port) as worker, Client("127.0.0.1", broker.port) as bus:
        answers = [bus.ask("same words", request_id="mine").result(10).content for _ in range(50)]
    assert answers == ["same words"] * 50
    assert len(worker.requests) == 50


def test_an_id_whose_answer_is_still_awaited_is_in_use(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port, play=lambda *_: None), Client("127.0.0.1", broker.port) as bus:
        bus.ask("hello", request_id="mine")
        with pytest.raises(ValueError, match="'mine' is in use"):
            bus.ask("hello", request_id="mine")


# --- an answer that does not fit into one event ------------------------------------------------------------------------


def end_without_text(worker: PlayedWorker, session: str, request: dict[str, Any], *, seq: int) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 100, "total_tokens": 103, "cached_tokens": 0}
    worker.say(
        session, request, type="done", seq=seq, final=True, content_omitted=True, finish_reason="stop", usage=usage,
        timings={}, dropped_messages=0,
    )  # fmt: skip


def in_pieces(worker: PlayedWorker, session: str, request: dict[str, Any], *, lost: int = -1) -> None:
    for number in range(4):
        if number != lost:
            worker.say(session, request, type="chunk", seq=number, content=f"{number} ")
    end_without_text(worker, session, request, seq=4)


def test_the_chunks_before_an_end_without_text_are_the_whole_answer(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port, play=in_pieces), Client("127.0.0.1", broker.port) as bus:
        answer = bus.ask("hello", stream=False)
        done = answer.result(10)
    assert (done.content, done.complete, answer.sends) == ("0 1 2 3 ", True, 1)
    assert done.message == {"role": "assistant", "content": "0 1 2 3 "}


@pytest.mark.parametrize("lost", [0, 2, 3])
def test_an_end_without_text_is_no_end_while_a_chunk_is_missing(broker: Mosquitto, lost: int) -> None:
    def lose_one(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        in_pieces(worker, session, request, lost=lost if len(worker.requests) == 1 else -1)

    with PlayedWorker(broker.port, play=lose_one) as worker, Client("127.0.0.1", broker.port) as bus:
        answer = bus.ask("hello", stream=False)
        kinds = [event["type"] for event in answer.events()]
        assert kinds == ["chunk", "chunk", "chunk", "chunk", "done"]
        assert (answer.result().content, answer.sends) == ("0 1 2 3 ", 2)
    assert len({payload for _, payload in worker.requests}) == 1


@pytest.mark.parametrize("seq", [0, 4])
def test_an_answer_whose_text_never_comes_is_an_error_that_says_so(broker: Mosquitto, seq: int) -> None:
    def never(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        end_without_text(worker, session, request, seq=seq)

    with (
        PlayedWorker(broker.port, play=never),
        Client("127.0.0.1", broker.port, resend_limit=1) as bus,
    ):
        answer = bus.ask("hello", stream=False)
        with pytest.raises(AnswerLost, match=r"the worker has ended it.*text did not arrive"):
            answer.result(20)
        assert answer.sends == 2


def test_who_asks_for_an_end_without_text_gets_one(broker: Mosquitto) -> None:
    def silent(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        end_without_text(worker, session, request, seq=0)

    with PlayedWorker(broker.port, play=silent), Client("127.0.0.1", broker.port) as bus:
        answer = bus.ask("hello", stream=False, full_content=False)
        assert (answer.result(10).content, answer.sends) == ("", 1)


def test_silence_makes_the_client_send_again_and_a_stored_end_is_taken(broker: Mosquitto) -> None:
    def fall_silent(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        if len(worker.requests) == 1:
            worker.say(session, request, type="start", model="played")
        else:
            worker.done(session, request, "at last", seq=5)

    with PlayedWorker(broker.port, play=fall_silent) as worker:
        worker.status(heartbeat_s=0.1)
        with Client("127.0.0.1", broker.port) as bus:
            bus.status()
            answer = bus.ask("hello")
            assert list(answer) == ["at last"]
            assert answer.sends == 2


def test_an_answer_that_stays_silent_is_given_up_after_the_limit(broker: Mosquitto) -> None:
    def start_only(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        if len(worker.requests) == 1:
            worker.say(session, request, type="start", model="played")

    with PlayedWorker(broker.port, play=start_only) as worker:
        worker.status(heartbeat_s=0.1)
        with Client("127.0.0.1", broker.port, resend_limit=2) as bus:
            bus.status()
            answer = bus.ask("hello")
            with pytest.raises(AnswerLost, match="broke off"):
                answer.result(10)
        eventually(
            lambda: ("cancel", answer.request_id) in [(c["action"], c.get("request_id")) for _, c in worker.controls]
        )


def test_repeated_and_foreign_events_change_nothing(broker: Mosquitto) -> None:
    def stutter(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.raw(f"llm/reply/{session}", b"not json")
        worker.raw(f"llm/reply/{session}", b"[1]")
        worker.raw(f"llm/reply/{session}", b'{"type":"chunk","seq":{},"request_id":["x"]}')
        worker.say(session, {"request_id": "other"}, type="chunk", seq=0, content="foreign")
        worker.say(session, request, type="novelty", content="later protocol")
        for _ in range(2):
            worker.say(session, request, type="chunk", seq=0, content="once")
        for _ in range(2):
            worker.done(session, request, "once", seq=1)

    with PlayedWorker(broker.port, play=stutter), Client("127.0.0.1", broker.port) as bus:
        assert list(bus.ask("hello")) == ["once"]
        assert list(bus.ask("hello")) == ["once"]


def test_a_cancel_reaches_the_worker_and_the_partial_text_stays(broker: Mosquitto) -> None:
    def wait_for_cancel(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="chunk", seq=0, content="partial")
        threading.Thread(target=finish, args=(worker, session, request), daemon=True).start()

    def finish(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        eventually(lambda: worker.controls)
        worker.done(session, request, "partial", seq=1, reason="cancelled")

    with PlayedWorker(broker.port, play=wait_for_cancel) as worker, Client("127.0.0.1", broker.port) as bus:
        answer = bus.ask("hello")
        assert next(iter(answer)) == "partial"
        answer.cancel()
        done = answer.result(10)
    assert done.cancelled
    assert done.content == "partial"
    assert worker.controls[0][1] == {"action": "cancel", "request_id": answer.request_id}


def test_leaving_the_block_of_an_answer_cancels_it(broker: Mosquitto) -> None:
    def hang(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="chunk", seq=0, content="partial")

    with PlayedWorker(broker.port, play=hang) as worker, Client("127.0.0.1", broker.port) as bus:
        with bus.ask("hello") as answer:
            assert next(iter(answer)) == "partial"
        eventually(lambda: worker.controls)
        second = bus.ask("again")
        bus.close()
        with pytest.raises(AnswerLost, match="closed"):
            second.result(5)
        eventually(lambda: second.request_id in [control["request_id"] for _, control in worker.controls])


@VERSIONS
def test_without_a_worker_the_error_says_so(broker: Mosquitto, protocol: Literal["5", "3.1.1"]) -> None:
    with Client("127.0.0.1", broker.port, protocol=protocol, answer_within_s=0.2) as bus:
        with pytest.raises(NoWorker, match=r"no worker is online under llm/status/#"):
            bus.ask("hello").result(10)
        with pytest.raises(NoWorker, match=r"ping was not answered"):
            bus.control(None, "ping", timeout_s=0.2)


def test_a_worker_that_said_goodbye_is_named(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port, play=lambda *_: None) as worker:
        worker.answers_control = False
        worker.status(state="offline")
        with Client("127.0.0.1", broker.port, answer_within_s=0.1) as bus:
            bus.status()
            with pytest.raises(NoWorker, match="played is offline"):
                bus.ask("hello").result(10)


def test_a_worker_whose_status_may_not_be_read_proves_itself_by_a_ping(broker: Mosquitto) -> None:
    def late(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        threading.Thread(target=finish, args=(worker, session, request), daemon=True).start()

    def finish(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        eventually(lambda: any(control["action"] == "ping" for _, control in worker.controls))
        worker.done(session, request, "late", seq=0)

    with (
        PlayedWorker(broker.port, play=late, online=False),
        Client("127.0.0.1", broker.port, answer_within_s=0.1) as bus,
    ):
        assert bus.ask("hello", stream=False).result(10).content == "late"


def test_the_client_survives_a_restart_of_the_broker_in_mid_answer(broker: Mosquitto) -> None:
    def resume(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        if len(worker.requests) == 1:
            worker.say(session, request, type="chunk", seq=0, content="before")
        else:
            worker.say(session, request, type="snapshot", content="before and", next_seq=2)
            worker.done(session, request, "before and after", seq=3)

    with PlayedWorker(broker.port, play=resume) as worker, Client("127.0.0.1", broker.port) as bus:
        answer = bus.ask("hello")
        pieces = iter(answer)
        assert next(pieces) == "before"
        broker.stop()
        broker.start()
        assert "".join(pieces) == " and after"
        assert answer.sends >= 2
        assert list(bus.ask("and again")) != []
        assert len({payload for _, payload in worker.requests[:2]}) == 1


def test_a_broker_that_stays_away_is_reported(broker: Mosquitto) -> None:
    with (
        PlayedWorker(broker.port, play=lambda *_: None),
        Client("127.0.0.1", broker.port, offline_limit_s=0.3) as bus,
    ):
        answer = bus.ask("hello")
        broker.stop()
        with pytest.raises(BrokerUnreachable, match="has been away for"):
            answer.result(10)


def test_a_client_that_could_not_subscribe_at_first_may_open_again_and_reconnects_like_any_other(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (Connection, AsyncConnection):
        monkeypatch.setattr(kind.subscribe, "__kwdefaults__", {"timeout_s": 0.3})
    with closing(Cable(broker.port)) as cable, PlayedWorker(broker.port):
        bus = Client("127.0.0.1", cable.port)
        cable.eat(SUBACK)
        with pytest.raises(BrokerUnreachable, match="left a subscription unanswered"):
            bus.open()
        cable.eat()
        bus.open()
        try:
            assert bus.ask("hello").result(10).content == "hello"
            connections = cable.connections
            cable.cut()
            eventually(lambda: cable.connections > connections)
            assert bus.ask("hello again").result(20).content == "hello again"
        finally:
            bus.close()


def test_a_program_with_many_open_files_can_ask_too(broker: Mosquitto) -> None:
    # select() takes no descriptor from 1024 on.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.fail(f"this machine allows {hard} open files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with PlayedWorker(broker.port), contextlib.ExitStack() as many:
        for _ in range(1100):
            many.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        with Client("127.0.0.1", broker.port) as bus:
            assert bus.ask("x" * 300_000).result(9).content == "x" * 300_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_request_over_the_brokers_size_limit_ends_instead_of_looping(start_mosquitto: Start) -> None:
    small = start_mosquitto(settings=["message_size_limit 2000"])
    with PlayedWorker(small.port), Client("127.0.0.1", small.port, resend_limit=1) as bus:
        # Plain paho cannot read the refusal and tries again; in a process where the worker's link mended paho it is heard.
        with pytest.raises(BusError, match="message_size_limit"):
            bus.ask("x" * 5000).result(30)
        assert list(bus.ask("small")) == ["small"]


def test_a_rejected_delivery_raises_with_its_code(broker: Mosquitto) -> None:
    def reject(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="rejected", code="duplicate_request", message="The id is taken.")

    with (
        PlayedWorker(broker.port, play=reject),
        Client("127.0.0.1", broker.port) as bus,
        pytest.raises(RequestRejected, match="duplicate_request"),
    ):
        bus.ask("hello", request_id="mine").result(10)


def test_with_the_recommended_access_list_the_own_session_works(guarded: Mosquitto) -> None:
    with (
        PlayedWorker(guarded.port, username="worker"),
        Client("127.0.0.1", guarded.port, username="alice", password="alice-secret") as bus,
    ):
        assert bus.session.startswith("alice/")
        assert list(bus.ask("one two")) == ["one", " two"]
        assert bus.status()["played"]["state"] == "online"


def test_a_topic_of_somebody_else_is_refused_at_once_on_mqtt_5(guarded: Mosquitto) -> None:
    with (
        PlayedWorker(guarded.port, username="worker"),
        Client("127.0.0.1", guarded.port, username="bob", password="bob-secret", protocol="5") as bus,
    ):
        with pytest.raises(NotPermitted, match="'bob' may not publish to llm/request/alice/x"):
            bus.ask("hello", session="alice/x").result(10)
        with pytest.raises(NotPermitted, match="llm/control/alice/x"):
            bus.control("alice/x", "ping")


def test_a_denied_publish_on_mqtt_311_ends_with_an_explanation(guarded: Mosquitto) -> None:
    with (
        PlayedWorker(guarded.port, username="worker"),
        Client(
            "127.0.0.1",
            guarded.port,
            username="bob",
            password="bob-secret",
            protocol="3.1.1",
            answer_within_s=0.1,
            resend_limit=1,
        ) as bus,
    ):
        bus.status()
        with pytest.raises(AnswerLost, match="looks like success"):
            bus.ask("hello", session="alice/x").result(10)


def test_a_wrong_password_is_refused_at_once_and_never_shown(guarded: Mosquitto) -> None:
    client = Client("127.0.0.1", guarded.port, username="alice", password="wr0ng-secret")
    with pytest.raises(BrokerRefused, match=r"refuses user 'alice'.*password") as caught:
        client.open()
    assert "wr0ng" not in str(caught.value) + repr(client.address)
    client.close()


def test_a_closed_port_and_an_unknown_name_are_told_apart() -> None:
    with pytest.raises(BrokerUnreachable, match="Nothing listens"):
        Client("127.0.0.1", free_port()).open()
    with pytest.raises(BrokerUnreachable, match="does not resolve"):
        Client("broker.invalid").open()
    with pytest.raises(BrokerUnreachable, match="does not resolve"):
        Client("a..b").open()


def test_history_and_reset_come_back_as_acks(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port) as worker, Client("127.0.0.1", broker.port) as bus:
        worker.history["cli/work"] = [{"role": "user", "content": "hello"}]
        assert bus.history("cli/work") == [{"role": "user", "content": "hello"}]
        assert bus.control("cli/work", "reset")["status"] == "ok"


def test_tokens_are_counted_and_a_refusal_is_an_error_with_its_code(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port) as worker, Client("127.0.0.1", broker.port) as bus:
        assert bus.count_tokens("hello", session="cli/work", system_prompt="Be brief.", model="m") == 7
        session, asked = worker.controls[-1]
        assert session == "cli/work"
        asked.pop("transaction")
        assert asked == {"action": "count_tokens", "prompt": "hello", "system_prompt": "Be brief.", "model": "m"}
        worker.counted = {"status": "error", "code": "engine_unavailable", "message": "It sleeps.", "retry_after_s": 5}
        with pytest.raises(AnswerError, match="It sleeps") as caught:
            bus.count_tokens(messages=[{"role": "user", "content": "hello"}])
        assert (caught.value.code, caught.value.retryable) == ("engine_unavailable", True)
        assert caught.value.details == {"retry_after_s": 5}
        worker.counted = {"status": "error", "code": "bad_request", "message": "?", "fields": {"action": "cancel"}}
        with pytest.raises(AnswerError, match="version"):
            bus.count_tokens("hello")


def test_many_threads_share_one_client(broker: Mosquitto) -> None:
    results: dict[int, str] = {}
    with PlayedWorker(broker.port), Client("127.0.0.1", broker.port) as bus:

        def ask(number: int) -> None:
            results[number] = bus.ask(f"number {number}", session=f"cli/{number % 3}").result(20).content

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert results == {number: f"number {number}" for number in range(40)}


def test_a_consumer_that_falls_behind_loses_no_text(start_mosquitto: Start) -> None:
    count = 6000
    text = "".join(f"{number} " for number in range(count))

    def flood(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        for number in range(count):
            worker.say(session, request, type="chunk", seq=number, content=f"{number} ")
        worker.done(session, request, text, seq=count)

    patient = start_mosquitto(settings=["max_queued_messages 0"])
    with PlayedWorker(patient.port, play=flood), Client("127.0.0.1", patient.port) as bus:
        answer = bus.ask("hello")
        eventually(lambda: answer.ended, 30)
        pieces = list(answer)
    assert "".join(pieces) == text
    assert len(pieces) < count


def test_an_answer_that_the_broker_cut_short_is_made_whole_again(start_mosquitto: Start) -> None:
    count = 500
    text = "".join(f"{number} " for number in range(count))

    def flood(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        if len(worker.requests) == 1:
            for number in range(count):
                worker.say(session, request, type="chunk", seq=number, content=f"{number} ")
        worker.done(session, request, text, seq=count)

    # A queue this short drops the newest events of a burst, and every PUBACK still says success.
    hasty = start_mosquitto(settings=["max_queued_messages 1", "max_inflight_messages 1"])
    with PlayedWorker(hasty.port, play=flood) as worker:
        worker.status(heartbeat_s=0.2)
        with Client("127.0.0.1", hasty.port) as bus:
            bus.status()
            assert "".join(bus.ask("hello")) == text


def test_over_tls_a_certificate_that_is_not_trusted_is_told_apart(start_mosquitto: Start, authority: Authority) -> None:
    broker = start_mosquitto(tls=(authority.ca_file, *authority.issue("localhost")))
    trusting = tls_context(ca_file=authority.ca_file)
    with PlayedWorker(broker.port), Client("127.0.0.1", broker.tls_port, tls=trusting) as bus:
        assert list(bus.ask("one two")) == ["one", " two"]
    with pytest.raises(BrokerUnreachable, match="certificate of the broker"):
        Client("127.0.0.1", broker.tls_port, tls=True).open()
    with pytest.raises(BrokerUnreachable, match=r"failed \(no TLS handshake\)"):
        Client("127.0.0.1", broker.port, tls=trusting).open()
    with pytest.raises(BrokerUnreachable, match="switch TLS on"):
        Client("127.0.0.1", broker.tls_port).open()


def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(amqtt_broker: AmqttBroker) -> None:
    with (
        PlayedWorker(amqtt_broker.port, protocol="3.1.1"),
        Client("127.0.0.1", amqtt_broker.port, connect_timeout_s=5) as bus,
    ):
        assert bus.protocol == "3.1.1"
        assert list(bus.ask("one two")) == ["one", " two"]


@pytest.mark.parametrize("session", ["", "a/b/c", "a b", "$x", "a\n", "a/", "+", "x" * 65])
def test_a_session_that_is_no_session_path_is_refused_before_anything_is_sent(session: str) -> None:
    with pytest.raises(ValueError, match=r"session|one or two levels"):
        Client().ask("hello", session=session or " ")


@pytest.mark.parametrize("timeout_s", [2.0**32, 1e308])
def test_a_time_limit_beyond_what_mqtt_can_tell_is_asked_for_all_the_same(broker: Mosquitto, timeout_s: float) -> None:
    with PlayedWorker(broker.port), Client("127.0.0.1", broker.port, protocol="5") as bus:
        assert bus.ask("hello", timeout_s=timeout_s).result(10).content == "hello"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_refused_with_the_name_of_its_field(
    broker: Mosquitto, number: float
) -> None:
    with PlayedWorker(broker.port) as worker, Client("127.0.0.1", broker.port) as bus:
        for field, value in (
            ("temperature", number),
            ("logit_bias", {"1": number}),
            ("metadata", {"a": [None, (number,)]}),
        ):
            with pytest.raises(ValueError, match=rf"^{field}: .* nan and inf"):
                bus.ask("hi", **{field: value})
        with pytest.raises(ValueError, match=r"^tools: .* nan and inf"):
            bus.count_tokens("hi", tools=[{"parameters": {"minimum": number}}])
        bus.ask("hi", metadata={"a": None}).result(10)
    assert [json.loads(payload)["metadata"] for _, payload in worker.requests] == [{"a": None}]


def test_the_request_on_the_wire_holds_only_what_was_asked_for(broker: Mosquitto) -> None:
    with PlayedWorker(broker.port) as worker, Client("127.0.0.1", broker.port) as bus:
        bus.ask("hi", temperature=0.5, seed=None, timeout_s=9).result(10)
        bus.ask(messages=[{"role": "user", "content": "hi"}], stream="sentence").result(10)
    first, second = (json.loads(payload) for _, payload in worker.requests)
    assert set(first) == {"request_id", "prompt", "temperature", "timeout_s"}
    assert set(second) == {"request_id", "messages", "stream"}
