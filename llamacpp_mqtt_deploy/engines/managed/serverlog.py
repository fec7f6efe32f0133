"""What a llama.cpp server writes: into our log at its level, without prompts, within bounds; the end of it for error texts."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

KEPT_LINES = 50
TOLD_LINES = 3
MAX_LINE_CHARS = 500
MAX_LINE_BYTES = 4 * MAX_LINE_CHARS
LINES_PER_S = 20.0
BURST_LINES = 200.0
"""A server that complains about each token must not fill the disk; a load prints some hundred lines at most."""

_PREFIXED = re.compile(r"^(?:[\d.]+ )?([DIWEV]) (.*)$")  # "0.00.013.988 I srv    load_model: loading model"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]+")
_COLOUR = re.compile("\x1b\\[[0-9;]*m")
# What the server repeats of a request or of an answer comes after these; the text before them says enough.
_QUOTES = re.compile(
    r"(?i)(got exception|failed to parse|parse error|unexpected end of input|prompt:|parsed message|invalid input|"
    r"while parsing|request body|content:|messages:)"
)
# A line without prefix may be the rest of a message that quotes a request. These are the last words of a process.
_LAST_WORDS = re.compile(
    r"^(/\S+: )?(ggml|GGML|CUDA|cuda|ROCm|HIP|vk::|Vulkan|terminate called|  what\(\)|libc\+\+abi|free\(\)|malloc|double free|"
    r"corrupted|Aborted|Segmentation|Bus error|Illegal instruction|Fatal Python error|\[New LWP|error while loading)|"
    r"^\S+: error while loading shared libraries|GGML_ASSERT|out of memory"
)
_STAGES = (
    ("loading model", "opens the model file"),
    ("load_tensors", "reads the weights"),
    ("llama_kv_cache", "makes room for the context"),
    ("warming up", "warms up"),
)
_DEVICE = re.compile(r"using device (CUDA|ROCm|HIP|Vulkan|Metal|MTL|SYCL|CANN|MUSA|OpenCL)", re.IGNORECASE)
_OFFLOADED = re.compile(r"offloaded (\d+/\d+) layers to GPU")
_BACKENDS = {"mtl": "metal", "hip": "rocm"}


class ServerLog:
    """Takes the bytes of one server process as they come. Not for several threads, but `last` may be read by any."""

    def __init__(self, *, now: float, serving: Callable[[], bool]) -> None:
        self._serving = serving
        self._rest = b""
        self._skipping = False
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._budget = BURST_LINES
        self._filled_at = now
        self._dropped = 0
        self.stage = ""
        """What the server does while it loads, in words; empty before the first sign."""
        self.backend = "cpu"
        self.gpu_layers: str | None = None
        """Layers on the GPU of all, as in `25/25`."""

    def feed(self, data: bytes, now: float) -> None:
        """Some bytes; an empty one says that there are no more."""
        if not data:
            data = b"\n"
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if not self._skipping:
                self._take(line[:MAX_LINE_BYTES], now)
            self._skipping = False
        if len(self._rest) > MAX_LINE_BYTES:
            if not self._skipping:
                self._take(self._rest[:MAX_LINE_BYTES], now)
            self._skipping = True
            self._rest = b""

    def last(self, *, from_cause: bool = False) -> str:
        """The last complaints, or the last lines when there was no complaint, as one text. `from_cause`: the first two
        complaints and the last, for a load that failed: there llama.cpp tells the cause first, then who gave up for it."""
        kept = [line.partition("\t") for line in tuple(self._kept)]
        complaints = list(dict.fromkeys(text for level, _, text in kept if level == "error"))
        if from_cause and len(complaints) > TOLD_LINES:
            return " | ".join((*complaints[: TOLD_LINES - 1], "[...]", complaints[-1]))
        return " | ".join((complaints or [text for _, _, text in kept])[-TOLD_LINES:])

    def _take(self, raw: bytes, now: float) -> None:
        text = _COLOUR.sub("", raw.decode("utf-8", "replace"))
        text = _CONTROL.sub(" ", text).rstrip()
        if not text.strip(". "):
            return
        found = _PREFIXED.match(text)
        if found:
            level = {"W": "warning", "E": "error"}.get(found[1], "debug")
            text = found[2]
            quote = _QUOTES.search(text)
            if quote:
                text = f"{text[: quote.end()]} [...]"
        elif _LAST_WORDS.search(text):
            level = "error"
        elif self._serving():
            return
        else:
            level = "debug"
        text = re.sub(r" {2,}", " ", text)[:MAX_LINE_CHARS]
        self._learn(text)
        self._kept.append(f"{level}\t{text}")
        self._pass_on(level, text, now)

    def _learn(self, text: str) -> None:
        device = _DEVICE.search(text)
        if device:
            name = device[1].lower()
            self.backend = _BACKENDS.get(name, name)
        offloaded = _OFFLOADED.search(text)
        if offloaded:
            self.gpu_layers = offloaded[1]
        for sign, stage in _STAGES:
            if sign in text:
                self.stage = stage

    def _pass_on(self, level: str, text: str, now: float) -> None:
        self._budget = min(BURST_LINES, self._budget + (now - self._filled_at) * LINES_PER_S)
        self._filled_at = now
        if self._budget < 1:
            self._dropped += 1
            return
        self._budget -= 1
        if self._dropped:
            log.warning("llama_server.lines_dropped", lines=self._dropped)
            self._dropped = 0
        # Its "info" is several lines for each request: our log has one of its own for that.
        match level:
            case "error":
                log.error("llama_server.said", line=text)
            case "warning":
                log.warning("llama_server.said", line=text)
            case _:
                log.debug("llama_server.said", line=text)
