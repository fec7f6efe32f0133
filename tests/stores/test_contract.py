"""What every store promises, over all stores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamacpp_mqtt_deploy.core.spending import REST, LedgerRow, Spent, day_of
from llamacpp_mqtt_deploy.ports import HistoryChange, Pending, Store, StoreError
from llamacpp_mqtt_deploy.stores import journal_times
from llamacpp_mqtt_deploy.stores.bounds import LEDGER_DAYS, LEDGER_LEVELS
from llamacpp_mqtt_deploy.stores.postgres import pg_times
from llamacpp_mqtt_deploy.stores.sqlite import WRITE_TIMEOUT_S
from tests.support.store_cases import MEMBERS, NOW, SESSION, change, entry, key, new_store, talk
from tests.support.waiting import eventually

OTHER = ("default", "hall")
DAY_S = 86400.0
MIB = 1024 * 1024


@pytest.fixture(params=MEMBERS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = new_store(request.param, tmp_path)
    store.open()
    yield store
    store.close()


def purge(store: Store, *, now: float = NOW, **limits: Any) -> dict[str, int]:
    purged = store.purge(now=now, **{"remember_s": 600.0, "ttl_s": 86400.0 * 30, "max_sessions": 1000, **limits})
    return {"entries": purged.entries, "sessions": purged.sessions} | ({"more": 1} if purged.more else {})


# --- journal ---------------------------------------------------------------------------------------------------------


def test_an_accepted_request_is_found_again_as_it_was(store: Store) -> None:
    plain = entry("plain")
    full = entry("full", payload=bytes(range(256)), correlation=b"\x00\xff", expires_at=NOW + 1.5, digest="ä")
    store.accept([plain, full])
    assert store.find(key("plain")) == plain
    assert store.find(key("full")) == full
    assert store.find(key("unknown")) is None


def test_the_same_id_under_another_session_or_route_is_another_request(store: Store) -> None:
    store.accept([entry("r"), entry("r", OTHER), entry("r", ("maze", SESSION[1]))])
    store.finish(key("r"), b"end", now=NOW)
    assert [e.key for e in store.unfinished()] == [key("r", OTHER), key("r", ("maze", SESSION[1]))]


def test_unfinished_requests_come_in_the_order_in_which_they_were_accepted(store: Store) -> None:
    store.accept([entry(f"b{n}") for n in range(5)])
    store.accept([entry("a")])
    store.mark_streaming(key("b3"))
    store.finish(key("b1"), b"end", now=NOW)
    assert [e.key.request_id for e in store.unfinished()] == ["b0", "b2", "b3", "b4", "a"]
    assert [e.state for e in store.unfinished()] == ["accepted", "accepted", "streaming", "accepted", "accepted"]


def test_accepting_an_unfinished_request_again_changes_nothing(store: Store) -> None:
    store.accept([entry(), entry(digest="other")])
    store.mark_started(key())
    store.accept([entry(payload=b"other"), entry("next")])
    assert store.find(key()) == entry(starts=1)
    assert [e.key.request_id for e in store.unfinished()] == ["r1", "next"]


def test_the_record_of_chunks_is_kept_with_the_end_and_goes_with_it(store: Store) -> None:
    store.accept([entry(), entry("plain")])
    assert store.chunks(key()) is None
    store.finish(key(), b"end", now=NOW, chunks=b"record")
    store.finish(key(), b"again", now=NOW, chunks=b"another")
    store.finish(key("plain"), b"end", now=NOW)
    assert [store.chunks(key(name)) for name in ("r1", "plain", "unknown")] == [b"record", None, None]
    store.accept([entry()])
    assert store.chunks(key()) is None


def test_accepting_an_ended_request_again_begins_anew_at_the_end_of_the_line(store: Store) -> None:
    store.accept([entry(), entry("next")])
    store.mark_started(key())
    store.finish(key(), b"end", now=NOW)
    again = entry(digest="d2", payload=b"again")
    store.accept([again])
    assert store.find(key()) == again
    assert [e.key.request_id for e in store.unfinished()] == ["next", "r1"]
    assert store.undelivered() == []


def test_accepting_nothing_is_no_error(store: Store) -> None:
    store.accept([])
    assert store.unfinished() == []


def test_starts_are_counted_until_the_request_ends(store: Store) -> None:
    store.accept([entry()])
    assert [store.mark_started(key()) for _ in range(3)] == [1, 2, 3]
    store.finish(key(), b"end", now=NOW)
    assert store.mark_started(key()) == 3
    assert store.mark_started(key("unknown")) == 0


def test_streaming_is_marked_once_and_never_on_an_ended_or_unknown_request(store: Store) -> None:
    store.accept([entry()])
    store.mark_streaming(key())
    store.mark_streaming(key())
    store.mark_streaming(key("unknown"))
    assert store.find(key()) == entry(state="streaming")
    store.finish(key(), b"end", now=NOW)
    store.mark_streaming(key())
    found = store.find(key())
    assert found is not None
    assert found.state == "ended"


def test_an_ended_request_keeps_its_terminal_event_and_lets_go_of_its_body(store: Store) -> None:
    accepted = entry(correlation=b"c", expires_at=NOW + 9)
    store.accept([accepted])
    store.finish(key(), b"terminal", now=NOW + 2)
    assert store.find(key()) == replace(accepted, state="ended", terminal=b"terminal", payload=b"", ended_at=NOW + 2)


def test_only_the_first_end_counts(store: Store) -> None:
    store.accept([entry()])
    store.finish(key(), b"first", now=NOW, history=change("q", "a"))
    store.mark_delivered([key()])
    store.finish(key(), b"second", now=NOW + 1, history=change("x", "y"))
    found = store.find(key())
    assert found is not None
    assert (found.terminal, found.delivered, found.ended_at) == (b"first", True, NOW)
    assert len(store.history(SESSION)) == 2


def test_undelivered_ends_come_in_the_order_in_which_they_ended(store: Store) -> None:
    store.accept([entry(f"r{n}") for n in range(5)])
    for name in ("r3", "r0", "r4", "r1"):
        store.finish(key(name), name.encode(), now=NOW)
    store.mark_delivered([key("r0"), key("unknown"), key("r2"), key("r0")])
    assert [e.terminal for e in store.undelivered()] == [b"r3", b"r4", b"r1"]
    found = store.find(key("r2"))
    assert found == entry("r2")
    store.mark_delivered([])


# --- writes that are only begun ------------------------------------------------------------------------------------------


def test_writes_that_were_begun_take_effect_in_the_order_of_the_calls(store: Store) -> None:
    names = [f"r{n}" for n in range(40)]
    pending = []
    for name in names:
        pending += [
            store.accept_soon([entry(name)]),
            store.mark_streaming_soon(key(name)),
            store.finish_soon(key(name), name.encode(), now=NOW, history=change(name, name)),
        ]
    store.mark_delivered([key(names[0])])
    assert all(write.done() for write in pending)  # what a later call has written, an earlier one has too
    for write in pending:
        write.wait(0)
    assert [e.key.request_id for e in store.undelivered()] == names[1:]
    assert [m["content"] for m in store.history(SESSION)][::2] == names


def test_a_write_calls_back_once_when_it_is_over(store: Store) -> None:
    told: list[object] = []
    write = store.accept_soon([entry()])
    write.on_done(told.append)
    write.wait(10)
    write.on_done(lambda problem: told.append(("late", problem)))
    store.mark_delivered([])  # the thread that calls back has gone on
    assert told in ([None, ("late", None)], [("late", None), None])
    assert store.find(key()) == entry()


@pytest.mark.parametrize(
    "hasten",
    [
        lambda store, write: write.hurry(),
        lambda store, write: write.wait(10),
        lambda store, write: store.mark_streaming(key("other")),
    ],
)
def test_what_may_be_kept_back_is_written_when_it_is_hurried_waited_for_or_followed(
    store: Store, hasten: Callable[[Store, Pending], object]
) -> None:
    told: list[object] = []
    write = store.accept_soon([entry()], unhurried=True)
    write.on_done(told.append)
    hasten(store, write)
    eventually(lambda: told == [None])
    assert write.done()
    write.hurry()
    assert store.find(key()) == entry()


def test_a_request_that_cannot_be_written_costs_its_neighbours_nothing(store: Store) -> None:
    good = [store.accept_soon([entry(f"r{n}")]) for n in range(3)]
    bad = store.accept_soon([entry("half"), entry("bad", topic="llm/request/\ud800")])
    good += [store.accept_soon([entry(f"r{n}")]) for n in range(3, 6)]
    for write in good:
        write.wait(10)
    with pytest.raises(StoreError, match="UnicodeEncodeError"):
        bad.wait(10)
    assert [e.key.request_id for e in store.unfinished()] == [f"r{n}" for n in range(6)]


@pytest.mark.parametrize("member", ["sqlite", "postgres"])
def test_closing_takes_what_was_begun_along(member: str, tmp_path: Path) -> None:
    store = new_store(member, tmp_path)
    store.open()
    pending = [store.accept_soon([entry(f"r{n}")], unhurried=n == 599) for n in range(600)]
    store.close()
    for write in pending:
        write.wait(0)
    with pytest.raises(StoreError, match="closed"):
        store.accept_soon([entry()])
    store.open()
    assert len(store.unfinished()) == 600
    store.close()


# --- histories -------------------------------------------------------------------------------------------------------


def test_an_end_and_its_history_come_together_and_in_order(store: Store) -> None:
    store.accept([entry("1"), entry("2"), entry("3", OTHER)])
    store.finish(key("1"), b"", now=NOW, history=change("q1", "a1"))
    store.finish(key("3", OTHER), b"", now=NOW, history=change("qo", "ao", session=OTHER))
    store.finish(key("2"), b"", now=NOW, history=change("q2", "a2"))
    assert [m["content"] for m in store.history(SESSION)] == ["q1", "a1", "q2", "a2"]
    assert [m["content"] for m in store.history(OTHER)] == ["qo", "ao"]
    assert store.history(("maze", SESSION[1])) == ()


def test_a_history_has_the_same_bytes_at_every_turn(store: Store) -> None:
    odd = {"role": "assistant", "content": None, "tool_calls": [{"type": "f", "id": "1", "a": {"z": 1e-7, "b": 0.1}}]}
    messages: list[dict[str, Any]] = [
        {"content": "first \N{SNOWMAN}\x00\u2028", "role": "user", "name": "z"},
        odd,
        {"tool_call_id": "1", "role": "tool", "content": ["a", {"y": 1, "x": 2}]},
    ]
    store.accept([entry("1"), entry("2")])
    store.finish(key("1"), b"", now=NOW, history=change(messages=messages))
    first = orjson.dumps(store.history(SESSION))
    assert first == orjson.dumps(messages)
    store.finish(key("2"), b"", now=NOW, history=change("more", "and more"))
    assert orjson.dumps(store.history(SESSION)).startswith(first[:-1])


def test_what_was_given_or_returned_can_be_changed_without_changing_the_history(store: Store) -> None:
    message: dict[str, Any] = {"role": "user", "content": "as it was"}
    store.accept([entry()])
    store.finish(key(), b"", now=NOW, history=HistoryChange(session=SESSION, append=(message,)))
    message["content"] = "changed"
    returned: Any = store.history(SESSION)[0]
    returned["content"] = "changed"
    assert store.history(SESSION) == ({"role": "user", "content": "as it was"},)


def test_a_new_conversation_forgets_what_came_before(store: Store) -> None:
    store.accept([entry("1"), entry("2"), entry("3")])
    store.finish(key("1"), b"", now=NOW, history=change("q1", "a1"))
    store.finish(key("2"), b"", now=NOW, history=change("q2", "a2", new=True))
    assert [m["content"] for m in store.history(SESSION)] == ["q2", "a2"]
    store.finish(key("3"), b"", now=NOW, history=change(new=True))
    assert store.history(SESSION) == ()


def test_the_end_of_an_unknown_request_still_changes_its_history(store: Store) -> None:
    store.finish(key("unknown"), b"", now=NOW, history=change("q", "a"))
    assert len(store.history(SESSION)) == 2
    assert store.find(key("unknown")) is None
    assert store.undelivered() == []


def test_a_history_that_cannot_be_written_leaves_the_request_unfinished(store: Store) -> None:
    store.accept([entry()])
    with pytest.raises(TypeError):
        store.finish(key(), b"", now=NOW, history=change("q", messages=[{"role": "assistant", "content": object()}]))
    assert store.find(key()) == entry()
    assert store.history(SESSION) == ()


def test_reset_and_delete_forget_the_messages_of_one_session(store: Store) -> None:
    for forget in (store.reset, store.delete):
        talk(store, SESSION)
        talk(store, OTHER, text=forget.__name__)
        forget(SESSION)
        assert store.history(SESSION) == ()
        assert store.history(OTHER) != ()
        forget(("maze", "unknown"))
        store.accept([entry(forget.__name__)])
        store.finish(key(forget.__name__), b"", now=NOW, history=change("after", "it"))
        assert [m["content"] for m in store.history(SESSION)] == ["after", "it"]


@pytest.mark.parametrize("member", MEMBERS)
def test_an_endless_conversation_keeps_its_newest_exchanges_within_its_bound(member: str, tmp_path: Path) -> None:
    store = new_store(member, tmp_path, max_history_bytes=5000)
    store.open()
    try:
        trimmed = 0
        before: tuple[Any, ...] = ()
        for turn in range(60):
            store.accept([entry(str(turn))])
            store.finish(key(str(turn)), b"", now=NOW, history=change(f"{turn} " + "q" * 90, f"{turn} " + "a" * 90))
            history = store.history(SESSION)
            assert sum(len(orjson.dumps(m)) for m in history) <= 5000
            assert history[0]["role"] == "user"
            assert [m["content"].split()[0] for m in history[-2:]] == [str(turn)] * 2
            trimmed += before[:1] != history[:1]
            before = history
        assert len(before) >= 20
        assert trimmed <= 12  # rarely: each trim makes the engine read the whole history anew
        store.finish(key("unknown"), b"", now=NOW, history=change("q" * 9000, "a"))
        assert len(store.history(SESSION)) == 2  # the last exchange stays, whatever its size
    finally:
        store.close()


# --- purge -----------------------------------------------------------------------------------------------------------


def test_delivered_ends_are_remembered_for_a_while_and_undelivered_ones_for_a_day(store: Store) -> None:
    store.accept([entry("delivered"), entry("lost"), entry("waiting")])
    store.finish(key("delivered"), b"", now=NOW)
    store.finish(key("lost"), b"", now=NOW)
    store.mark_delivered([key("delivered")])
    assert purge(store, now=NOW + 600) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + 601) == {"entries": 1, "sessions": 0}
    assert store.find(key("delivered")) is None
    assert purge(store, now=NOW + DAY_S) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + DAY_S + 1) == {"entries": 1, "sessions": 0}
    assert [e.key.request_id for e in store.unfinished()] == ["waiting"]


def test_sessions_that_nobody_used_are_forgotten(store: Store) -> None:
    talk(store, SESSION)
    talk(store, OTHER, at=NOW + 50)
    assert purge(store, now=NOW + 101, ttl_s=100)["sessions"] == 1
    assert store.history(SESSION) == ()
    assert store.history(OTHER) != ()


def test_a_request_keeps_its_session_from_being_forgotten(store: Store) -> None:
    talk(store, SESSION)
    store.accept([entry("waits", accepted_at=NOW)])
    assert purge(store, now=NOW + 1000, ttl_s=100, max_sessions=0)["sessions"] == 0
    store.finish(key("waits"), b"", now=NOW + 1000)
    assert purge(store, now=NOW + 1200, ttl_s=100)["sessions"] == 1


def test_a_new_request_counts_as_use_of_its_session(store: Store) -> None:
    talk(store, SESSION)
    store.accept([entry("later", accepted_at=NOW + 90)])
    store.finish(key("later"), b"", now=NOW + 91)
    assert purge(store, now=NOW + 150, ttl_s=100)["sessions"] == 0


def test_one_client_with_many_sessions_does_not_push_the_others_out(store: Store) -> None:
    talk(store, ("default", "quiet/only"), at=NOW)
    for n in range(8):
        talk(store, ("default", f"greedy/{n}"), at=NOW + 10 + n)
    for n in range(3):
        talk(store, ("maze", f"middle/{n}"), at=NOW + 5 + n)
    assert purge(store, now=NOW + 100, max_sessions=7)["sessions"] == 5
    left = [s for s in (("default", f"greedy/{n}") for n in range(8)) if store.history(s)]
    assert left == [("default", f"greedy/{n}") for n in (5, 6, 7)]
    assert store.history(("default", "quiet/only"))
    assert all(store.history(("maze", f"middle/{n}")) for n in range(3))
    assert purge(store, now=NOW + 100, max_sessions=7)["sessions"] == 0


def test_the_session_with_a_request_stays_and_the_next_one_goes(store: Store) -> None:
    for n in range(3):
        talk(store, ("default", f"greedy/{n}"), at=NOW + n)
    store.accept([entry("busy", ("default", "greedy/0"), accepted_at=NOW)])
    assert purge(store, now=NOW + 10, max_sessions=2)["sessions"] == 1
    assert [bool(store.history(("default", f"greedy/{n}"))) for n in range(3)] == [True, False, True]


def test_one_purge_drops_five_hundred_requests_and_sessions_at_most(tmp_path: Path) -> None:
    for member in ("memory", "sqlite", "postgres"):
        store = new_store(member, tmp_path)
        store.open()
        names = [f"r{n}" for n in range(507)]
        store.accept([entry(name) for name in names])
        for name in names:
            store.finish(key(name), b"", now=NOW, history=change("q", "a", session=("default", name)))
        store.mark_delivered([key(name) for name in names])
        limits = {"ttl_s": 1.0, "max_sessions": 3}
        assert purge(store, now=NOW + 1000, **limits) == {"entries": 500, "sessions": 500, "more": 1}
        assert purge(store, now=NOW + 1000, **limits) == {"entries": 7, "sessions": 7}
        store.close()


def test_one_purge_drops_four_mebibytes_at_most(store: Store) -> None:
    size = MIB
    for n in range(6):
        store.accept([entry(f"r{n}")])
        history = change("q", "x" * 3_000_000, session=("default", f"s{n}"))
        store.finish(key(f"r{n}"), bytes(size), now=NOW, history=history)
        store.mark_delivered([key(f"r{n}")])
    limits = {"ttl_s": 1.0}
    assert purge(store, now=NOW + 1000, **limits) == {"entries": 4, "sessions": 1, "more": 1}
    assert purge(store, now=NOW + 1000, **limits) == {"entries": 2, "sessions": 1, "more": 1}


def test_the_record_of_chunks_counts_among_the_bytes_that_one_purge_drops(store: Store) -> None:
    for n in range(2):
        store.accept([entry(f"r{n}")])
        store.finish(key(f"r{n}"), bytes(100), now=NOW, chunks=bytes(3 * MIB))
        store.mark_delivered([key(f"r{n}")])
    assert purge(store, now=NOW + 1000) == {"entries": 1, "sessions": 0, "more": 1}
    assert purge(store, now=NOW + 1000) == {"entries": 1, "sessions": 0}


def test_messages_that_were_forgotten_count_no_more_when_their_sessions_go(store: Store) -> None:
    for n in range(2):
        session = ("default", f"s{n}")
        store.accept([entry(f"r{n}", session)])
        store.finish(key(f"r{n}", session), b"", now=NOW, history=change("q", "x" * 3_000_000, session=session))
        store.reset(session)
    assert purge(store, now=NOW + 700, ttl_s=600.0)["sessions"] == 2


def test_a_request_that_is_written_when_it_has_ended_already_is_remembered_as_ended(store: Store) -> None:
    store.accept([entry("first")])
    store.finish(key("first"), b"one", now=NOW)
    over = entry("over", state="ended", terminal=b"two", ended_at=NOW, payload=b"")
    store.accept([over, entry("last")])
    store.finish(key("last"), b"three", now=NOW)
    assert store.find(key("over")) == over
    assert [e.terminal for e in store.undelivered()] == [b"one", b"two", b"three"]
    assert store.unfinished() == []


def ended(store: Store, first_level: str, numbers: range, *, delivered: bool = True) -> None:
    """Ended requests of one first level; each takes 10 KiB with what it is beside its end."""
    keys = [key(f"r{n}", ("default", f"{first_level}/{n % 3}")) for n in numbers]
    store.accept([entry(k.request_id, (k.route, k.session)) for k in keys])
    for k in keys:
        store.finish(k, bytes(10_240 - 512), now=NOW)
    if delivered:
        store.mark_delivered(keys)


def remembered(store: Store, first_level: str, numbers: range) -> list[int]:
    return [n for n in numbers if store.find(key(f"r{n}", ("default", f"{first_level}/{n % 3}"))) is not None]


def test_beyond_their_bytes_the_oldest_ended_requests_of_whoever_holds_most_are_forgotten(store: Store) -> None:
    ended(store, "quiet", range(5))
    ended(store, "flood", range(200))
    ended(store, "busy", range(30))
    while purge(store, max_bytes=100 * 10_240).get("more"):
        pass
    assert remembered(store, "quiet", range(5)) == [0, 1, 2, 3, 4]
    assert remembered(store, "busy", range(30)) == list(range(30))
    assert remembered(store, "flood", range(200)) == list(range(150, 200))  # no more than half of all for one
    while purge(store, max_bytes=70 * 10_240).get("more"):
        pass
    assert remembered(store, "flood", range(200)) == list(range(165, 200))
    assert remembered(store, "quiet", range(5)) == [0, 1, 2, 3, 4]


def test_what_no_broker_took_is_forgotten_after_all_that_one_took_and_the_unfinished_never(store: Store) -> None:
    store.accept([entry(f"waits{n}", ("default", "flood/0"), payload=bytes(50_000)) for n in range(10)])
    ended(store, "flood", range(20), delivered=False)
    ended(store, "flood", range(20, 60))
    while purge(store, max_bytes=60 * 10_240).get("more"):
        pass
    assert remembered(store, "flood", range(60)) == [*range(20), *range(50, 60)]
    while purge(store, max_bytes=30 * 10_240).get("more"):
        pass
    assert remembered(store, "flood", range(60)) == list(range(5, 20))
    while purge(store, max_bytes=1).get("more"):
        pass
    assert [e.key.request_id for e in store.unfinished()] == [f"waits{n}" for n in range(10)]


def test_a_clock_that_is_set_at_last_does_not_make_everything_look_old(store: Store) -> None:
    """A board without a battery clock boots in 1970 and jumps by decades when the network comes."""
    talk(store, SESSION, at=60.0)
    assert purge(store, now=120.0) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW) == {"entries": 0, "sessions": 0}
    assert store.history(SESSION)
    assert purge(store, now=NOW + 601) == {"entries": 1, "sessions": 0}


def test_a_clock_that_is_set_forward_makes_nothing_older(store: Store) -> None:
    year_s = 365 * DAY_S
    then = NOW + 300 + year_s
    talk(store, ("default", "old"), at=NOW)
    talk(store, ("default", "new"), at=then)
    store.clock_was_set(year_s, now=then)
    assert purge(store, now=then) == {"entries": 0, "sessions": 0}
    assert purge(store, now=then + 301) == {"entries": 1, "sessions": 0}, "the one that had waited for 300 s"
    assert purge(store, now=then + 601) == {"entries": 1, "sessions": 0}
    for day in range(1, 30):
        assert purge(store, now=then + day * DAY_S) == {"entries": 0, "sessions": 0}
    assert purge(store, now=then + 30 * DAY_S - 299) == {"entries": 0, "sessions": 1}


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One purge changes the times of three rows."""
    monkeypatch.setattr(journal_times, "MOVED_ROWS", 3)
    monkeypatch.setattr(pg_times, "MOVED_ROWS", 3)


@pytest.mark.usefixtures("small_portions")
def test_after_a_clock_was_set_forward_times_are_moved_some_at_a_time_and_each_once(store: Store) -> None:
    for number in range(5):
        talk(store, ("default", f"s{number}"), at=NOW + number)
    store.clock_was_set(9 * DAY_S, now=NOW + 9 * DAY_S + 100)
    talk(store, ("default", "between"), at=NOW + 9 * DAY_S + 150)
    assert purge(store, now=NOW + 9 * DAY_S + 160, ttl_s=700.0) == {"entries": 0, "sessions": 0, "more": 1}
    store.clock_was_set(9 * DAY_S, now=NOW + 18 * DAY_S + 200)
    talk(store, ("default", "after"), at=NOW + 18 * DAY_S + 250)
    rounds = 1
    while purge(store, now=NOW + 18 * DAY_S + 600, ttl_s=700.0) == {"entries": 0, "sessions": 0, "more": 1}:
        rounds += 1
    assert rounds >= 7, "five of both, and six of both, less the first three"
    for at in (0, 1, 2, 3, 4, 150, 250):
        assert purge(store, now=NOW + 18 * DAY_S + at + 700, ttl_s=700.0)["sessions"] == 0
        assert purge(store, now=NOW + 18 * DAY_S + at + 700.5, ttl_s=700.0)["sessions"] == 1


@pytest.mark.usefixtures("small_portions")
def test_after_a_clock_was_ahead_times_are_mended_some_at_a_time(store: Store) -> None:
    for number in range(5):
        talk(store, ("default", f"s{number}"), at=NOW + 365 * DAY_S + number)
    mended = [purge(store, now=NOW) for _ in range(4)]
    assert [mended[n].get("more", 0) for n in (0, 1, 3)] == [1, 1, 0]
    assert purge(store, now=NOW + 601, ttl_s=600.0) == {"entries": 5, "sessions": 5}


def test_a_clock_that_is_set_forward_takes_nothing_of_the_time_limit_of_what_waits(store: Store) -> None:
    year_s = 365 * DAY_S
    then = NOW + 300 + year_s
    store.accept([entry("waits", expires_at=NOW + 900), entry("without a limit")])
    store.accept([entry("streams", expires_at=NOW + 600)])
    store.mark_streaming(key("streams"))
    store.accept([entry("later", accepted_at=then, expires_at=then + 60), entry("young", accepted_at=then - 1)])
    store.clock_was_set(year_s, now=then).wait(WRITE_TIMEOUT_S)
    found = {name: store.find(key(name)) for name in ("waits", "without a limit", "streams", "later", "young")}
    left = {name: None if each is None else each.left_s(then) for name, each in found.items()}
    waited = {name: None if each is None else each.waited_s(then) for name, each in found.items()}
    assert left == {"waits": 600, "without a limit": None, "streams": 300, "later": 60, "young": None}
    assert waited == {"waits": 300, "without a limit": 300, "streams": 300, "later": 0, "young": 0}


def test_a_clock_that_was_ahead_does_not_keep_things_for_ever(store: Store) -> None:
    talk(store, SESSION, at=NOW + 10 * 365 * 86400)
    assert purge(store, now=NOW) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + 601, ttl_s=600) == {"entries": 1, "sessions": 1}


def test_a_boot_under_a_wrong_clock_forgets_nothing_when_the_clock_is_right_again(store: Store) -> None:
    """A board without a clock of its own boots with the date of its system: plausible, and years behind."""
    talk(store, SESSION, at=NOW)
    assert purge(store, now=NOW + 5) == {"entries": 0, "sessions": 0}
    wrong = NOW - 3 * 365 * DAY_S
    talk(store, OTHER, at=wrong)
    assert purge(store, now=wrong + 5) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + 3600) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + 3600 + 590) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + 3600 + 610, ttl_s=86400) == {"entries": 2, "sessions": 0}
    assert store.history(SESSION)
    assert store.history(OTHER)


def test_a_boot_under_a_clock_that_is_far_ahead_forgets_nothing(store: Store) -> None:
    talk(store, SESSION, at=NOW)
    assert purge(store, now=NOW + 5) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + 20 * 365 * DAY_S) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + 60) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + 60 + 601, ttl_s=600) == {"entries": 1, "sessions": 1}


def test_what_no_broker_has_taken_waits_its_day_for_one_while_a_worker_runs(store: Store) -> None:
    store.accept([entry()])
    store.finish(key(), b"end", now=NOW)
    assert purge(store, now=NOW + 3600)["entries"] == 0
    month_s = 30 * DAY_S
    assert purge(store, now=NOW + month_s) == {"entries": 0, "sessions": 0}, "the worker was off"
    assert purge(store, now=NOW + month_s + DAY_S - 3700)["entries"] == 0
    assert purge(store, now=NOW + month_s + DAY_S - 3500)["entries"] == 1


def test_a_day_without_a_worker_counts_for_the_age_of_what_is_kept(store: Store) -> None:
    talk(store, SESSION, at=NOW)
    assert purge(store, now=NOW) == {"entries": 0, "sessions": 0}
    assert purge(store, now=NOW + DAY_S, ttl_s=DAY_S - 1) == {"entries": 1, "sessions": 1}


# --- life ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["memory", "sqlite", "postgres"])
def test_a_closed_store_says_so_and_can_be_opened_again(member: str, tmp_path: Path) -> None:
    store = new_store(member, tmp_path)
    store.open()
    store.open()
    talk(store, SESSION)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.accept([entry()])
    with pytest.raises(StoreError, match="closed"):
        store.history(SESSION)
    store.open()
    assert len(store.history(SESSION)) == (0 if member == "memory" else 2)  # a memory ends with its store
    talk(store, SESSION, at=NOW + 1)
    store.close()


@pytest.mark.parametrize("member", ["memory", "sqlite", "postgres"])
def test_many_threads_at_once_lose_and_double_nothing(member: str, tmp_path: Path) -> None:
    store = new_store(member, tmp_path)
    store.open()
    failures: list[BaseException] = []

    def live(number: int) -> None:
        try:
            session = ("default", f"s{number % 3}")
            for turn in range(25):
                name = f"{number}-{turn}"
                store.accept([entry(name, session)])
                assert store.mark_started(key(name, session)) == 1
                store.mark_streaming(key(name, session))
                history = change(name, name, session=session)
                store.finish(key(name, session), name.encode(), now=NOW, history=history)
                assert store.history(session)
                store.mark_delivered([key(name, session)])
                purge(store)
        except BaseException as error:  # noqa: BLE001  brought back to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=live, args=(n,), name=f"client-{n}") for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert store.unfinished() == []
    assert store.undelivered() == []
    for n in range(3):
        contents = [m["content"] for m in store.history(("default", f"s{n}"))]
        assert contents[::2] == contents[1::2]  # prompt and answer always side by side
        assert len(set(contents)) == 25 * len([c for c in range(8) if c % 3 == n])
    store.close()


# --- ledger ------------------------------------------------------------------------------------------------------------

TODAY = day_of(NOW)


def spend(store: Store, name: str, first_level: str = "alice", *, at: float = NOW, tokens: int = 1) -> None:
    """One request that ends with these costs."""
    store.accept([entry(name)])
    store.finish(key(name), b"{}", now=at, spent=Spent(first_level=first_level, tokens_in=tokens, engine_s=0.5))


def test_what_requests_cost_is_added_up_by_first_level_and_day(store: Store) -> None:
    store.accept([entry("a"), entry("b"), entry("c"), entry("d")])
    for name, level, at in (
        ("a", "alice", NOW),
        ("b", "alice", NOW + 60),
        ("c", "bob", NOW),
        ("d", "alice", NOW + DAY_S),
    ):
        spent = Spent(first_level=level, tokens_in=10, tokens_out=3, engine_s=1.5)
        store.finish(key(name), b"end", now=at, spent=spent)
    cost = {"tokens_in": 10, "tokens_out": 3, "engine_s": 1.5}
    twice = {"tokens_in": 20, "tokens_out": 6, "engine_s": 3.0}
    alice = LedgerRow(day=TODAY, first_level="alice", requests=2, **twice)  # type: ignore[arg-type]
    bob = LedgerRow(day=TODAY, first_level="bob", requests=1, **cost)  # type: ignore[arg-type]
    next_day = LedgerRow(day=TODAY + 1, first_level="alice", requests=1, **cost)  # type: ignore[arg-type]
    assert store.ledger(since_day=0) == [next_day, alice, bob]
    assert store.ledger(since_day=TODAY + 1) == [next_day]
    assert store.ledger(since_day=0, first_level="bob") == [bob]
    assert store.ledger(since_day=0, skip=1, most=1) == [alice]


def test_a_request_that_is_ended_twice_has_cost_something_once(store: Store) -> None:
    spend(store, "r", tokens=5)
    store.finish(key("r"), b"again", now=NOW, spent=Spent(first_level="alice", tokens_in=7))
    assert [row.tokens for row in store.ledger(since_day=0)] == [5]


def test_an_end_that_the_journal_does_not_know_costs_nothing(store: Store) -> None:
    store.finish(key("unknown"), b"end", now=NOW, spent=Spent(first_level="alice", tokens_in=7))
    assert store.ledger(since_day=0) == []


def test_an_end_whose_history_cannot_be_stored_has_cost_nothing_yet(store: Store) -> None:
    store.accept([entry()])
    broken = change("q", messages=[{"role": "assistant", "content": object()}])
    with pytest.raises((StoreError, TypeError)):
        store.finish(key(), b"", now=NOW, history=broken, spent=Spent(first_level="alice", tokens_in=7))
    assert store.ledger(since_day=0) == []


def test_the_ledger_outlives_what_a_purge_forgets(store: Store) -> None:
    spend(store, "r")
    store.mark_delivered([key("r")])
    assert purge(store, now=NOW + 10 * DAY_S, ttl_s=1.0)["entries"] == 1
    assert [row.first_level for row in store.ledger(since_day=0)] == ["alice"]


def test_the_ledger_tells_of_days_up_to_one(store: Store) -> None:
    for day in range(4):
        spend(store, f"r{day}", at=NOW + day * DAY_S)
    assert [row.day for row in store.ledger(since_day=TODAY + 1, until_day=TODAY + 2)] == [TODAY + 2, TODAY + 1]
    assert [row.day for row in store.ledger(since_day=0, until_day=TODAY)] == [TODAY]


def purge_all(store: Store, *, now: float) -> None:
    while purge(store, now=now).get("more"):
        pass


def test_a_day_of_a_clock_that_was_ahead_keeps_no_place_in_the_ledger(store: Store) -> None:
    spend(store, "ahead", at=NOW + 10 * 365 * DAY_S)
    spend(store, "farther ahead", at=NOW + 20 * 365 * DAY_S)
    for day in range(LEDGER_DAYS):
        spend(store, f"r{day}", at=NOW + day * DAY_S)
    purge_all(store, now=NOW + (LEDGER_DAYS - 1) * DAY_S)
    assert [row.day for row in store.ledger(since_day=0)] == [TODAY + day for day in reversed(range(LEDGER_DAYS))]


def test_a_clock_that_is_behind_for_a_while_forgets_no_new_days_of_the_ledger(store: Store) -> None:
    """To such a clock most days are ahead."""
    for day in range(LEDGER_DAYS):
        spend(store, f"r{day}", at=NOW + day * DAY_S)
    behind = NOW - 3 * 365 * DAY_S
    spend(store, "behind", at=behind)
    purge_all(store, now=behind)
    spend(store, "right again", at=NOW + LEDGER_DAYS * DAY_S)
    purge_all(store, now=NOW + LEDGER_DAYS * DAY_S)
    kept = [row.day for row in store.ledger(since_day=0)]
    assert kept == [TODAY + day for day in range(LEDGER_DAYS, 0, -1)][: len(kept)]
    assert len(kept) >= LEDGER_DAYS - 1


def test_the_clock_of_a_day_ago_takes_the_last_day_for_no_day_ahead(store: Store) -> None:
    for day in range(LEDGER_DAYS):
        spend(store, f"r{day}", at=NOW + 2 * day * DAY_S)
    last = NOW + 2 * (LEDGER_DAYS - 1) * DAY_S
    spend(store, "set back", at=last - DAY_S)
    purge_all(store, now=last - DAY_S)
    assert [row.day for row in store.ledger(since_day=0)][:2] == [day_of(last), day_of(last) - 1]
    assert len(store.ledger(since_day=0)) == LEDGER_DAYS


def test_the_ledger_keeps_the_newest_days(tmp_path: Path) -> None:
    store = new_store("sqlite", tmp_path)
    store.open()
    for day in range(LEDGER_DAYS + 3):
        spend(store, f"r{day}", at=NOW + day * DAY_S)
    kept = [row.day for row in store.ledger(since_day=0)]
    store.close()
    assert kept == [TODAY + day for day in reversed(range(3, LEDGER_DAYS + 3))]


def test_first_levels_that_find_no_row_of_their_own_share_one(tmp_path: Path) -> None:
    store = new_store("memory", tmp_path)
    store.open()
    for number in range(LEDGER_LEVELS + 4):
        spend(store, f"r{number}", f"user{number}")
    spend(store, "known", "user0", tokens=9)
    rows = store.ledger(since_day=0)
    store.close()
    assert len(rows) == LEDGER_LEVELS + 1
    assert (rows[0].first_level, rows[0].tokens) == ("user0", 10)
    assert [(row.requests, row.tokens) for row in rows if row.first_level == REST] == [(4, 4)]
