"""States of prompts that a server has read, to go on from when a conversation comes back, edited or not."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from .cache import RecurrentCache

# The least distance of snapshots, in tokens. Of the text before an edit less than this is read again, or than
# two thirds of what had been read behind the edit, whichever is more.
SPACING = 64


class PromptCache(LRUPromptCache):
    """MLX-LM's prompt cache, for states instead of keys and values.

    A state belongs to exactly the tokens it has read, so it is of use only to a prompt that begins with all
    of them; but it holds snapshots (`RecurrentCache.remember`), and each belongs to a shorter beginning. What
    is handed out is the longest of all these that the prompt begins with.

    MLX-LM's own cache would trim a stored state and not look whether that worked, and hands out a state that
    has read the whole prompt, from which nothing can be generated. This one does neither, and what it evicts
    first is what has not been used for longest.
    """

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[RecurrentCache] | None, list[int]]:
        """The state that has read most of `tokens`, but not all, and the tokens that it has not read.

        Args:
            model: the key of the model.
            tokens: a whole prompt.
        """
        best: tuple[int, list[int]] = (0, [])
        usable = tokens[:-1]
        for key in self._keys(model):
            common = _common_prefix(key, usable)
            if common > best[0]:
                position = common if common == len(key) else self._snapshot(model, key, common)
                best = max(best, (position, key))
        position, key = best
        if position == 0:
            return None, tokens
        entry = self._trie.get(model, key)
        self._lru.remove(model, key)
        self._lru.push(model, key, entry.cache_type)
        return [layer.at(position) for layer in entry.prompt_cache], tokens[position:]

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[RecurrentCache],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Store a state for the tokens that it has read.

        Where it has read fewer than `tokens`, as after a draft, or some layers more, it is stored for the
        beginning that all have read; if that cannot be had, not at all.
        """
        read = min(len(tokens), *(layer.offset for layer in prompt_cache))
        if read == 0 or any(read not in layer.positions() for layer in prompt_cache):
            return
        stored, tokens = [layer.at(read) for layer in prompt_cache], tokens[:read]
        mx.async_eval([array for layer in stored for array in layer.cache if array is not None])
        super().insert_cache(model, tokens, stored, cache_type=cache_type)

    def _keys(self, model: Any) -> list[list[int]]:
        return [key for order in self._lru._lrus.values() for owner, key in order if owner == model]

    def _snapshot(self, model: Any, key: list[int], limit: int) -> int:
        """The longest beginning of `key`, of `limit` tokens at most, that its entry has a state for."""
        positions = self._trie.get(model, key).prompt_cache[0].positions()
        return max(position for position in positions if position <= limit)


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
