"""How a request's tokens are chosen: samplers, with a seed or without."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc, make_sampler


@lru_cache(maxsize=256)
def shared_sampler(
    temp: float, xtc_special_tokens: tuple[int, ...] = (), **settings: Any
) -> Callable[[mx.array], mx.array]:
    """MLX-LM's sampler; one object for equal settings, for rows that share one are sampled together."""
    return make_sampler(temp, xtc_special_tokens=list(xtc_special_tokens), **settings)


class SeededSampler:
    """A sampler whose choice depends on the seed, the position and the logits alone, not on other rows.

    Attributes:
        position: how many tokens it has chosen; set back where a row is read again.
    """

    def __init__(
        self,
        seed: int,
        *,
        temp: float,
        top_p: float,
        top_k: int,
        min_p: float,
        xtc_probability: float = 0.0,
        xtc_threshold: float = 0.1,
        xtc_special_tokens: tuple[int, ...] = (),
    ) -> None:
        self._seed, self._temp = seed, temp
        self._top_p, self._top_k, self._min_p = top_p, top_k, min_p
        self._xtc = xtc_probability, xtc_threshold, list(xtc_special_tokens)
        self.position = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Tokens (B,) for log probabilities (B, V)."""
        # Multiplied by an odd constant the positions of neighbouring seeds do not meet.
        key = mx.random.key((self._seed + self.position * 0x9E3779B97F4A7C15) % 2**64)
        self.position += 1
        gate, key = mx.random.split(key)
        if 0 < self._top_p < 1:
            logprobs = apply_top_p(logprobs, self._top_p)
        if self._min_p > 0:
            logprobs = apply_min_p(logprobs, self._min_p)
        probability, threshold, special = self._xtc
        if probability > 0 and cast(float, mx.random.uniform(key=gate).item()) < probability:
            logprobs = apply_xtc(logprobs, 1.0, threshold, special)
        if self._top_k > 0:
            logprobs = apply_top_k(logprobs, self._top_k)
        return mx.random.categorical(logprobs * (1 / self._temp), key=key)
