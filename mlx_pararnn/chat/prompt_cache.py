"""States of prompts that a server has read, to go on from when a conversation comes back, edited or not."""

from collections import OrderedDict
from fractions import Fraction
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import LRUPromptCache

from ..cache import RecurrentCache, held_arrays

# The least distance of snapshots, in tokens. Of the text before an edit less than this is read again, or than
# two thirds of what had been read after the edit, whichever is more.
SPACING = 64


class PromptCache(LRUPromptCache):
    """MLX-LM's prompt cache, for states instead of keys and values.

    A state belongs to exactly the tokens it has read, so it is of use only to a prompt that begins with all
    of them; but it holds snapshots (`RecurrentCache.remember`), and each belongs to a shorter beginning. What
    is handed out is the longest of all these that the prompt begins with.

    MLX-LM's own cache would trim a stored state and not look whether that worked, and hands out a state that
    has read the whole prompt, from which nothing can be generated. It keeps texts as a tree of dictionaries,
    hundreds of bytes a token that it does not count; beside keys and values that is little, beside a state
    that does not grow it would be nearly everything. Here a token takes four bytes, which count. Evicted is
    what has not been used for longest.

    Attributes:
        share: the part of each state that this process has; bytes are those of whole states, so that
            processes which share a model keep and evict the same.
    """

    share = Fraction(1)

    def __init__(self, max_size: int = 10, max_bytes: int = 1 << 63) -> None:
        super().__init__(max_size, max_bytes)
        # By model and text, int32; what was used last stands last.
        self._states: OrderedDict[tuple[Any, bytes], list[RecurrentCache]] = OrderedDict()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        """Bytes of all states, snapshots and texts."""
        return self._nbytes

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[RecurrentCache] | None, list[int]]:
        """The state that has read most of `tokens`, but not all, and the tokens that it has not read.

        Args:
            model: the key of the model.
            tokens: a whole prompt.
        """
        position, best = 0, None
        usable = np.array(tokens[:-1], np.int32)
        for key, states in self._states.items():
            if key[0] != model:
                continue
            common = _common_prefix(np.frombuffer(key[1], np.int32), usable)
            there = max(p for p in states[0].positions() if p <= common)
            if there > position:
                position, best = there, key
        if best is None:
            return None, tokens
        self._states.move_to_end(best)
        return [layer.at(position) for layer in self._states[best]], tokens[position:]

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[RecurrentCache],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Store a state for the tokens that it has read; `cache_type` is not looked at.

        Where it has read fewer than `tokens`, as after a draft, or some layers more, it is stored for the
        beginning that all have read; if that cannot be had, not at all.
        """
        read = min(len(tokens), *(layer.offset for layer in prompt_cache))
        if read == 0 or any(read not in layer.positions() for layer in prompt_cache):
            return
        stored = [layer.at(read) for layer in prompt_cache]
        mx.async_eval(held_arrays(stored))
        key = model, np.array(tokens[:read], np.int32).tobytes()
        if key in self._states:
            self._drop(key)
        self._store(key, stored)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Evict until there are no more than so many texts, of no more than so many bytes together."""
        while self._states and (
            (n_sequences is not None and len(self) > n_sequences)
            or (n_bytes is not None and self.nbytes > n_bytes)
        ):
            self._drop(next(iter(self._states)))

    def open(self, model: Any) -> None:
        """For a cache that outlives the process: read what was saved for this model."""

    def save_some(self, busy: bool = False) -> bool:
        """For a cache that outlives the process: save one state; False where nothing was to save."""
        return False

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """What MLX-LM logs; here there is one type."""
        return {"all": {"n_sequences": len(self), "n_bytes": self.nbytes}}

    def _store(self, key: tuple[Any, bytes], states: list[RecurrentCache]) -> None:
        self._states[key] = states
        self._nbytes += self._size(key, states)
        self.trim_to(n_sequences=self.max_size, n_bytes=self.max_bytes)

    def _drop(self, key: tuple[Any, bytes]) -> None:
        self._nbytes -= self._size(key, self._states.pop(key))

    def _size(self, key: tuple[Any, bytes], states: list[RecurrentCache]) -> int:
        return len(key[1]) + int(sum(layer.nbytes for layer in states) / self.share)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
