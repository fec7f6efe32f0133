"""How lines reach the log: JSON for machines, columns for a terminal; never a secret, never a raw control character."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import lru_cache
from types import TracebackType
from typing import IO, Any, ClassVar

import orjson

from llamacpp_mqtt_deploy.config.settings import LoggingSettings
from llamacpp_mqtt_deploy.log_output import LogOutput, output_to

if "structlog" not in sys.modules and "rich" not in sys.modules:
    # structlog loads rich where it finds it, to draw tracebacks that we print plainly: 25 ms and 5 MB of a daemon that has
    # no terminal. A None makes this one import fail and is taken back at once.
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog
    finally:
        del sys.modules["rich"]
else:
    import structlog

Event = MutableMapping[str, Any]

LEVELS: dict[str, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_URGENT = frozenset({"warning", "error", "critical"})
_METHODS = LEVELS | {"warn": 30, "exception": 40, "err": 40, "fatal": 50, "msg": 20, "log": 20}
# sd-daemon(3): journald reads the priority of a line from its beginning.
_PRIORITIES: Mapping[str, str] = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>", "critical": "<2>"}

MASK = "********"
# `token`, not `tokens`: counts of tokens are what this log is about.
_SECRET_KEY = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|secret|api[_-]?key|token|authorization|credentials?)$", re.IGNORECASE
)
_WITHOUT_TEXT = (int, float, bool, type(None))
_BEARER = re.compile(r"(?i)\b(bearer\s+)[^\s\"'\\]+")
# What people typed and what the model answered. Private, and of any size.
CONTENT_KEYS = frozenset(
    {
        "prompt",
        "answer",
        "content",
        "messages",
        "system_prompt",
        "reasoning",
        "full_content",
        "partial_content",
        "payload",
    }
)
# C0 and C1 controls and DEL, the line and paragraph separators, and everything that turns or hides the writing direction:
# with them a prompt could draw a second log line, or run a terminal's escape sequence.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


KEPT_PROBLEMS = 50
"""Warnings and errors that an operator can ask a running worker for."""
_KEPT_OF_A_KIND = 10
"""Of one event: requests that fail by the hundred must not hide that the disk is full."""
_LONGEST_PROBLEM = 500
_NOT_TOLD = frozenset({"timestamp", "level", "event", "logger", "exception", "stack"}) | CONTENT_KEYS
"""Said elsewhere, or nothing for an operator, who reads no prompts on the bus either."""
_MAY_QUOTE = frozenset({"message", "cause"})
"""Of a request: an engine's words, which may repeat some of it, where content is logged."""
_NO_PROBLEM = frozenset({"admin.answered", "configuration.reloaded"})
"""Warnings only so that they are logged at that level too."""


class _State:
    """What a running process may change about its log, and what it remembers of it."""

    threshold = LEVELS["info"]
    hidden: tuple[str, ...] = ()
    with_content = False
    problems: ClassVar[deque[dict[str, str]]] = deque(maxlen=KEPT_PROBLEMS)
    lock = threading.Lock()


def setup(settings: LoggingSettings, *, stream: IO[str] | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Send all log lines of this process to `stream` (stderr when absent) in the form that the settings ask for.

    `auto` is columns on a terminal and JSON elsewhere. Lines that go to journald begin with their priority. May be called
    again; loggers that were used before keep their first output.
    """
    stream = sys.stderr if stream is None else stream
    terminal = _is_terminal(stream)
    as_json = settings.format == "json" or (settings.format == "auto" and not terminal)
    set_level(settings.level)
    _State.with_content = settings.log_content
    processors: list[Callable[[Any, str, Event], Any]] = [
        _name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    if not settings.log_content:
        processors.append(_drop_content)
    processors += [_mask, _remember]
    if as_json:
        processors.append(_to_json)
    else:
        colours = terminal and not environ.get("NO_COLOR")
        processors += [_printable, structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=28, sort_keys=False)]
    output = _Output(stream, processors, journal=_is_journal(stream, environ))
    structlog.configure(
        processors=processors,
        wrapper_class=_Logger,
        logger_factory=lambda *args: _Named(output, str(args[0]) if args else ""),
        cache_logger_on_first_use=True,
    )
    _take_in_the_standard_library()


def set_level(name: str) -> None:
    """Change the least important level that is logged, at once and for every logger. Raises ValueError for an unknown name."""
    if name not in LEVELS:
        raise ValueError(f"unknown log level {name!r}; expected one of {', '.join(LEVELS)}")
    _State.threshold = LEVELS[name]


def level() -> str:
    """The least important level that is logged now."""
    return next(name for name, number in LEVELS.items() if number == _State.threshold)


def hide(*secrets: str | None) -> None:
    """Replace these texts wherever they turn up in a log line, in case that something quotes them (an engine's error page).

    Texts under four characters are left alone: hiding them would shred every line.
    """
    new = [secret for secret in secrets if secret and len(secret) >= 4]
    escaped = [_escape_text(orjson.dumps(secret, default=str)[1:-1].decode()) for secret in new if secret.isprintable()]
    _State.hidden = tuple(dict.fromkeys([*_State.hidden, *new, *escaped]))


def without_secrets(text: str) -> str:
    """The text without what `hide` was told and without bearer tokens, as the log would show it: for what goes elsewhere."""
    return _without_secrets(_masked("", text))


def problems(most: int = KEPT_PROBLEMS) -> list[dict[str, str]]:
    """The last warnings and errors of this process, the newest last: `ts`, `level`, `event` and `text`, each one line."""
    with _State.lock:
        kept = list(_State.problems)[-most:] if most > 0 else []
    return [{name: _without_secrets(text) for name, text in problem.items()} for problem in kept]


def forget_problems() -> None:
    """Begin anew, as a process does."""
    with _State.lock:
        _State.problems.clear()


# --- from logger to stream ---------------------------------------------------------------------------------------------


class _Output:
    """The one way out of a finished line. A log that cannot be written is lost; it must not take a generation with it."""

    def __init__(
        self, stream: IO[str], processors: Sequence[Callable[[Any, str, Event], Any]], *, journal: bool
    ) -> None:
        self._processors = processors
        self._journal = journal
        self._output: LogOutput = output_to(stream, lost_line=self._lost_line)

    def write(self, level: str, text: str) -> None:
        self._output.write(self._formed(level, text), urgent=level in _URGENT)

    def _formed(self, level: str, text: str) -> str:
        text = _without_secrets(text)
        if not self._journal:
            return text
        priority = _PRIORITIES[level]
        return priority + text.replace("\n", f"\n{priority}")

    def _lost_line(self, lines: int) -> str:
        """What stands where lines are missing because nobody read the stream."""
        made: Any = {"event": "log.lost", "lines": lines}
        for processor in self._processors:
            made = processor(_Named(self, __name__), "warning", made)
        return self._formed("warning", made)


def _without_secrets(text: str) -> str:
    for secret in _State.hidden:
        if secret in text:
            text = text.replace(secret, MASK)
    return text


class _Named:
    """What structlog calls with the finished line; knows the module it was made for."""

    __slots__ = ("_output", "name")

    def __init__(self, output: _Output, name: str) -> None:
        self._output = output
        self.name = name.removeprefix("llamacpp_mqtt_deploy.")

    def debug(self, line: str) -> None:
        self._output.write("debug", line)

    def info(self, line: str) -> None:
        self._output.write("info", line)

    def warning(self, line: str) -> None:
        self._output.write("warning", line)

    def error(self, line: str) -> None:
        self._output.write("error", line)

    def critical(self, line: str) -> None:
        self._output.write("critical", line)


class _Logger(structlog.make_filtering_bound_logger(logging.DEBUG)):  # type: ignore[misc]
    """structlog's logger with a level that can change: structlog's own fixes it when a logger is first used."""

    def _proxy_to_logger(self, method_name: str, event: str | None = None, *args: Any, **fields: Any) -> Any:
        if _METHODS.get(method_name, 50) < _State.threshold:
            return None
        try:
            # As the inherited one does, without handing all fields on once more.
            (line,), _ = self._process_event(method_name, event, fields)
            return getattr(self._logger, method_name)(line)
        except Exception as error:  # noqa: BLE001 - a line that cannot be rendered must not end the thread that wrote it
            failed = orjson.dumps(
                {"level": "error", "event": "log.failed", "line": repr(event)[:100], "error": type(error).__name__}
            )
            self._logger.warning(failed.decode())
            return None


def _name(logger: Any, _: str, event: Event) -> Event:
    if logger.name:
        event["logger"] = logger.name
    return event


def _drop_content(_: Any, __: str, event: Event) -> Event:
    if CONTENT_KEYS.isdisjoint(event):
        return event
    for key in CONTENT_KEYS & event.keys():
        value = event[key]
        size = f"{len(value)} long, " if isinstance(value, str | bytes | list | tuple) else ""
        event[key] = f"({size}not logged)"
    return event


def _mask(_: Any, __: str, event: Event) -> Event:
    for key, value in event.items():
        kind = type(value)
        if value is not None and _names_a_secret(key):
            event[key] = MASK
        elif kind is str:
            if "earer" in value.lower():
                event[key] = _masked("", value)
        elif kind not in _WITHOUT_TEXT:
            event[key] = _masked("", value)
    return event


@lru_cache(maxsize=512)
def _names_a_secret(key: str) -> bool:
    """For the names of fields, which are few and stand in the code; what is nested in them may come from outside."""
    return _SECRET_KEY.search(key) is not None


def _masked(key: object, value: Any, depth: int = 0) -> Any:
    if isinstance(key, str) and value is not None and _SECRET_KEY.search(key):
        return MASK
    if isinstance(value, str):
        return _BEARER.sub(rf"\1{MASK}", value) if "earer" in value.lower() else value
    if depth >= 6:
        return value if isinstance(value, int | float | bool) else "(nested too deeply)"
    if isinstance(value, Mapping):
        return {k: _masked(k, v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_masked("", item, depth + 1) for item in value]
    return value


def _remember(_: Any, __: str, event: Event) -> Event:
    """Keep warnings and errors for whoever asks the worker for them."""
    if event.get("level") not in _URGENT:
        return event
    name = str(event.get("event", ""))[:100]
    if name in _NO_PROBLEM:
        return event
    not_told = _NOT_TOLD | _MAY_QUOTE if _State.with_content and name.startswith("request.") else _NOT_TOLD
    words = [f"{key}={_text(value)[:_LONGEST_PROBLEM]}" for key, value in event.items() if key not in not_told]
    if exception := str(event.get("exception") or "").strip():
        words.append(exception.rpartition("\n")[2])
    # Secrets are taken out before it is cut: of half a secret nobody would know that it is one.
    text = _without_secrets(_escape_text("  ".join(words)))
    problem = {
        "ts": str(event.get("timestamp", "")),
        "level": str(event.get("level")),
        "event": _escape_text(name),
        "text": text if len(text) <= _LONGEST_PROBLEM else f"{text[:_LONGEST_PROBLEM]}...",
    }
    with _State.lock:
        alike = [kept for kept in _State.problems if kept["event"] == problem["event"]]
        if len(alike) >= _KEPT_OF_A_KIND:
            _State.problems.remove(alike[0])
        _State.problems.append(problem)
    return event


def _to_json(_: Any, __: str, event: Event) -> str:
    ordered = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    ordered.update(event)
    try:
        line = orjson.dumps(ordered, default=_text, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # half a surrogate pair, an integer over 64 bits, a cycle
        texts = {str(k): v if isinstance(v, str) else repr(v)[:2000] for k, v in ordered.items()}
        line = orjson.dumps({_escape_text(k): _escape_text(v) for k, v in texts.items()}).decode()
    if line.isascii() and "\x7f" not in line:  # the only one of these in ASCII that JSON leaves as it is
        return line
    # Only strings can hold these, and inside a JSON string an escape means the same.
    return _UNSAFE.sub(_escape, line)


def _printable(_: Any, __: str, event: Event) -> Event:
    out: Event = {}
    for key, value in event.items():
        if key in ("exception", "stack"):
            # Lines of their own, each marked, so that no text of an exception can pass for a log line.
            lines = str(value).split("\n")
            out[key] = "\n".join(f"    | {_escape_text(line)}" for line in lines)
        elif value is None or isinstance(value, bool | int | float):
            out[_escape_text(str(key))] = value
        else:
            out[_escape_text(str(key))] = _escape_text(value if isinstance(value, str) else _text(value))
    return out


def _text(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return str(value)


def _escape_text(text: str) -> str:
    return _UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _is_journal(stream: IO[str], environ: Mapping[str, str]) -> bool:
    """systemd.exec(5), $JOURNAL_STREAM: device and inode of the stream, so that a redirected stderr is not mistaken."""
    try:
        device, inode = environ.get("JOURNAL_STREAM", "").split(":")
        found = os.fstat(stream.fileno())
        return (found.st_dev, found.st_ino) == (int(device), int(inode))
    except (OSError, ValueError, AttributeError):
        return False


# --- what is not ours --------------------------------------------------------------------------------------------------


class _Bridge(logging.Handler):
    """Lines that libraries write with the standard library's logging."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            name = record.levelname.lower()
            log = structlog.get_logger(record.name)
            method = getattr(log, name if name in LEVELS else "warning")
            method("library.logged", message=record.getMessage(), exc_info=record.exc_info or None)
        except Exception:  # noqa: BLE001 - as above: a log line is never worth a thread
            return


def _take_in_the_standard_library() -> None:
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Bridge)]:
        root.removeHandler(handler)
    root.addHandler(_Bridge(level=logging.WARNING))
    root.setLevel(logging.WARNING)  # urllib3 logs every request at debug, with its address
    logging.captureWarnings(capture=True)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    structlog.get_logger(__name__).critical("process.failed", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or issubclass(args.exc_type, SystemExit):
        return
    name = args.thread.name if args.thread else "unknown"
    structlog.get_logger(__name__).critical(
        "thread.died", thread=name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback)
    )


def use_host_logging() -> None:
    """Send our events to `logging` unless a log is set up already; structlog's default would print them on stdout, where a
    program that uses us as a library has its own output."""
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.processors.KeyValueRenderer(key_order=["event"])],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
