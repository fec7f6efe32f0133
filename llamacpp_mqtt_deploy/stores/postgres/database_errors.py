"""What went wrong with PostgreSQL: as a sentence for the operator, and whether it passes by itself."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg


@dataclass(frozen=True, slots=True)
class Cause:
    """Why the database does not do what it was asked."""

    advice: str
    """With a place for `where`."""
    passes: bool = False
    """By itself, sooner or later: who starts may wait for it. A person is needed for the others, or a statement was wrong."""


_REACH = "see whether PostgreSQL runs there and sessions.url is right"
_OUT_OF_REACH = Cause("{where} is out of reach: " + _REACH, passes=True)
_TLS = Cause("TLS with {where} failed: check sslmode in sessions.url and ssl in postgresql.conf")

_BY_STATE = {
    "08": _OUT_OF_REACH,
    "08P01": Cause("{where} does not understand this: is it PostgreSQL, or a proxy before it?"),
    "28P01": Cause("{where} refused the password: check the user in sessions.url and sessions.password_file"),
    "28": Cause("{where} does not let this user in: check sessions.url and the server's pg_hba.conf"),
    "3D000": Cause("{where} does not exist: create it (createdb), or correct sessions.url"),
    "42501": Cause("This user may not do this in {where}: make the user the owner of the schema (docs/fleet.md)"),
    "53100": Cause("The disk of {where} is full: free some space there"),
    "53300": Cause(
        "{where} has no connection left: raise its max_connections (four for each worker are enough)", passes=True
    ),
    "53": Cause("{where} lacks resources", passes=True),
    "57P03": Cause("{where} is starting or stopping: it takes connections when it has recovered", passes=True),
    "57P04": Cause("{where} was dropped: create it again (createdb), or correct sessions.url"),
    "57P": Cause(
        "{where} ended the connection: it was restarted, or an administrator or a time-out ended it", passes=True
    ),
    "57014": Cause(
        "{where} took too long for one statement: look for a lock or for an overloaded disk (pg_stat_activity)"
    ),
    "55P03": Cause("Another program holds a lock in {where}: find it in pg_stat_activity and end it", passes=True),
    "40": Cause("Transactions in {where} got into each other's way", passes=True),
    "25006": Cause("{where} is read-only: it is a standby, or its administrator made it so", passes=True),
    "25P03": Cause(
        "{where} ended a transaction in which this worker was silent for too long: the machine is overloaded or was asleep",
        passes=True,
    ),
    "42P01": Cause(
        "A table is missing in {where}: somebody dropped it; restore it from a back-up, or drop the schema to begin anew"
    ),
    "3F000": Cause("The schema is missing in {where}: somebody dropped it; restart the worker to begin anew"),
    "XX": Cause("{where} is damaged: look into the log of PostgreSQL"),
    "58": Cause("{where} cannot read or write its disk: look into the log of PostgreSQL"),
}
"""By SQLSTATE, or what it begins with."""

# A connection that does not come about has no SQLSTATE, only words: libpq's and psycopg's own, which are English, and those of the
# server, which may be in another language (see `Database.judged`).
_BY_WORDS = (
    ("password authentication failed", _BY_STATE["28P01"]),
    ("no password supplied", _BY_STATE["28P01"]),
    ("no pg_hba.conf entry", _BY_STATE["28"]),
    ("permission denied for", _BY_STATE["42501"]),
    (
        "Permission denied",
        Cause("{where} may not be used by this user: check the socket's permissions and sessions.url"),
    ),
    (
        "does not match host name",
        Cause(
            "{where}: its certificate is for another name: write the host in sessions.url as the certificate has it, or issue a new one"
        ),
    ),
    (
        "root certificate file",
        Cause(
            "The file that sslrootcert in sessions.url names is not there: put the certificate of the authority there"
        ),
    ),
    (
        "certificate verify failed",
        Cause(
            "{where}: its certificate does not verify: see whether it has expired, and whether sslrootcert in sessions.url issued it"
        ),
    ),
    (
        "certificate",
        Cause("{where} shows a certificate that does not verify: check sslmode and sslrootcert in sessions.url"),
    ),
    ("does not exist", Cause("{where} does not exist, or its user does not: check sessions.url")),
    ("too many clients", _BY_STATE["53300"]),
    ("too many connections", _BY_STATE["53300"]),
    ("connection slots", _BY_STATE["53300"]),
    ("starting up", _BY_STATE["57P03"]),
    ("shutting down", _BY_STATE["57P03"]),
    ("not yet accepting connections", _BY_STATE["57P03"]),
    ("not accepting connections", _BY_STATE["57P03"]),
    ("in recovery mode", _BY_STATE["57P03"]),
    ("server closed the connection", _OUT_OF_REACH),
    ("SSL connection has been closed", _OUT_OF_REACH),
    ("SSL SYSCALL", _OUT_OF_REACH),
    ("SSL", _TLS),
    ("session is read-only", _BY_STATE["25006"]),
    ("server is in hot standby", _BY_STATE["25006"]),
    (
        "no answer for",
        Cause("{where} does not answer: look at the network between, and at the load of the database", passes=True),
    ),
    (
        "timeout expired",
        Cause(
            "{where} does not answer: look at the network between, at firewalls, and at the load of the database",
            passes=True,
        ),
    ),
    ("failed to resolve host", Cause("The host of {where} is not known here: check sessions.url and DNS", passes=True)),
    ("Is the server running", _OUT_OF_REACH),
    ("the connection is lost", _OUT_OF_REACH),
    ("expected authentication request", Cause("{where} is no PostgreSQL: check host and port in sessions.url")),
    ('missing "="', Cause("sessions.url is no address of a database: postgresql://USER@HOST/DATABASE")),
)


def cause_of(error: psycopg.Error) -> Cause | None:
    """None where neither a SQLSTATE nor words that are known tell it."""
    state = error.sqlstate or ""
    if state:
        return _cause_of_state(state)
    words = " ".join(str(error).split())
    return next((cause for known, cause in _BY_WORDS if known in words), None)


def passes(state: str) -> bool:
    """Whether what this SQLSTATE stands for passes by itself."""
    cause = _cause_of_state(state)
    return cause is not None and cause.passes


def _cause_of_state(state: str) -> Cause | None:
    known = (_BY_STATE.get(state[:length]) for length in (5, 3, 2))
    return next((cause for cause in known if cause is not None), None)


def sentence(error: psycopg.Error, where: str) -> str:
    """What happened, where, what to do."""
    detail, state = " ".join(str(error).split()).rstrip("."), error.sqlstate or ""
    cause = cause_of(error)
    if cause is not None:
        advice = cause.advice
    else:
        advice = "PostgreSQL refused this in {where}" if state else _OUT_OF_REACH.advice
    return f"{advice.format(where=where)} ({detail}{'; ' + state if state else ''})."
