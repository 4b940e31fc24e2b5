"""The recurrent state as MLX-LM's generators want it: fixed size, batched, saved like a KV cache."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache


class RecurrentCache(mlx_lm_cache.ArraysCache):
    """One layer's memory of B sequences: two arrays whose size never changes, and how far each row has read.

    `cache[0]` is the recurrent state (B, slots, D), float32; `cache[1]` the convolution's last inputs
    (B, conv_kernel - 1, D), or None where the layer has no convolution. Both are None before the first token.

    The rows' offsets, and the padding of the piece that comes next, are Python integers: learned positions
    and the end of a row's room are known without asking the device.

    Like every recurrent cache of MLX-LM it is not trimmable: a state cannot forget.
    """

    def __init__(self, batch_size: int = 1, left_padding: Sequence[int] | None = None) -> None:
        super().__init__(size=2)
        self.row_padding: list[int] | None = list(left_padding) if left_padding else None
        self.row_lengths: list[int] | None = None
        self.offsets = [0] * (len(left_padding) if left_padding else batch_size)

    @property
    def batch_size(self) -> int:
        return len(self.offsets)

    @property
    def offset(self) -> int:
        """Tokens read so far, by the row that has read most."""
        return max(self.offsets)

    def size(self) -> int:
        return self.offset

    def open(self, batch_size: int) -> None:
        """Make an empty cache one of `batch_size` rows; MLX-LM does not say how many when it makes one."""
        if self.empty() and len(self.offsets) == 1:
            self.offsets *= batch_size

    def spans(self, n: int) -> list[tuple[int, int]] | None:
        """Where the real tokens of the next n stand, (begin, end) a row; None if all are real."""
        if self.finalized:
            return None
        begins = [min(max(p, 0), n) for p in self.row_padding or [0] * self.batch_size]
        ends = [min(max(e, 0), n) for e in self.row_lengths or [n] * self.batch_size]
        if all(b == 0 for b in begins) and all(e == n for e in ends):
            return None
        return [(b, max(b, e)) for b, e in zip(begins, ends, strict=True)]

    def make_mask(self, N: int) -> mx.array | None:
        """(B, N), True at real tokens; None if all are."""
        spans = self.spans(N)
        if spans is None:
            return None
        begin, end = (mx.array(side)[:, None] for side in zip(*spans, strict=True))
        steps = mx.arange(N)
        return (steps >= begin) & (steps < end)

    def advance(self, N: int) -> None:
        """Count N more positions, padding excepted."""
        spans = self.spans(N) or [(0, N)] * self.batch_size
        self.offsets = [o + end - begin for o, (begin, end) in zip(self.offsets, spans, strict=True)]
        if self.row_padding is not None:
            self.row_padding = [p - N for p in self.row_padding]
        if self.row_lengths is not None:
            self.row_lengths = [length - N for length in self.row_lengths]

    def prepare(self, lengths: Any = None, **padding: Any) -> None:
        """Announce padding in the tokens to come.

        Args:
            lengths: each row's real tokens, the rest of the row being padding on its right.
            padding: `left_padding`, each row's padding on its left; `right_padding`, which MLX-LM gives
                beside `lengths` and which follows from it.

        Raises:
            ValueError: `right_padding` without `lengths`.
        """
        if lengths is None and padding.get("right_padding") is not None:
            raise ValueError("right_padding needs lengths")
        if lengths is not None:
            self.row_lengths = [int(length) for length in lengths]
        if padding.get("left_padding") is not None:
            self.row_padding = [int(n) for n in padding["left_padding"]]

    @property
    def finalized(self) -> bool:
        """False while padding is announced for tokens that have not come."""
        return self.row_padding is None and self.row_lengths is None

    def finalize(self) -> None:
        self.row_padding = self.row_lengths = None

    @property
    def state(self) -> tuple[Any, ...]:
        return self.cache, self.offsets, self.row_padding, self.row_lengths

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        cache, offsets, self.row_padding, self.row_lengths = value
        self.cache, self.offsets = list(cache), list(offsets)

    def filter(self, batch_indices: Sequence[int]) -> None:
        rows = [int(index) for index in batch_indices]
        index = mx.array(rows, dtype=mx.int32)
        self.cache = [None if c is None else c[index] for c in self.cache]
        self.offsets = [self.offsets[r] for r in rows]
        if self.row_padding is not None:
            self.row_padding = [self.row_padding[r] for r in rows]
        if self.row_lengths is not None:
            self.row_lengths = [self.row_lengths[r] for r in rows]

    def extend(self, other: "RecurrentCache") -> None:
        if not (self.finalized and other.finalized):
            raise ValueError("rows can only join between pieces of a prompt, not while padding is pending")
        rows = self.batch_size, other.batch_size
        self.cache = [_concatenate(a, b, *rows) for a, b in zip(self.cache, other.cache, strict=True)]
        self.offsets = self.offsets + other.offsets

    def extract(self, idx: int) -> "RecurrentCache":
        row = RecurrentCache()
        row.cache = [None if c is None else c[idx : idx + 1] for c in self.cache]
        row.offsets = [self.offsets[idx]]
        return row

    @classmethod
    def merge(cls, caches: Sequence["RecurrentCache"]) -> "RecurrentCache":
        merged = caches[0].extract(0)
        for other in caches[1:]:
            merged.extend(other)
        return merged


def _concatenate(a: mx.array | None, b: mx.array | None, rows_a: int, rows_b: int) -> Any:
    """Rows of a, then of b; None stands for rows of zeros."""
    like = b if a is None else a
    if like is None:
        return None
    return mx.concatenate(
        [
            mx.zeros((rows, *like.shape[1:]), like.dtype) if part is None else part
            for part, rows in ((a, rows_a), (b, rows_b))
        ]
    )


vars(mlx_lm_cache)["RecurrentCache"] = RecurrentCache  # where mlx_lm's load_prompt_cache looks classes up
