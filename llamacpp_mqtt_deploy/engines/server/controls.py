"""Learns the control strings of the model that a llama.cpp server has loaded, by asking how it tokenizes what looks like one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson
import structlog

from llamacpp_mqtt_deploy.core.control_tokens import (
    WELL_KNOWN,
    ControlStrings,
    special_looking,
    surely_special,
    texts_of,
)
from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.engines.server.describing import PromptMarks
from llamacpp_mqtt_deploy.stopping import StopSignal

log = structlog.get_logger(__name__)

ASKED_AT_ONCE = 256
"""Strings in one question; the answer names each of their tokens."""
PLAIN_KEPT = 4096
"""Strings remembered as no control strings; clients may write as many different ones as they like."""
MODELS_KEPT = 8

Ask = Callable[[str, bytes | None, StopSignal | None], tuple[int, dict[str, Any]]]


class LearnedControls:
    """What is known of each string that looked like a control string, from one load of a model to the next.

    Only strings that occur are asked for. A string is a control string when the tokenizer makes it one token in a prompt
    (`parse_special`) and several in plain text; or when models mark turns with it and the template or the vocabulary has it.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lock = threading.Lock()  # guards what follows; held for arithmetic only
        self._marks: PromptMarks | None = None
        self._models: OrderedDict[str | None, _Known] = OrderedDict()
        self._can_ask = True

    def described(self, marks: PromptMarks | None) -> None:
        """The server was asked what it is; everything is learnt anew when it has loaded another model."""
        with self._lock:
            self._can_ask = True
            if marks is None or self._marks is None or marks.load != self._marks.load:
                self._models.clear()
            self._marks = marks

    def of(self, call: EngineCall, model: str | None, stop: StopSignal) -> ControlStrings:
        """The control strings in this call. Asks the server about strings that it was never asked about."""
        text = texts_of(call)
        with self._lock:
            marks = self._marks
        named = frozenset[str]() if marks is None else marks.strings
        found = _special_in(text, named)
        if not found:
            return _NONE
        with self._lock:
            known = self._known(model)
        written = "" if marks is None else marks.templates
        controls = {string for string in found if string in named or (string in WELL_KNOWN and string in written)}
        unknown = sorted(found - controls - known.controls - known.plain)
        for start in range(0, len(unknown), ASKED_AT_ONCE):
            strings = unknown[start : start + ASKED_AT_ONCE]
            answer = self._learn(strings, model, stop) if self._can_ask else None
            if answer is not None:
                controls |= answer
                with self._lock:
                    known.remember(strings, answer)
            elif self._can_ask:
                controls.update(strings)  # better a blank too many in this request than a forged turn
        if unknown and not self._can_ask:
            controls |= unproven(call).strings
        controls |= found & known.controls
        return ControlStrings(controls) if controls else _NONE

    def _known(self, model: str | None) -> _Known:
        known = self._models.setdefault(model, _Known())
        self._models.move_to_end(model)
        while len(self._models) > MODELS_KEPT:
            self._models.popitem(last=False)
        return known

    def _learn(self, strings: Sequence[str], model: str | None, stop: StopSignal) -> set[str] | None:
        """Which of these are control strings; None when the server did not answer."""
        in_prompt = self._pieces(strings, model, stop, parse_special=True)
        if in_prompt is None:
            return None
        whole = in_prompt.intersection(strings)
        if not whole:
            return set()
        in_text = self._pieces(sorted(whole), model, stop, parse_special=False)
        if in_text is None:
            return None
        return {string for string in whole if string not in in_text or string in WELL_KNOWN}

    def _pieces(
        self, strings: Iterable[str], model: str | None, stop: StopSignal, *, parse_special: bool
    ) -> set[str] | None:
        """The texts of the tokens that these strings are made of."""
        asked = {
            "content": "\n".join(strings),
            "add_special": False,
            "parse_special": parse_special,
            "with_pieces": True,
            **({} if model is None else {"model": model}),  # for a server that has several
        }
        status, answer = self._ask("/tokenize", orjson.dumps(asked), stop)
        stop.raise_if_set()
        tokens = answer.get("tokens")
        if status == 200 and isinstance(tokens, list):
            pieces = {token.get("piece") for token in tokens if isinstance(token, dict)}
            return {piece for piece in pieces if isinstance(piece, str)}
        log.warning("engine.controls_not_learnt", status=status, problem="the server does not tokenize")
        if status in (404, 405, 501):
            with self._lock:
                self._can_ask = False  # until the next probe finds a server
        return None


_NONE = ControlStrings(())
_UNBRACKETED = frozenset(each for each in WELL_KNOWN if "<" not in each and "[" not in each)
"""Those that may stand in a text without either."""


def _special_in(text: str, named: frozenset[str]) -> set[str]:
    """What may be a control string: looks like one, is well known, or is `named` by the server."""
    if "<" in text or "[" in text:
        found = special_looking(text)
        found.update([string for string in WELL_KNOWN if string in text])
    else:  # as nearly every prompt
        found = {string for string in _UNBRACKETED if string in text}
    found.update([string for string in named if string in text])
    return found


class _Known:
    """What was learnt of one model."""

    def __init__(self) -> None:
        self.controls: frozenset[str] = frozenset()
        self.plain: frozenset[str] = frozenset()

    def remember(self, asked: Iterable[str], controls: set[str]) -> None:
        self.controls |= controls
        plain = frozenset(asked) - controls
        self.plain = plain if len(self.plain) + len(plain) > PLAIN_KEPT else self.plain | plain


def unproven(call: EngineCall) -> ControlStrings:
    """Where no tokenizer can be asked: what models in use mark turns with, and what nobody writes for anything else."""
    return ControlStrings(WELL_KNOWN | surely_special(texts_of(call)))
