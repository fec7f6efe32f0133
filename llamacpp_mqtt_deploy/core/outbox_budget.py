"""What an outbox may hold: so many messages and bytes in all, and of those a third for answers to what was not accepted."""

from __future__ import annotations

ANSWER_SHARE = 3
"""Refusals and acks get one part in so many: who brings them about must not take the place of accepted requests' events."""

MIB = 1024 * 1024


class _Tally:
    """Messages and bytes in a place of bounded size. Each number has one writer: who puts in, or who takes out."""

    __slots__ = ("_bytes_in", "_bytes_out", "_messages_in", "_messages_out", "_most_bytes", "_most_messages")

    def __init__(self, most_messages: int, most_bytes: int) -> None:
        self._most_messages = most_messages
        self._most_bytes = most_bytes
        self._messages_in = self._messages_out = 0
        self._bytes_in = self._bytes_out = 0

    def put(self, size: int) -> None:
        self._messages_in += 1
        self._bytes_in += size

    def remove(self, size: int) -> None:
        self._bytes_out += size
        self._messages_out += 1

    def bytes_held(self) -> int:
        return self._bytes_in - self._bytes_out

    def messages_left(self) -> int:
        return self._most_messages - (self._messages_in - self._messages_out)

    def bytes_left(self) -> int:
        return self._most_bytes - (self._bytes_in - self._bytes_out)


class OutboxBudget(_Tally):
    """Counts what waits and what is in flight.

    `take` and `force` are for whoever publishes, under a lock; `give_back` is for the one thread that sees messages done, and
    takes no lock: it runs for each acknowledgement.
    """

    __slots__ = ("_answers",)

    def __init__(self, *, most_messages: int, most_bytes: int) -> None:
        super().__init__(most_messages, most_bytes)
        self._answers = _Tally(most_messages // ANSWER_SHARE, most_bytes // ANSWER_SHARE)

    def take(self, size: int, *, answer: bool = False) -> bool:
        """Count a message in; False when there is no place for it. An empty outbox has a place for one of any size.

        For an answer the last byte that is left is enough: its size is not known when `room_for_answers` is asked.
        """
        if answer:
            if self.room_for_answers(size) < 1:
                return False
            self._answers.put(size)
        else:  # spelled out: it runs for each chunk of each stream
            held = self._messages_in - self._messages_out
            if held and (held >= self._most_messages or self._bytes_in - self._bytes_out + size > self._most_bytes):
                return False
        self._messages_in += 1
        self._bytes_in += size
        return True

    def force(self, size: int) -> None:
        """Count a message in whether or not there is a place for it: the last message of a connection."""
        self.put(size)

    def give_back(self, size: int, *, answer: bool = False) -> None:
        """One of these is done."""
        if answer:
            self._answers.remove(size)
        self._bytes_out += size
        self._messages_out += 1

    def room_for_answers(self, largest: int) -> int:
        """How many answers of up to this size find a place now: those that `take` is then sure to take."""
        answers = self._answers
        messages = min(self.messages_left(), answers.messages_left())
        spare = min(self.bytes_left(), answers.bytes_left())
        if messages < 1 or spare < 1:
            return 0
        return min(messages, max(1, spare // max(1, largest)))
