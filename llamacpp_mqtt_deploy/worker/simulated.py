"""Simulated streaming: a finished answer is published piece by piece, without a slot and without a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llamacpp_mqtt_deploy.core.chunking import SentenceCutter, pieces
from llamacpp_mqtt_deploy.core.coalescer import TextKind
from llamacpp_mqtt_deploy.core.deltas import FinishReason
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.worker.accumulator import AnswerAccumulator
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.jobs import Job

# So much of an answer is cut into sentences in one turn of the loop.
_CUT_AT_ONCE_CHARS = 4096

# When the background has no place for an ending.
_ASK_AGAIN_S = 0.1


class SimulatedStream:
    """Publishes one piece each `interval_s` and then the terminal event; a stop signal ends it with what was told so far.

    A broker that acknowledges slowly gets fewer, larger pieces: what was due meanwhile goes out as one.
    """

    def __init__(
        self,
        *,
        job: Job,
        finish_reason: FinishReason,
        completion: Completion,
        loop: IoLoop,
        background: Background,
        chunk_chars: int,
        interval_s: float,
    ) -> None:
        self._job = job
        self._finish_reason = finish_reason
        self._completion = completion
        self._loop = loop
        self._background = background
        self._interval_s = interval_s
        self._pieces = _cut(job.answer, chunk_chars, by_sentence=job.request.stream == "sentence")
        self._due: list[tuple[TextKind, str]] = []

    def start(self) -> None:
        """Begin; the journal knows that the stream begins. The steps run in the loop, which never waits for the store."""
        self._job.stop.on_stop(lambda: self._end(lambda: self._completion.stopped(self._job)))
        self._loop.soon(self._step)

    def _end(self, ending: Callable[[], object]) -> None:
        if not self._background.run(("paced", self._job.key), ending):
            self._loop.after(_ASK_AGAIN_S, lambda: self._end(ending))

    def _step(self) -> None:
        job = self._job
        if job.stop.is_set() or job.phase == "ended":
            return
        piece = next(self._pieces, None)
        if piece is not None:
            self._due.append(piece)
        if self._due and (piece is None or job.responder.unacknowledged() == 0):
            self._publish()
        if piece is not None:
            self._loop.after(self._interval_s, self._step)
            return
        calls = job.answer.tool_calls()
        if calls:
            job.responder.tool_calls(
                [{"index": index, "id": call["id"], **call["function"]} for index, call in enumerate(calls)]
            )
        self._end(lambda: self._completion.done(job, self._finish_reason))

    def _publish(self) -> None:
        kind, text = self._due[0]
        for next_kind, next_text in self._due[1:]:
            if next_kind != kind:
                self._job.responder.piece(kind, text)
                kind, text = next_kind, next_text
            else:
                text += next_text
        self._job.responder.piece(kind, text)
        self._due.clear()


def _cut(answer: AnswerAccumulator, chunk_chars: int, *, by_sentence: bool) -> Iterator[tuple[TextKind, str]]:
    for piece in pieces(answer.thoughts(), chunk_chars):
        yield "reasoning", piece
    if by_sentence:
        cutter = SentenceCutter()
        # Not all at once: this runs in the loop.
        for part in pieces(answer.text(), _CUT_AT_ONCE_CHARS):
            for sentence in cutter.feed(part):
                yield "content", sentence
        for sentence in cutter.flush():
            yield "content", sentence
    else:
        for piece in pieces(answer.text(), chunk_chars):
            yield "content", piece
