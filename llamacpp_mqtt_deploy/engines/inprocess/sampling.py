"""Chooses tokens as llama.cpp's server does: the same samplers in the same order with the same defaults."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llamacpp_mqtt_deploy.engines.inprocess.native import Context

# tools/server's defaults, which are not llama-cpp-python's.
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPEAT_PENALTY, PENALTY_LAST_N = 0.8, 40, 0.95, 0.05, 1.0, 64

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)], align=True)  # llama_token_data


class Sampler:
    """One generation's choice of tokens. With a grammar, a token that does not fit is drawn again among those that do."""

    def __init__(
        self,
        context: Context,
        sampling: Mapping[str, Any],
        *,
        bias: Mapping[int, float],
        grammar: str | None,
        prompt: Sequence[int],
    ) -> None:
        self._context = context
        self._c = c = context.model.library.c
        self._model = context.model
        self._grammar: Any = None
        params = c.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain: Any = c.llama_sampler_chain_init(params)
        try:
            self._build(sampling, bias)
            if _penalizes(sampling):
                for token in prompt[-PENALTY_LAST_N:]:
                    c.llama_sampler_accept(self._chain, token)
            if grammar is not None:
                self._grammar = self._model.grammar_sampler(grammar)
                if self._grammar is None:
                    raise ValueError("llama.cpp cannot parse the grammar")
                self._ids = np.arange(self._model.n_vocab, dtype=np.int32)
                self._candidates = np.zeros(self._model.n_vocab, _CANDIDATE)
                self._one = np.zeros(1, _CANDIDATE)
        except BaseException:
            self.close()
            raise

    def sample(self) -> int:
        """The next token by the last computed logits, without the grammar."""
        return int(self._c.llama_sampler_sample(self._chain, self._context.handle, -1))

    def sample_by_grammar(self, also: int | None = None) -> int | None:
        """The next token that fits the grammar, or `also`; None when nothing fits (the grammar is complete, or stuck)."""
        if self._grammar is None:
            return self.sample()
        token = self._choose(fitting=False)
        if token != also and not self._fits(token):
            token = self._choose(fitting=True)
            if not self._fits(token):
                return None
        self._c.llama_sampler_accept(self._chain, token)
        # Only what fits: a token that does not would end the process, llama.cpp throws through our frames.
        if token != also and not self._model.is_end(token):
            self._c.llama_sampler_accept(self._grammar, token)
        return token

    def accept(self, token: int) -> None:
        """Note a token that was not sampled, for the penalties."""
        self._c.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler:
                self._c.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def _build(self, sampling: Mapping[str, Any], bias: Mapping[int, float]) -> None:
        c = self._c

        def add(sampler: Any) -> None:
            if not sampler:
                raise MemoryError("llama.cpp could not make a sampler")
            c.llama_sampler_chain_add(self._chain, sampler)

        if bias:
            pairs = (c.llama_logit_bias * len(bias))(*((token, value) for token, value in bias.items()))
            add(c.llama_sampler_init_logit_bias(self._model.n_vocab, len(bias), pairs))
        if _penalizes(sampling):
            repeat = float(sampling.get("repeat_penalty") or REPEAT_PENALTY)
            frequency = float(sampling.get("frequency_penalty") or 0.0)
            presence = float(sampling.get("presence_penalty") or 0.0)
            add(self._penalties(repeat, frequency, presence))
        temperature = _or(sampling.get("temperature"), TEMPERATURE)
        if temperature <= 0:
            add(c.llama_sampler_init_greedy())
            return
        add(c.llama_sampler_init_top_k(int(_or(sampling.get("top_k"), TOP_K))))
        add(c.llama_sampler_init_top_p(_or(sampling.get("top_p"), TOP_P), 1))
        add(c.llama_sampler_init_min_p(_or(sampling.get("min_p"), MIN_P), 1))
        add(c.llama_sampler_init_temp(temperature))
        seed = sampling.get("seed")
        add(c.llama_sampler_init_dist(secrets.randbits(32) if seed is None or seed < 0 else int(seed) & 0xFFFFFFFF))

    def _penalties(self, repeat: float, frequency: float, presence: float) -> Any:
        init = self._c.llama_sampler_init_penalties
        values: tuple[Any, ...] = (PENALTY_LAST_N, repeat, frequency, presence)
        # Newer llama.cpp wants the size of the vocabulary first.
        return init(self._model.n_vocab, *values) if len(init.argtypes) == 5 else init(*values)

    def _choose(self, *, fitting: bool) -> int:
        c, candidates = self._c, self._candidates
        logits = c.llama_get_logits_ith(self._context.handle, -1)
        candidates["id"] = self._ids  # the samplers sort in place
        candidates["logit"] = np.ctypeslib.as_array(logits, shape=(self._model.n_vocab,))
        array = self._array(candidates)
        if fitting:
            c.llama_sampler_apply(self._grammar, ctypes.byref(array))
        c.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id) if array.selected >= 0 else int(array.data[0].id)

    def _fits(self, token: int) -> bool:
        self._one["id"], self._one["logit"] = token, 1.0
        array = self._array(self._one)
        self._c.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(array.data[0].logit == 1.0)

    def _array(self, candidates: Any) -> Any:
        c = self._c
        return c.llama_token_data_array(
            data=candidates.ctypes.data_as(c.llama_token_data_p), size=len(candidates), selected=-1, sorted=False
        )


def _penalizes(sampling: Mapping[str, Any]) -> bool:
    return (
        _or(sampling.get("repeat_penalty"), 1.0) != 1.0
        or _or(sampling.get("frequency_penalty"), 0.0) != 0.0
        or _or(sampling.get("presence_penalty"), 0.0) != 0.0
    )


def _or(value: Any, default: float) -> float:
    return default if value is None else float(value)
