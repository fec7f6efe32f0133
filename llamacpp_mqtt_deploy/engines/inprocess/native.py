"""The edge to llama.cpp in this process: the only file that touches llama-cpp-python, typed by hand.

It uses the package's bindings of llama.h and not its `Llama` class, which allocates a score for each token of the vocabulary
and each token of a batch, cuts token texts longer than 32 bytes wrongly, hides flash attention's `auto`, and cannot be stopped
inside a batch (0.3.36). Nothing here is thread-safe except `Model.tokenize`, `piece` and the other questions about the
vocabulary; nothing here locks.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from llamacpp_mqtt_deploy.core.shared_libraries import lacking_library

log = structlog.get_logger(__name__)

KV_TYPES: Mapping[str, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q5_1": 7, "q8_0": 8}  # enum ggml_type
_FLASH: Mapping[str, int] = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type
_ALL_LAYERS = 0x7FFFFFFF
_NEEDED = (
    "llama_model_load_from_file", "llama_init_from_model", "llama_memory_seq_rm", "llama_state_seq_get_data",
    "llama_sampler_init_penalties", "llama_set_abort_callback", "llama_model_is_recurrent", "llama_model_is_hybrid",
)  # fmt: skip
_UNKNOWN, _CONTROL = 1 << 0, 1 << 3  # enum llama_token_attr
_OFFLOADED = re.compile(rb"offloaded (\d+/\d+) layers to GPU")
_DECODED, _NO_ROOM, _ABORTED = 0, 1, 2  # llama_decode

ProgressCallback = Callable[[float], bool]
"""Hears how much is loaded, from 0 to 1; False gives the loading up."""


MISSING = (
    'llama-cpp-python is not installed: pip install "llamacpp-mqtt-deploy[inprocess]", or use another engine.kind.'
)


class NotInstalled(Exception):
    """llama-cpp-python is missing or too old; the text says what to install."""


class LoadFailed(Exception):
    """llama.cpp could not load the model or make a context; the text holds its own last words."""


class DecodeFailed(Exception):
    """llama.cpp failed in the middle of a computation."""


class Aborted(Exception):
    """A computation was stopped through its `AbortFlag`."""


class AbortFlag:
    """A byte that a computation looks at between two operations, and stops when it is set. Set it from any thread.

    llama.cpp calls a function for each of some hundred operations per token. A Python function would take the GIL each time,
    so the function is the C library's `strlen` and the flag a C string: empty goes on, one character stops. Only the CPU and
    Metal backends ask; on others a stop waits for the end of the batch.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)

    def set(self) -> None:
        self._text[0] = b"\x01"

    @property
    def address(self) -> int:
        return ctypes.addressof(self._text)


class Library:
    """The loaded bindings, with what llama.cpp says turned into our log. One for the whole process."""

    _lock = threading.Lock()
    _one: Library | None = None

    @classmethod
    def load(cls) -> Library:
        """Import llama-cpp-python. Raises NotInstalled."""
        with cls._lock:
            if cls._one is None:
                cls._one = cls()
            return cls._one

    def __init__(self) -> None:
        try:
            import llama_cpp  # noqa: PLC0415 - takes a second and may be absent
        except (ImportError, OSError, RuntimeError) as error:
            # A build for another processor, or a library that this machine lacks (libgomp, CUDA's).
            lacks = lacking_library(str(error))
            if isinstance(error, ImportError) and not lacks:
                raise NotInstalled(MISSING) from error
            raise NotInstalled(
                f"llama-cpp-python is installed and its library does not load: {f'{lacks}.' if lacks else error}"
            ) from error
        self.c: Any = llama_cpp.llama_cpp
        missing = [name for name in _NEEDED if not hasattr(self.c, name)]
        if missing:
            version = getattr(llama_cpp, "__version__", "?")
            raise NotInstalled(
                f"llama-cpp-python {version} is too old (no {missing[0]}): pip install -U llama-cpp-python"
            )
        self.said: deque[str] = deque(maxlen=40)
        """The last warnings and errors of llama.cpp."""
        self.gpu_layers: str | None = None
        """Layers of the model that was loaded last on the GPU, of all, as in `25/25`."""
        self._hear = self.c.llama_log_callback(self._heard)  # kept for ever: llama.cpp holds a pointer to it
        self.c.llama_log_set(self._hear, ctypes.c_void_p(0))
        self.c.llama_backend_init()
        self._strlen = ctypes.cast(ctypes.CDLL(None).strlen, self.c.ggml_abort_callback)

    def can_offload(self) -> bool:
        return bool(self.c.llama_supports_gpu_offload())

    def backend(self) -> str:
        """`cuda`, `metal`, `vulkan` and so on, or `cpu`."""
        described = self.c.llama_print_system_info().decode("utf-8", "replace").lower()
        for name in ("cuda", "rocm", "metal", "mtl", "vulkan", "sycl", "musa", "cann", "opencl"):
            if f"{name} :" in described and self.can_offload():
                return "metal" if name == "mtl" else name
        return "gpu" if self.can_offload() else "cpu"

    def watch(self, context: Any, flag: AbortFlag) -> None:
        """Let computations of this context look at this flag."""
        self.c.llama_set_abort_callback(context, self._strlen, ctypes.c_void_p(flag.address))

    def _heard(self, level: int, text: bytes, _: object) -> None:
        # Called from llama.cpp's threads: it must be short and must not raise.
        try:
            if level == 2 and (offloaded := _OFFLOADED.search(text)):
                self.gpu_layers = offloaded[1].decode()
            if level in (3, 4):  # warning, error (ggml_log_level)
                line = text.decode("utf-8", "replace").strip()
                if line:
                    self.said.append(line)
                    log.debug("llama.said", text=line)
        except Exception:  # noqa: BLE001, S110 - an exception would be printed inside of C code, and nothing can be done
            pass


class Model:
    """The weights and the vocabulary."""

    def __init__(
        self,
        library: Library,
        path: str,
        *,
        gpu_layers: int,
        main_gpu: int,
        tensor_split: Sequence[float],
        progress: ProgressCallback,
    ) -> None:
        c = self._c = library.c
        self.library = library
        params = c.llama_model_default_params()
        params.n_gpu_layers = _ALL_LAYERS if gpu_layers < 0 else gpu_layers
        params.main_gpu = main_gpu
        if tensor_split:
            shares = (ctypes.c_float * max(int(c.llama_max_devices()), len(tensor_split)))(*tensor_split)
            params.tensor_split = shares
        params.progress_callback = heard = c.llama_progress_callback(lambda done, _: progress(done))
        library.said.clear()
        library.gpu_layers = None
        handle = c.llama_model_load_from_file(path.encode(), params)
        del heard  # alive until the loading has ended
        if not handle:
            raise LoadFailed(_last_words(library.said))
        self.handle = handle
        self._vocab = c.llama_model_get_vocab(handle)
        self.n_vocab = int(c.llama_vocab_n_tokens(self._vocab))
        self.n_ctx_train = int(c.llama_model_n_ctx_train(handle))
        self.size_bytes = int(c.llama_model_size(handle))
        self.adds_bos = bool(c.llama_vocab_get_add_bos(self._vocab))
        self.adds_eos = bool(c.llama_vocab_get_add_eos(self._vocab))
        self.has_encoder = bool(c.llama_model_has_encoder(handle))
        self.keeps_whole_states = bool(c.llama_model_is_recurrent(handle) or c.llama_model_is_hybrid(handle))
        """Parts of a state cannot be removed: a saved one serves only prompts that begin with all of it."""
        self._ends = [bool(c.llama_vocab_is_eog(self._vocab, token)) for token in range(self.n_vocab)]
        self.control_texts = frozenset(
            self._text(token)
            for token in range(self.n_vocab)
            if c.llama_vocab_get_attr(self._vocab, token) & (_UNKNOWN | _CONTROL)
        )
        """What `tokenize` takes for one token and not for text, for whoever must keep it out of a prompt."""
        self._pieces: dict[int, bytes] = {}
        self._shown: set[int] = set()

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one token in a KV cache of 16 bit; a guess for models whose layers differ."""
        heads, kv_heads = self._c.llama_model_n_head(self.handle), self._c.llama_model_n_head_kv(self.handle)
        width = self._c.llama_model_n_embd(self.handle) * max(kv_heads, 1) // max(heads, 1)
        return int(self._c.llama_model_n_layer(self.handle) * width * 2 * 2)

    def metadata(self, key: str) -> str | None:
        size = self._c.llama_model_meta_val_str(self.handle, key.encode(), ctypes.create_string_buffer(1), 1)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self._c.llama_model_meta_val_str(self.handle, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def token_text(self, which: str) -> str:
        """The text of `bos` or `eos`; empty when the vocabulary has none."""
        token = int(getattr(self._c, f"llama_vocab_{which}")(self._vocab))
        return self._text(token) if token >= 0 else ""

    def _text(self, token: int) -> str:
        text: bytes = self._c.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """The tokens of a rendered prompt, marks of the template included."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self._c.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, True)
        if count < 0:
            tokens = (ctypes.c_int32 * -count)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), tokens, -count, add_special, True)
        if count < 0:
            raise DecodeFailed("The prompt cannot be tokenized.")
        return list(tokens[:count])

    def show(self, marks: Sequence[str]) -> None:
        """From now on give the text of these control tokens too; by themselves they are silent."""
        for mark in marks:
            tokens = self.tokenize(mark, add_special=False)
            if len(tokens) == 1:
                self._shown.add(tokens[0])
        self._pieces.clear()

    def single_token(self, text: str) -> int | None:
        tokens = self.tokenize(text, add_special=False)
        return tokens[0] if len(tokens) == 1 else None

    def piece(self, token: int) -> bytes:
        """The bytes that a generated token adds to the text."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._piece(token, token in self._shown)
        return piece

    def _piece(self, token: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        size = self._c.llama_token_to_piece(self._vocab, token, buffer, 64, 0, special)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = self._c.llama_token_to_piece(self._vocab, token, buffer, -size, 0, special)
        return buffer.raw[: max(size, 0)]

    def is_end(self, token: int) -> bool:
        """The model ends its turn with this token."""
        return self._ends[token]

    def grammar_sampler(self, grammar: str) -> Any:
        """A sampler that holds to the grammar, or None when llama.cpp cannot parse it. Freed with `llama_sampler_free`."""
        # A NULL in a chain is a segmentation fault, so it is looked at before anything else gets it.
        return self._c.llama_sampler_init_grammar(self._vocab, grammar.encode(), b"root") or None

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle:
            self._c.llama_model_free(handle)


class Context:
    """The memory of one sequence and the computation on it. `tokens` is what the memory holds."""

    def __init__(
        self, model: Model, *, n_ctx: int, batch_tokens: int, threads: int, flash_attention: str, kv_type: str
    ) -> None:
        c = self._c = model.library.c
        self.model = model
        params = c.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(batch_tokens, n_ctx)
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        params.type_k = params.type_v = KV_TYPES[kv_type]
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = _FLASH[flash_attention]
        else:
            params.flash_attn = flash_attention == "on"
        model.library.said.clear()
        handle = c.llama_init_from_model(model.handle, params)
        if not handle:
            raise LoadFailed(_last_words(model.library.said))
        self.handle = handle
        self._memory = c.llama_get_memory(handle)
        self.n_ctx = int(c.llama_n_ctx(handle))
        self.batch_tokens = int(c.llama_n_batch(handle))
        self.tokens: list[int] = []
        self._room = (ctypes.c_int32 * self.batch_tokens)()

    def watch(self, flag: AbortFlag) -> None:
        self.model.library.watch(self.handle, flag)

    def decode(self, tokens: list[int]) -> None:
        """Compute at most `batch_tokens` further tokens. Raises Aborted and DecodeFailed; the memory is then as before."""
        count = len(tokens)
        self._room[:count] = tokens  # type: ignore[assignment]
        result = self._c.llama_decode(self.handle, self._c.llama_batch_get_one(self._room, count))
        if result == _DECODED:
            self.tokens += tokens
            return
        self.truncate(len(self.tokens))
        if result == _ABORTED:
            raise Aborted
        if result == _NO_ROOM:
            raise DecodeFailed("The engine's context has no room left.")
        raise DecodeFailed(f"The engine failed while computing (llama_decode gave {result}).")

    def truncate(self, count: int) -> int:
        """Forget all but the first `count` tokens; where only the whole can be forgotten, that. Returns how many are left."""
        if count > 0 and self._c.llama_memory_seq_rm(self._memory, 0, count, -1):
            del self.tokens[count:]
        else:
            self._c.llama_memory_clear(self._memory, True)
            self.tokens = []
        return len(self.tokens)

    def state_bytes(self) -> int:
        """The size that `save` would need."""
        return int(self._c.llama_state_seq_get_size(self.handle, 0))

    def save(self) -> Any | None:
        """The state of the sequence as a C array of bytes; None when llama.cpp cannot give it."""
        size = self.state_bytes()
        if size <= 0:
            return None
        try:
            data = (ctypes.c_uint8 * size)()
        except MemoryError:
            return None
        return data if self._c.llama_state_seq_get_data(self.handle, data, size, 0) > 0 else None

    def restore(self, data: Any, tokens: Sequence[int]) -> bool:
        """Take a saved state instead of the present one; False when it did not fit, the memory is then empty."""
        self.truncate(0)
        if self._c.llama_state_seq_set_data(self.handle, data, len(data), 0) == 0:
            self.truncate(0)
            return False
        self.tokens = list(tokens)
        return True

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle:
            self._c.llama_free(handle)


def _last_words(said: Sequence[str]) -> str:
    """What llama.cpp said of a failure: the most telling line, which is seldom the last."""
    lines = [line for line in said if "error" in line.lower() or "fail" in line.lower() or "unknown" in line.lower()]
    return (lines or list(said) or ["no reason given"])[0][:300]
