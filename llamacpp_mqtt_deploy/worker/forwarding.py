"""What an engine says in one generation, on its way to the events of the request."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llamacpp_mqtt_deploy.core.counts import checked_end
from llamacpp_mqtt_deploy.core.deltas import Delta, Finished, Opened, PromptProgress, Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.ports import Pending, StoreError
from llamacpp_mqtt_deploy.worker.jobs import Job

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.core.chunking import SentenceCutter

# Protocol, section 3: `progress` at most twice a second. The first one goes at once when there is work worth telling of.
_PROGRESS_EVERY_S = 0.5
_PROGRESS_WORTH_TOKENS = 256


# Engines make tokens of 4 bytes on average. One that says several times what it was asked for ignores `max_tokens`; where each
# delta is a token, that is seen from their number, and where it is not, from their length.
_LONG_TOKEN_BYTES = 16

_LONGEST_CHAR_BYTES = 4


class TooMuch(Exception):
    """The engine goes on beyond what the request or the worker allows."""


class Forwarder:
    """Takes the deltas of one generation: into the job's answer and, where it streams, to its responder.

    `feed` is what `Engine.pump` calls; it never waits. `mark` begins to tell the journal that the stream has begun, and gives
    None when that failed: no chunk goes out before it is over. `opened` is called when the engine has taken the request up,
    and tells whether to mark at once: where the prompt is short the journal is then faster than the first token. During a
    long prompt a request can still be started again, so it is marked when the prompt is done.
    """

    def __init__(
        self,
        *,
        job: Job,
        native: bool,
        worker_id: str,
        opened: Callable[[Job], bool],
        mark: Callable[[Job], Pending | None],
        max_answer_bytes: int,
        max_tokens: int | None,
    ) -> None:
        self._job = job
        self._live = native and not job.responder.silent
        self._worker_id = worker_id
        self._opened = opened
        self._mark = mark
        self._max_answer_bytes = max_answer_bytes
        self._max_tokens = sys.maxsize if max_tokens is None else max_tokens
        self._marking: Pending | None = None
        self._marked = False
        self._begun = False
        self._sentences = _sentence_cutter() if job.request.stream == "sentence" else None
        self._told_progress_at: float | None = None
        self._is_full = False  # the answer is as long as it may be, and the engine said more

    def feed(self, deltas: Sequence[Delta]) -> float:
        """Pass on what the engine said; gives the seconds for which more of it may collect."""
        job, now = self._job, time.monotonic()
        before = job.answer.pieces
        for delta in deltas:
            # A token's way is the first branch.
            if type(delta) is Text:
                text = delta.text
                if len(text) * _LONGEST_CHAR_BYTES > self._max_answer_bytes - job.answer.size:
                    text = self._shortened(text)
                if not self._begun:
                    self._begin()
                job.answer.add_text(text, now, delta.pieces)
                if self._live:
                    if self._sentences is None:
                        job.responder.text("content", text)
                    else:
                        self._tell_sentences(self._sentences.feed(text))
            elif type(delta) is Reasoning:
                text = delta.text
                if len(text) * _LONGEST_CHAR_BYTES > self._max_answer_bytes - job.answer.size:
                    text = self._shortened(text)
                if not self._begun:
                    self._begin()
                job.answer.add_reasoning(text, now, delta.pieces)
                if self._live:
                    self._end_sentence()
                    job.responder.text("reasoning", text)
            elif type(delta) is ToolCall:
                if not self._begun:
                    self._begin()
                event = job.answer.add_call(delta, now)
                if self._live:
                    self._end_sentence()
                    job.responder.tool_call(event)
            elif type(delta) is PromptProgress:
                self._progress(delta, now)
            elif type(delta) is Opened:
                job.answer.model = delta.model
                # A request that is started again opens again and is warned once.
                job.answer.warnings += tuple(each for each in delta.warnings if each not in job.answer.warnings)
                job.opened = True
                self._live = job.live = self._live and delta.streams
                if self._opened(job):
                    self._begin_marking()
                self._tell_start()
            if self._is_full:
                raise TooMuch
        answer = job.answer
        if answer.pieces > self._max_tokens and answer.size > self._max_tokens * _LONG_TOKEN_BYTES:
            raise TooMuch
        return job.responder.settle(pieces=answer.pieces - before) if self._live and self._begun else 0.0

    def finish(self, finished: Finished) -> None:
        """The engine is done: what still waits goes out, or it would pass for an answer to be paced."""
        if finished.finish_reason in ("stop", "tool_calls"):  # else a call may have been cut off before its arguments
            self._give_arguments()
        if self._live:
            self._end_sentence()
            self._job.responder.flush()
        self._job.answer.finished = checked_end(finished)

    def _shortened(self, text: str) -> str:
        """The text of a delta, or as much of it as the answer may still hold: one that is far too long must not go out whole."""
        said = text.encode("utf-8", "replace")
        left = max(0, self._max_answer_bytes - self._job.answer.size)
        if len(said) <= left:
            return text
        self._is_full = True
        return said[:left].decode("utf-8", "ignore")

    def _give_arguments(self) -> None:
        """A call without arguments has an empty object of them: what was told of each call joins to JSON."""
        answer, now = self._job.answer, time.monotonic()
        for index in answer.without_arguments():
            event = answer.add_call(ToolCall(index, None, None, "{}"), now)
            if self._live:
                self._end_sentence()
                self._job.responder.tool_call(event)

    def _begin(self) -> None:
        self._begun = True
        self._job.prompt_done = True
        if self._live:
            self._await_marking()

    def _begin_marking(self) -> None:
        if self._live and not self._marked:
            self._marked = True
            self._marking = self._mark(self._job)

    def _await_marking(self) -> None:
        """Before the first chunk: from here on the request is never started again, also after a crash."""
        self._begin_marking()
        responder = self._job.responder
        if self._marking is None:
            responder.withhold_text()
            return
        self._job.marking = self._marking
        responder.hold()

        def over(problem: StoreError | None) -> None:
            # In the store's thread, at once: the end of this request, should it follow closely, is stored after this.
            if problem is not None:
                responder.withhold_text()
            responder.release()

        self._marking.on_done(over)

    def _end_sentence(self) -> None:
        """Text goes out before what was generated after it, be its sentence whole or not."""
        if self._sentences is not None:
            self._tell_sentences(self._sentences.flush())

    def _tell_sentences(self, sentences: Iterable[str]) -> None:
        for sentence in sentences:
            self._job.responder.piece("content", sentence)

    def _progress(self, progress: PromptProgress, now: float) -> None:
        self._job.answer.progress = progress
        if progress.processed >= progress.total:
            self._begin_marking()
        told_at = self._told_progress_at
        worth = progress.total - progress.processed >= _PROGRESS_WORTH_TOKENS
        if worth if told_at is None else now - told_at >= _PROGRESS_EVERY_S:
            self._told_progress_at = now
            self._job.responder.progress(processed=progress.processed, total=progress.total, cached=progress.cached)

    def _tell_start(self) -> None:
        job = self._job
        fields: dict[str, Any] = {
            "model": job.answer.model or job.request.model or "",
            "worker": self._worker_id,
            "created": int(time.time()),
        }
        warnings = [*job.request.warnings, *job.answer.warnings]
        if warnings:
            fields["warnings"] = warnings
        if job.request.metadata is not None:
            fields["metadata"] = job.request.metadata
        job.responder.start(fields)


def _sentence_cutter() -> SentenceCutter:
    from llamacpp_mqtt_deploy.core.chunking import SentenceCutter  # noqa: PLC0415 - 1.5 MiB of regular expressions

    return SentenceCutter()
