"""An outbox holds so many messages and bytes; answers to what was not accepted get a third of it."""

from __future__ import annotations

from llamacpp_mqtt_deploy.core.outbox_budget import MIB, OutboxBudget


def test_the_last_place_for_an_answer_is_named_and_given() -> None:
    budget = OutboxBudget(most_messages=6, most_bytes=600)
    assert budget.room_for_answers(10) == 2
    assert budget.take(10, answer=True)
    assert budget.room_for_answers(10) == 1
    assert budget.take(10, answer=True)
    assert budget.room_for_answers(10) == 0
    assert not budget.take(10, answer=True)
    assert budget.take(10)  # events have the rest
    budget.give_back(10, answer=True)
    assert budget.room_for_answers(10) == 1


def test_the_last_byte_is_room_for_one_answer_of_any_size() -> None:
    budget = OutboxBudget(most_messages=30, most_bytes=300)
    assert budget.room_for_answers(30) == 3
    assert budget.take(99, answer=True)
    assert budget.room_for_answers(500) == 1
    assert budget.take(1, answer=True)
    assert budget.room_for_answers(1) == 0


def test_events_fill_the_outbox_to_the_byte_and_an_empty_one_takes_any_size() -> None:
    budget = OutboxBudget(most_messages=3, most_bytes=100)
    assert budget.take(1000)
    assert not budget.take(1)
    budget.give_back(1000)
    assert (budget.take(60), budget.take(41), budget.take(40)) == (True, False, True)
    budget.give_back(60)
    budget.give_back(40)
    assert [budget.take(1) for _ in range(4)] == [True, True, True, False]
    budget.force(1)
    assert budget.messages_left() == -1


def test_events_leave_answers_no_room_in_a_full_outbox() -> None:
    budget = OutboxBudget(most_messages=3, most_bytes=100)
    assert budget.take(100)
    assert budget.room_for_answers(1) == 0


def test_answers_of_a_byte_find_as_many_places_as_there_are_bytes() -> None:
    budget = OutboxBudget(most_messages=300, most_bytes=30)
    assert [budget.room_for_answers(size) for size in (0, 1, 2, 10, 11)] == [10, 10, 5, 1, 1]
    assert (budget.messages_left(), budget.bytes_left()) == (300, 30)
    budget.force(4)
    assert (budget.messages_left(), budget.bytes_left()) == (299, 26)
    budget.give_back(4)
    assert (budget.messages_left(), budget.bytes_left()) == (300, 30)


def test_mebibytes_are_those_of_the_configuration() -> None:
    assert MIB == 1_048_576
