"""What the writer of PostgreSQL is given to write: the steps of a transaction, and what becomes of their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.stores.group_commit import Write
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection


@dataclass(frozen=True, slots=True)
class Later:
    """What a step may return: its result comes once its statements were sent with those of others.

    `read` reads the answers. Where they were lost with the connection and the transaction turned out to be committed, `again` asks the
    database for the same result; it changes nothing that the step has done. Both may raise a StoreError where the statements, by
    what they say, changed nothing.
    """

    read: Callable[[], object]
    again: Callable[[BoundedConnection], object]


PgStep = Callable[[BoundedConnection], "object | Later"]
"""Runs again from the beginning when its transaction was undone, so it must change nothing but the database."""


class PgWrite(Write):
    """A change of the database that was begun. `serial`: it decides about the common queue, one worker after the other. `alone`: in
    a transaction of its own, since what it locks in a good order would not be in one after what others of the same have locked."""

    def __init__(self, step: PgStep, *, size: int, durable: bool, urgent: bool, serial: bool, alone: bool) -> None:
        super().__init__(lambda _: None, size=size, durable=durable, urgent=urgent)
        self.pg_step = step
        self.serial = serial
        self.alone = alone
        self.given_up = False
        """Whoever waited for it does so no more."""
        self._later: Later | None = None

    def wait(self, timeout_s: float) -> None:
        if not self._over.wait(timeout_s):
            self.given_up = True
            raise StoreError(
                f"The database has not taken a write for {timeout_s:g} s: look at its load and at its disk."
            )
        super().wait(timeout_s)

    def forget_result(self) -> None:
        """What it did is undone."""
        self.problem = self.result = self._later = None

    def run(self, db: BoundedConnection) -> None:
        self.result = self.pg_step(db)
        self._later = self.result if isinstance(self.result, Later) else None

    def read_result(self) -> None:
        """The answers are there."""
        if self._later is not None:
            self._settle_result(self._later.read)

    def ask_again(self, db: BoundedConnection) -> None:
        """It is committed, and the answers may be lost or of long ago."""
        later = self._later
        if later is not None and self.problem is None:
            self._settle_result(lambda: later.again(db))

    def _settle_result(self, ask: Callable[[], object]) -> None:
        try:
            self.result = ask()
        except StoreError as problem:
            self.problem = problem
